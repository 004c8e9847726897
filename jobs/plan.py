"""Freeze the plan: the shards, their partitions and the encoder.

reads    the listing of the input, a few side-cars, the model's weights (to hash them)
writes   OUT/_clip_batch/plan.json, plan.parquet, config.yaml
needs    one core, no GPU; 1 GB for a million tars
exits    0 planned (or unchanged); 2 OUT has another plan, or an option is wrong
run      python jobs/plan.py --input SPEC... --output OUT
"""

import sys

from clip_batch.cli import main

raise SystemExit(main(["plan", *sys.argv[1:]]))
