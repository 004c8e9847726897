"""Every path and every byte read or written: local disks and whatever fsspec opens.

A `Store` is one root folder (OUT, INDEX, or an input) with names relative to it. Files appear whole
or not at all: `create` publishes bytes only if the name is absent (the commit), `replace` swaps
bytes atomically, and `writer` spools to a local file and publishes when its block ends well.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

from clip_batch.errors import InputError

TEMPORARY = ".tmp-"
"""Marks a local file that is being written; nothing but `gc` looks at such names."""


def is_local(url: str) -> bool:
    """True for a plain path or a `file://` URL."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> str:
    """The path of a local URL."""
    return url[7:] if url.startswith("file://") else url


def absolute(url: str) -> str:
    """A local path made absolute, so that a plan means the same wherever it is read; URLs as is."""
    return os.path.abspath(os.path.expanduser(local_path(url))) if is_local(url) else url


def filesystem(url: str, options: dict[str, Any] | None = None) -> tuple[Any, str]:
    """fsspec's filesystem for a URL, and the path within it. Listings are never cached."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **(options or {}))
    except (ValueError, ImportError) as error:
        raise InputError(f"cannot open {url}: {error}; install the package it names, or mend the URL") from None
    return fs, path


def read_url(url: str, options: dict[str, Any] | None = None) -> bytes:
    """A whole file by its path or URL; FileNotFoundError if absent."""
    folder, _, name = absolute(url).rpartition("/")
    return Store(folder, options).read(name)


def stream_digest(file: IO[bytes]) -> str:
    """sha256 (hex) of what is left of a file, read in pieces."""
    digest = hashlib.sha256()
    while piece := file.read(2**20):
        digest.update(piece)
    return digest.hexdigest()


def file_digest(path: str) -> str:
    """sha256 (hex) of a local file."""
    with open(path, "rb") as file:
        return stream_digest(file)


class Store:
    """One folder, local or remote; all names are relative to it and use "/"."""

    def __init__(self, url: str, options: dict[str, Any] | None = None) -> None:
        self.url = absolute(url).rstrip("/")
        self.options = options or {}
        self.local = is_local(url)
        self._fs: Any = None
        self._root = self.url
        if not self.local:
            self._fs, root = filesystem(self.url, self.options)
            self._root = str(root).rstrip("/")

    def path(self, name: str) -> str:
        """Where a name lies: a local path, or the path within the remote filesystem."""
        return f"{self._root}/{name}" if name else self._root

    def display(self, name: str) -> str:
        """A name as messages show it."""
        return f"{self.url}/{name}" if name else self.url

    def exists(self, name: str) -> bool:
        return os.path.exists(self.path(name)) if self.local else bool(self._fs.exists(self.path(name)))

    def size(self, name: str) -> int:
        """Bytes of a file; FileNotFoundError if absent."""
        return os.path.getsize(self.path(name)) if self.local else int(self._fs.size(self.path(name)))

    def list(self, folder: str) -> list[str]:
        """Sorted names of the files and folders in a folder, relative to it; [] if there is none."""
        path = self.path(folder)
        try:
            if self.local:
                return sorted(os.listdir(path))
            return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in self._fs.ls(path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def walk(self) -> Sequence[str]:
        """Sorted names of all files below the root; InputError if there is no such folder."""
        if not self.local:
            prefix = self._root.rstrip("/") + "/"
            names = sorted(str(path).removeprefix(prefix) for path in self._fs.find(self._root))
            if not names:
                raise InputError(f"no files in {self.url}: mend the URL")
            return names
        if not os.path.isdir(self._root):
            raise InputError(f"no folder {self._root}: mend the path")
        paths = (os.path.join(folder, name) for folder, _, names in os.walk(self._root) for name in names)
        return sorted(os.path.relpath(path, self._root) for path in paths)

    def read(self, name: str) -> bytes:
        """A whole file; FileNotFoundError if absent."""
        if self.local:
            with open(self.path(name), "rb") as file:
                return file.read()
        return bytes(self._fs.cat_file(self.path(name)))

    def read_json(self, name: str) -> Any:
        return json.loads(self.read(name))

    def read_all(self, names: Iterable[str]) -> Iterator[bytes]:
        """Many small files, in order; at once where each costs a round trip. FileNotFoundError if one is absent."""
        if self.local:  # threads would only wait for each other
            yield from map(self.read, names)
            return
        with ThreadPoolExecutor(32) as pool:
            yield from pool.map(self.read, names)

    def open(self, name: str) -> IO[bytes]:
        """A seekable file to read."""
        if self.local:
            return open(self.path(name), "rb")
        file: IO[bytes] = self._fs.open(self.path(name), "rb")
        return file

    def create(self, name: str, data: bytes) -> bool:
        """Publish a file only if its name is absent: True if this call made it. The commit."""
        if self.local:
            with self._spool(name) as spool:
                spool.write(data)
                _sync(spool)
                try:
                    os.link(spool.name, self.path(name))
                except FileExistsError:
                    return False
            _sync_folder(self.path(name))
            return True
        try:
            self._fs.pipe_file(self.path(name), data, mode="create")
        except FileExistsError:
            return False
        return True

    def replace(self, name: str, data: bytes) -> None:
        """Publish a file in the place of any older one, atomically."""
        with self.writer(name) as file:
            file.write(data)

    @contextlib.contextmanager
    def writer(self, name: str) -> Iterator[IO[bytes]]:
        """A local file to write; published as `name` when the block ends, dropped if it raises."""
        with self._spool(name) as spool:
            yield spool
            _sync(spool)
            if self.local:
                os.replace(spool.name, self.path(name))
                _sync_folder(self.path(name))
            elif os.path.getsize(spool.name) < 64 * 2**20:
                spool.seek(0)
                self._fs.pipe_file(self.path(name), spool.read())
            else:
                self._fs.put_file(spool.name, self.path(name))

    @contextlib.contextmanager
    def _spool(self, name: str) -> Iterator[IO[bytes]]:
        """A temporary file: beside its destination if that is local, so that it can be renamed."""
        if self.local:
            folder, base = os.path.split(self.path(name))
            os.makedirs(folder, exist_ok=True)
            path = os.path.join(folder, f".{base}{TEMPORARY}{secrets.token_hex(4)}")
        else:
            path = os.path.join(tempfile.gettempdir(), f"clip-batch{TEMPORARY}{secrets.token_hex(8)}")
        try:
            with open(path, "w+b") as file:
                yield file
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def remove(self, name: str) -> None:
        """Delete one file; no error if absent."""
        with contextlib.suppress(FileNotFoundError):
            if self.local:
                os.unlink(self.path(name))
            else:
                self._fs.rm_file(self.path(name))

    def rename(self, old: str, new: str) -> None:
        """Give a file the name `new`, in the place of any older one (HDFS refuses to replace).

        Atomic on file systems; object stores copy and then delete. Any number of callers may do the
        same at once, or again: where `old` is gone and `new` is there, it is done.
        """
        try:
            if self.local:
                os.makedirs(os.path.dirname(self.path(new)), exist_ok=True)
                os.replace(self.path(old), self.path(new))
                _sync_folder(self.path(new))
            else:
                self._move(self.path(old), self.path(new))
        except Exception:
            if self.exists(old) or not self.exists(new):
                raise

    def _move(self, old: str, new: str) -> None:
        from fsspec import AbstractFileSystem

        if type(self._fs).mv is AbstractFileSystem.mv:  # which would take a name with brackets for a pattern
            self._fs.cp_file(old, new)
            self._fs.rm_file(old)
        else:
            self._fs.makedirs(new.rpartition("/")[0], exist_ok=True)
            self._fs.mv(old, new)

    def remove_folder(self, folder: str) -> None:
        """Delete a folder and all in it, as far as it can be deleted; no error if absent."""
        if self.local:
            shutil.rmtree(self.path(folder), ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                self._fs.rm(self.path(folder), recursive=True)

    def digest(self, name: str) -> str:
        """sha256 (hex) of a file."""
        with self.open(name) as file:
            return stream_digest(file)

    @contextlib.contextmanager
    def fetch(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[str]:
        """A local path that holds the file: itself if local, else a temporary copy of [start, stop)."""
        if self.local:
            yield self.path(name)
            return
        with tempfile.NamedTemporaryFile(prefix="clip-batch-") as copy:
            if start == 0 and stop is None:
                self._fs.get_file(self.path(name), copy.name)
            else:
                with self._fs.open(self.path(name), "rb") as remote:
                    remote.seek(start)
                    left = (stop if stop is not None else self.size(name)) - start
                    while left > 0 and (piece := remote.read(min(left, 16 * 2**20))):
                        copy.write(piece)
                        left -= len(piece)
                copy.flush()
            yield copy.name

    def free_space(self) -> int | None:
        """Free bytes on a local disk; None for a remote store."""
        if not self.local:
            return None
        folder = self._root
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        return shutil.disk_usage(folder).free


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: str) -> None:
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
