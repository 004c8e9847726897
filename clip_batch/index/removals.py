"""Removal lists of INDEX: rows that no search may return, by the values of a metadata column.

A list belongs to INDEX, not to a version, so that neither a later merge nor a roll-back brings its rows back; on disk
the folder of the lists is `tombstones`. To take a removal back, delete its file there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from clip_batch.errors import CorruptError
from clip_batch.index.paths import REMOVALS, parse_removal_list, removal_list
from clip_batch.storage.store import Store


@dataclass(frozen=True)
class RemovalList:
    """The sorted unique `values`, as text, of a metadata column: rows with one of them are removed."""

    column: str
    values: tuple[str, ...]

    @classmethod
    def of(cls, column: str, values: Iterable[str]) -> RemovalList:
        """The list of these values, in any order, repeats allowed."""
        return cls(column, tuple(sorted(set(values))))

    @property
    def digest(self) -> str:
        """16 hex digits over column and values, so that equal lists are one file."""
        return hashlib.sha256(self.to_json()).hexdigest()[:16]

    def to_json(self) -> bytes:
        """The content of the list's file."""
        return json.dumps({"column": self.column, "values": self.values}).encode()


def names(store: Store) -> list[str]:
    """The sorted digests of all lists of INDEX, by one listing."""
    return [digest for name in store.list(REMOVALS) if (digest := parse_removal_list(name))]


def load(store: Store, digest: str) -> RemovalList:
    """A list of INDEX by its digest; CorruptError if the file has another content."""
    name = removal_list(digest)
    data = store.read(name)
    with contextlib.suppress(ValueError, KeyError, TypeError):
        content = json.loads(data)
        removals = RemovalList(content["column"], tuple(content["values"]))
        if removals.digest == digest:
            return removals
    raise CorruptError(f"{store.display(name)} is not the list of its name: remove those rows again, then delete it")


def add(store: Store, column: str, values: Iterable[str]) -> str:
    """Record a list and return its digest. Every version that is opened from now on lacks its rows."""
    removals = RemovalList.of(column, values)
    store.create(removal_list(removals.digest), removals.to_json())
    return load(store, removals.digest).digest  # `create` may have failed without an answer
