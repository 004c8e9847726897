"""Merge the committed parts into sharded indices with metadata in index order.

reads    OUT (every commit, embedding and metadata file)
writes   INDEX/<version>, and INDEX/CURRENT once that version is complete
needs    cores; memory for one index shard (`shard_rows`)
exits    0 merged (or it already was); 1 OUT is incomplete or corrupt; 2 an option is wrong
run      python jobs/merge.py --output OUT --index INDEX
"""

import sys

from clip_batch.cli import main

raise SystemExit(main(["merge", *sys.argv[1:]]))
