"""`read`: the rows of OUT or of INDEX as an Arrow dataset, metadata and vectors, for pandas, DuckDB, Polars and others.

A filter is applied to the metadata before vectors are read, and row groups whose statistics exclude it are skipped.
Nothing but a few thousand rows is in memory at a time, and of an index whose vectors lie in OUT, one index shard's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds

from clip_batch.config import MergeConfig, StorageConfig
from clip_batch.config.paths import path_text
from clip_batch.embeddings import clip_retrieval
from clip_batch.embeddings.metadata import LINEAGE
from clip_batch.embeddings.reader import Embeddings
from clip_batch.errors import ConfigError, some
from clip_batch.export.databases.rows import VectorRows
from clip_batch.index.manifest import load_manifest
from clip_batch.index.merge.job import open_source
from clip_batch.index.metadata import MetadataFile, common_schema, take_as
from clip_batch.index.paths import CURRENT
from clip_batch.index.removed_rows import fetch_metadata, read_schema, removed_ids
from clip_batch.plan import paths
from clip_batch.search import clip_retrieval as foreign_index
from clip_batch.search.searcher import Searcher
from clip_batch.storage.npy import unit
from clip_batch.storage.store import Store
from clip_batch.types import Commit, EncoderSpec, StrPath

ROWS = 4096
"""Rows of a record batch."""

_PLACE = "__place"
"""The column that has the place of a row in its block while a filter is applied; no metadata column has this name."""

Columns = Sequence[str] | Mapping[str, ds.Expression]
"""Names of columns, or expressions by the name of the column that has their value."""

Vectors = npt.NDArray[np.float32]
VectorsOf = Callable[[str, npt.NDArray[np.int64]], Vectors]
"""From a modality and places in a block to unit vectors (n, d); zero for a row without one."""


def read(source: StrPath, *, storage: StorageConfig = StorageConfig()) -> RowDataset:
    """The rows of OUT or of the live version of INDEX, as an Arrow dataset that reads when it is asked.

    Its columns are those of the metadata, and a fixed-size list of float32, of unit norm, for each modality:
    `image_vector` and `text_vector`, which is null for a row without a caption. The rows of INDEX have their `id`, and
    lack those that were removed; those of OUT are the committed ones, in the order of the plan.

    Example: `read("out").to_table(columns=["key", "image_vector"], filter=pyarrow.compute.field("width") > 512)`.

    ConfigError: `source` is neither. CorruptError: a file is damaged, or OUT has no row.
    """
    StorageConfig.expect(storage=storage)
    store = Store(path_text(source, "source"), storage.storage_options)
    if store.exists(CURRENT) or foreign_index.is_index(store):
        return IndexDataset(store, storage)
    if store.exists(paths.PLAN) or clip_retrieval.is_folder(store):
        model, pretrained = MergeConfig().made_by
        return OutputDataset(open_source(store, EncoderSpec(model, pretrained, weights=""), allow_partial=True))
    raise ConfigError(f"{store.url} is neither an embeddings folder nor an index: give what embed or merge wrote")


class RowDataset(ds.Dataset):  # type: ignore[misc]
    """Rows with their metadata and vectors: a `pyarrow.dataset.Dataset` that libraries read as any other.

    It has `schema`, `to_table`, `to_batches`, `to_pandas`, `head`, `count_rows` and `scanner`; all take `columns` and
    a `filter`, an expression of pyarrow.
    """

    def __init__(self, metadata: pa.Schema, modalities: Sequence[str], dim: int) -> None:
        """Columns of metadata, and the modalities that there are vectors of; pyarrow's own state stays empty."""
        self._dim = dim
        self._vectors = {f"{modality}_vector": modality for modality in modalities}
        kind = pa.list_(pa.float32(), dim)
        self._columns = pa.schema([*metadata, *((name, kind) for name in self._vectors)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError(f"{self!r} cannot be pickled: call clip_batch.read in the process that reads")

    def close(self) -> None:
        """Close what is open."""

    @property
    def schema(self) -> pa.Schema:
        """The columns of the rows."""
        return self._columns

    def to_batches(self, columns: Columns | None = None, filter: Any = None, **_: Any) -> Iterator[pa.RecordBatch]:
        """The rows that meet the filter, in order, in batches of at most a few thousand.

        `columns` are names, or expressions by name; None: all. ConfigError: there is no such column.
        """
        chosen = self.schema.names if columns is None else columns
        names = list(chosen) if not isinstance(chosen, Mapping) else _named_in(self.schema.names, *chosen.values())
        if unknown := [name for name in names if name not in self.schema.names]:
            raise ConfigError(f"no column {unknown[0]!r}: there are {some(self.schema.names, 30)}")
        conditions = [] if filter is None else _named_in(self.schema.names, filter)
        early = not set(conditions) & set(self._vectors)  # metadata decides which vectors are read
        needed = [name for name in self.schema.names if name in {*names, *conditions}]
        metadata = [name for name in needed if name not in self._vectors]
        for table, vectors_of in self._blocks(metadata, filter if early else None):
            block = table.select(metadata).append_column(_PLACE, pa.array(np.arange(len(table))))
            if filter is not None and early:
                block = _scan(block, filter=filter)
            places = block[_PLACE].to_numpy()
            for name in needed:
                if name in self._vectors:
                    block = block.append_column(name, self._list(vectors_of(self._vectors[name], places)))
            if filter is not None and not early:
                block = _scan(block, filter=filter)
            block = _scan(block, columns=dict(chosen)) if isinstance(chosen, Mapping) else block.select(names)
            yield from block.combine_chunks().to_batches()

    def to_table(self, columns: Columns | None = None, filter: Any = None, **_: Any) -> pa.Table:
        """The rows that meet the filter, as one table in memory; see `to_batches`."""
        return pa.Table.from_batches(self.to_batches(columns, filter), self._schema_of(columns))

    def to_pandas(self, columns: Columns | None = None, filter: Any = None) -> Any:
        """The rows that meet the filter, as a pandas DataFrame in memory; see `to_batches`."""
        return self.to_table(columns, filter).to_pandas()

    def reader(self, columns: Columns | None = None, filter: Any = None) -> pa.RecordBatchReader:
        """A stream of the rows that meet the filter, which is read once; see `to_batches`."""
        return pa.RecordBatchReader.from_batches(self._schema_of(columns), self.to_batches(columns, filter))

    def scanner(self, columns: Columns | None = None, filter: Any = None, **options: Any) -> ds.Scanner:
        """A scanner of the rows that meet the filter, which is read once; DuckDB asks for it."""
        return ds.Scanner.from_batches(self.reader(columns, filter), use_threads=False)

    def count_rows(self, filter: Any = None, **_: Any) -> int:
        """The number of rows that meet the filter."""
        column = self.schema.names[:1]
        return sum(len(batch) for batch in self.to_batches(column, filter))

    def head(self, num_rows: int, columns: Columns | None = None, filter: Any = None, **_: Any) -> pa.Table:
        """The first rows that meet the filter."""
        batches: list[pa.RecordBatch] = []
        for batch in self.to_batches(columns, filter):
            batches.append(batch.slice(0, num_rows - sum(map(len, batches))))
            if sum(map(len, batches)) >= num_rows:
                break
        return pa.Table.from_batches(batches, self._schema_of(columns))

    def _unsupported(self, *_: Any, **__: Any) -> Any:
        raise ConfigError("a dataset of clip_batch.read has no such method: give to_table columns and a filter")

    filter = join = join_asof = sort_by = replace_schema = get_fragments = take = _unsupported

    def _blocks(self, columns: Sequence[str], filter: Any) -> Iterator[tuple[pa.Table, VectorsOf]]:
        """All rows in order, at most ROWS at a time: at least these columns, and how their vectors are read.

        Blocks in which no row can meet the filter may be left out.
        """
        raise NotImplementedError

    def _schema_of(self, columns: Columns | None) -> pa.Schema:
        if columns is None:
            return self.schema
        if isinstance(columns, Mapping):
            return _scan(self.schema.empty_table(), columns=dict(columns)).schema
        return pa.schema([self.schema.field(name) for name in columns if name in self.schema.names])

    def _list(self, vectors: Vectors) -> pa.Array:
        """Vectors (n, d) as fixed-size lists; null where all is zero."""
        values = pa.array(np.ascontiguousarray(vectors).reshape(-1), pa.float32())
        kind = pa.list_(pa.float32(), self._dim)
        return pa.FixedSizeListArray.from_arrays(values, type=kind, mask=pa.array(~vectors.any(axis=1)))


class OutputDataset(RowDataset):
    """The committed rows of OUT."""

    def __init__(self, source: Embeddings) -> None:
        self._source = source
        modalities = [
            kind for kind, folder in paths.VECTORS.items() if all(part.file(folder) for part in source.commits)
        ]
        clashes = [f"{modality}_vector" for modality in modalities]
        self._names = {f"json_{name}" if name in clashes else name: name for name in source.metadata_schema.names}
        renamed = [source.metadata_schema.field(name).with_name(shown) for shown, name in self._names.items()]
        super().__init__(pa.schema(renamed), modalities, source.dim)

    def __repr__(self) -> str:
        return f"<OutputDataset {self._source.store.url}: {self._source.rows:,} rows of {self._dim}>"

    def count_rows(self, filter: Any = None, **options: Any) -> int:
        """The number of rows that meet the filter."""
        return self._source.rows if filter is None else super().count_rows(filter)

    def _blocks(self, columns: Sequence[str], filter: Any) -> Iterator[tuple[pa.Table, VectorsOf]]:
        wanted = [self._names[name] for name in columns]
        shown = {name: shown for shown, name in self._names.items()}

        def keep(file: IO[bytes]) -> Sequence[int]:
            fragment = ds.ParquetFileFormat().make_fragment(pa.PythonFile(file))
            pieces = fragment.split_by_row_group(filter, schema=self.schema)
            return [group.id for piece in pieces for group in piece.row_groups]

        # Statistics are by the names of the file, and a renamed column is another one there.
        renamed = any(name.startswith("json_") for name in self._names)
        for commit in self._source.commits:
            with ExitStack() as stack:
                matrices: dict[str, npt.NDArray[Any]] = {}
                for table in self._source.scan_metadata(commit, wanted, None if filter is None or renamed else keep):
                    table = table.rename_columns([shown[name] for name in table.column_names])
                    for start in range(0, len(table), ROWS):
                        block = table.slice(start, ROWS)
                        yield block, self._reader(commit, block[LINEAGE[1]].to_numpy(), matrices, stack)

    def _reader(
        self, commit: Commit, rows: npt.NDArray[Any], matrices: dict[str, npt.NDArray[Any]], stack: ExitStack
    ) -> VectorsOf:
        def vectors_of(modality: str, places: npt.NDArray[np.int64]) -> Vectors:
            if modality not in matrices:  # a remote file is fetched when a vector of it is first asked for
                matrices[modality] = stack.enter_context(self._source.mapped(commit, modality))
            with np.errstate(over="ignore"):
                return unit(np.asarray(matrices[modality][rows[places]], dtype=np.float16))

        return vectors_of


class IndexDataset(RowDataset):
    """The rows of the live version of INDEX that were not removed.

    Of a remote INDEX, metadata files are fetched one after another while they are read; it is copied to this machine's
    cache as a whole, as a search does, once vectors are asked for.
    """

    def __init__(self, store: Store, storage: StorageConfig) -> None:
        self._store, self._storage = store, storage
        self._searcher: Searcher | None = None
        self._rows: VectorRows | None = None
        if store.local or foreign_index.is_index(store):
            searcher = self._opened()
            self._manifest, self._removed, metadata = searcher.manifest, searcher.removed, searcher.schema
        else:
            self._manifest = load_manifest(store)
            names = [self._manifest.paths(shard).metadata(shard.name) for shard in self._manifest.shards]
            with ThreadPoolExecutor(16) as pool:
                metadata = common_schema(list(pool.map(lambda name: _plain(read_schema(store, name)), names)))
            self._removed = removed_ids(store, self._manifest, fetch_metadata(store, self._manifest))
        modalities = list(self._manifest.key)
        own = ["id", *(f"{modality}_vector" for modality in modalities)]
        self._names = {f"json_{name}" if name in own else name: name for name in metadata.names}
        renamed = [metadata.field(name).with_name(shown) for shown, name in self._names.items()]
        self._metadata = metadata
        super().__init__(pa.schema([("id", pa.int64()), *renamed]), modalities, self._manifest.dim)

    def __repr__(self) -> str:
        return f"<IndexDataset {self._manifest.version}: {self.count_rows():,} rows of {self._dim}>"

    def close(self) -> None:
        """Close the index."""
        if self._searcher:
            self._searcher.close()

    def count_rows(self, filter: Any = None, **options: Any) -> int:
        """The number of rows that meet the filter."""
        alive = self._manifest.rows - len(self._removed)
        return alive if filter is None else super().count_rows(filter)

    def _opened(self) -> Searcher:
        """The index, opened; a remote one is copied first. ConfigError: another version went live meanwhile."""
        if self._searcher is None:
            self._searcher = Searcher(self._store.url, self._storage)
            version = self._searcher.manifest.version
            if hasattr(self, "_manifest") and version != self._manifest.version:
                raise ConfigError(f"{self._store.url} has version {version} now: call clip_batch.read again")
        return self._searcher

    def _blocks(self, columns: Sequence[str], filter: Any) -> Iterator[tuple[pa.Table, VectorsOf]]:
        names = [name for name in columns if name != "id"]
        schema = pa.schema([self._metadata.field(self._names[name]) for name in names])
        for shard in self._manifest.shards:
            with ExitStack() as stack:
                file: MetadataFile | None = None
                if names and self._searcher is None:
                    name = self._manifest.paths(shard).metadata(shard.name)
                    file = MetadataFile(stack.enter_context(self._store.fetch(name)))
                end = shard.offset + shard.rows
                for start in range(shard.offset, end, ROWS):
                    low, high = np.searchsorted(self._removed, [start, min(start + ROWS, end)])
                    every = np.arange(start, min(start + ROWS, end))
                    ids = np.setdiff1d(every, self._removed[low:high], assume_unique=True)
                    columns_of = {"id": pa.array(ids)}
                    if names:
                        if file:
                            table = take_as(file, ids - shard.offset, schema)
                        else:
                            table = self._opened().table(ids, schema.names)
                        columns_of |= zip(names, table.columns, strict=True)
                    yield pa.table(columns_of), lambda modality, places, ids=ids: self._read(modality, ids[places])  # type: ignore[misc]

    def _read(self, modality: str, ids: npt.NDArray[np.int64]) -> Vectors:
        if self._rows is None:
            self._rows = VectorRows(self._opened())
            if not self._rows.exact:
                warnings.warn(f"vectors are {self._rows.origin}", stacklevel=2)
        return self._rows.vectors(ids)[modality]


def _plain(schema: pa.Schema) -> pa.Schema:
    """The schema of a metadata file as `MetadataFile` gives it: without dictionaries."""
    kinds = [one.type.value_type if pa.types.is_dictionary(one.type) else one.type for one in schema]
    return pa.schema([one.with_type(kind) for one, kind in zip(schema, kinds, strict=True)])


def _named_in(names: Sequence[str], *expressions: Any) -> list[str]:
    """The columns that expressions may use: those whose names their text has; all where it has none of them.

    pyarrow does not say which columns an expression uses. A name in a text constant makes one column too many.
    """
    text = "\n".join(map(str, expressions))
    return [name for name in names if name in text and "FieldPath" not in text] or list(names)


def _scan(table: pa.Table, **options: Any) -> pa.Table:
    return ds.InMemoryDataset(table).to_table(use_threads=False, **options)
