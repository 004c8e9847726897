"""Remote files as Python file objects: each read is a request for a byte range, with retries."""

from __future__ import annotations

import io
from typing import IO, TYPE_CHECKING

from clip_batch.storage.transfer import RemoteFile, file_version, has_ranges, read_range

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK = 4 * 2**20
"""Least bytes of a request, which small reads are served from."""


def open_ranged(remote: RemoteFile) -> IO[bytes]:
    """Open a file to read and seek, buffered; errors as `file_version`.

    It is fsspec's file object where the store serves no ranges or tells no size.
    """
    size = file_version(remote).size
    if size is None or not has_ranges(remote):
        file: IO[bytes] = remote.call("opening", lambda: remote.fs.open(remote.path, "rb"))
        return file
    return io.BufferedReader(_Ranged(remote, size), BLOCK)


class Positioned(io.RawIOBase):
    """A file of `size` bytes to read and seek; a subclass has `readinto`, which moves the place `_at` on."""

    def __init__(self, size: int) -> None:
        self._size, self._at = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at


class _Ranged(Positioned):
    def __init__(self, remote: RemoteFile, size: int) -> None:
        super().__init__(size)
        self._remote = remote

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer)
        data = read_range(self._remote, self._at, min(self._at + len(view), max(self._size, self._at)))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)
