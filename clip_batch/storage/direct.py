"""Large reads of S3 and GCS by plain HTTP requests, received into one buffer.

s3fs and gcsfs receive the same bytes through asyncio, as many small objects, for two to three times the CPU time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from clip_batch.storage.retry import is_transient

if TYPE_CHECKING:
    from http.client import HTTPMessage

_BUFFER = 256 * 2**10  # bytes; a buffer that stays in the processor's cache is copied fastest
_TIMEOUT = 60.0  # seconds, as botocore

_refused: set[tuple[Any, str]] = set()
"""Filesystem and bucket where plain requests are refused (a customer's keys, requester pays): the client reads them."""


def s3_chunks(fs: Any, path: str, start: int, stop: int) -> Iterator[memoryview]:
    """The bytes [start, stop) of an S3 object, read through a presigned URL; see `chunks`."""
    settings = fs.config_kwargs or {}
    if "proxies" in settings:
        return
    url = fs.url(path)
    if "AWSAccessKeyId=" not in url:  # else signed by version 2, which most regions of S3 refuse
        yield from chunks(fs, path, url, {}, start, stop, settings.get("read_timeout", _TIMEOUT))


def chunks(
    fs: Any, path: str, url: str, headers: dict[str, str], start: int, stop: int, timeout: float = _TIMEOUT
) -> Iterator[memoryview]:
    """The bytes [start, stop) of an object as they arrive; each chunk is valid until the next one.

    Yields fewer bytes where the connection ends early, and none where the server refuses the request: the store's
    client then reads the object, or raises the error. Raises transient errors, as HTTPError or OSError.
    """
    from urllib.error import HTTPError, URLError  # with ssl and email, which most commands never need
    from urllib.request import Request, urlopen

    bucket = fs, path.partition("/")[0]
    if bucket in _refused:
        return
    request = Request(url, headers={**headers, "Range": f"bytes={start}-{stop - 1}"})
    try:
        response = urlopen(request, timeout=timeout)
    except HTTPError as error:
        error.close()
        if is_transient(error):
            raise
        if error.code not in (404, 416):  # these concern the object, not the bucket
            _refused.add(bucket)
        return
    except URLError:
        return
    with response:
        if not _starts_at(response.headers, start):
            _refused.add(bucket)
            return
        buffer = memoryview(bytearray(_BUFFER))
        while size := response.readinto(buffer[: stop - start]):
            yield buffer[:size]
            start += size


def _starts_at(headers: HTTPMessage, start: int) -> bool:
    """Whether a response is a byte range that begins at `start`."""
    return headers.get("Content-Range", "").startswith(f"bytes {start}-")
