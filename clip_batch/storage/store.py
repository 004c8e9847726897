"""Stores: folders on local disks and on any filesystem that fsspec opens, with one interface.

A `Store` is one root folder (OUT, INDEX, or an input); names are relative to it. Files appear whole or not at
all: `create` publishes bytes only if the name is absent (the commit), `replace` replaces bytes atomically, and
`writer` spools to a local file that is published when its block ends without an error. Operations of a remote
store are retried, and its errors are OSErrors of one line (see `clip_batch.storage.retry`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO, Any, TypeVar

from clip_batch.config.paths import path_text
from clip_batch.errors import ConfigError
from clip_batch.storage.download import download
from clip_batch.storage.filesystem import abort_upload, filesystem, move, put_if_absent, unfinished_uploads
from clip_batch.storage.paths import TEMPORARY, absolute, is_local, split_url
from clip_batch.storage.ranged import open_ranged
from clip_batch.storage.retry import call_store
from clip_batch.storage.transfer import RemoteFile
from clip_batch.types import StrPath

T = TypeVar("T")

_ONE_REQUEST = 64 * 2**20
"""Bytes up to which a file is uploaded in one request."""


def read_url(url: str, options: dict[str, Any] | None = None) -> bytes:
    """Read a whole file by its path or URL; FileNotFoundError if absent."""
    folder, name = split_url(absolute(url))
    return Store(folder, options).read(name)


def write_url(url: str, data: bytes, options: dict[str, Any] | None = None) -> None:
    """Write a whole file by its path or URL, atomically, replacing any older one."""
    folder, name = split_url(absolute(url))
    Store(folder, options).replace(name, data)


def stream_digest(file: IO[bytes]) -> str:
    """sha256 (hex) of the rest of an open file, read in pieces."""
    digest = hashlib.sha256()
    while piece := file.read(2**20):
        digest.update(piece)
    return digest.hexdigest()


def file_digest(path: str) -> str:
    """sha256 (hex) of a local file."""
    with open(path, "rb") as file:
        return stream_digest(file)


class Store:
    """One folder, local or remote; all names are relative to it and use "/".

    InputError where no package opens the URL, or an option is wrong. ConfigError: it is no path or URL; or something is
    written to it, and it is a file.
    """

    def __init__(self, url: StrPath, options: dict[str, Any] | None = None) -> None:
        text = path_text(url, "a folder")
        self.url = absolute(text).rstrip("/")
        self.options = options or {}
        self.local = is_local(text)
        self._fs: Any = None
        self._root = self.url
        if not self.local:
            self._fs, root = filesystem(self.url, self.options)
            self._root = str(root).rstrip("/")

    def path(self, name: str) -> str:
        """The local path of a name; TypeError if the store is remote, where `fetch` makes a local copy."""
        if not self.local:
            raise TypeError(f"{self.display(name)} has no local path")
        return self._at(name)

    def _at(self, name: str) -> str:
        """The local path of a name, or its path within the remote filesystem."""
        return f"{self._root}/{name}" if name else self._root or "/"

    def _call(self, what: str, name: str, operation: Callable[[], T]) -> T:
        """Run an operation of the remote filesystem on a name (see `call_store`)."""
        return call_store(operation, f"{what} {self.display(name)}", self.options)

    def display(self, name: str) -> str:
        """The full path or URL of a name, for messages."""
        return f"{self.url}/{name}" if name else self.url or "/"

    def check_folder(self) -> None:
        """ConfigError: the folder, or one that it would lie in, is a local file, so that it cannot be made."""
        if self.local and not os.path.isdir(self._root or "/"):
            _check_above(self._root, self._root)

    def exists(self, name: str) -> bool:
        """Whether there is a file or folder of this name."""
        if self.local:
            return os.path.exists(self.path(name))
        return self._call("looking for", name, lambda: bool(self._fs.exists(self._at(name))))

    def size(self, name: str) -> int:
        """Bytes of a file; FileNotFoundError if absent."""
        if self.local:
            with _absent_under_files():
                return os.path.getsize(self.path(name))
        return self._call("looking at", name, lambda: int(self._fs.size(self._at(name))))

    def list(self, folder: str) -> list[str]:
        """Sorted names of the files and folders in a folder, relative to it; [] if there is no such folder."""
        try:
            if self.local:
                return sorted(os.listdir(self.path(folder)))
            paths = self._call("listing", folder, lambda: self._fs.ls(self._at(folder), detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in paths)

    def files(self, folder: str) -> dict[str, int]:
        """The bytes of all files below a folder, hidden ones too, by their sorted names relative to it."""
        start = len(self._at(folder)) + 1
        if self.local:
            paths = [os.path.join(at, name) for at, _, names in os.walk(self._at(folder)) for name in names]
            return {path[start:]: os.lstat(path).st_size for path in sorted(paths) if os.path.lexists(path)}
        try:
            found = self._call("listing", folder, lambda: self._fs.find(self._at(folder), detail=True))
        except FileNotFoundError:
            return {}
        return {str(path)[start:]: int(info.get("size") or 0) for path, info in sorted(found.items())}

    def modified(self, name: str) -> float | None:
        """When a file last changed by the store's clock, in Unix seconds; None where the store does not tell."""
        if self.local:
            with _absent_under_files():
                return os.path.getmtime(self.path(name))
        with contextlib.suppress(NotImplementedError, OSError):  # an optional part of fsspec
            return self._call("looking at", name, lambda: float(self._fs.modified(self._at(name)).timestamp()))
        return None

    def read(self, name: str) -> bytes:
        """Read a whole file; FileNotFoundError if absent."""
        if self.local:
            with _absent_under_files(), open(self.path(name), "rb") as file:
                return file.read()
        return self._call("reading", name, lambda: bytes(self._fs.cat_file(self._at(name))))

    def read_json(self, name: str) -> Any:
        """Read and parse a JSON file; FileNotFoundError if absent, ValueError if it is not JSON."""
        return json.loads(self.read(name))

    def read_all(self, names: Iterable[str]) -> Iterator[bytes]:
        """Read many small files, in order; several at once if remote. FileNotFoundError if one is absent."""
        if self.local:  # threads would be slower
            yield from map(self.read, names)
            return
        with ThreadPoolExecutor(32) as pool:
            yield from pool.map(self.read, names)

    def open(self, name: str) -> IO[bytes]:
        """Open a file to read and seek; FileNotFoundError if absent."""
        if self.local:
            with _absent_under_files():
                return open(self.path(name), "rb")
        return open_ranged(self.remote(name))

    def create(self, name: str, data: bytes, check_first: bool = True) -> bool:
        """Publish a file only if its name is absent; True if this call created it. This is the commit.

        One atomic step where the store refuses a name that is taken: local disks, S3, HDFS, GCS. On
        others two calls at the same time may both return True, and the last one's bytes stay. False may
        mean that this call wrote the file but its answer was lost: read back what matters. `check_first`
        asks whether the name exists, so that on such stores only calls at the same time can collide.
        """
        if self.local:
            with self._spool(name) as spool:
                spool.write(data)
                _sync(spool)
                try:
                    with _writing(self.path(name)):
                        os.link(spool.name, self.path(name))
                except FileExistsError:
                    return False
            _sync_folder(self.path(name))
            return True
        if check_first and self.exists(name):
            return False
        return self._call("creating", name, lambda: put_if_absent(self._fs, self._at(name), data))

    def replace(self, name: str, data: bytes) -> None:
        """Publish a file atomically, replacing any older one."""
        with self.writer(name) as file:
            file.write(data)

    @contextlib.contextmanager
    def writer(self, name: str) -> Iterator[IO[bytes]]:
        """A local file to write; published as `name` when the block ends, deleted if it raises."""
        with self._spool(name) as spool:
            yield spool
            if self.local:
                _sync(spool)
                with _writing(self.path(name)):
                    os.replace(spool.name, self.path(name))
                _sync_folder(self.path(name))
            elif spool.seek(0, os.SEEK_END) < _ONE_REQUEST:
                spool.seek(0)
                data = spool.read()
                self._call("writing", name, lambda: self._fs.pipe_file(self._at(name), data))
            else:  # s3fs and gcsfs abort the upload if a part of it fails
                spool.flush()
                self._call("writing", name, lambda: self._fs.put_file(spool.name, self._at(name)))

    def adopt(self, path: str, name: str) -> None:
        """Publish a finished local file as `name`: by moving it if the store is local, else by uploading it.

        A local store must be on the same disk as the file.
        """
        if self.local:
            _make_folder(self.path(name))
            with _writing(self.path(name)):
                os.replace(path, self.path(name))
            _sync_folder(self.path(name))
        else:
            self._call("writing", name, lambda: self._fs.put_file(path, self._at(name)))

    @contextlib.contextmanager
    def _spool(self, name: str) -> Iterator[IO[bytes]]:
        """A temporary file; beside its destination if that is local, so that it can be renamed."""
        if self.local:
            folder, base = _make_folder(self.path(name)), os.path.basename(name)
            path = os.path.join(folder, f".{base}{TEMPORARY}{secrets.token_hex(4)}")
        else:
            path = os.path.join(tempfile.gettempdir(), f"clip-batch{TEMPORARY}{secrets.token_hex(8)}")
        try:
            with contextlib.ExitStack() as stack:
                with _writing(self.path(name) if self.local else path):  # not around what the caller does
                    file = stack.enter_context(open(path, "w+b"))
                yield file
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def remove(self, name: str) -> None:
        """Delete one file; no error if absent."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if self.local:
                with _writing(self.path(name)):
                    os.unlink(self.path(name))
            else:
                self._call("removing", name, lambda: self._fs.rm_file(self._at(name)))

    def abort_uploads(self, folder: str, is_orphan: Callable[[str], bool]) -> Sequence[str]:
        """End S3's unfinished uploads into a folder whose file name `is_orphan`; returns these names."""
        if self.local:
            return []
        uploads = self._call("listing uploads of", folder, lambda: unfinished_uploads(self._fs, self._at(folder)))
        orphans = [(path, id) for path, id in uploads if is_orphan(path.rpartition("/")[2])]
        for path, id in orphans:
            self._call("ending an upload of", path, partial(abort_upload, self._fs, path, id))
        return [path.rpartition("/")[2] for path, _ in orphans]

    def rename(self, old: str, new: str) -> None:
        """Rename a file, replacing any older one.

        Atomic on file systems; object stores copy and then delete. Any number of callers may make the same call,
        at once or again: if `old` is absent and `new` exists, the rename is done.
        """
        try:
            if self.local:
                _make_folder(self.path(new))
                with _writing(self.path(new)):
                    os.replace(self.path(old), self.path(new))
                _sync_folder(self.path(new))
            else:
                self._call("renaming", old, lambda: move(self._fs, self._at(old), self._at(new)))
        except Exception:
            if self.exists(old) or not self.exists(new):
                raise

    def remove_folder(self, folder: str) -> None:
        """Delete a folder with its content, as far as that can be deleted; no error if absent."""
        if self.local:
            shutil.rmtree(self.path(folder), ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                self._call("removing", folder, lambda: self._fs.rm(self._at(folder), recursive=True))

    def digest(self, name: str) -> str:
        """sha256 (hex) of a file."""
        with self.open(name) as file:
            return stream_digest(file)

    def remote(self, name: str) -> RemoteFile:
        """A file of a remote store, as `clip_batch.storage.transfer` reads it."""
        return RemoteFile(self._fs, self._at(name), self.display(name), self.options)

    @contextlib.contextmanager
    def fetch(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[str]:
        """A local path of the file: its own if the store is local, else a temporary copy of the bytes [start, stop)."""
        if self.local:
            yield self.path(name)
            return
        with tempfile.NamedTemporaryFile(prefix="clip-batch-") as copy:
            download(self.remote(name), copy.name, start, stop)
            yield copy.name

    def free_space(self) -> int | None:
        """Free bytes on a local disk; None for a remote store."""
        if not self.local:
            return None
        folder = self._root
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        return shutil.disk_usage(folder).free


@contextlib.contextmanager
def _absent_under_files() -> Iterator[None]:
    """A file under a path that is no folder is absent, as one in a folder without it."""
    try:
        yield
    except NotADirectoryError as error:
        raise FileNotFoundError(errno.ENOENT, "its folder is a file", error.filename) from None


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    """PermissionError of one line, with the remedy, where a local file may not be written, or deleted."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EROFS):
            raise
        folder = os.path.dirname(path)
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        remedy = f"get the right to write in {folder}, or name another folder"
        raise PermissionError(f"{path} may not be written ({error.strerror}): {remedy}") from None


def _make_folder(path: str) -> str:
    """Make the folder of a file, where it is absent; its path. ConfigError: a file is in its place, or above it."""
    folder = os.path.dirname(path)
    try:
        with _writing(path):
            os.makedirs(folder, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        _check_above(folder, path)
        raise
    return folder


def _check_above(folder: str, path: str) -> None:
    """ConfigError: a folder of `path` cannot be made, as a file is in its place or above it."""
    file = folder
    while not os.path.lexists(file):
        file = os.path.dirname(file)
    if not os.path.isdir(file):
        raise ConfigError(f"{path} cannot be written, as {file} is no folder: name another one") from None


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: str) -> None:
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
