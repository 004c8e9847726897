"""Local copies of remote files: an index, so that it can be memory-mapped, and weights.

    $XDG_CACHE_HOME/clip_batch/index/<digest of INDEX>/<version>/<path in INDEX>
    $XDG_CACHE_HOME/clip_batch/files/<digest of URL and version>-<name>     weights at a URL

While a file is copied it is `<file>.part`, and `<file>.pieces` lists its finished pieces, so that a copy that was
killed is resumed; it gets its name when its sha256 is right. Processes share the copies, under locks that end with
their process.
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
from clip_batch.types import StoredFile

_LOCKS = (".used", ".copied")


class IndexCache:
    """The local copy of one version of a remote index, in use until `close`.

    All versions together take at most `limit` bytes. To make room for this one, of `size` bytes, those that no
    process uses are removed, the least recently opened first. ConfigError where that is not enough.
    """

    def __init__(self, store: Store, version: str, size: int, limit: int) -> None:
        root = os.path.join(cache_home(), "index")
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
        """Allow the version to be removed when room is needed; files that are mapped stay mapped."""
        os.close(self._used)

    def _make_room(self, root: str, size: int, limit: int) -> None:
        sizes = {folder: _size(folder) for _, folder in sorted(_versions(root)) if folder != self.folder}
        for folder in list(sizes):
            if sum(sizes.values()) + size <= limit:
                return
            with contextlib.suppress(BlockingIOError):
                lock = _lock(folder + _LOCKS[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
                try:
                    shutil.rmtree(folder, ignore_errors=True)
                    del sizes[folder]
                finally:
                    os.close(lock)
        if (used := sum(sizes.values())) + size > limit:
            raise ConfigError(
                f"{self.store.url} takes {size:,} bytes in {root}, which may hold {limit:,}, {used:,} of them in use: "
                "raise --index-cache, or mount the index as a local folder"
            )

    def file(self, name: str, stored: StoredFile) -> str:
        """The path of a local copy of a file of INDEX; `stored` has its "bytes" and "sha256" of the manifest.

        CorruptError: the file has another sha256.
        """
        path = os.path.join(self.folder, name)
        lock = _lock(self.folder + _LOCKS[1], fcntl.LOCK_EX)
        try:
            if not os.path.exists(path) or os.path.getsize(path) != stored["bytes"]:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                self._copy(name, path, stored)
        finally:
            os.close(lock)
        return path

    def _copy(self, name: str, path: str, stored: StoredFile) -> None:
        part, pieces = f"{path}.part", f"{path}.pieces"
        for _ in range(2 if os.path.exists(pieces) else 1):  # pieces that an earlier process left may be wrong
            fetch_pieces(self.store.remote(name), part, pieces, stored["bytes"])
            right = file_digest(part) == stored["sha256"]
            os.unlink(pieces)
            if right:
                os.replace(part, path)
                return
            os.unlink(part)
        raise CorruptError(f"{self.store.display(name)} has not its recorded sha256: copy it again, or merge again")


def local_copy(url: str, options: dict[str, Any] | None = None) -> str:
    """The path of a local copy of a remote file, made once for each version of the file.

    FileNotFoundError: the file is absent. OSError: the store does not answer or tells no size, or the disk is full.
    """
    remote = remote_file(url, options)
    size, etag = file_version(remote)
    if size is None:
        raise OSError(f"{url} has no size: copy it to a local file")
    name = hashlib.sha256(f"{url} {size} {etag}".encode()).hexdigest()[:16]
    path = os.path.join(cache_home(), "files", f"{name}-{url.rpartition('/')[2]}")
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


def cache_home() -> str:
    """The folder of everything that clip-batch keeps on this machine."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "clip_batch")


def _lock(path: str, kind: int) -> int:
    """The descriptor of a file that is locked until it is closed; BlockingIOError with LOCK_NB if it is locked."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, kind)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _versions(root: str) -> Iterator[tuple[float, str]]:
    """When each version was last opened, in Unix seconds, and its folder."""
    for index in os.scandir(root):
        for entry in os.scandir(index.path):
            with contextlib.suppress(FileNotFoundError):  # another process is removing it
                if entry.is_dir():
                    yield entry.stat().st_mtime, entry.path


def _size(folder: str) -> int:
    """Bytes of the files below a folder; files that another process removes meanwhile do not count."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.path.getsize(os.path.join(parent, name))
    return total
