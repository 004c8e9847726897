"""search and filter: one query on the command line."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from clip_batch.cli.arguments import IndexArguments, JsonArguments, answer, say
from clip_batch.config import SearchConfig, StorageConfig
from clip_batch.config.texts import query_text, shell_text
from clip_batch.config.values import ANY
from clip_batch.errors import ConfigError
from clip_batch.types import counted

if TYPE_CHECKING:
    from clip_batch.search.query import Query, QueryTerm
    from clip_batch.types import Hit

_REPEAT = {"repeat": True}


@dataclass(frozen=True, kw_only=True)
class QueryArguments(JsonArguments, IndexArguments):
    """What is searched for, and in which index."""

    text: list[str] = field(default_factory=list, metadata=_REPEAT)
    """A text to search for; may be given several times, as may the next three: their weighted sum is searched for."""
    image: list[str] = field(default_factory=list, metadata=_REPEAT)
    """An image file to search for: a path, or a URL."""
    embedding: list[str] = field(default_factory=list, metadata=_REPEAT)
    """A .npy file of one vector to search for."""
    id: list[int] = field(default_factory=list, metadata=_REPEAT)
    """A row of the index, to search for rows like it."""
    weight: list[Annotated[float, ANY]] = field(default_factory=list, metadata=_REPEAT)
    """Weight of a text, image, vector or row; negative: away from it. Give one for each, in this order, or none."""


def search(arguments: QueryArguments, search: SearchConfig, storage: StorageConfig) -> int:
    """Search an index with texts, images, vectors or rows of it."""
    from clip_batch.search.results import describe_hits
    from clip_batch.search.searcher import Searcher

    query = _query(arguments, search, search.k)
    with Searcher(arguments.index_folder, storage, config=search) as searcher:
        result = searcher.find(query, search.columns or None)
    if not result.complete:
        say(f"there may be more hits: {result.scanned:,} candidates were looked through for {search.k}")
    answer(arguments, [_without_null_aesthetic(hit) for hit in result.hits], describe_hits(result.hits, search.columns))
    return 0


@dataclass(frozen=True, kw_only=True)
class FilterArguments(QueryArguments):
    """Where `filter` writes, and what besides rows."""

    output: str
    """The folder to write: a path, or any URL that fsspec opens."""
    images: bool = False
    """Copy the rows' images too, into tars."""
    images_from: Literal["tar", "path", "url"] = "tar"
    """Where images are copied from. tar: the planned file; path, url: what the column image_path, or url, names."""


def filter(arguments: FilterArguments, search: SearchConfig, storage: StorageConfig) -> int:
    """Every row over a --threshold, or the k best, as Parquet in OUTPUT; their images too, if asked."""
    from clip_batch.api import index

    query = _query(arguments, search, search.k if search.threshold is None else None)
    done = index.filter(
        arguments.index_folder,
        query,
        arguments.output,
        columns=search.columns or None,
        images=arguments.images,
        images_from=arguments.images_from,
        config=search,
        storage=storage,
        progress=say,
    )
    text = f"{counted(done.rows, 'row')}, {counted(done.images, 'image')}: {arguments.output}"
    place = {"tar": "a planned file", "path": "an image_path", "url": "a url"}[arguments.images_from]
    text += f"; {counted(done.missing, 'image')} could not be read from {place}" if done.missing else ""
    text += "" if done.complete else f"; fewer than {search.k:,}, and there may be more: lower --k"
    answer(arguments, asdict(done), text)
    return 0


def _query(arguments: QueryArguments, search: SearchConfig, k: int | None) -> Query:
    from clip_batch.search.query import Criteria, Query

    if search.unique_threshold is not None and not search.unique:
        raise ConfigError("--unique-threshold has no effect without --unique: add it, or leave both out")
    shared = {field.name for field in dataclasses.fields(Criteria)} - {"k", "kind"}
    criteria = {name: getattr(search, name) for name in shared}
    if search.unique_threshold is None:
        del criteria["unique_threshold"]
    if search.where is not None:
        criteria["where"] = shell_text(search.where, "--where")
    return Query(terms=_terms(arguments), k=k, **criteria)


def _terms(arguments: QueryArguments) -> list[QueryTerm]:
    from clip_batch.search.query import QueryTerm

    given: list[dict[str, Any]] = [
        {"text": query_text(shell_text(text, "--text"), "--text")} for text in arguments.text
    ]
    given += [{"image": image} for image in arguments.image]
    given += [{"embedding": read_vector(path)} for path in arguments.embedding]
    given += [{"id": row} for row in arguments.id]
    if not given:
        raise ConfigError("a search needs one of --text, --image, --embedding and --id")
    if arguments.weight and len(arguments.weight) != len(given):
        many = f"--weight is given {len(arguments.weight)} times for {len(given)} things to search for"
        raise ConfigError(f"{many}: give one for each text, image, embedding and id, in this order, or none")
    weights = arguments.weight or [1.0] * len(given)
    return [QueryTerm(**term, weight=weight) for term, weight in zip(given, weights, strict=True)]


def read_vector(path: str) -> Any:
    """The array of a .npy file. ConfigError: it is none."""
    import numpy as np

    try:
        with open(path, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ConfigError(f"--embedding {path} is no file: give a .npy file of one vector") from None
    except (ValueError, EOFError):
        raise ConfigError(f"--embedding {path} is no .npy file of numbers: give one that numpy.save wrote") from None


def _without_null_aesthetic(hit: Hit) -> dict[str, Any]:
    values = asdict(hit)
    if hit.aesthetic is None:
        del values["aesthetic"]
    return values
