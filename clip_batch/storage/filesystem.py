"""Remote filesystems: fsspec's, opened with their options, asked with patience, their errors told in one line.

Which ones refuse to create a name that is there, so that a commit can rest on it: `REFUSING`. On all
others the last to write wins, and each writer goes on believing that it won (see docs/storage.md).
"""

from __future__ import annotations

import errno
import importlib.util
from typing import Any, TypeVar

from clip_batch.config import extras
from clip_batch.errors import InputError
from clip_batch.storage.paths import REFUSING
from clip_batch.storage.retry import error_codes, message_of, redact

T = TypeVar("T")


_NAMES = ({"s3", "s3a"}, {"gs", "gcs"})
"""Protocols that are one."""


def filesystem(url: str, options: dict[str, Any] | None = None) -> tuple[Any, str]:
    """fsspec's filesystem for a URL, and the path within it. Listings are never cached.

    `options` apply to every URL, but those under the name of a protocol ({"s3": {...}, "hdfs": {...}}) to
    that one's alone. HDFS is hdfs-native's where that is installed, else fsspec's own (pyarrow's libhdfs,
    which needs Hadoop); of options for all, it takes Hadoop's properties, which have dots in their names.
    InputError where the protocol has no package, or the options are not its own.
    """
    import fsspec

    protocol = url.partition("://")[0]
    wanted = own_options(protocol, options or {})
    try:
        if protocol in ("hdfs", "viewfs") and importlib.util.find_spec("hdfs_native"):
            from clip_batch.storage.hdfs import open_hdfs

            return open_hdfs(url, {name: str(value) for name, value in wanted.items() if "." in name})
        if protocol in ("s3", "s3a"):  # `ask` repeats; botocore's own five tries at each request would multiply
            config = {"retries": {"total_max_attempts": 1}, **_signing(url), **wanted.get("config_kwargs", {})}
            wanted = {**wanted, "config_kwargs": config}
        if protocol in ("gs", "gcs") and importlib.util.find_spec("gcsfs"):
            from clip_batch.storage.gcs import open_gcs

            return open_gcs(url, {"use_listings_cache": False, **wanted})
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **wanted)
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        said = redact(message_of(error), options)
        missing = error.__cause__.name if isinstance(error.__cause__, ModuleNotFoundError) else None
        mend = extras.mend(missing) or "install the package it names, or mend the URL or --storage-options"
        raise InputError(f"cannot open {redact(url)}: {said}; {mend}") from None
    return fs, path


def _signing(url: str) -> dict[str, str]:
    """For presigned URLs, which botocore signs by version 2 otherwise; two kinds of bucket have ways of their own."""
    bucket = url.partition("://")[2].partition("/")[0]
    return {} if bucket.startswith("arn:") or bucket.endswith("--x-s3") else {"signature_version": "s3v4"}


def own_options(protocol: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a protocol: those for all but other protocols' sections, then its own, by any of its names."""
    from fsspec.registry import known_implementations

    protocols = (*known_implementations, *REFUSING)
    sections = {name for name, value in options.items() if name in protocols and isinstance(value, dict)}
    general = {name: value for name, value in options.items() if name not in sections}
    names = next((names for names in _NAMES if protocol in names), {protocol})
    own = {name: value for section in sorted(names & sections) for name, value in options[section].items()}
    return {**general, **own}


def put_if_absent(fs: Any, path: str, data: bytes) -> bool:
    """Write a small file unless the store refuses because its name is there; True where it was written.

    A store that cannot refuse takes it in any case: the last one to write wins. An answer may be lost
    and the request repeated, so False does not prove that another's file is there: read it back.
    """
    try:
        if refuses(fs):
            fs.pipe_file(path, data, mode="create")
        else:
            fs.pipe_file(path, data)
    except FileExistsError:
        return False
    except Exception as error:
        if {"412", "PreconditionFailed"} & set(error_codes(error)):
            return False
        if getattr(error, "errno", None) != errno.ENOSYS:  # S3 servers that do not know If-None-Match
            raise
        fs.pipe_file(path, data)
    return True


def move(fs: Any, old: str, new: str) -> None:
    """Give a file another name, in the place of any older one: at once if the store can, else copy and delete."""
    from fsspec import AbstractFileSystem

    if type(fs).mv is AbstractFileSystem.mv:  # which would take a name with brackets for a pattern
        fs.cp_file(old, new)
        fs.rm_file(old)
    else:
        fs.makedirs(new.rpartition("/")[0], exist_ok=True)
        fs.mv(old, new)


def uploads(fs: Any, folder: str) -> list[tuple[str, str]]:
    """Path and upload id of each multipart upload to S3 below a folder that was begun and not completed."""
    found: list[tuple[str, str]] = []
    if "s3" not in _protocols(fs):
        return found
    bucket, _, prefix = folder.partition("/")
    after: dict[str, str] = {}
    while True:
        answer = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/", **after)
        found += [(f"{bucket}/{one['Key']}", one["UploadId"]) for one in answer.get("Uploads", ())]
        if not answer.get("IsTruncated"):
            return found
        after = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}


def abort(fs: Any, path: str, upload: str) -> None:
    """Free what such an upload holds."""
    bucket, _, key = path.partition("/")
    fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)


def refuses(fs: Any) -> bool:
    """Whether a filesystem has the request that `put_if_absent` rests on (libhdfs, for one, has not)."""
    return not _protocols(fs).isdisjoint(REFUSING) and "arrow" not in type(fs).__module__


def _protocols(fs: Any) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
