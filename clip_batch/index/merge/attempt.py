"""Attempts at a merge task, of which the first to create the task's record wins.

A task may be tried several times, also at once. An attempt writes files under names of its own; its record names it
and is created only if there is none, and readers read only what a record names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import IO, Any

from clip_batch.storage.store import Store, file_digest
from clip_batch.types import StoredFile


class Attempt:
    """One attempt at a task: files in a folder of its own, then the record that makes them count.

    A context manager: it suppresses an error of reading or writing where another attempt's record exists, for the task
    is done then, and `publish` may have removed this attempt's files. On any other error nothing is deleted: the record
    may exist although creating it raised. `record` is the record that exists after `commit`, of whichever attempt.
    """

    def __init__(self, index: Store, id: str, folder: str, record: str) -> None:
        """`folder` and `record` are paths below INDEX."""
        self.id = id
        self.folder = folder
        self.files: dict[str, StoredFile] = {}
        self.record: Any = {}
        self._index, self._record_name = index, record

    @property
    def won(self) -> bool:
        """Whether the task's record names this attempt."""
        return bool(self.record) and self.record["attempt"] == self.id

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, (OSError, RuntimeError)) and self._index.exists(self._record_name):
            self._decide()
            return not self.won
        return False

    def write(self, name: str, write: Callable[[IO[bytes]], object]) -> None:
        """Write a file of the attempt; `name` is relative to its folder."""
        with self._index.writer(f"{self.folder}/{name}") as file:
            write(file)
            file.flush()
            with open(file.name, "rb") as written:  # `write` may have written by the file's name
                size = written.seek(0, 2)
            self.files[name] = {"bytes": size, "sha256": file_digest(file.name)}

    def commit(self, **fields: Any) -> None:
        """Create the record, unless there is one: then remove the attempt's files."""
        record = {"attempt": self.id, **fields, "files": self.files}
        self._index.create(self._record_name, json.dumps(record, indent=1).encode())
        self._decide()

    def _decide(self) -> None:
        # The record decides, not what `create` returned: the store's answer may have been lost.
        self.record = self._index.read_json(self._record_name)
        if not self.won:
            self._index.remove_folder(self.folder)
