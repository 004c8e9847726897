"""The schema of JSON side-car fields, which every partition writes as metadata columns; inferred from some samples."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from clip_batch.plan.specs import Options
from clip_batch.plan.threads import map_in_threads
from clip_batch.storage.paths import is_local
from clip_batch.types import EXTRA_COLUMN, KEY_COLUMNS, Plan, Sample, Shard, Slice

SCHEMA_SHARDS, SCHEMA_SAMPLES = 32, 20
"""The schema is inferred from this many shards, and from this many samples of each."""

SCHEMA_BYTES = 8 * 2**20
"""Bytes of a remote tar that are read for it."""

MOST_FIELDS = 256

_RESERVED = {*KEY_COLUMNS, EXTRA_COLUMN, "partition", "row"}


def sample_fields(shards: Sequence[Shard], draft: Plan, options: Options) -> dict[str, str]:
    """The schema inferred from the first samples of shards that are spread over the input.

    `draft` is the plan without partitions. Samples that cannot be read are skipped here: `embed` reports them.
    """
    from clip_batch.samples import read_slice

    def records(shard: Shard) -> list[dict[str, Any]]:
        values = []
        # Only the first bytes of a remote tar are requested; a gzipped one has to be read from its start anyway.
        whole = is_local(shard.url) or shard.url.endswith("gz") or (shard.size or 0) <= SCHEMA_BYTES
        stop = SCHEMA_SAMPLES if draft.format == "files" else None if whole else SCHEMA_BYTES
        with contextlib.suppress(Exception):
            for sample in islice(read_slice(Slice(shard, 0, stop), draft, options), SCHEMA_SAMPLES):
                if isinstance(sample, Sample) and sample.json:
                    with contextlib.suppress(ValueError, RecursionError):
                        values.append(json.loads(sample.json))
        return [value for value in values if isinstance(value, dict)]

    count = min(len(shards), SCHEMA_SHARDS)
    spread = [shards[(len(shards) - 1) * k // max(count - 1, 1)] for k in range(count)]
    return infer_fields(record for some in map_in_threads(records, spread) for record in some)


def infer_fields(records: Iterable[dict[str, Any]]) -> dict[str, str]:
    """The kind of each field, "string", "int64", "double", "bool" or "json", by its name, sorted.

    Whole numbers and fractions together are a double. Any other mixture, lists, objects and whole numbers beyond 64
    bits are json; a field that is always null is a string. Names of metadata columns, names that UTF-8 cannot encode,
    and all but the `MOST_FIELDS` most frequent fields are left to the `extra` column.

    >>> infer_fields([{"width": 640, "license": None}, {"width": 1.5}])
    {'license': 'string', 'width': 'double'}
    """
    kinds: dict[str, set[str]] = {}
    frequencies: Counter[str] = Counter()
    for record in records:
        for name, value in record.items():
            kinds.setdefault(name, set()).add(_kind(value))
            frequencies[name] += 1
    by_frequency = sorted(kinds, key=lambda name: (-frequencies[name], name))
    usable = [name for name in by_frequency if name not in _RESERVED and name.isprintable() and name]
    return {name: _merge(kinds[name] - {"null"}) for name in sorted(usable[:MOST_FIELDS])}


def _kind(value: Any) -> str:
    """The kind of one value, or "null"."""
    if isinstance(value, int) and not isinstance(value, bool):
        return "int64" if -(2**63) <= value < 2**63 else "json"
    return {type(None): "null", bool: "bool", float: "double", str: "string"}.get(type(value), "json")


def _merge(kinds: set[str]) -> str:
    """The kind of a field that has values of all these kinds."""
    if len(kinds) == 1:
        return next(iter(kinds))
    return "string" if not kinds else "double" if kinds == {"int64", "double"} else "json"
