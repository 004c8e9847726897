"""Large reads past a store's client: a request of our own, and a socket that is read into one buffer.

s3fs and gcsfs take the same bytes through asyncio, in many small objects, for two to three times the CPU time.
"""

from __future__ import annotations

from collections.abc import Iterator
from http.client import HTTPMessage
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from clip_batch.storage.retry import is_transient

_BUFFER = 256 * 2**10  # bytes; what stays in a core's cache is copied on the fastest
_TIMEOUT = 60.0  # seconds, botocore's own

_refused: set[tuple[Any, str]] = set()
"""Filesystem and bucket of those that are read by the client: other certificates, a customer's keys, requester pays."""


def s3_chunks(fs: Any, path: str, start: int, stop: int) -> Iterator[memoryview]:
    """`chunks` of an object of S3, through a presigned URL."""
    if "proxies" in (settings := fs.config_kwargs or {}):
        return
    url = fs.url(path)
    if "AWSAccessKeyId=" not in url:  # a signature of version 2, which most of S3 refuses
        yield from chunks(fs, path, url, {}, start, stop, settings.get("read_timeout", _TIMEOUT))


def chunks(
    fs: Any, path: str, url: str, headers: dict[str, str], start: int, stop: int, timeout: float = _TIMEOUT
) -> Iterator[memoryview]:
    """The bytes [start, stop) of an object as they come; each chunk holds until the next one.

    Fewer where the connection ends early. None where this request is not answered: the client may know
    how to ask, or else says what is wrong. Raises what may pass, as HTTPError or OSError.
    """
    place = fs, path.partition("/")[0]
    if place in _refused:
        return
    request = Request(url, headers={**headers, "Range": f"bytes={start}-{stop - 1}"})
    try:
        answer = urlopen(request, timeout=timeout)
    except HTTPError as error:
        error.close()
        if is_transient(error):
            raise
        if error.code not in (404, 416):  # those two are the object's
            _refused.add(place)
        return
    except URLError:
        return
    with answer:
        if not _is_of(answer.headers, start):
            _refused.add(place)
            return
        buffer = memoryview(bytearray(_BUFFER))
        while taken := answer.readinto(buffer[: stop - start]):
            yield buffer[:taken]
            start += taken


def _is_of(headers: HTTPMessage, start: int) -> bool:
    """Whether an answer is of a range, from that byte on."""
    return headers.get("Content-Range", "").startswith(f"bytes {start}-")
