"""The JSON side-car fields that every partition writes as columns of one schema, inferred from some samples."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from clip_batch.plan.specs import Options, threaded
from clip_batch.storage.paths import is_local
from clip_batch.types import EXTRA_COLUMN, KEY_COLUMNS, Plan, Sample, Shard, Slice

SCHEMA_SHARDS, SCHEMA_SAMPLES = 32, 20
"""How many shards, and samples of each, the JSON schema is inferred from."""


_SCHEMA_BYTES = 8 * 2**20


_MOST_FIELDS = 256


_TAKEN = {*KEY_COLUMNS, EXTRA_COLUMN, "partition", "row"}


def sample_fields(shards: Sequence[Shard], draft: Plan, options: Options) -> dict[str, str]:
    """The schema of the JSON side-cars, from the first samples of shards spread over the input.

    What cannot be read adds nothing: `embed` reports it, sample by sample.
    """
    from clip_batch.samples import read_slice

    def records(shard: Shard) -> list[dict[str, Any]]:
        found = []
        # A remote tar is asked for its first bytes only; a gz must be read from the start anyway.
        near = is_local(shard.url) or shard.url.endswith("gz") or (shard.size or 0) <= _SCHEMA_BYTES
        stop = SCHEMA_SAMPLES if draft.format == "files" else None if near else _SCHEMA_BYTES
        with contextlib.suppress(Exception):
            for item in islice(read_slice(Slice(shard, 0, stop), draft, options), SCHEMA_SAMPLES):
                with contextlib.suppress(ValueError, RecursionError):
                    value = json.loads(item.json) if isinstance(item, Sample) and item.json else None
                    found += [value] if isinstance(value, dict) else []
        return found

    count = min(len(shards), SCHEMA_SHARDS)
    spread = [shards[(len(shards) - 1) * k // max(count - 1, 1)] for k in range(count)]
    return infer_fields(record for found in threaded(records, spread) for record in found)


def infer_fields(records: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Field -> "string", "int64", "double", "bool" or "json", sorted by name.

    Whole numbers and fractions mix to double; any other mix, lists, objects and whole numbers
    beyond 64 bits are json; nothing but null is string. Left to the `extra` column: names that
    are metadata columns already, names that UTF-8 cannot hold, and all but the commonest 256.
    """
    kinds: dict[str, set[str]] = {}
    seen: Counter[str] = Counter()
    for record in records:
        for name, value in record.items():
            kinds.setdefault(name, set()).add(_kind(value))
            seen[name] += 1
    commonest = sorted(kinds, key=lambda name: (-seen[name], name))
    fit = [name for name in commonest if name not in _TAKEN and name.isprintable() and name][:_MOST_FIELDS]
    return {name: _merge(kinds[name] - {"null"}) for name in sorted(fit)}


def _kind(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return "int64" if -(2**63) <= value < 2**63 else "json"
    return {type(None): "null", bool: "bool", float: "double", str: "string"}.get(type(value), "json")


def _merge(kinds: set[str]) -> str:
    if len(kinds) == 1:
        return next(iter(kinds))
    return "string" if not kinds else "double" if kinds == {"int64", "double"} else "json"
