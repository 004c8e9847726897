"""What `clip-batch submit spark` hands to spark-submit; see clip_batch.launch.spark.main."""

from clip_batch.launch.spark import main

if __name__ == "__main__":
    raise SystemExit(main())
