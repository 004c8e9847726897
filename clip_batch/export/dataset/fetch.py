"""Fetch a row's image, by its place in a tar, a Parquet file or a folder, or by its URL; in any number of threads."""

from __future__ import annotations

import functools
import os
import threading
from typing import Any, NamedTuple

from clip_batch.errors import ClipBatchError, InputError, Preempted, StorageUnavailable, one_line
from clip_batch.samples.files import read_picture
from clip_batch.samples.parquet.reader import read_image
from clip_batch.samples.tar.fast_headers import BLOCK
from clip_batch.samples.tar.headers import name_and_size
from clip_batch.samples.tar.scan import scan_links
from clip_batch.search import lineage
from clip_batch.storage import web
from clip_batch.storage.arrow import UNREADABLE
from clip_batch.storage.names import text_name
from clip_batch.storage.paths import is_local, local_path, split_url
from clip_batch.storage.store import Store
from clip_batch.storage.transfer import has_ranges, read_range, remote_file

OPEN = 64
"""Number of local tars that are kept open."""

_NAME = 90
"""Longest key, in bytes, whose file name is surely whole in the member's last header."""


class Lost(ClipBatchError):
    """A row's image cannot be fetched; `reason` is one of REASONS."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


REASONS = ("no_place", "missing_tar", "changed_tar", "unavailable", *web.REASONS)
"""Reasons why an image cannot be fetched. Those of decoding are in `clip_batch.samples.decode`."""


class Place(NamedTuple):
    """Where a row's image is. A field that is not known is None."""

    key: str | None
    shard: str | None
    offset: int | None
    length: int | None
    url: str | None = None
    image_column: str | None = None


class Fetch:
    """Fetches the image files of places.

    `via` is "tar", "url", or "either", which fetches by URL only the rows without a byte range. `timeout` in seconds,
    `limit` in bytes, and `private`, which allows addresses that are not public, apply to URLs. Once `stop` is set, no
    request is retried.
    """

    def __init__(self, via: str, options: dict[str, Any], timeout: float, limit: int, private: bool) -> None:
        self._via, self._timeout, self._limit, self._private = via, timeout, limit, private
        self._options = options
        self.stop = threading.Event()
        self._local = functools.lru_cache(OPEN)(_Tar)
        self._links = functools.lru_cache(OPEN)(functools.partial(scan_links, options=options))
        self._remote = functools.lru_cache(OPEN)(functools.partial(remote_file, options=options))

    def __call__(self, place: Place) -> bytes:
        """Return an image file. Lost: it cannot be fetched. InputError: no package opens the tar's store."""
        if self._via != "url" and None not in (place.shard, place.offset):
            if place.length is not None:
                return self._member(place)
            if place.image_column is not None:
                return self._row(place, place.image_column)
        if self._via != "url" and lineage.in_folder(place._asdict()):
            return self._file(place)
        if self._via == "tar" or not place.url:
            absent = "no URL" if self._via == "url" else "no place in a file that our planner recorded"
            raise Lost("no_place", f"{absent}{' and no URL' if self._via == 'either' else ''}")
        try:
            return web.fetch(place.url, self._limit, self._timeout, self._private)
        except web.FetchError as error:
            raise Lost(error.reason, f"{place.url} {error}") from None

    def _member(self, place: Place) -> bytes:
        """Return a tar member. Its header is read with it, to check that it is still the planned member."""
        assert place.shard is not None and place.offset is not None and place.length is not None
        start, stop = place.offset - BLOCK, place.offset + place.length
        shard = text_name(place.shard)
        remote = None if is_local(shard) else self._remote(shard)
        try:
            if remote is None:
                tar = self._local(local_path(shard))  # this reference keeps it open if the cache drops it
                data = os.pread(tar.descriptor, stop - start, start)
            elif has_ranges(remote):
                data = read_range(remote, start, stop, self._pause)
            else:
                raise OSError(f"{place.shard}: the server does not support byte ranges: copy the tar, or read by URL")
        except FileNotFoundError:
            raise Lost("missing_tar", f"{place.shard} does not exist: put it back, or plan again") from None
        except (InputError, ValueError) as error:
            raise Lost("changed_tar", one_line(error)) from None
        except OSError as error:
            raise Lost("unavailable", one_line(error)) from None
        if not self._is_member(data, place, shard):
            member = f"member {place.key} of {place.length} bytes at byte {place.offset}"
            raise Lost("changed_tar", f"{place.shard} no longer has {member}: put the planned tar back, or plan again")
        return data[BLOCK:]

    def _row(self, place: Place, column: str) -> bytes:
        """Return the image in a column of a row of a Parquet file, if the row has the planned key."""
        assert place.shard is not None and place.offset is not None
        folder, name = split_url(text_name(place.shard))
        store = Store(folder, self._options)
        try:
            with store.open(name) as file:
                data = read_image(file, place.offset, column, place.key)
        except FileNotFoundError:
            raise Lost("missing_tar", f"{place.shard} does not exist: put it back, or plan again") from None
        except StorageUnavailable as error:
            raise Lost("unavailable", one_line(error)) from None
        except (InputError, OSError, *UNREADABLE) as error:
            raise Lost("changed_tar", f"{place.shard}: {one_line(error)}") from None
        if data is None:
            raise Lost("changed_tar", f"{place.shard} no longer has an image in row {place.offset}: plan again")
        return data

    def _file(self, place: Place) -> bytes:
        """Return the picture of a key in a folder."""
        assert place.shard is not None and place.key is not None
        try:
            data = read_picture(Store(text_name(place.shard), self._options), text_name(place.key))
        except OSError as error:
            raise Lost("unavailable", one_line(error)) from None
        if data is None:
            raise Lost("missing_tar", f"{place.shard} has no picture {place.key}: put it back, or plan again")
        return data

    def _is_member(self, data: bytes, place: Place, shard: str) -> bool:
        """Return whether `data`, a header and the bytes behind it, is the member that was planned at a place."""
        try:
            name, size = name_and_size(data[:BLOCK])
        except Exception:  # any bytes may stand there now
            return False
        if len(data) != BLOCK + (place.length or 0) or size != place.length:
            return False
        # the name of a long key, or one that is not ASCII, may be in an extended header before this one
        key = None if place.key is None else text_name(place.key)
        if key is None or not key.isascii() or len(key) > _NAME or name.startswith(f"{key}."):
            return True
        try:
            links = self._links(shard).get(place.offset or 0, [])
        except Exception:  # each store has errors of its own; without its links the tar is another one
            return False
        return any(link.startswith(f"{key}.") for link in links)

    def _pause(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise Preempted()


class _Tar:
    """An open file, which is closed when the last reference to it is dropped."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
