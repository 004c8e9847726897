"""An index folder that clip-retrieval's own `back` serves.

    FOLDER/image.index, text.index      one plain faiss file each, with the effort that merge tuned stored in it
    FOLDER/metadata/metadata_000000.parquet, ...    row i over all files is id i, as in INDEX
    FOLDER/indices_paths.json           for `clip-retrieval back --indices_paths`; written last

clip-retrieval finds metadata by position, so a row that was removed stays as an empty one; no index has its id.
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
from clip_batch.types import EncoderSpec

INDICES = "indices_paths.json"
BLOCK = 65_536
"""Metadata rows in memory at a time."""

IMAGE_PATH = "image_path"
"""Its page and client look for it, and `back` opens the file of that name where there is one."""

COLUMNS = ("url", IMAGE_PATH, "caption", "NSFW", "key", "shard")
"""What a hit shows: clip-retrieval's own choice, and where the image is. Numbers that may be missing would be NaN."""


def export_clip_retrieval(
    index: str,
    folder: str,
    storage: StorageConfig = StorageConfig(),
    progress: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the live version of INDEX, without removed rows, to a local folder that holds no such export yet.

    Memory: the largest of its indices (see `concatenate`). ConfigError: the folder is remote or has an export,
    or clip-retrieval cannot serve this kind of index. Otherwise as `Searcher`.
    """
    if not is_local(folder):
        raise ConfigError(f"{folder} is remote: clip-retrieval serves a local folder, so export to one and copy it")
    store = Store(folder)
    if store.exists(INDICES):
        raise ConfigError(f"{store.display(INDICES)} is there already: name another folder, or delete this one")
    with Searcher(index, storage) as searcher:
        for number, table in enumerate(_tables(searcher)):
            with store.writer(f"metadata/metadata_{number:06d}.parquet") as file:
                rows = _write(table, file)
            progress(f"metadata {number + 1}: {rows:,} rows")
        for modality, effort in searcher.manifest.effort.items():
            parts = [(one.index, one.offset) for one in searcher.indices[modality]]
            with store.writer(f"{modality}.index") as file:
                concatenate(parts, searcher.removed, effort, file.name)
            progress(f"{modality}: {len(parts)} index shards in one file")
        name = os.path.basename(store.url)
        made = {name: _options(store.url, searcher.manifest.encoder)}
    store.replace(INDICES, json.dumps(made, indent=1).encode())
    progress(f"serve it: clip-retrieval back --indices_paths {store.path(INDICES)}{_flags(made[name])}")


def _tables(searcher: Searcher) -> Iterator[Iterator[pa.Table]]:
    """The metadata of each shard, in blocks."""
    offset = 0
    for metadata in searcher.tables:
        gone = searcher.removed[np.searchsorted(searcher.removed, offset) :] - offset
        yield (
            _block(metadata.take(np.arange(start, min(start + BLOCK, metadata.rows))), gone - start)
            for start in range(0, metadata.rows, BLOCK)
        )
        offset += metadata.rows


def _block(table: pa.Table, gone: np.ndarray[Any, np.dtype[np.int64]]) -> pa.Table:
    """Rows as clip-retrieval wants them: with an image_path, which is never null; those that are `gone` empty."""
    if IMAGE_PATH not in table.column_names:
        table = table.append_column(IMAGE_PATH, table["key"])
    there = np.ones(len(table), dtype=bool)
    there[gone[(gone >= 0) & (gone < len(table))]] = False
    columns = {name: pc.if_else(pa.array(there), table[name], None) for name in table.column_names}
    columns[IMAGE_PATH] = pc.coalesce(columns[IMAGE_PATH].cast(pa.string()), "")
    return pa.table(columns)


def _write(tables: Iterator[pa.Table], file: IO[bytes]) -> int:
    """Write tables as one Parquet file; how many rows."""
    writer: Any = None
    rows = 0
    for table in tables:
        writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
        writer.write_table(table)
        rows += len(table)
    writer.close()
    return rows


def _options(folder: str, encoder: EncoderSpec) -> dict[str, Any]:
    """What `back` is told of the index: options of its command line. Extras that exist for two models only are off."""
    options: dict[str, Any] = {
        "indice_folder": folder,
        "columns_to_return": list(COLUMNS),
        "enable_mclip_option": False,
        "provide_aesthetic_embeddings": False,
        "use_jit": False,
    }
    if not set("/:") & set(encoder.model) and encoder.model != "demo":  # it cannot name hub models nor folders
        options["clip_model"] = f"open_clip:{encoder.model}/{encoder.pretrained}"
    return options


def _flags(options: dict[str, Any]) -> str:
    return "" if "clip_model" in options else " --clip_model MODEL, the encoder of this index in its words"
