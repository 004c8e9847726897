"""The names of all files in DIR, the folder of an `end2end` run, relative to DIR. No other module spells one.

urls/<number>.parquet   the frozen list; urls.json, its description, is written after it
images/<shard>.tar      a shard that img2dataset downloaded, with <shard>.parquet and, last, <shard>_stats.json
embeddings/, index/     OUT and INDEX
run.json                written by `run`: its first SPEC, so that a run of another one takes another name
failures.parquet        each URL without a vector; summary.json, the counts, is written after it
"""

from __future__ import annotations

from clip_batch.plan.paths import IN_RUN

URLS = "urls"
URL_LIST = "urls.json"
IMAGES = "images"
OUTPUT = IN_RUN
INDEX = "index"
RUN = "run.json"
FAILURES = "failures.parquet"
SUMMARY = "summary.json"

STATS_SUFFIX = "_stats.json"


def urls(number: int) -> str:
    """Return the name of a file of the frozen list."""
    return f"{URLS}/{number:05d}.parquet"


def tar(shard: int) -> str:
    """Return the name of a shard's tar."""
    return f"{IMAGES}/{shard:05d}.tar"


def records(shard: int) -> str:
    """Return the name of the Parquet file in which img2dataset records each URL of a shard."""
    return f"{IMAGES}/{shard:05d}.parquet"


def stats(shard: int) -> str:
    """Return the name of the file that img2dataset writes last of a shard."""
    return f"{IMAGES}/{shard:05d}{STATS_SUFFIX}"
