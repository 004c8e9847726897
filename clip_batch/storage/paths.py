"""Local paths and URLs: which is which, and names with a meaning."""

from __future__ import annotations

import os

TEMPORARY = ".tmp-"
"""Part of the name of a file that is being written; only `gc` looks at such files."""

REFUSING = ("s3", "s3a", "gs", "gcs", "hdfs", "viewfs")
"""Protocols whose `pipe_file(mode="create")` refuses a name that is taken, in one atomic request.

Some S3 servers ignore the condition all the same.
"""


def is_local(url: str) -> bool:
    """Whether a URL is a plain path or begins with `file://`."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> str:
    """The path of a local URL."""
    return url[7:] if url.startswith("file://") else url


def split_url(url: str) -> tuple[str, str]:
    """The folder of a path or URL, and the name in it; the folder of "/x" is "/".

    >>> split_url("/x.txt"), split_url("s3://bucket/a/x.txt")
    (('/', 'x.txt'), ('s3://bucket/a', 'x.txt'))
    """
    folder, _, name = url.rpartition("/")
    return folder or "/", name


def absolute(url: str) -> str:
    """A local path made absolute, so that it means the same from any working directory; other URLs unchanged."""
    return os.path.abspath(os.path.expanduser(local_path(url))) if is_local(url) else url
