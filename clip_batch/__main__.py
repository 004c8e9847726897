"""`python -m clip_batch` is `clip-batch`."""

from clip_batch.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
