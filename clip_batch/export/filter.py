"""filter: write every row that scores over a threshold, or the k best, as Parquet, and copy their images to tars.

    DIR/rows/00000.parquet      id, score and the metadata, in row groups of 10,000 rows
    DIR/images/00000.tar        <id>.<extension>, <id>.txt and <id>.json, as webdataset and `plan` read them
    DIR/filter.json             written last: the query, the counts, and which ids our planner located

If the metadata has the columns url and caption, so do the Parquet files, and img2dataset can read them.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_batch.config import StorageConfig
from clip_batch.errors import ClipBatchError, ConfigError, some
from clip_batch.samples import kinds
from clip_batch.search import lineage
from clip_batch.search.checks import check_columns
from clip_batch.search.find import THOROUGH, best_rows, rows_over
from clip_batch.search.query import Query
from clip_batch.search.rows import Ids, Vectors
from clip_batch.search.searcher import Searcher
from clip_batch.storage import web
from clip_batch.storage.store import Store, read_url
from clip_batch.types import counted

GROUP = 10_000
"""Rows of a Parquet row group and of a tar, which are in memory at a time."""

FILE = 100 * GROUP
"""Rows of a Parquet file."""


_ABOUT = "filter.json"

ImagesFrom = Literal["tar", "path", "url"]
"""Where the pictures of rows are copied from."""

_COLUMN = {"path": "image_path", "url": "url"}
"""The metadata column that says where a picture is."""

_READERS, _TIMEOUT, _LARGEST, _PRIVATE = 32, 10.0, 2**26, False
"""Files and URLs that are read at a time, seconds and bytes of one URL, and whether addresses may be private ones."""


@dataclass(frozen=True)
class Filtered:
    """What `filter_rows` wrote.

    `missing` images are not where they were looked for: they have no byte range in a tar, or are no longer in it.
    `complete` is false if fewer than k rows were found and a deeper search might find more.
    """

    rows: int
    images: int
    missing: int
    complete: bool = True


def filter_rows(
    searcher: Searcher,
    query: Query,
    store: Store,
    images: bool = False,
    columns: Sequence[str] | None = None,
    images_from: ImagesFrom = "tar",
    progress: Callable[[str], None] = lambda line: None,
) -> Filtered:
    """Write the k best rows of a query to the folder `store`; with a threshold and no `k`, every row over it.

    `columns` are the metadata columns to write; None writes all. `images` copies pictures into tars from where
    `images_from` says: their byte range in a tar that our planner recorded ("tar"), or as clip-retrieval's own filter
    does, the file that the column image_path names ("path") or the one at the column url ("url"). Every row over a
    threshold is written in the order of the index, the k best are written best first. The result of an earlier run is
    replaced, but pictures only by the same query. Memory: one index shard's ids and scores (with `unique`, those of all
    rows), and 10,000 rows. ConfigError: the folder has files, but no result of an earlier run, or pictures of another
    query; and the errors of `Searcher.find`.
    """
    if (present := store.list("")) and _ABOUT not in present:
        where = f"{store.url} has files that are no result of a filter ({some(present)})"
        raise ConfigError(f"{where}: name another output, or remove them if an interrupted filter left them")
    if present:
        _check_same(store, query)
    if columns is not None:
        check_columns(searcher.schema, columns)
    if images_from not in get_args(ImagesFrom):
        raise ConfigError(f"images_from is {images_from!r}: it must be one of {', '.join(get_args(ImagesFrom))}")
    if images and images_from != "tar":
        check_columns(searcher.schema, [_COLUMN[images_from]])
    complete = True
    pieces: Iterator[tuple[Vectors, Ids]]
    if query.threshold is not None and query.k is None:
        pieces = rows_over(searcher, query, searcher.heads)
    else:
        ranked = best_rows(searcher, query, searcher.heads, THOROUGH)
        pieces, complete = iter([(ranked.scores, ranked.ids)]), ranked.complete
    store.remove(_ABOUT)
    store.remove_folder("rows")
    store.remove_folder("images")
    rows = copied = missing = 0
    with ExitStack() as stack:
        writer: Any = None
        for number, table in enumerate(_groups(searcher, pieces)):
            written = table if columns is None else table.select(list(dict.fromkeys(["id", "score", *columns])))
            if rows % FILE == 0:
                stack.close()
                file = stack.enter_context(store.writer(f"rows/{rows // FILE:05d}.parquet"))
                writer = stack.enter_context(pq.ParquetWriter(file, written.schema, compression="zstd"))
            writer.write_table(written)
            rows += len(table)
            if images:
                images_copied = _copy_images(searcher, table, store, f"images/{number:05d}.tar", images_from)
                copied, missing = copied + images_copied, missing + len(table) - images_copied
            if rows % GROUP == 0:
                also = f" and {counted(copied, 'image')}" if images else ""
                progress(f"{counted(rows, 'row')}{also} written so far")
    result = Filtered(rows, copied, missing, complete)
    about = {"index": searcher.manifest.version, **query.describe(), "planned": lineage.planned(searcher.manifest)}
    store.replace(_ABOUT, json.dumps({**about, **asdict(result)}, indent=1).encode())
    return result


def _check_same(store: Store, query: Query) -> None:
    """ConfigError if a folder has the pictures of a run with another query, which would be removed."""
    about = json.loads(store.read(_ABOUT))
    ours = {"index", "planned", *(field.name for field in fields(Filtered))}
    if about.get("images") and {name: about[name] for name in about if name not in ours} != query.describe():
        where = f"{store.url} has {about['images']} pictures of another query"
        raise ConfigError(f"{where}: name another output, or remove that folder")


def _groups(searcher: Searcher, pieces: Iterator[tuple[Vectors, Ids]]) -> Iterator[pa.Table]:
    """Yield tables of GROUP rows, the last one shorter, with id, score and metadata."""
    scores, ids = np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int64)
    for more_scores, more_ids in pieces:
        scores, ids = np.concatenate([scores, more_scores]), np.concatenate([ids, more_ids])
        while len(ids) >= GROUP:
            yield _table(searcher, scores[:GROUP], ids[:GROUP])
            scores, ids = scores[GROUP:], ids[GROUP:]
    if len(ids):
        yield _table(searcher, scores, ids)


def _table(searcher: Searcher, scores: Vectors, ids: Ids) -> pa.Table:
    table = searcher.table(ids)
    kept = [
        name for name in table.column_names if name not in ("id", "score")
    ]  # the id and score of the result replace columns of those names
    return table.select(kept).add_column(0, "score", pa.array(scores)).add_column(0, "id", pa.array(ids))


def _copy_images(searcher: Searcher, table: pa.Table, store: Store, name: str, images_from: ImagesFrom) -> int:
    """Write the rows' images, captions and metadata to a tar, and return the number of images."""
    copied = 0
    with store.writer(name) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row, image in _images(searcher, table.to_pylist(), images_from):
            if image is None:
                continue
            copied += 1
            members = {_extension(image): image, "json": json.dumps(row, ensure_ascii=False, default=str).encode()}
            if row.get("caption") is not None:
                members["txt"] = str(row["caption"]).encode()
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{row['id']:012d}.{extension}")
                member.size, member.mode = len(data), 0o644
                tar.addfile(member, io.BytesIO(data))
    return copied


def _images(
    searcher: Searcher, rows: list[dict[str, Any]], images_from: ImagesFrom
) -> Iterator[tuple[dict[str, Any], bytes | None]]:
    """Each row with its image file; None where it cannot be read. Files and URLs are read some at a time."""
    if images_from == "tar":
        for row in rows:
            yield (
                row,
                lineage.image(row, searcher.storage) if lineage.is_planned(searcher.manifest, row["id"]) else None,
            )
        return
    read = partial(_READ[images_from], storage=searcher.storage)
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(rows), _READERS):
            some_rows = rows[start : start + _READERS]
            yield from zip(some_rows, pool.map(read, (row[_COLUMN[images_from]] for row in some_rows)), strict=True)


def _at_path(path: Any, storage: StorageConfig) -> bytes | None:
    """The image file at a path or a URL of a store; None if it cannot be read or is no image."""
    try:
        data = read_url(str(path), storage.storage_options) if path else None
    except (OSError, ClipBatchError):
        return None
    return data if data is not None and kinds.picture(data) else None


def _at_url(url: Any, storage: StorageConfig) -> bytes | None:
    """The image file at a public web address; None if it cannot be had or is no image."""
    try:
        data = web.fetch(str(url), _LARGEST, _TIMEOUT, _PRIVATE) if url else None
    except web.FetchError:
        return None
    return data if data is not None and kinds.picture(data) else None


_READ = {"path": _at_path, "url": _at_url}

_EXTENSIONS = {"PNG": "png", "WebP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "AVIF": "avif", "HEIC": "heic"}


def _extension(image: bytes) -> str:
    """Return the extension that fits an image's first bytes; jpg if they are of another format."""
    return _EXTENSIONS.get(kinds.picture(image) or "", "jpg")
