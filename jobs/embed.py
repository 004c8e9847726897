"""Embed one worker's share of the plan: a slot, or partitions by number.

reads    OUT/_clip_batch/plan.*, the planned tars
writes   OUT/img_emb, text_emb, metadata, _clip_batch/commits, _clip_batch/failures
needs    one GPU (or cores); memory for a few batches, whatever the size of the plan
exits    0 all committed; 1 some partitions failed; 2 options or encoder; 75 stopped by a signal, run again
run      python jobs/embed.py --output OUT --slot I --slots N
"""

import sys

from clip_batch.cli import main

raise SystemExit(main(["worker", *sys.argv[1:]]))
