"""search and filter: one query on the command line."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from clip_batch.cli.arguments import Options, answer
from clip_batch.config import SearchConfig, TargetConfig
from clip_batch.errors import ConfigError


def search(options: Options) -> int:
    """Search an index with a text, an image or a vector."""
    from clip_batch.search.results import describe_hits
    from clip_batch.search.searcher import Searcher

    how = _one_query(options)
    with Searcher(options.index, options.storage, config=how) as searcher:
        hits = searcher.search(_query(searcher, options.target), how.k, how.modality, how.effort)[0]
    hits = [hit for hit in hits if how.threshold is None or hit.score >= how.threshold]
    answer(options, [asdict(hit) for hit in hits], describe_hits(hits))
    return 0


def filter(options: Options) -> int:
    """Every row over a --threshold, or the k best, as Parquet in OUTPUT; their images too, if asked."""
    from clip_batch.export.filter import filter_rows
    from clip_batch.search.searcher import Searcher
    from clip_batch.storage.store import Store

    how = _one_query(options)
    with Searcher(options.index, options.storage, config=how) as searcher:
        store, query = Store(options.output, options.storage.storage_options), _query(searcher, options.target)
        done = filter_rows(
            searcher, query, store, how.k, how.threshold, how.modality, how.effort, options.target.images
        )
    text = f"{done.rows:,} rows, {done.images:,} images: {options.output}"
    text += f"; {done.missing:,} images are not in a tar that can be read" if done.missing else ""
    answer(options, asdict(done), text)
    return 0


def _one_query(options: Options) -> SearchConfig:
    """How to search, once there is one thing to search for."""
    target = options.target
    if sum(bool(value) for value in (target.text, target.image, target.embedding)) != 1:
        raise ConfigError("a search needs one of --text, --image and --embedding")
    return options.search


def _query(searcher: Any, target: TargetConfig) -> Any:
    import numpy as np

    from clip_batch.storage.store import read_url

    if target.text:
        return searcher.encode_text([target.text])
    if target.image:
        return searcher.encode_image(read_url(target.image, searcher.storage.storage_options))
    try:
        return np.load(target.embedding)
    except ValueError as error:
        raise ConfigError(f"--embedding {target.embedding} is no .npy file of numbers: {error}") from None
