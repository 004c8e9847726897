"""Local copies of a remote index, so that it can be memory-mapped: checked, bounded, resumed, shared.

    $XDG_CACHE_HOME/clip_batch/index/<digest of INDEX>/<version>/<path in INDEX>
    $XDG_CACHE_HOME/clip_batch/files/<digest of URL and version>-<name>     weights at a URL

A file gets its name when its sha256 is right. Until then it is `<file>.part`, with the pieces that are there in
`<file>.pieces`, so that a copy that was killed goes on where it was. Locks end with their process.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

from clip_batch.errors import ConfigError, CorruptError
from clip_batch.storage.download import fetch_pieces
from clip_batch.storage.store import Store, file_digest
from clip_batch.storage.transfer import file_version, remote_file

_LOCKS = (".used", ".copied")


class IndexCache:
    """One version of a remote index on this machine, in use until `close`.

    `size` is in bytes, of all its files. Versions that no process uses make room, the least recently
    opened first, so that all stay within `limit` bytes. ConfigError where they cannot.
    """

    def __init__(self, store: Store, version: str, size: int, limit: int) -> None:
        root = os.path.join(home(), "index")
        self.store, self.version = store, version
        self.folder = os.path.join(root, hashlib.sha256(store.url.encode()).hexdigest()[:16], version)
        os.makedirs(os.path.dirname(self.folder), exist_ok=True)
        self._used = _lock(self.folder + _LOCKS[0], fcntl.LOCK_SH)
        try:
            os.makedirs(self.folder, exist_ok=True)
            os.utime(self.folder)
            self._make_room(root, size, limit)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let the version be removed when room is needed; what is mapped stays mapped."""
        os.close(self._used)

    def _make_room(self, root: str, size: int, limit: int) -> None:
        taken = {folder: _size(folder) for _, folder in sorted(_versions(root)) if folder != self.folder}
        for folder in list(taken):
            if sum(taken.values()) + size <= limit:
                return
            with contextlib.suppress(BlockingIOError):
                lock = _lock(folder + _LOCKS[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
                try:
                    shutil.rmtree(folder, ignore_errors=True)
                    del taken[folder]
                finally:
                    os.close(lock)
        if (used := sum(taken.values())) + size > limit:
            raise ConfigError(
                f"{self.store.url} takes {size:,} bytes in {root}, which may hold {limit:,}, {used:,} of them in use: "
                "raise --index-cache, or mount the index as a local folder"
            )

    def file(self, name: str, wanted: dict[str, Any]) -> str:
        """A local copy of a file of INDEX; `wanted` has its "bytes" and "sha256". CorruptError: it is another."""
        path = os.path.join(self.folder, name)
        lock = _lock(self.folder + _LOCKS[1], fcntl.LOCK_EX)
        try:
            if not os.path.exists(path) or os.path.getsize(path) != wanted["bytes"]:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                self._copy(name, path, wanted)
        finally:
            os.close(lock)
        return path

    def _copy(self, name: str, path: str, wanted: dict[str, Any]) -> None:
        part, pieces = f"{path}.part", f"{path}.pieces"
        for _ in range(2 if os.path.exists(pieces) else 1):  # what an earlier process left may be wrong
            fetch_pieces(self.store.remote(name), part, pieces, wanted["bytes"])
            right = file_digest(part) == wanted["sha256"]
            os.unlink(pieces)
            if right:
                os.replace(part, path)
                return
            os.unlink(part)
        raise CorruptError(f"{self.store.display(name)} has not its recorded sha256: copy it again, or merge again")


def local_copy(url: str, options: dict[str, Any] | None = None) -> str:
    """The path of a local copy of a remote file, made once for each version that the store tells of.

    FileNotFoundError: it is absent. OSError: the store, or the local disk, does not do it.
    """
    remote = remote_file(url, options)
    size, etag = file_version(remote)
    if size is None:
        raise OSError(f"{url} has no size: copy it to a local file")
    name = hashlib.sha256(f"{url} {size} {etag}".encode()).hexdigest()[:16]
    path = os.path.join(home(), "files", f"{name}-{url.rpartition('/')[2]}")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    lock = _lock(f"{path}.lock", fcntl.LOCK_EX)
    try:
        if not os.path.exists(path):
            fetch_pieces(remote, f"{path}.part", f"{path}.pieces", size)
            os.replace(f"{path}.part", path)
            os.unlink(f"{path}.pieces")
    finally:
        os.close(lock)
    return path


def home() -> str:
    """The folder of all that is kept on this machine."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "clip_batch")


def _lock(path: str, kind: int) -> int:
    """An open file that is locked until it is closed; BlockingIOError with LOCK_NB where another holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, kind)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _versions(root: str) -> Iterator[tuple[float, str]]:
    """Every version's folder, and when it was opened."""
    for index in os.scandir(root):
        for entry in os.scandir(index.path):
            with contextlib.suppress(FileNotFoundError):  # another process is removing it
                if entry.is_dir():
                    yield entry.stat().st_mtime, entry.path


def _size(folder: str) -> int:
    """Bytes of the files below a folder, as far as they can be seen while others remove them."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.path.getsize(os.path.join(place, name))
    return total
