"""search and filter: one query on the command line."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from clip_batch.cli.arguments import IndexArguments, JsonArguments, answer
from clip_batch.config import SearchConfig, StorageConfig
from clip_batch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class QueryArguments(JsonArguments, IndexArguments):
    """What is searched for, and in which index."""

    text: str = ""
    """A text to search for."""
    image: str = ""
    """An image file to search for."""
    embedding: str = ""
    """A .npy file of one vector to search for."""

    def check(self) -> None:
        """ConfigError unless there is exactly one thing to search for."""
        if sum(bool(value) for value in (self.text, self.image, self.embedding)) != 1:
            raise ConfigError("a search needs one of --text, --image and --embedding")


def search(arguments: QueryArguments, search: SearchConfig, storage: StorageConfig) -> int:
    """Search an index with a text, an image or a vector."""
    from clip_batch.search.results import describe_hits
    from clip_batch.search.searcher import Searcher

    arguments.check()
    with Searcher(arguments.index_folder, storage, config=search) as searcher:
        hits = searcher.search(_query(searcher, arguments), search.k, search.modality, search.effort)[0]
    hits = [hit for hit in hits if search.threshold is None or hit.score >= search.threshold]
    answer(arguments, [asdict(hit) for hit in hits], describe_hits(hits))
    return 0


@dataclass(frozen=True, kw_only=True)
class FilterArguments(QueryArguments):
    """Where `filter` writes, and what besides rows."""

    output: str
    """The folder to write: a path, or any URL that fsspec opens."""
    images: bool = False
    """Copy the rows' images too, into tars."""


def filter(arguments: FilterArguments, search: SearchConfig, storage: StorageConfig) -> int:
    """Every row over a --threshold, or the k best, as Parquet in OUTPUT; their images too, if asked."""
    from clip_batch.export.filter import filter_rows
    from clip_batch.search.searcher import Searcher
    from clip_batch.storage.store import Store

    arguments.check()
    with Searcher(arguments.index_folder, storage, config=search) as searcher:
        store, query = Store(arguments.output, storage.storage_options), _query(searcher, arguments)
        done = filter_rows(
            searcher, query, store, search.k, search.threshold, search.modality, search.effort, arguments.images
        )
    text = f"{done.rows:,} rows, {done.images:,} images: {arguments.output}"
    text += f"; {done.missing:,} images are not in a tar that can be read" if done.missing else ""
    answer(arguments, asdict(done), text)
    return 0


def _query(searcher: Any, arguments: QueryArguments) -> Any:
    import numpy as np

    from clip_batch.storage.store import read_url

    if arguments.text:
        return searcher.encode_text([arguments.text])
    if arguments.image:
        return searcher.encode_image(read_url(arguments.image, searcher.storage.storage_options))
    try:
        return np.load(arguments.embedding)
    except ValueError as error:
        raise ConfigError(f"--embedding {arguments.embedding} is no .npy file of numbers: {error}") from None
