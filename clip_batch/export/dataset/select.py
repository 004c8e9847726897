"""Which rows: what queries find in an index, or the rows that `clip-batch filter` wrote, as one file to map.

    FOLDER/rows.arrow        id, score, query, key, shard, offset, length, url, caption, then the columns asked for;
                             in the order of the tars' bytes; a row without a place in a tar comes last
    FOLDER/selection.json    written with it: what was asked, rows of each query, a digest of the ids

The folder appears whole, by a rename; who comes second takes what is there. Workers map the file, so what
travels to them is its path.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clip_batch.errors import ConfigError, CorruptError
from clip_batch.index.metadata_writer import write_ordered
from clip_batch.search.find import THOROUGH, best_rows, rows_over
from clip_batch.search.lineage import planned
from clip_batch.search.query import Query
from clip_batch.storage.arrow import ParquetFile
from clip_batch.storage.paths import absolute, is_local
from clip_batch.storage.store import Store

if TYPE_CHECKING:
    from clip_batch.config import SearchConfig, StorageConfig
    from clip_batch.search.searcher import Searcher

ROWS, ABOUT = "rows.arrow", "selection.json"

GROUP = 100_000
"""Rows whose metadata is in memory."""

TAR = {"shard": pa.string(), "offset": pa.int64(), "length": pa.int64()}
PLACE = {**TAR, "url": pa.string()}
TYPES = {**PLACE, "key": pa.string(), "caption": pa.string()}
OURS = ("id", "score", "query", "image")

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Runs = list[tuple[int, int]]


@dataclass(frozen=True)
class SavedSelection:
    """An opened selection: rows in all and of each query, a digest of their ids, whether all lie in local tars."""

    folder: str
    rows: int
    queries: tuple[int, ...]
    digest: str
    local: bool

    @property
    def path(self) -> str:
        return os.path.join(self.folder, ROWS)


@dataclass(frozen=True)
class _Found:
    """Rows before they are written: `tables` gives so many of them, in any order, as often as it is called.

    Its tables have the columns asked for, and id, score and query. `keep` are those of them to take, None for all.
    """

    rows: int
    names: Sequence[str]
    planned: Runs
    tables: Callable[[Sequence[str]], Iterator[pa.Table]]
    keep: Ids | None = None


def select(
    source: str,
    queries: Sequence[Query],
    amount: int | None,
    via: str,
    columns: Sequence[str],
    folder: str,
    storage: StorageConfig,
    search: SearchConfig,
) -> SavedSelection:
    """Make the selection in `folder`, or open the one that is there. Memory: ids and places of all rows.

    ConfigError: the folder holds what was asked otherwise, a column is not in the metadata, nothing was found,
    or as `Searcher`.
    """
    asked: dict[str, Any] = {"source": absolute(source), "queries": [query.describe() for query in queries]}
    asked |= {"amount": amount, "via": via, "columns": list(columns)}
    if os.path.exists(os.path.join(folder, ABOUT)):
        return _open(folder, asked)
    if wrong := [name for name in columns if name in OURS]:
        raise ConfigError(f"column {wrong[0]!r}: samples have that name for something else")
    store = Store(source, storage.storage_options)
    if store.exists("filter.json"):
        if queries:
            raise ConfigError(f"{source} was filtered already: leave the queries out, or name the index")
        found = _filtered(store, amount)
        return _write(found, columns, via, folder, asked)
    if not queries:
        raise ConfigError(f"no query for {source}: give a text, or some of Query")
    from clip_batch.search.searcher import Searcher

    with Searcher(source, storage, config=search) as searcher:
        return _write(_searched(searcher, queries, amount), columns, via, folder, asked)


def mix(
    found: Sequence[tuple[Ids, Floats]], weights: Sequence[float], amount: int | None = None
) -> tuple[Ids, Floats, npt.NDArray[np.int16]]:
    """The ids (n,) of several queries, each once, ascending; scores, and which query each belongs to.

    `found` has each query's ids and scores, best first. Queries take turns as their weights say: one of weight 2
    takes two rows while one of weight 1 takes one. A row that several found belongs to the one whose turn it
    is first (at the same time: the first in order), and has its score. `amount` ends the taking: as long as none
    has run out, the queries' parts are as their weights; after that the others go on.
    """
    sizes = [len(ids) for ids, _ in found]
    ids, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
    query = np.repeat(np.arange(len(found)), sizes)
    pace = np.asarray(weights, dtype=np.float64)[query]
    turn = (np.concatenate([np.arange(size) for size in sizes]) + 1) / pace
    order = np.lexsort((query, turn, ids))
    mine = order[np.diff(ids[order], prepend=-1) > 0]
    if amount is not None and len(mine) > amount:
        mine = mine[np.lexsort((turn[mine], query[mine]))]  # by query, best first; their turns without what others took
        starts = np.searchsorted(query[mine], np.arange(len(found)))
        again = (np.arange(len(mine)) - starts[query[mine]] + 1) / pace[mine]
        mine = mine[np.lexsort((query[mine], again))[:amount]]
        mine = mine[np.argsort(ids[mine])]
    return ids[mine], scores[mine], query[mine].astype(np.int16)


def _searched(searcher: Searcher, queries: Sequence[Query], amount: int | None) -> _Found:
    lists = [_find(searcher, query, amount) for query in queries]
    ids, scores, query = mix(lists, [query.weight for query in queries], amount)

    def tables(names: Sequence[str]) -> Iterator[pa.Table]:
        for start in range(0, len(ids), GROUP):
            part = slice(start, start + GROUP)
            table = searcher.table(ids[part], list(names))
            for name, values in (("id", ids), ("score", scores), ("query", query)):
                table = table.append_column(name, pa.array(values[part]))
            yield table

    names = [name for name in searcher.schema.names if name not in OURS]
    return _Found(len(ids), names, planned(searcher.manifest), tables)


def _find(searcher: Searcher, query: Query, amount: int | None) -> tuple[Ids, Floats]:
    """The ids and scores of a query's rows, best first."""
    if query.k is None and query.threshold is not None:
        parts = list(rows_over(searcher, query, searcher.heads))
        scores, ids = (np.concatenate(one) for one in zip(*parts, strict=True))
        best = np.lexsort((ids, -scores))
        return ids[best], scores[best]
    if (k := query.k or amount) is None:
        raise ConfigError(f"query {query.describe()} finds every row: give it a k or a threshold, or an amount")
    ranked = best_rows(searcher, replace(query, k=k), searcher.heads, THOROUGH)
    return ranked.ids, ranked.scores


def _filtered(store: Store, amount: int | None) -> _Found:
    """What `clip-batch filter` wrote."""
    about = store.read_json("filter.json")
    files = [f"rows/{name}" for name in store.list("rows") if name.endswith(".parquet")]

    def read(names: Sequence[str]) -> Iterator[pa.Table]:
        for name in files:
            with store.open(name) as file:
                yield from ParquetFile(file).pieces(GROUP, names)

    def tables(names: Sequence[str]) -> Iterator[pa.Table]:
        for table in read([*names, "id", "score"]):
            yield table.append_column("query", pa.array(np.zeros(len(table), dtype=np.int16)))

    names = []
    if files:
        with store.open(files[0]) as file:
            names = [name for name in ParquetFile(file).schema.names if name not in OURS]
    keep = None
    if amount is not None and amount < about["rows"]:
        scores = np.concatenate([table["score"].to_numpy() for table in read(["score"])])
        keep = np.argsort(-scores, kind="stable")[:amount]
    return _Found(about["rows"], names, [tuple(run) for run in about.get("planned", ())], tables, keep)


def _write(found: _Found, columns: Sequence[str], via: str, folder: str, asked: dict[str, Any]) -> SavedSelection:
    """Write the selection beside `folder`, and give it that name unless it is taken."""
    if not found.rows:
        raise ConfigError(f"{asked['source']} has no row for {asked['queries'] or 'its filter'}: lower the threshold")
    for name in (*columns, *(["url"] if via == "url" else [])):
        if name not in found.names:
            raise ConfigError(f"no metadata column {name!r}: there are {', '.join(found.names)}")
    taken = list(dict.fromkeys(["key", "caption", *(TAR if via == "tar" else PLACE), *columns]))
    ids, query, order, local = _by_place(found)
    home = os.path.dirname(os.path.abspath(folder))
    os.makedirs(home, exist_ok=True)
    draft = tempfile.mkdtemp(prefix=".clip-batch-", dir=home)
    try:
        tables = found.tables([name for name in taken if name in found.names])
        path = os.path.join(draft, ROWS)
        write_ordered((_shaped(table, taken, found.planned) for table in tables), order, path)
        about = {
            "asked": asked,
            "rows": len(order),
            "queries": np.bincount(query[order], minlength=len(asked["queries"])).tolist(),
            "digest": hashlib.sha256(ids[order].tobytes()).hexdigest()[:16],
            "local": local and via == "tar",
        }
        with open(os.path.join(draft, ABOUT), "w") as file:
            json.dump(about, file, indent=1)
        os.chmod(draft, 0o755)  # mkdtemp's are for one user
        try:
            os.rename(draft, folder)
        except OSError:  # another was first
            if not os.path.exists(os.path.join(folder, ABOUT)):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return _open(folder, asked)


def _open(folder: str, asked: dict[str, Any]) -> SavedSelection:
    try:
        with open(os.path.join(folder, ABOUT)) as file:
            about = json.load(file)
        known = about["asked"]
        found = SavedSelection(folder, about["rows"], tuple(about["queries"]), about["digest"], about["local"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{folder} is not a selection ({error}): delete it") from None
    for name, value in asked.items():
        if known.get(name) != value:
            raise ConfigError(f"selection {folder} was made with {name} {known.get(name)}, not {value}: name another")
    return found


def _by_place(found: _Found) -> tuple[Ids, Ids, Ids, bool]:
    """Ids and queries (rows,); which rows to take (n,), in the order of the tars' bytes; whether all tars are local."""
    codes: dict[str | None, int] = {}
    parts: list[list[Ids]] = []
    places = [name for name in ("shard", "offset") if name in found.names]
    for table in found.tables(places):
        table = _shaped(table, ["shard", "offset"], found.planned)
        shard = table["shard"].combine_chunks().dictionary_encode()
        known = [codes.setdefault(name, len(codes)) for name in [*shard.dictionary.to_pylist(), None]]
        code = np.array(known)[shard.indices.fill_null(len(known) - 1).to_numpy(zero_copy_only=False)]
        offset = table["offset"].fill_null(0).to_numpy()
        parts.append([table["id"].to_numpy(), table["query"].to_numpy(), code, offset])
    ids, query, code, offset = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    names = sorted(codes, key=lambda name: (name is None, name))
    rank = np.empty(len(names), dtype=np.int64)
    rank[[codes[name] for name in names]] = np.arange(len(names))
    order = np.lexsort((ids, offset, rank[code]))
    if found.keep is not None:
        order = order[np.isin(order, found.keep)]
    return ids, query, order, all(name is None or is_local(name) for name in names)


def _shaped(table: pa.Table, names: Sequence[str], planned: Runs) -> pa.Table:
    """id, score, query, and these columns: null where absent, and places null that are not the planner's own."""
    ids = table["id"].to_numpy()
    right = np.zeros(len(ids), dtype=bool)
    for start, stop in planned:
        right |= (ids >= start) & (ids < stop)
    shaped = {"id": table["id"], "score": table["score"], "query": table["query"]}
    for name in names:
        kind = TYPES.get(name)
        column = table[name] if name in table.column_names else pa.nulls(len(table), kind or pa.string())
        if name in TAR:
            column = pc.if_else(pa.array(right), column, None) if right.any() else pa.nulls(len(table), kind)
        shaped[name] = column.cast(kind) if kind else column
    return pa.table(shaped)
