"""The schema of JSON side-car fields, which every partition writes as metadata columns; inferred from some samples."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from clip_batch.plan.specs import Options
from clip_batch.plan.threads import map_in_threads
from clip_batch.samples.files import Folder, read_samples
from clip_batch.samples.tar.suffixes import is_compressed
from clip_batch.storage.names import is_utf8, text_name
from clip_batch.storage.paths import is_local
from clip_batch.types import CAPTION_FIELDS, EXTRA_COLUMN, KEY_COLUMNS, Failure, Item, Plan, Sample, Shard, Slice

SCHEMA_SHARDS, SCHEMA_SAMPLES = 32, 20
"""The schema is inferred from this many shards, and from this many samples of each."""

SCHEMA_BYTES = 8 * 2**20
"""Bytes of a remote tar that are read for it."""

MOST_FIELDS = 256

HEADER_BYTES = 768
"""Bytes of a member's header in a tar, with the mean of what fills its last block."""

_RESERVED = {*KEY_COLUMNS, EXTRA_COLUMN, "partition", "row"}


class Look(NamedTuple):
    """What some samples of the input have beside their images.

    - `samples`: how many were looked at.
    - `captions`: how many of them have a caption file that is not blank.
    - `beside`: how many have a caption in the Parquet file beside their tar.
    - `records`: the JSON of those that have an object.
    - `firsts`: the first sample of each shard that was looked at.
    - `dotted`: the failures of images with a dotted name.
    - `not_utf8`: the keys of samples whose names are not UTF-8.
    - `sample_bytes`: their mean size in a tar or a Parquet file, with the headers of a tar; 0 where there is none.
    """

    samples: int
    captions: int
    beside: int
    records: list[dict[str, Any]]
    firsts: Sequence[Sample] = ()
    dotted: Sequence[Failure] = ()
    not_utf8: Sequence[str] = ()
    sample_bytes: float = 0.0


def look_at_samples(
    shards: Sequence[Shard], draft: Plan, options: Options, folders: Mapping[str, Folder] | None = None
) -> Look:
    """Read the first samples of shards that are spread over the input.

    `draft` is the plan without partitions, and `folders` has the content of folders of which no listing is written yet.
    Samples that cannot be read are skipped here: `embed` reports them.
    """
    from clip_batch.samples import read_slice
    from clip_batch.samples.parquet.reader import first_samples
    from clip_batch.samples.texts import decode_caption
    from clip_batch.storage.text import decode

    firsts: list[Sample] = []
    dotted: list[Failure] = []
    not_utf8: list[str] = []
    sizes: list[int] = []

    def look(shard: Shard) -> list[tuple[bool, bool, Any]]:
        found: list[tuple[bool, bool, Any]] = []
        # Only the first bytes of a remote tar are requested; a compressed one has to be read from its start anyway.
        whole = is_local(shard.url) or is_compressed(shard.url) or (shard.size or 0) <= SCHEMA_BYTES
        stop = SCHEMA_SAMPLES if draft.format == "files" else None if whole else SCHEMA_BYTES
        with contextlib.suppress(Exception):
            samples: Iterable[Item] = islice(read_slice(Slice(shard, 0, stop), draft, options), SCHEMA_SAMPLES)
            if draft.format == "parquet":
                samples = first_samples(shard, draft, SCHEMA_SAMPLES, options)
            elif folders and shard.url in folders:
                samples = read_samples(folders[shard.url].samples[:SCHEMA_SAMPLES], shard.url, draft, options)
            for sample in samples:
                if isinstance(sample, Failure) and sample.reason == "dotted_name":
                    dotted.append(sample)
                if isinstance(sample, Sample):
                    parts = (sample.image, sample.caption, sample.json)
                    sizes.append(sum(len(part) + HEADER_BYTES for part in parts if part is not None))
                    if not is_utf8(text_name(sample.key)):
                        not_utf8.append(sample.key)
                    if not found and sample.image is not None:
                        firsts.append(sample._replace(image=bytes(sample.image)))  # a view would keep the whole tar
                    record = None
                    with contextlib.suppress(ValueError, RecursionError):
                        record = json.loads(decode(sample.json or b"")[0])
                    found.append((decode_caption(sample.caption)[0] is not None, sample.beside is not None, record))
        return found

    count = min(len(shards), SCHEMA_SHARDS)
    spread = [shards[(len(shards) - 1) * k // max(count - 1, 1)] for k in range(count)]
    found = [sample for samples in map_in_threads(look, spread) for sample in samples]
    records = [record for _, _, record in found if isinstance(record, dict)]
    captions, beside = sum(caption for caption, _, _ in found), sum(beside for _, beside, _ in found)
    mean = sum(sizes) / len(sizes) if sizes else 0.0
    return Look(len(found), captions, beside, records, firsts, dotted, not_utf8, mean)


def name_advice(look: Look) -> list[str]:
    """Lines about names that hide images or are not UTF-8, if there were such among the samples that were looked at."""
    lines = []
    if look.dotted:
        images = f"{len(look.dotted)} of {len(look.dotted) + look.samples} images that were looked at"
        lines.append(f"{images} will not be embedded because of their names: {look.dotted[0].message}")
    if look.not_utf8:
        samples = f"{len(look.not_utf8)} of {look.samples} samples that were looked at"
        lines.append(f"{samples} have names that are not UTF-8: their keys are written like {look.not_utf8[0]}")
    return lines


def caption_advice(look: Look, caption_field: str) -> str | None:
    """A line that says where the captions are, if no sample that was looked at has one where the options say."""
    from clip_batch.samples.texts import field_caption

    def present(names: Iterable[str]) -> list[str]:
        return [name for name in names if any(field_caption(record, name) for record in look.records)]

    if caption_field and look.samples and not look.beside and not present([caption_field]):
        texts = {
            name: None for record in look.records for name, value in record.items() if isinstance(value, str | list)
        }
        fields = ", ".join(present(texts)[:20])
        return (
            f"none of {look.samples} samples that were looked at has the caption field {caption_field!r}; "
            f"their fields with text are: {fields or 'none'}"
        )
    if not caption_field and not look.captions and (names := present(CAPTION_FIELDS)):
        return (
            f"none of {look.samples} samples that were looked at has a caption file, but their JSON has the field "
            f"{names[0]!r}: --caption-field {names[0]} takes it"
        )
    return None


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
