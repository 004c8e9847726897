"""Small files that are kept on this machine because making them again takes longer, such as thumbnails.

    <folder>/<first two digits of the digest>/<digest of the key>

Processes may share a folder: a file gets its name when it is complete, and one that another process removed is made
again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from threading import Lock

KEPT = 0.8
"""Share of the limit that is kept when room is made, so that room is not made at every file."""


class BytesCache:
    """Bytes by key, in files that together take at most about `limit` bytes; those used least recently go first.

    A disk that is full or not writable keeps nothing, which is no error. With a limit of 0 nothing is kept.
    """

    def __init__(self, folder: str, limit: int) -> None:
        self._folder, self._limit, self._lock = folder, limit, Lock()
        self._size: int | None = None  # of all files, once they were counted

    def get(self, key: str) -> bytes | None:
        """Return the bytes of a key, or None if they are not kept."""
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                data = file.read()
            os.utime(path)
        except OSError:
            return None
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keep the bytes of a key."""
        if not self._limit:
            return
        path = self._path(key)
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            descriptor, part = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                os.replace(part, path)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(part)
                raise
            with self._lock:
                self._make_room(len(data))

    def _path(self, key: str) -> str:
        digest = hashlib.sha256(key.encode()).hexdigest()
        return os.path.join(self._folder, digest[:2], digest)

    def _make_room(self, added: int) -> None:
        """Count `added` bytes, and remove the files used least recently if the limit is exceeded."""
        if self._size is not None:
            self._size += added
        if self._size is not None and self._size <= self._limit:
            return
        files = []
        for parent, _, names in os.walk(self._folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # another process removed it
                    status = os.stat(os.path.join(parent, name))
                    files.append((status.st_mtime_ns, status.st_size, os.path.join(parent, name)))
        self._size = sum(size for _, size, _ in files)
        if self._size <= self._limit:
            return
        for _, size, path in sorted(files):
            if self._size <= KEPT * self._limit:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            self._size -= size
