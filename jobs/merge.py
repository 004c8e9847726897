"""Merge the committed parts into sharded indices with metadata in index order, or run one task of that.

reads    OUT (every commit, embedding and metadata file)
writes   INDEX/<version>, and INDEX/CURRENT once that version is complete
needs    cores; memory for one index shard (`shard_rows`)
exits    0 merged (or it already was); 1 OUT, or another input of the task, is incomplete or corrupt; 2 an
         option is wrong, or the task `train` has not ended
run      python jobs/merge.py --output OUT --index INDEX
tasks    ... --task train; then ... --task shards --slot I --slots N, for each I below N, in any order or
         at the same time; then ... --task manifest. All tasks need the same options of the merge. Any
         task can be run again, also while it runs
"""

import sys

from clip_batch.cli import main

raise SystemExit(main(["merge", *sys.argv[1:]]))
