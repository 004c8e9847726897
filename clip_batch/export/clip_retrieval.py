"""Export an index as a folder that `clip-retrieval back` serves.

    FOLDER/image.index, text.index      one plain faiss file each, which stores the effort that merge tuned
    FOLDER/metadata/metadata_000000.parquet, ...    row i over all files is id i, as in INDEX
    FOLDER/indices_paths.json           for `clip-retrieval back --indices_paths`; written last

clip-retrieval looks up metadata by position, so a removed row stays as an empty row, whose id is in no index.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clip_batch.config import StorageConfig
from clip_batch.errors import ConfigError
from clip_batch.index.ann.concatenate import concatenate
from clip_batch.search.searcher import Searcher
from clip_batch.storage.paths import is_local
from clip_batch.storage.store import Store
from clip_batch.types import EncoderSpec, counted

INDICES = "indices_paths.json"
BLOCK = 65_536
"""Metadata rows in memory at a time."""

IMAGE_PATH = "image_path"
"""Column that clip-retrieval's page and client read. `back` opens the file that it names, if there is one."""

COLUMNS = ("url", IMAGE_PATH, "caption", "NSFW", "key", "shard")
"""Columns of a hit: clip-retrieval's defaults, and the image's shard. A numeric column with nulls would give NaN."""


def export_clip_retrieval(
    index: str,
    folder: str,
    storage: StorageConfig = StorageConfig(),
    progress: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the live version of INDEX, without removed rows, to a local folder that holds no export yet.

    Memory: the largest of its indices (see `concatenate`). ConfigError: the folder is remote or has an export, or
    clip-retrieval cannot serve this kind of index. Other errors: those of `Searcher`.
    """
    if not is_local(folder):
        raise ConfigError(f"{folder} is remote: clip-retrieval serves a local folder, so export to one and copy it")
    store = Store(folder)
    if store.exists(INDICES):
        raise ConfigError(f"{store.display(INDICES)} exists already: name another folder, or delete this one")
    with Searcher(index, storage) as searcher:
        shards = len(searcher.manifest.shards)
        progress(f"metadata of {counted(shards, 'index shard')} are written first; then the indices")
        for number, table in enumerate(_tables(searcher)):
            with store.writer(f"metadata/metadata_{number:06d}.parquet") as file:
                rows = _write(table, file)
            progress(f"metadata {number + 1} of {shards} written: {counted(rows, 'row')}")
        for modality, effort in searcher.manifest.effort.items():
            parts = [(one.index, one.offset) for one in searcher.indices[modality].parts]
            progress(f"{modality}.index is written: {counted(len(parts), 'index shard')} become one file")
            with store.writer(f"{modality}.index") as file:
                concatenate(parts, searcher.removed, effort, file.name, searcher.stored.get(modality))
        name = os.path.basename(store.url)
        served = {name: _options(store.url, searcher.manifest.encoder)}
    store.replace(INDICES, json.dumps(served, indent=1).encode())
    progress(f"serve it: clip-retrieval back --indices_paths {store.path(INDICES)}{_flags(served[name])}")


def _tables(searcher: Searcher) -> Iterator[Iterator[pa.Table]]:
    """Yield the metadata of each shard, as an iterator of blocks."""
    offset = 0
    for metadata in searcher.tables:
        removed = searcher.removed[np.searchsorted(searcher.removed, offset) :] - offset
        yield (
            _block(metadata.take(np.arange(start, min(start + BLOCK, metadata.rows))), removed - start)
            for start in range(0, metadata.rows, BLOCK)
        )
        offset += metadata.rows


def _block(table: pa.Table, removed: np.ndarray[Any, np.dtype[np.int64]]) -> pa.Table:
    """Return rows as clip-retrieval needs them: `removed` rows are empty, and image_path is never null."""
    if IMAGE_PATH not in table.column_names:
        table = table.append_column(IMAGE_PATH, table["key"])
    kept = np.ones(len(table), dtype=bool)
    kept[removed[(removed >= 0) & (removed < len(table))]] = False
    columns = {name: pc.if_else(pa.array(kept), table[name], None) for name in table.column_names}
    columns[IMAGE_PATH] = pc.coalesce(columns[IMAGE_PATH].cast(pa.string()), "")
    return pa.table(columns)


def _write(tables: Iterator[pa.Table], file: IO[bytes]) -> int:
    """Write tables as one Parquet file, and return the number of rows."""
    writer: Any = None
    rows = 0
    for table in tables:
        writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
        writer.write_table(table)
        rows += len(table)
    writer.close()
    return rows


def _options(folder: str, encoder: EncoderSpec) -> dict[str, Any]:
    """Return command line options of `back` for this index. Features that exist for two models only are off."""
    options: dict[str, Any] = {
        "indice_folder": folder,
        "columns_to_return": list(COLUMNS),
        "enable_mclip_option": False,
        "provide_aesthetic_embeddings": False,
        "use_jit": False,
    }
    if (
        not set("/:") & set(encoder.model) and encoder.model != "demo"
    ):  # clip-retrieval cannot name hub models or folders
        options["clip_model"] = f"open_clip:{encoder.model}/{encoder.pretrained}"
    return options


def _flags(options: dict[str, Any]) -> str:
    return "" if "clip_model" in options else " --clip_model MODEL, the encoder of this index in its words"
