"""Captions from the Parquet file that img2dataset writes beside each tar."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from clip_batch.samples.tar.suffixes import tar_stem
from clip_batch.storage.paths import split_url
from clip_batch.storage.retry import corrupt_unless_unavailable
from clip_batch.storage.store import Store

_ROWS = 10_000
"""Rows of the file that are in memory at a time."""


def captions_beside(url: str, field: str, keys: Collection[str], options: dict[str, Any] | None) -> dict[str, str]:
    """The captions of a tar's samples by key: column `field` of NAME.parquet beside NAME.tar.

    It is empty if there is no such file, or if it lacks that column or `key`. Only the captions of `keys` are kept.
    CorruptError: the file is not readable Parquet. OSError: the store does not answer.
    """

    from clip_batch.storage.arrow import UNREADABLE, ParquetFile, caption_column, text_column

    folder, name = split_url(url)
    store, path = Store(folder, options), tar_stem(name) + ".parquet"
    wanted, captions = set(keys), dict[str, str]()
    try:
        opened = store.open(path)
    except FileNotFoundError:
        return {}
    what = f"captions cannot be read from {store.display(path)}"
    with opened as file, corrupt_unless_unavailable(what, "copy it again", *UNREADABLE):
        parquet = ParquetFile(file)
        if not {"key", field} <= set(parquet.schema.names):
            return {}
        for piece in parquet.pieces(_ROWS, ["key", field]):
            texts = text_column(piece["key"]), caption_column(piece[field])
            pairs = zip(*(column.to_pylist() for column in texts), strict=True)
            captions.update((key, text.strip()) for key, text in pairs if key in wanted and text and text.strip())
    return captions
