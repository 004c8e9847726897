"""fsspec's remote filesystems: opened with their options, and what a Store needs beyond fsspec's interface.

A commit needs a store that refuses to create a name that is taken (`clip_batch.storage.paths.REFUSING`). On all
others the last write wins, and every writer believes that it won (see docs/storage.md).
"""

from __future__ import annotations

import errno
import importlib.util
from typing import Any

from clip_batch.config import extras
from clip_batch.errors import InputError
from clip_batch.storage.paths import REFUSING
from clip_batch.storage.retry import error_codes, message_of, redact

_ALIASES = ({"s3", "s3a"}, {"gs", "gcs"})
"""Names of the same protocol."""


def filesystem(url: str, options: dict[str, Any] | None = None) -> tuple[Any, str]:
    """fsspec's filesystem for a URL, and the path within it. Listings are never cached.

    `options` apply to every URL, except those under the name of a protocol ({"s3": {...}, "hdfs": {...}}), which
    apply to that protocol. HDFS is opened by hdfs-native where that is installed, else by fsspec (pyarrow's
    libhdfs, which needs Hadoop); hdfs-native only takes Hadoop's properties, which have dots in their names.
    InputError where no package opens the protocol, or an option is wrong.

    Example: `filesystem("s3://bucket/a.tar", {"s3": {"anon": True}})` is (<S3FileSystem>, "bucket/a.tar").
    """
    import fsspec

    protocol = url.partition("://")[0]
    settings = protocol_options(protocol, options or {})
    try:
        if protocol in ("hdfs", "viewfs") and importlib.util.find_spec("hdfs_native"):
            from clip_batch.storage.hdfs import open_hdfs

            return open_hdfs(url, {name: str(value) for name, value in settings.items() if "." in name})
        if protocol in ("s3", "s3a"):  # `call_store` retries; botocore's five tries would multiply
            config = {"retries": {"total_max_attempts": 1}, **_signing(url), **settings.get("config_kwargs", {})}
            settings = {**settings, "config_kwargs": config}
        if protocol in ("gs", "gcs") and importlib.util.find_spec("gcsfs"):
            from clip_batch.storage.gcs import open_gcs

            return open_gcs(url, {"use_listings_cache": False, **settings})
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **settings)
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        message = redact(message_of(error), options)
        missing = error.__cause__.name if isinstance(error.__cause__, ModuleNotFoundError) else None
        remedy = extras.remedy(missing) or "install the package it names, or check the URL and --storage-options"
        raise InputError(f"cannot open {redact(url)}: {message}; {remedy}") from None
    return fs, path


def _signing(url: str) -> dict[str, str]:
    """Signature version 4 for presigned URLs, where botocore would use 2; two kinds of bucket choose their own."""
    bucket = url.partition("://")[2].partition("/")[0]
    return {} if bucket.startswith("arn:") or bucket.endswith("--x-s3") else {"signature_version": "s3v4"}


def protocol_options(protocol: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options that apply to a protocol: the general ones, then its section's, under any name of the protocol.

    >>> protocol_options("s3a", {"timeout": 5, "s3": {"key": "k"}, "gs": {"token": "anon"}})
    {'timeout': 5, 'key': 'k'}
    """
    from fsspec.registry import known_implementations

    protocols = (*known_implementations, *REFUSING)
    sections = {name for name, value in options.items() if name in protocols and isinstance(value, dict)}
    general = {name: value for name, value in options.items() if name not in sections}
    names = next((names for names in _ALIASES if protocol in names), {protocol})
    of_protocol = {name: value for section in sorted(names & sections) for name, value in options[section].items()}
    return {**general, **of_protocol}


def put_if_absent(fs: Any, path: str, data: bytes) -> bool:
    """Write a small file unless its name is taken; True where it was written.

    A store that cannot refuse writes it in any case: the last write wins. The answer to an earlier try may have
    been lost, so False does not prove that the file is another writer's: read it back.
    """
    try:
        if _refuses(fs):
            fs.pipe_file(path, data, mode="create")
        else:
            fs.pipe_file(path, data)
    except FileExistsError:
        return False
    except Exception as error:
        if {"412", "PreconditionFailed"} & set(error_codes(error)):
            return False
        if getattr(error, "errno", None) != errno.ENOSYS:  # an S3 server without If-None-Match
            raise
        fs.pipe_file(path, data)
    return True


def move(fs: Any, old: str, new: str) -> None:
    """Rename a file, replacing any older one: in one step if the store can, else by copying and deleting."""
    from fsspec import AbstractFileSystem

    if type(fs).mv is AbstractFileSystem.mv:  # which takes a name with brackets for a pattern
        fs.cp_file(old, new)
        fs.rm_file(old)
    else:
        fs.makedirs(new.rpartition("/")[0], exist_ok=True)
        fs.mv(old, new)


def unfinished_uploads(fs: Any, folder: str) -> list[tuple[str, str]]:
    """Path and upload id of each unfinished multipart upload to S3 below a folder; [] on other stores."""
    uploads: list[tuple[str, str]] = []
    if "s3" not in _protocols(fs):
        return uploads
    bucket, _, prefix = folder.partition("/")
    markers: dict[str, str] = {}
    while True:
        page = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/", **markers)
        uploads += [(f"{bucket}/{upload['Key']}", upload["UploadId"]) for upload in page.get("Uploads", ())]
        if not page.get("IsTruncated"):
            return uploads
        markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def abort_upload(fs: Any, path: str, upload: str) -> None:
    """End an unfinished multipart upload, so that S3 frees its parts."""
    bucket, _, key = path.partition("/")
    fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)


def _refuses(fs: Any) -> bool:
    """Whether a filesystem has the conditional request that `put_if_absent` needs; libhdfs does not."""
    return not _protocols(fs).isdisjoint(REFUSING) and "arrow" not in type(fs).__module__


def _protocols(fs: Any) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
