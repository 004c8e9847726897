"""A filesystem in memory, protocol `flaky`, that fails as remote stores do when a test tells it to."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Flaky(MemoryFileSystem):
    """Calls `before` at each operation, which may raise; cuts answers at random if `short` is set."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    before: ClassVar[Callable[[str, str, int], None] | None] = None
    short: ClassVar[random.Random | None] = None
    calls: ClassVar[list[tuple[str, str, int, int]]] = []
    versions: ClassVar[dict[str, int]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("flaky://", "memory://")))

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        self._note("info", path, 0, 0)
        return self._versioned(super().info(path, **options))

    def find(self, path: str, *rest: Any, **options: Any) -> Any:
        found = super().find(path, *rest, **options)
        return {name: self._versioned(info) for name, info in found.items()} if isinstance(found, dict) else found

    def _versioned(self, info: dict[str, Any]) -> dict[str, Any]:
        return {**info, "etag": f"v{self.versions.get(info['name'], 0)}"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self._note("read", path, start or 0, end or 0)
        data = bytes(super().cat_file(path, start=start, end=end, **options))
        with self._lock:
            return data[: self.short.randint(0, len(data))] if self.short and data else data

    def _note(self, what: str, path: str, start: int, end: int) -> None:
        with self._lock:
            self.calls.append((what, path, start, end))
        if Flaky.before:
            Flaky.before(what, path, start)

    @classmethod
    def reset(cls) -> None:
        cls.store.clear()
        cls.calls.clear()
        cls.versions.clear()
        cls.before = cls.short = None


fsspec.register_implementation("flaky", Flaky, clobber=True)


def put(path: str, data: bytes) -> str:
    """Write a file as a new version; returns its URL."""
    name = "/" + path.strip("/")
    fsspec.filesystem("flaky").pipe_file(name, data)
    Flaky.versions[name] = Flaky.versions.get(name, 0) + 1
    return f"flaky:/{name}"
