"""A row's image file: by its byte range in a tar, or by its URL. From threads, any number at once."""

from __future__ import annotations

import functools
import os
import threading
from typing import Any, NamedTuple

from clip_batch.errors import ClipBatchError, InputError, Preempted, one_line
from clip_batch.samples.tar.fast_headers import BLOCK
from clip_batch.samples.tar.headers import name_and_size
from clip_batch.storage import web
from clip_batch.storage.paths import is_local, local_path
from clip_batch.storage.transfer import has_ranges, read_range, remote_file

OPEN = 64
"""Local tars that are kept open."""

_NAME = 90
"""Bytes of a member's name up to which its one header has all of it."""


class Lost(ClipBatchError):
    """A row whose image cannot be had; `reason` is one of REASONS."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


REASONS = ("no_place", "missing_tar", "changed_tar", "unavailable", *web.REASONS)
"""Besides those of decoding (see `clip_batch.samples.decode`)."""


class Place(NamedTuple):
    """Where a row's image is; what is not known is None."""

    key: str | None
    shard: str | None
    offset: int | None
    length: int | None
    url: str | None = None


class Fetch:
    """Image bytes of places, by `via`: "tar", "url", or "either", which takes the URL of rows without a byte range.

    `timeout` in seconds, `limit` in bytes and `private` (addresses too) are for URLs. Once `stop` is set, nothing
    is asked of a store again.
    """

    def __init__(self, via: str, options: dict[str, Any], timeout: float, limit: int, private: bool) -> None:
        self._via, self._timeout, self._limit, self._private = via, timeout, limit, private
        self.stop = threading.Event()
        self._local = functools.lru_cache(OPEN)(_Tar)
        self._remote = functools.lru_cache(OPEN)(functools.partial(remote_file, options=options))

    def __call__(self, place: Place) -> bytes:
        """The image file; Lost where it cannot be had. InputError: no package opens the tar's store."""
        located = None not in (place.shard, place.offset, place.length) and self._via != "url"
        if located:
            return self._member(place)
        if self._via == "tar" or not place.url:
            what = "no URL" if self._via == "url" else "no byte range in a tar that our planner recorded"
            raise Lost("no_place", f"{what}{' and no URL' if self._via == 'either' else ''}")
        try:
            return web.fetch(place.url, self._limit, self._timeout, self._private)
        except web.FetchError as error:
            raise Lost(error.reason, f"{place.url} {error}") from None

    def _member(self, place: Place) -> bytes:
        """The bytes of a tar's member, and before them its header, which tells whether it is still the one."""
        assert place.shard is not None and place.offset is not None and place.length is not None
        start, stop = place.offset - BLOCK, place.offset + place.length
        remote = None if is_local(place.shard) else self._remote(place.shard)
        try:
            if remote is None:
                tar = self._local(local_path(place.shard))  # held while it is read: the cache may let go of it
                data = os.pread(tar.descriptor, stop - start, start)
            elif has_ranges(remote):
                data = read_range(remote, start, stop, self._pause)
            else:
                raise OSError(f"{place.shard}: the server gives no byte ranges: copy the tar, or read by URL")
        except FileNotFoundError:
            raise Lost("missing_tar", f"{place.shard} is not there: put it back, or plan again") from None
        except (InputError, ValueError) as error:
            raise Lost("changed_tar", one_line(error)) from None
        except OSError as error:
            raise Lost("unavailable", one_line(error)) from None
        if not _is_of(data, place):
            told = f"{place.shard} has no member {place.key} of {place.length} bytes at byte {place.offset} any more"
            raise Lost("changed_tar", f"{told}: put the planned tar back, or plan again")
        return data[BLOCK:]

    def _pause(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise Preempted()


class _Tar:
    """An open file, closed when the last thread lets go of it."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _is_of(data: bytes, place: Place) -> bool:
    """Whether a header and what follows it are the member of a place."""
    try:
        name, size = name_and_size(data[:BLOCK])
    except Exception:  # bytes of anything
        return False
    if len(data) != BLOCK + (place.length or 0) or size != place.length:
        return False
    known = place.key is None or not place.key.isascii() or len(place.key) > _NAME  # else in extended headers, perhaps
    return known or name.startswith(f"{place.key}.")
