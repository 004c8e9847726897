"""Writes the metadata of an index shard: tables of any order in, one Arrow IPC file in index order out.

Columns of few distinct values are dictionary-encoded in the file; `MetadataFile` returns them as plain strings.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc

from clip_batch.errors import CorruptError
from clip_batch.index.metadata import MetadataFile, Rows

BATCH_ROWS = 262_144
"""Most rows of a record batch: tests/bench/metadata.py says why."""

BATCH_BYTES = 2**27
"""About the most bytes of a record batch; `write_ordered` holds a few of them."""

DICTIONARY_VALUES = 65_536
"""Most distinct values of a dictionary-encoded column; see `_dictionaries`."""

DICTIONARY_BYTES = 2**24
"""Most bytes of a dictionary: it should stay in the processor's cache."""


def write_ordered(tables: Iterable[pa.Table], order: Rows, path: str) -> None:
    """Write rows `order` (n,) of the concatenated tables as an Arrow IPC file.

    The rows go through a temporary file beside `path`, as large as the result; memory holds one of the tables and some
    record batches. CorruptError: the tables' schemas differ. IndexError: a row is in none of the tables.
    """
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(path) or ".", prefix=".clip-batch-rows-") as spool:
        _spool(same_schema(tables, path), spool)
        rows = MetadataFile(spool.name)
        dictionaries = _dictionaries(rows.batches)
        schema = pa.schema(
            [
                field.with_type(pa.dictionary(pa.int32(), field.type)) if field.name in dictionaries else field
                for field in rows.schema
            ]
        )
        size = min(BATCH_ROWS, max(1, BATCH_BYTES * rows.rows // max(1, os.path.getsize(spool.name))))
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for start in range(0, len(order), size):
                table = rows.take(order[start : start + size]).combine_chunks()
                for name, values in dictionaries.items():
                    place = table.schema.get_field_index(name)
                    codes = pc.index_in(table.column(place), value_set=values).combine_chunks()
                    encoded = pa.DictionaryArray.from_arrays(codes, values)
                    table = table.set_column(place, schema.field(name), encoded)
                writer.write_table(table)


def same_schema(tables: Iterable[pa.Table], where: str) -> Iterator[pa.Table]:
    """The tables, unchanged; CorruptError, naming `where`, at the first whose schema is not the first one's."""
    schema: pa.Schema | None = None
    for table in tables:
        schema = table.schema if schema is None else schema
        if not table.schema.equals(schema):
            here, first = (
                ", ".join(f"{field.name}: {field.type}" for field in one if field not in other)
                for one, other in ((table.schema, schema), (schema, table.schema))
            )
            reason = f"{here or 'less'}, not {first or 'less, or in another order'}"[:200]
            raise CorruptError(f"{where}: metadata schemas differ among partitions ({reason}): embed anew")
        yield table


def _spool(tables: Iterable[pa.Table], sink: IO[bytes]) -> None:
    """Write tables as an Arrow IPC file; small ones share a record batch."""
    writer: Any = None
    pending: list[pa.Table] = []
    for table in itertools.chain(tables, [None]):
        full = sum(map(len, pending)) >= BATCH_ROWS or sum(each.nbytes for each in pending) >= BATCH_BYTES
        if pending and (full or table is None):
            writer = writer or pa.ipc.new_file(sink, pending[0].schema)
            writer.write_table(pa.concat_tables(pending).combine_chunks(), max_chunksize=BATCH_ROWS)
            pending.clear()
        pending.append(table)
    if writer is None:
        raise ValueError("metadata of no table at all has no schema")
    writer.close()
    sink.flush()


def _dictionaries(batches: Sequence[pa.RecordBatch]) -> dict[str, pa.Array]:
    """The distinct values, by column, of the string columns that a dictionary makes half as large or smaller.

    Such columns are taken faster too, as long as the dictionary stays in the cache: beyond `DICTIONARY_VALUES` and
    `DICTIONARY_BYTES` a column gets none.
    """
    dictionaries = {}
    for place, field in enumerate(batches[0].schema if batches else ()):
        columns = [batch.column(place) for batch in batches]
        if pa.types.is_string(field.type) and (values := _distinct(columns)) is not None:
            plain, encoded = sum(column.nbytes for column in columns), 4 * sum(map(len, columns)) + values.nbytes
            if 2 * encoded <= plain:
                dictionaries[field.name] = values
    return dictionaries


def _distinct(columns: Iterable[pa.Array]) -> pa.Array | None:
    """The distinct values of all columns, without null; None if they are too many or too large."""
    values = pa.array([], pa.string())
    for column in columns:
        more = column.unique()
        values = pa.concat_arrays([values, more]).unique() if more.nbytes <= DICTIONARY_BYTES else more
        if len(values) > DICTIONARY_VALUES or values.nbytes > DICTIONARY_BYTES:
            return None
    return values.drop_null()
