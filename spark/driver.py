"""The Spark driver: embeds the missing partitions of OUT on the executors and, with --index, merges OUT there.

reads    OUT/_clip_batch/plan.* and commits; on the executors the planned tars and the model's weights
writes   OUT/_clip_batch/submissions; on the executors everything that `clip-batch worker` and `merge` write
needs    a driver of one core and 1 GB; executors as in spark/spark-defaults.conf
exits    0 all committed (and merged); 1 some partitions failed, or the merge did; 2 an option is wrong
run      spark-submit spark/driver.py --output OUT [--index INDEX] [--tasks N]; see spark/submit.sh
"""

from clip_batch.cli.spark_driver import main

if __name__ == "__main__":
    raise SystemExit(main())
