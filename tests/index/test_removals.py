from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clip_batch.errors import ConfigError, CorruptError
from clip_batch.index import removals, removed_rows
from clip_batch.index.manifest import Manifest
from clip_batch.index.paths import CURRENT
from clip_batch.index.publications import current_version
from clip_batch.index.removals import RemovalList
from clip_batch.storage.store import Store
from tests.fabricated import ENCODER
from tests.servers.flaky import Flaky

Row = tuple[str | None, int | None]


def state_of(store: Store) -> tuple[str | None, ...]:
    """What a server watches: the live version and the removal lists."""
    return current_version(store), *removals.names(store)


def write_shard(path: str, batches: Sequence[Sequence[Row]], dictionary: bool = False, wide: bool = False) -> None:
    """A metadata file of key and n, in these record batches."""
    keys = pa.array([key for batch in batches for key, _ in batch], pa.large_string() if wide else pa.string())
    keys = keys.dictionary_encode() if dictionary else keys  # one dictionary for all batches, as a file must have
    numbers = pa.array([number for batch in batches for _, number in batch], pa.int16())
    whole, done = pa.record_batch({"key": keys, "n": numbers}), 0
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, whole.schema) as writer:
        for batch in batches:
            writer.write_batch(whole.slice(done, len(batch)))
            done += len(batch)


def manifest_of(version: str, rows: int) -> Manifest:
    return Manifest(version, 0.0, 8, rows, ENCODER, "", {}, {}, {}, 0.95, (), False, ())


def untouched() -> Iterator[tuple[str, int]]:
    """Metadata that nobody may look at."""
    raise AssertionError("the metadata was scanned")
    yield


class Counting(Store):
    """Counts listings; refuses to write where `full` says so."""

    full = False
    listed = 0

    def list(self, folder: str) -> list[str]:
        self.listed += 1
        return super().list(folder)

    def replace(self, name: str, data: bytes) -> None:
        if self.full:
            raise PermissionError(f"read-only: {name}")
        super().replace(name, data)


@pytest.fixture
def store(tmp_path: Path) -> Counting:
    return Counting(str(tmp_path / "index"))


@pytest.fixture
def shards(tmp_path: Path) -> list[tuple[str, int]]:
    """Keys a to f in two files, ids 0 to 5; n is the id but for the last, which has none."""
    write_shard(f"{tmp_path}/0.arrow", [[("a", 0), ("b", 1)], [("c", 2)]])
    write_shard(f"{tmp_path}/1.arrow", [[("d", 3)], [("e", 4), ("f", None)]], dictionary=True)
    return [(f"{tmp_path}/0.arrow", 0), (f"{tmp_path}/1.arrow", 3)]


ROWS = st.lists(st.tuples(st.none() | st.sampled_from(["", "a", "b", "é", "12", "012"]), st.none() | st.integers(0, 9)))
TEXTS = st.builds(RemovalList.of, st.just("key"), st.lists(st.sampled_from(["", "a", "b", "é", "12", "012", "z"])))
NUMBERS = st.builds(RemovalList.of, st.just("n"), st.lists(st.sampled_from(["1", "2", "02", "9", "-3"])))


@settings(max_examples=150)
@given(
    files=st.lists(st.tuples(st.lists(ROWS, max_size=3), st.booleans(), st.booleans()), max_size=3),
    lists=st.lists(TEXTS | NUMBERS, max_size=4),
)
@example(files=[([[]], True, False), ([], True, True)], lists=[RemovalList.of("key", ["a"])])
def test_resolve_is_a_search_row_by_row(
    files: list[tuple[list[list[Row]], bool, bool]], lists: list[RemovalList]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows: list[Row] = []
        shards = []
        for number, (batches, dictionary, wide) in enumerate(files):
            write_shard(f"{folder}/{number}", batches, dictionary, wide)
            shards.append((f"{folder}/{number}", len(rows)))
            rows += [row for batch in batches for row in batch]
        found = removed_rows.find_removed(lists, shards)
    for one, (ids, missing) in zip(lists, found, strict=True):
        wanted: set[Any] = set(one.values) if one.column == "key" else {int(value) for value in one.values}
        column = [row[0 if one.column == "key" else 1] for row in rows]
        assert ids.dtype == np.int64
        assert ids.tolist() == [id for id, value in enumerate(column) if value in wanted]
        assert missing == tuple(v for v in one.values if (v if one.column == "key" else int(v)) not in column)


def test_a_dictionary_that_grows_from_batch_to_batch(tmp_path: Path) -> None:
    path = str(tmp_path / "0.arrow")
    schema = pa.schema([("key", pa.dictionary(pa.int8(), pa.string()))])
    options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, schema, options=options) as writer:
        for indices, entries in (([0, 1, None], ["a", "b"]), ([2, 0], ["a", "b", "c"])):
            column = pa.DictionaryArray.from_arrays(pa.array(indices, pa.int8()), entries)
            writer.write_batch(pa.record_batch([column], schema=schema))
    (found,) = removed_rows.find_removed([RemovalList.of("key", ["a", "c", "d"])], [(path, 10)])
    assert found.ids.tolist() == [10, 13, 14]
    assert found.missing == ("d",)


def test_a_list_is_one_file_whatever_its_order(store: Store) -> None:
    assert removals.names(store) == []
    with ThreadPoolExecutor(8) as pool:
        same = set(pool.map(lambda i: removals.add(store, "key", ["b", "a", "b"][i % 2 :]), range(16)))
        other = set(pool.map(lambda i: removals.add(store, "key", [f"{i % 4}"]), range(16)))
    assert len(same) == 1 and len(other) == 4
    assert removals.names(store) == sorted(same | other)
    assert removals.load(store, same.pop()) == RemovalList("key", ("a", "b"))
    removals.add(store, "n", ["a", "b"])  # the column counts too
    assert len(removals.names(store)) == 6


def test_the_files_name_is_what_the_formats_say(store: Store, tmp_path: Path) -> None:
    digest = removals.add(store, "key", ["b", "a"])
    text = (tmp_path / f"index/tombstones/{digest}.json").read_bytes()
    assert json.loads(text) == {"column": "key", "values": ["a", "b"]}
    assert digest == hashlib.sha256(text).hexdigest()[:16]
    for stranger in (f".{digest}.json.tmp-12345678", "README", "abc.json", f"{digest}.npy"):
        (tmp_path / "index/tombstones" / stranger).write_text("")
    assert removals.names(store) == [digest]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"column": "key"}', '{"column": "key", "values": ["other"]}'])
def test_a_damaged_list_is_refused(store: Store, shards: list[tuple[str, int]], tmp_path: Path, text: str) -> None:
    digest = removals.add(store, "key", ["a"])
    (tmp_path / f"index/tombstones/{digest}.json").write_text(text)
    with pytest.raises(CorruptError, match=f"{digest}.json is not the list of its name"):
        removed_rows.removed_ids(store, manifest_of("v", 6), shards)


def test_removed_is_the_union_and_is_scanned_for_once(store: Counting, shards: list[tuple[str, int]]) -> None:
    first, second = manifest_of("first", 6), manifest_of("second", 4)
    assert removed_rows.removed_ids(store, first, untouched()).tolist() == []
    removals.add(store, "key", ["e", "a", "nowhere"])
    removals.add(store, "n", ["4", "2"])
    assert removed_rows.removed_if_known(store, first) is None
    assert removed_rows.removed_ids(store, first, shards).tolist() == [0, 2, 4]
    store.listed = 0
    assert removed_rows.removed_ids(store, first, untouched()).tolist() == [0, 2, 4]
    assert store.listed == 2
    assert np.array_equal(removed_rows.removed_if_known(store, first), [0, 2, 4])
    # another version has ids of its own, and only a later list is scanned for
    assert removed_rows.removed_ids(store, second, [(shards[1][0], 0)]).tolist() == [1]
    removals.add(store, "key", ["b"])
    assert removed_rows.removed_ids(store, first, shards).tolist() == [0, 1, 2, 4]


@given(st.sets(st.integers(0, 20)), st.lists(st.integers(0, 20)))
def test_contains(removed: set[int], ids: list[int]) -> None:
    found = removed_rows.contains(np.array(sorted(removed), np.int64), np.array(ids, np.int64))
    assert found.tolist() == [id in removed for id in ids]


def test_a_cache_alone_removes_nothing(store: Store, shards: list[tuple[str, int]]) -> None:
    digest = removals.add(store, "key", ["a"])
    assert removed_rows.removed_ids(store, manifest_of("v", 6), shards).tolist() == [0]
    store.remove(f"tombstones/{digest}.json")
    assert removed_rows.removed_ids(store, manifest_of("v", 6), untouched()).tolist() == []


@pytest.mark.parametrize("damage", ["empty", "cut", "unsorted", "beyond", "int32", "matrix"])
def test_a_damaged_cache_is_made_anew(store: Store, shards: list[tuple[str, int]], tmp_path: Path, damage: str) -> None:
    digest, manifest = removals.add(store, "key", ["a", "e"]), manifest_of("v", 6)
    removed_rows.removed_ids(store, manifest, shards)
    path = tmp_path / f"index/v/tombstones/{digest}.npy"
    whole = path.read_bytes()
    if damage in ("empty", "cut"):
        path.write_bytes(b"" if damage == "empty" else whole[:-8])
    else:
        wrong: dict[str, Any] = {
            "unsorted": np.array([4, 0]),
            "beyond": np.array([0, 6]),
            "int32": np.array([0, 4], np.int32),
            "matrix": np.array([[0, 4]]),
        }
        np.save(path, wrong[damage])
    assert removed_rows.removed_ids(store, manifest, shards).tolist() == [0, 4]
    assert path.read_bytes() == whole


def test_an_index_that_cannot_be_written_is_served_without_a_cache(
    store: Counting, shards: list[tuple[str, int]]
) -> None:
    removals.add(store, "key", ["c"])
    store.full = True
    for _ in range(2):
        assert removed_rows.removed_ids(store, manifest_of("v", 6), shards).tolist() == [2]
    assert not store.exists("v/tombstones")


def test_on_a_remote_store(shards: list[tuple[str, int]]) -> None:
    Flaky.reset()
    store, manifest = Store("flaky://home/index"), manifest_of("v", 6)
    assert removals.names(store) == []
    digest = removals.add(store, "key", ["c", "f"])
    assert removals.add(store, "key", ["f", "c"]) == digest
    before = state_of(store)
    assert removed_rows.removed_ids(store, manifest, shards).tolist() == [2, 5]
    assert removed_rows.removed_ids(store, manifest, untouched()).tolist() == [2, 5]
    assert state_of(store) == before  # a cache is no news
    with open(shards[1][0], "rb") as file:
        store.replace("v/metadata/1.arrow", file.read())
    assert removed_rows.read_schema(store, "v/metadata/1.arrow").names == ["key", "n"]
    Flaky.reset()


def test_state_changes_with_the_version_and_with_each_list(store: Store) -> None:
    states = [state_of(store)]
    store.replace(CURRENT, b"3f2a9c0d1e5b\n")
    states.append(state_of(store))
    for value in ("a", "b"):
        removals.add(store, "key", [value])
        states.append(state_of(store))
    store.replace(CURRENT, b"0123456789ab\n")
    states.append(state_of(store))
    assert len(set(states)) == 5
    removals.add(store, "key", ["b"])
    assert state_of(store) == states[-1]
    assert len(states[-1]) < 40


def test_what_cannot_be_looked_for_is_refused_by_name(tmp_path: Path, shards: list[tuple[str, int]]) -> None:
    path, schema = str(tmp_path / "x.arrow"), pa.schema([("key", pa.string()), ("score", pa.float64())])
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, schema):
        pass
    for one, shard, message in (
        (RemovalList.of("url", ["a"]), path, "no metadata column 'url' .*: there are key, score"),
        (
            RemovalList.of("score", ["0.5"]),
            path,
            "column 'score' is double, and values are text or whole numbers: use where",
        ),
        (RemovalList.of("n", ["7", "seven"]), shards[0][0], "'seven' is no int16, .* column 'n'"),
        (RemovalList.of("n", ["7", "40000"]), shards[0][0], "'40000' is no int16"),
    ):
        with pytest.raises(ConfigError, match=message):
            removed_rows.find_removed([one], [(shard, 0)])
        with pytest.raises(ConfigError, match=message):
            removed_rows.check_column(one, removed_rows.read_schema(Store(str(tmp_path)), Path(shard).name))
    Path(path).write_bytes(b"not Arrow")
    with pytest.raises(CorruptError, match=r"x.arrow is not a readable Arrow file"):
        removed_rows.find_removed([RemovalList.of("key", ["a"])], [(path, 0)])
    with pytest.raises(CorruptError, match=r"x.arrow is not a readable Arrow file"):
        removed_rows.read_schema(Store(str(tmp_path)), "x.arrow")
