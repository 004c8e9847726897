"""TODO."""

from __future__ import annotations

import os

TEMPORARY = ".tmp-"
"""Marks a file that is being written; nothing but `gc` looks at such names."""


REFUSING = ("s3", "s3a", "gs", "gcs", "hdfs", "viewfs")
"""Protocols whose `pipe_file(mode="create")` is one atomic request; an S3 server may ignore it all the same."""


def is_local(url: str) -> bool:
    """True for a plain path or a `file://` URL."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> str:
    """The path of a local URL."""
    return url[7:] if url.startswith("file://") else url


def absolute(url: str) -> str:
    """A local path made absolute, so that a plan means the same wherever it is read; URLs as is."""
    return os.path.abspath(os.path.expanduser(local_path(url))) if is_local(url) else url
