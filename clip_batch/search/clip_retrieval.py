"""Open an index folder of clip-retrieval, described by a manifest as if `merge` had written it as one shard.

    image.index, text.index        faiss files; one of them may be absent
    image.json, text.json          the descriptions that autofaiss wrote; they may be absent
    metadata/*.parquet             row i, in the order of the files' names, is vector i

clip-retrieval searches with the effort that autofaiss stored in the faiss file, and so do we: `effort` is None.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import pyarrow as pa

from clip_batch.embeddings.clip_retrieval import version_tag
from clip_batch.embeddings.tables import VERSION as TABLES
from clip_batch.embeddings.tables import Tables
from clip_batch.errors import ConfigError, CorruptError
from clip_batch.index import metadata_writer
from clip_batch.index.ann import faiss_index
from clip_batch.index.manifest import IndexShard, Manifest
from clip_batch.index.paths import CURRENT, VersionPaths
from clip_batch.storage.cache import cache_home, local_copy
from clip_batch.storage.store import Store
from clip_batch.types import EncoderSpec, StoredFile

MODEL, PRETRAINED = "ViT-B-32-quickgelu", "openai"
"""The names in open_clip of ViT-B/32, which is clip-retrieval's default model."""

MODALITIES = ("image", "text")
SHARD = "0000"


@dataclass(frozen=True)
class ClipRetrievalIndex:
    """A manifest, and the local paths of the files that it names, such as <version>/<modality>/<shard>.index."""

    manifest: Manifest
    files: dict[str, str]


def is_index(store: Store) -> bool:
    """Return whether a folder has an index of clip-retrieval, and none of ours."""
    return not store.exists(CURRENT) and any(store.exists(f"{modality}.index") for modality in MODALITIES)


def open_index(store: Store, model: str = "", pretrained: str = "") -> ClipRetrievalIndex:
    """Open an index folder. Its metadata is converted into the cache, once for each state of its files.

    `model` and `pretrained` name the encoder, which clip-retrieval does not record; the default is clip-retrieval's.
    Remote files are copied into the cache. ConfigError: the metric is not inner product, there is no metadata, or the
    index is one on disk. CorruptError: the indices and the metadata differ in rows, or a file cannot be read.
    """
    names = {modality: name for modality in MODALITIES if store.exists(name := f"{modality}.index")}
    paths = {modality: _local(store, name) for modality, name in names.items()}
    indices = {modality: faiss_index.read(path, mapped=True) for modality, path in paths.items()}
    tables = Tables(store, [(_number(name), f"metadata/{name}") for name in _parquets(store)])
    rows = sum(tables.rows(path) for _, path in tables.files)
    dim = next(iter(indices.values())).d
    for modality, index in indices.items():
        where = store.display(names[modality])
        if index.ntotal != rows:
            raise CorruptError(
                f"{where} has {index.ntotal} rows, {store.display('metadata')} has {rows}: copy both again"
            )
        if index.d != dim:
            raise CorruptError(f"{where} has {index.d} dimensions, the other index {dim}: copy both again")
        if index.metric_type != 0:  # faiss.METRIC_INNER_PRODUCT
            raise ConfigError(f"{where} is not of inner products: build it with clip-retrieval index, or merge again")
    tags = {path: version_tag(store, path) for path in (*names.values(), *(path for _, path in tables.files))}
    digest = hashlib.sha256(repr([TABLES, store.url, sorted(tags.items())]).encode()).hexdigest()[:12]
    names_of = VersionPaths()
    files = {names_of.index(modality, SHARD): path for modality, path in paths.items()}
    files[names_of.metadata(SHARD)] = _converted(tables, digest, rows)
    sizes: dict[str, StoredFile] = {
        name: {"bytes": os.path.getsize(path), "sha256": ""} for name, path in files.items()
    }
    version = f"clip-retrieval-{digest}"
    manifest = Manifest(
        version=version,
        created=max(filter(None, (store.modified(name) for name in names.values())), default=0.0),
        dim=dim,
        rows=rows,
        encoder=EncoderSpec(model or MODEL, pretrained if model else pretrained or PRETRAINED, weights=""),
        plan="",
        key={modality: _key(store, modality) for modality in names},
        effort=dict.fromkeys(names),
        recall={},
        recall_target=0.0,
        missing=(),
        allow_partial=False,
        shards=(IndexShard(SHARD, rows, 0, sizes),),
    )
    return ClipRetrievalIndex(manifest, {VersionPaths(version).file(name): path for name, path in files.items()})


def _local(store: Store, name: str) -> str:
    """Return the local path of an index file; a remote file is copied. ConfigError: it is an index on disk."""
    if store.list(name):
        raise ConfigError(
            f"{store.display(name)} is a folder (an index with its lists on disk): merge the embeddings with "
            "--layout single instead"
        )
    return store.path(name) if store.local else local_copy(store.display(name), store.options)


def _parquets(store: Store) -> list[str]:
    """Return the metadata files, in the order in which clip-retrieval numbers their rows."""
    if names := [name for name in store.list("metadata") if name.endswith(".parquet")]:
        return names
    raise ConfigError(
        f"{store.display('metadata')} has no Parquet files: copy metadata/ of the embeddings folder there"
    )


def _number(name: str) -> int:
    """Return the number of the part in a file name; 0 if it has none."""
    match = re.search(r"_(\d{1,9})(-[0-9a-f]{8})?\.parquet$", name)
    return int(match[1]) if match else 0


def _key(store: Store, modality: str) -> str:
    """Return the factory string that autofaiss wrote beside the index, or "unknown"."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        return str(store.read_json(f"{modality}.json")["index_key"])
    return "unknown"


def _converted(tables: Tables, digest: str, rows: int) -> str:
    """Return the path of the metadata as an Arrow file in the cache, and remove those of older states of the folder."""
    folder = os.path.join(cache_home(), "clip-retrieval")
    prefix = hashlib.sha256(tables.store.url.encode()).hexdigest()[:12]
    path = os.path.join(folder, f"{prefix}-{digest}.arrow")
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        part = f"{path}.{secrets.token_hex(4)}"
        try:
            metadata_writer.write_ordered(_blocks(tables), np.arange(rows), part)
            os.replace(part, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
        for name in os.listdir(folder):
            if name.startswith(prefix) and name.endswith(".arrow") and name != os.path.basename(path):
                os.unlink(os.path.join(folder, name))  # a process that has it open can still read it
    return path


def _blocks(tables: Tables) -> Iterator[pa.Table]:
    """Yield the metadata, one row group at a time."""
    for number, path in tables.files:
        for start, stop in pairwise(accumulate(tables.footers[path].groups, initial=0)):
            yield tables.read(number, path, start, stop)
