"""Select the rows of a dataset, by queries or from a folder of `clip-batch filter`, and save them as one mapped file.

    FOLDER/rows.arrow        id, score, query, key, shard, offset, length, image_column, url, caption, then the
                             requested columns; in the order of the tars' bytes, rows without a place in a file last
    FOLDER/selection.json    the request, the number of rows of each query, and a digest of the ids

The folder is renamed into place as a whole. If several processes make it at once, the first wins and the others open
its folder. Workers map the file, so only its path is sent to them.
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
from clip_batch.types import IMAGE_COLUMN

if TYPE_CHECKING:
    from clip_batch.config import SearchConfig, StorageConfig
    from clip_batch.search.searcher import Searcher

ROWS, ABOUT = "rows.arrow", "selection.json"

GROUP = 100_000
"""Rows whose metadata is in memory at a time."""

TAR = {"shard": pa.string(), "offset": pa.int64(), "length": pa.int64(), IMAGE_COLUMN: pa.string()}
PLACE = {**TAR, "url": pa.string()}
TYPES = {**PLACE, "key": pa.string(), "caption": pa.string()}
OURS = ("id", "score", "query", "image")

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Runs = list[tuple[int, int]]


@dataclass(frozen=True)
class SavedSelection:
    """An open selection: its rows in all and per query, a digest of their ids, and whether all are in local tars."""

    folder: str
    rows: int
    queries: tuple[int, ...]
    digest: str
    local: bool

    @property
    def path(self) -> str:
        return os.path.join(self.folder, ROWS)


@dataclass(frozen=True)
class _Candidates:
    """The selected rows before they are written.

    Each call of `tables` yields all `rows` rows in the same order, with the given columns and id, score and query.
    `names` are the columns that exist, and `planned` the ranges of ids whose places our planner recorded. `keep` has
    the positions of the rows to write; None is all of them.
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
    """Write the selection to `folder`, or open it if it exists. Memory: the ids and places of all rows.

    ConfigError: the folder holds the selection of another request, the metadata lacks a column, or no row was found.
    Other errors: those of `Searcher`.
    """
    request: dict[str, Any] = {"source": absolute(source), "queries": [query.describe() for query in queries]}
    request |= {"amount": amount, "via": via, "columns": list(columns)}
    if os.path.exists(os.path.join(folder, ABOUT)):
        return _open(folder, request)
    if reserved := [name for name in columns if name in OURS]:
        raise ConfigError(f"column {reserved[0]!r}: samples have that name for something else")
    store = Store(source, storage.storage_options)
    if store.exists("filter.json"):
        if queries:
            raise ConfigError(f"{source} was filtered already: leave the queries out, or name the index")
        return _write(_filtered(store, amount), columns, via, folder, request)
    if not queries:
        raise ConfigError(f"no query for {source}: give a text, or some of Query")
    from clip_batch.search.searcher import Searcher

    with Searcher(source, storage, config=search) as searcher:
        return _write(_searched(searcher, queries, amount), columns, via, folder, request)


def mix(
    results: Sequence[tuple[Ids, Floats]], weights: Sequence[float], amount: int | None = None
) -> tuple[Ids, Floats, npt.NDArray[np.int16]]:
    """Mix the results of several queries: ids int64 (n,), each once, ascending; scores; and the query of each row.

    `results` has each query's ids and scores, best first. Queries take turns in proportion to their weights: one of
    weight 2 takes two rows while one of weight 1 takes one. A row in several results belongs to the query that takes
    it first (in a tie, to the first query), and has the score of that query. `amount` limits the number of rows: the
    queries' shares are as their weights until one runs out of rows; then the others go on.
    """
    sizes = [len(ids) for ids, _ in results]
    ids, scores = (np.concatenate(parts) for parts in zip(*results, strict=True))
    query = np.repeat(np.arange(len(results)), sizes)
    pace = np.asarray(weights, dtype=np.float64)[query]
    turn = (np.concatenate([np.arange(size) for size in sizes]) + 1) / pace
    order = np.lexsort((query, turn, ids))
    mine = order[np.diff(ids[order], prepend=-1) > 0]
    if amount is not None and len(mine) > amount:
        mine = mine[
            np.lexsort((turn[mine], query[mine]))
        ]  # by query, best first, to count turns without rows that others took
        starts = np.searchsorted(query[mine], np.arange(len(results)))
        again = (np.arange(len(mine)) - starts[query[mine]] + 1) / pace[mine]
        mine = mine[np.lexsort((query[mine], again))[:amount]]
        mine = mine[np.argsort(ids[mine])]
    return ids[mine], scores[mine], query[mine].astype(np.int16)


def _searched(searcher: Searcher, queries: Sequence[Query], amount: int | None) -> _Candidates:
    results = [_find(searcher, query, amount) for query in queries]
    ids, scores, query = mix(results, [query.weight for query in queries], amount)

    def tables(names: Sequence[str]) -> Iterator[pa.Table]:
        for start in range(0, len(ids), GROUP):
            part = slice(start, start + GROUP)
            table = searcher.table(ids[part], list(names))
            for name, values in (("id", ids), ("score", scores), ("query", query)):
                table = table.append_column(name, pa.array(values[part]))
            yield table

    names = [name for name in searcher.schema.names if name not in OURS]
    return _Candidates(len(ids), names, planned(searcher.manifest), tables)


def _find(searcher: Searcher, query: Query, amount: int | None) -> tuple[Ids, Floats]:
    """Return the ids and scores of a query's rows, best first."""
    if query.k is None and query.threshold is not None:
        parts = list(rows_over(searcher, query, searcher.heads))
        scores, ids = (np.concatenate(one) for one in zip(*parts, strict=True))
        best = np.lexsort((ids, -scores))
        return ids[best], scores[best]
    if (k := query.k or amount) is None:
        raise ConfigError(f"query {query.describe()} finds every row: give it a k or a threshold, or an amount")
    ranked = best_rows(searcher, replace(query, k=k), searcher.heads, THOROUGH)
    return ranked.ids, ranked.scores


def _filtered(store: Store, amount: int | None) -> _Candidates:
    """Return the rows that `clip-batch filter` wrote to `store`; with `amount`, the best of them."""
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
    return _Candidates(about["rows"], names, [tuple(run) for run in about.get("planned", ())], tables, keep)


def _write(
    candidates: _Candidates, columns: Sequence[str], via: str, folder: str, request: dict[str, Any]
) -> SavedSelection:
    """Write the selection beside `folder` and rename it to `folder`, unless another process was first; open it."""
    if not candidates.rows:
        raise ConfigError(
            f"{request['source']} has no row for {request['queries'] or 'its filter'}: lower the threshold"
        )
    for name in (*columns, *(["url"] if via == "url" else [])):
        if name not in candidates.names:
            raise ConfigError(f"no metadata column {name!r}: there are {', '.join(candidates.names)}")
    stored = list(dict.fromkeys(["key", "caption", *(TAR if via == "tar" else PLACE), *columns]))
    ids, query, order, local = _by_place(candidates)
    home = os.path.dirname(os.path.abspath(folder))
    os.makedirs(home, exist_ok=True)
    draft = tempfile.mkdtemp(prefix=".clip-batch-", dir=home)
    try:
        tables = candidates.tables([name for name in stored if name in candidates.names])
        path = os.path.join(draft, ROWS)
        write_ordered((_shaped(table, stored, candidates.planned) for table in tables), order, path)
        about = {
            "asked": request,
            "rows": len(order),
            "queries": np.bincount(query[order], minlength=len(request["queries"])).tolist(),
            "digest": hashlib.sha256(ids[order].tobytes()).hexdigest()[:16],
            "local": local and via == "tar",
        }
        with open(os.path.join(draft, ABOUT), "w") as file:
            json.dump(about, file, indent=1)
        os.chmod(draft, 0o755)  # mkdtemp makes a folder that one user alone can open
        try:
            os.rename(draft, folder)
        except OSError:  # another process was first
            if not os.path.exists(os.path.join(folder, ABOUT)):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return _open(folder, request)


def _open(folder: str, request: dict[str, Any]) -> SavedSelection:
    """Open a selection. CorruptError: it cannot be read. ConfigError: it answers another request."""
    try:
        with open(os.path.join(folder, ABOUT)) as file:
            about = json.load(file)
        recorded = about["asked"]
        saved = SavedSelection(folder, about["rows"], tuple(about["queries"]), about["digest"], about["local"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{folder} is not a selection ({error}): delete it") from None
    for name, value in request.items():
        if recorded.get(name) != value:
            made_with = f"{name} {recorded.get(name)}"
            raise ConfigError(f"selection {folder} was made with {made_with}, not {value}: name another folder")
    return saved


def _by_place(candidates: _Candidates) -> tuple[Ids, Ids, Ids, bool]:
    """Return ids and queries (rows,), the positions (n,) of the rows to write, and whether all tars are local.

    The positions are in the order of the tars' bytes.
    """
    codes: dict[str | None, int] = {}
    parts: list[list[Ids]] = []
    places = [name for name in ("shard", "offset") if name in candidates.names]
    for table in candidates.tables(places):
        table = _shaped(table, ["shard", "offset"], candidates.planned)
        shard = table["shard"].combine_chunks().dictionary_encode()
        shard_codes = [codes.setdefault(name, len(codes)) for name in [*shard.dictionary.to_pylist(), None]]
        code = np.array(shard_codes)[shard.indices.fill_null(len(shard_codes) - 1).to_numpy(zero_copy_only=False)]
        offset = table["offset"].fill_null(0).to_numpy()
        parts.append([table["id"].to_numpy(), table["query"].to_numpy(), code, offset])
    ids, query, code, offset = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    names = sorted(codes, key=lambda name: (name is None, name))
    rank = np.empty(len(names), dtype=np.int64)
    rank[[codes[name] for name in names]] = np.arange(len(names))
    order = np.lexsort((ids, offset, rank[code]))
    if candidates.keep is not None:
        order = order[np.isin(order, candidates.keep)]
    return ids, query, order, all(name is None or is_local(name) for name in names)


def _shaped(table: pa.Table, names: Sequence[str], planned: Runs) -> pa.Table:
    """Return id, score, query and these columns.

    A column that the table lacks is null, and so is a place in a file that our planner did not record.
    """
    ids = table["id"].to_numpy()
    trusted = np.zeros(len(ids), dtype=bool)
    for start, stop in planned:
        trusted |= (ids >= start) & (ids < stop)
    shaped = {"id": table["id"], "score": table["score"], "query": table["query"]}
    for name in names:
        kind = TYPES.get(name)
        column = table[name] if name in table.column_names else pa.nulls(len(table), kind or pa.string())
        if name in TAR:
            column = pc.if_else(pa.array(trusted), column, None) if trusted.any() else pa.nulls(len(table), kind)
        shaped[name] = column.cast(kind) if kind else column
    return pa.table(shaped)
