"""Serve indices over HTTP, with a web page.

reads    INDEX (memory-mapped), the planned tars (byte ranges of the images shown)
writes   nothing
needs    cores; memory for the encoder, and page cache for the index
exits    0 stopped by a signal; 2 an option, the index or the encoder is wrong
run      python jobs/serve.py --index INDEX [--port 1234]
"""

import sys

from clip_batch.cli import main

raise SystemExit(main(["serve", *sys.argv[1:]]))
