"""Suffixes of the names of tars, in upper or lower case. What a file is, its first bytes say."""

from __future__ import annotations

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".tar.zst", ".tzst")
"""Suffixes of the files in a folder that are its tars; all but the first are of compressed ones."""


def is_tar(name: str) -> bool:
    """Whether a name is that of a tar.

    >>> is_tar("shards/00.TAR"), is_tar("00.Tar.GZ"), is_tar("00.gz")
    (True, True, False)
    """
    return name.lower().endswith(TAR_SUFFIXES)


def is_compressed(name: str) -> bool:
    """Whether a name is that of a compressed file; others may be compressed too."""
    return name.lower().endswith((*TAR_SUFFIXES[1:], "gz"))


def tar_stem(name: str) -> str:
    """The name without the suffix of a tar, which those of its side-cars begin with.

    >>> tar_stem("00.TAR.gz"), tar_stem("00.parquet")
    ('00', '00.parquet')
    """
    longest = max((suffix for suffix in TAR_SUFFIXES if name.lower().endswith(suffix)), key=len, default="")
    return name[: len(name) - len(longest)]
