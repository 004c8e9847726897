"""Reading the samples of a slice of a Parquet file: each row is a sample, in the order of the file.

A sample's `offset` is the number of its row in the file, and its `length` is None.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import IO, Any, NamedTuple

import pyarrow as pa

from clip_batch.errors import InputError, StorageUnavailable, one_line
from clip_batch.samples.parquet.columns import BYTES, KEY, PATH, Columns, find_columns, is_image, is_list, is_struct
from clip_batch.samples.parquet.file import Fetched, Group, SampleFile, check_inside, describe
from clip_batch.samples.parquet.values import bytes_of, values_of
from clip_batch.samples.prefetch import Prefetcher, check_version
from clip_batch.samples.tar.mapping import map_slice
from clip_batch.storage.arrow import caption_column, text_column
from clip_batch.storage.names import name_text
from clip_batch.storage.paths import is_local, split_url
from clip_batch.storage.store import Store
from clip_batch.storage.text import as_text
from clip_batch.storage.transfer import file_version
from clip_batch.types import (
    ERROR_FIELD,
    IMAGE_COLUMN,
    ROW_GROUP,
    Failure,
    Item,
    PassedOver,
    Plan,
    Sample,
    Shard,
    Slice,
)

MOST_LOST = 10_000_000
"""Rows that cannot be read are listed one by one, unless the file claims more than this many in a row group."""


class _Open(NamedTuple):
    """An open slice: the file, its row groups, and its columns."""

    file: SampleFile
    groups: Sequence[Group]
    columns: Columns


def read_parquet(
    piece: Slice, plan: Plan, options: dict[str, Any] | None = None, files: Prefetcher | None = None
) -> Iterator[Item]:
    """Read the rows of the row groups that begin in the bytes [piece.start, piece.stop); see `read_slice`."""
    url = name_text(piece.shard.url)
    (data, _, _), base = map_slice(piece, options, files, compressed=False)
    if base == 0 and not len(data):
        yield Failure(None, url, None, "empty_file", "the file is empty; copy or download it again")
        return
    folder, name = split_url(piece.shard.url)
    store = Store(folder, options)
    size = piece.shard.size if piece.stop is not None or base else None
    with Fetched(data, base, max(size or 0, base + len(data)), lambda: store.open(name)) as source:
        try:
            file = SampleFile(source)  # type: ignore[arg-type]
        except StorageUnavailable:
            raise
        except (OSError, pa.ArrowException, ValueError) as error:
            reason, message = describe(error, _at(source, 0, 24), _at(source, -4, 4), len(data))
            yield Failure(None, url, None, reason, message)
            return
        groups = file.inside(piece.start, piece.stop)
        check_inside(groups, file, url, piece.whole)
        if not is_local(piece.shard.url) and not piece.whole:  # the footer was read after the slice had been checked
            check_version(piece.shard, *file_version(store.remote(name)))
        if not file.rows and piece.whole:
            yield Failure(None, url, None, "empty_shard", "a Parquet file without a row; look at what wrote it")
        yield from _read(_Open(file, groups, _columns(file, plan)), url, plan)


def first_samples(shard: Shard, plan: Plan, count: int, options: dict[str, Any] | None = None) -> list[Item]:
    """The first items of a file, read in small ranges; errors as those of `SampleFile`, and of the store."""
    folder, name = split_url(shard.url)
    with Store(folder, options).open(name) as opened:
        file = SampleFile(opened)
        return list(islice(_read(_Open(file, file.groups, _columns(file, plan)), name_text(shard.url), plan), count))


def read_image(opened: IO[bytes], row: int, column: str, key: str | None = None) -> bytes | None:
    """The image of a row of an open file, by the row's number and the column; None where the row has no image.

    Reads the column from the beginning of the row's row group. `key`, where it is given and the file has keys, must be
    that of the row. InputError: there is no such row or column, or it has another key. OSError or pa.ArrowException:
    the file cannot be read.
    """
    file = SampleFile(opened)
    group = next((one for one in file.groups if one.first <= row < one.first + one.rows), None)
    if (
        group is None
        or column not in file.schema.names
        or not is_image(file.schema.types[file.schema.names.index(column)])
    ):
        raise InputError(f"row {row} of column {column!r} is not in the file: put the planned file back, or plan again")
    names = [column, *([KEY] if key is not None and KEY in file.schema.names and column != KEY else [])]
    before = row - group.first
    for batch in file.batches(group, names):
        if before < len(batch):
            if len(names) > 1 and (found := _keys(batch, group.first)[before]) not in (key, None):
                raise InputError(
                    f"row {row} has the key {found!r}, not {key!r}: put the planned file back, or plan again"
                )
            values = batch.column(batch.schema.names.index(column))
            found_image, _, _ = _image_of(values[before], values.type)
            return None if found_image is None else bytes(found_image)
        before -= len(batch)
    raise InputError(f"row {row} cannot be read: put the planned file back, or plan again")


def _columns(file: SampleFile, plan: Plan) -> Columns:
    return find_columns(file.schema, plan.image_field, plan.caption_field, "image" in plan.modalities)


def _read(opened: _Open, url: str, plan: Plan) -> Iterator[Item]:
    """The items of row groups, and the values that no metadata column takes."""
    passed_over: Counter[str] = Counter()
    for group in opened.groups:
        done = 0
        problem = "it has fewer rows than the footer says"
        try:
            for batch in opened.file.batches(group, _needed(opened)):
                batch = batch.slice(0, group.rows - done)
                yield from _samples(batch, group, done, opened.columns, url, passed_over, "image" in plan.modalities)
                done += len(batch)
        except StorageUnavailable:
            raise
        except (OSError, pa.ArrowException, ValueError, MemoryError) as error:
            problem = one_line(error, 200)
        yield from _lost(group, done, url, problem)
    if passed_over := Counter({name: count for name, count in passed_over.items() if count}):
        yield PassedOver(url, dict(passed_over))


def _needed(opened: _Open) -> list[str]:
    """The columns that are read: all, but for binary ones that are no images."""
    return [name for name in dict.fromkeys(opened.file.schema.names) if name not in opened.columns.passed_over]


def _lost(group: Group, done: int, url: str, problem: str) -> Iterator[Failure]:
    """The rows of a row group from the one after `done` rows on, which cannot be read."""
    first, stop = group.first + done, group.first + group.rows
    message = f"row group {group.number} cannot be read ({problem}): copy or write the file again"
    if stop - first > MOST_LOST:
        yield Failure(None, url, first, "corrupt_parquet", f"rows {first} to {stop}: {message}")
        return
    for row in range(first, stop):
        yield Failure(_number(row), url, row, "unreadable_row", message)


def _number(row: int) -> str:
    """The key of a row that has none of its own.

    >>> _number(17)
    '000000017'
    """
    return f"{row:09d}"


def _samples(
    batch: pa.RecordBatch, group: Group, done: int, columns: Columns, url: str, passed_over: Counter[str], images: bool
) -> Iterator[Item]:
    """The samples of a batch of rows, of which `done` rows of the group come before."""
    names: list[str] = batch.schema.names
    place = names.index(columns.image) if columns.image else -1
    captions, texts = _captions(batch, columns.caption)
    left_out = {texts, names.index(KEY) if KEY in names else -1}
    rest = [number for number in range(len(names)) if number not in left_out and names[number] != columns.image]
    values = [values_of(batch.column(number)) for number in rest]
    rest_names = [names[number] for number in rest]
    why = values[rest_names.index(ERROR_FIELD)] if ERROR_FIELD in rest_names else None
    first = group.first + done
    keys = _keys(batch, first)
    own = {ROW_GROUP: group.number, **({IMAGE_COLUMN: columns.image} if columns.image else {})}
    column = batch.column(place) if columns.image else None
    passed_over.update(dict.fromkeys(columns.passed_over, len(batch)))
    for at in range(len(batch)):
        image, path, others = None, None, 0
        if column is not None:
            image, path, others = _image_of(column[at], column.type)
            passed_over[columns.image or ""] += others
        if image is None and images:
            problem = (
                f"{columns.image!r} has the path {path!r}, but no bytes: write them into it" if path else "no image"
            )
            problem += f" ({as_text(why[at])})" if why is not None and why[at] else ""
            yield Failure(keys[at], url, first + at, "missing_image", one_line(columns.problem or problem, 500))
            continue
        fields = [(name, column[at]) for name, column in zip(rest_names, values, strict=True)]
        if path is not None:
            fields.append((f"{columns.image}.{PATH}", path))
        caption = captions[at]
        text = None if caption is None else caption.encode()
        yield Sample(keys[at], url, first + at, None, image, text, _json(fields, own))


def _keys(batch: pa.RecordBatch, first: int) -> list[str]:
    """The keys of a batch whose first row has the number `first`: those of its column of keys, else its numbers."""
    names = batch.schema.names
    if KEY not in names:
        return [_number(first + at) for at in range(len(batch))]
    keys = text_column(pa.chunked_array([batch.column(names.index(KEY))])).to_pylist()
    return [_number(first + at) if key is None else name_text(key) for at, key in enumerate(keys)]


def _captions(batch: pa.RecordBatch, name: str | None) -> tuple[Sequence[str | None], int]:
    """The captions of a batch, and the place of their column if metadata needs it no more: it has plain strings."""
    if name is None or name not in batch.schema.names:
        return [None] * len(batch), -1
    place = batch.schema.names.index(name)
    kind = batch.schema.types[place]
    if pa.types.is_nested(kind) and not is_list(kind):
        return [None] * len(batch), -1
    plain = not (pa.types.is_nested(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind))
    return caption_column(pa.chunked_array([batch.column(place)])).to_pylist(), place if plain else -1


def _image_of(value: pa.Scalar, kind: pa.DataType) -> tuple[memoryview | None, str | None, int]:
    """The bytes of the image of a row and its path, and how many further images the row has."""
    if not value.is_valid:
        return None, None, 0
    if is_list(kind):
        found = [_image_of(one, kind.value_type) for one in value.values]
        images = [one for one in found if one[0] is not None]
        return (*images[0][:2], len(images) - 1) if images else (None, found[0][1] if found else None, 0)
    if not is_struct(kind):
        return bytes_of(value), None, 0
    path = as_text(value[PATH].as_py()) if kind.get_field_index(PATH) >= 0 else None
    data = value[BYTES]
    return bytes_of(data) if data.is_valid else None, path, 0


def _json(fields: Sequence[tuple[str, Any]], own: Mapping[str, Any]) -> bytes:
    """The columns of a row as the JSON side-car that a tar would have; names that come twice stay twice."""
    pairs = [*fields, *own.items()]
    record = dict(pairs)
    if len(record) == len(pairs):
        return json.dumps(record, default=as_text).encode()
    texts = (f"{json.dumps(name)}: {json.dumps(value, default=as_text)}" for name, value in pairs)
    return ("{" + ", ".join(texts) + "}").encode()


def _at(source: Fetched, start: int, count: int) -> bytes:
    """Some bytes of a file, from its end for a negative start; fewer where it is short."""
    source.seek(start, 2 if start < 0 else 0)
    return source.read(count) or b""
