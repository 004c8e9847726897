"""The Spark driver: embed what OUT misses on the executors, then, with --index, merge it there.

reads    OUT/_clip_batch/plan.* and commits; on the executors the planned tars and the model's weights
writes   OUT/_clip_batch/submissions; on the executors all that `clip-batch worker` and `merge` write
needs    a driver of one core and 1 GB; executors as spark/spark-defaults.conf has them
exits    0 all committed (and merged); 1 some partitions failed, or the merge did; 2 an option is wrong
run      spark-submit spark/driver.py --output OUT [--index INDEX] [--tasks N]; see spark/submit.sh
"""

from clip_batch.cli.spark_driver import main

if __name__ == "__main__":
    raise SystemExit(main())
