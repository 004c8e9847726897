"""Removal lists over time: undone, removed again, listed; and lists of rows that are named one by one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_batch.config import MergeConfig, StorageConfig
from clip_batch.errors import ClipBatchError, ConfigError, CorruptError
from clip_batch.index import removals, removed_rows
from clip_batch.index.manifest import load_manifest
from clip_batch.index.merge.merge import merge
from clip_batch.index.paths import is_version
from clip_batch.index.removal_history import describe_list, describe_undo, list_removals, undo
from clip_batch.index.removal_pack import unpack
from clip_batch.index.removals import RemovalList, RowList, RowName
from clip_batch.index.remove import RemoveReport, describe_report, remove_values
from clip_batch.index.versions import use
from clip_batch.search.query import Query
from clip_batch.search.remove import remove_found
from clip_batch.search.verify import verify_searches
from clip_batch.storage import retry
from clip_batch.storage.store import Store
from tests import corpus
from tests.fabricated import clustered, make_out
from tests.servers.flaky import Flaky
from tests.servers.s3_server import BUCKET, S3
from tests.servers.s3_server import s3 as s3
from tests.servers.s3_server import s3_server as s3_server

CONFIG = MergeConfig(queries=5, shard_rows=40)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of 100 rows, and INDEX with two versions of it."""
    home = tmp_path_factory.mktemp("history")
    images, texts = clustered(100, 8, 5)
    make_out(home / "out", images, texts, [60, 40])
    for seed in (1, 2):
        merge(f"{home}/out", f"{home}/index", MergeConfig(queries=5, shard_rows=40, seed=seed))
    return home


@pytest.fixture
def store(home: Path, tmp_path: Path) -> Store:
    """A copy of INDEX."""
    shutil.copytree(home / "index", tmp_path / "index")
    return Store(f"{tmp_path}/index")


def removed(store: Store, version: str | None = None) -> int:
    manifest = load_manifest(store, version)
    return len(removed_rows.removed_ids(store, manifest, removed_rows.fetch_metadata(store, manifest)))


def test_a_list_that_is_undone_counts_in_no_version_until_it_is_removed_again(store: Store) -> None:
    new = load_manifest(store).version
    (old,) = set(filter(is_version, store.list(""))) - {new}
    report = remove_values(store.url, ["0-1", "0-2"], note="by mail")
    remove_values(store.url, ["0-2", "0-3"])
    assert (removed(store, new), removed(store, old)) == (3, 3)
    undone = undo(store.url, report.digest, note="a mistake")
    assert (undone.digest, undone.version, undone.rows, undone.still_removed) == (report.digest, new, 1, 1)
    assert describe_undo(undone).startswith("1 row of the live version can be found again; 1 row of it removed by")
    assert report.digest not in removals.names(store) and (removed(store, new), removed(store, old)) == (2, 2)
    use(store, old)
    assert removed(store) == 2
    for digest, message in ((report.digest, "is undone already"), ("f" * 16, "has no removal"), ("../x", "no removal")):
        with pytest.raises(ConfigError, match=message):
            undo(store.url, digest)
    assert remove_values(store.url, ["0-2", "0-1"], note="after all").digest == report.digest
    assert (removed(store, new), removed(store, old)) == (3, 3)
    first, second = list_removals(store.url)
    assert (first.digest, first.active, first.note, first.column, first.values, first.rows) == (
        report.digest,
        True,
        "by mail",
        "key",
        2,
        2,
    )
    assert [(event.undone, event.note) for event in first.history] == [
        (False, "by mail"),
        (True, "a mistake"),
        (False, "after all"),
    ]
    assert first.created is not None and first.created <= (first.history[1].time or 0) <= (first.history[2].time or 0)
    assert second.active and len(second.history) == 1
    lines = describe_list([first, second]).splitlines()
    assert len(lines) == 4 and "2 values of key; 2 rows of the live version; by mail" in lines[0]
    assert lines[1].endswith("undone; a mistake") and lines[2].endswith("removed again; after all")
    undo(store.url, report.digest)
    assert "does not count" in describe_list(list_removals(store.url)) and removed(store) == 2


def test_lists_of_an_older_clip_batch_are_listed_and_undone(store: Store, tmp_path: Path) -> None:
    old = RemovalList.of("key", ["0-1", "0-2", "x"])
    store.replace(f"tombstones/{old.digest}.json", json.dumps({"column": "key", "values": old.values}).encode())
    os.utime(tmp_path / f"index/tombstones/{old.digest}.json", (1e9, 1e9))
    (info,) = list_removals(store.url)
    assert (info.digest, info.active, info.created, info.column, info.values, info.rows) == (
        old.digest,
        True,
        1e9,
        "key",
        3,
        2,
    )
    remove_values(store.url, ["x", "0-1", "0-2"])  # the same again changes nothing, but for the record
    assert [(info.created, len(info.history)) for info in list_removals(store.url)] == [(1e9, 1)]
    assert undo(store.url, old.digest).rows == 2 and removed(store) == 0
    assert remove_values(store.url, old.values).digest == old.digest and removed(store) == 2


def test_a_list_that_no_version_can_be_searched_for_is_undone_all_the_same(store: Store, tmp_path: Path) -> None:
    unknown = removals.add(store, "not_there", ["x"])
    damaged = removals.add(store, "key", ["0-1"])
    (tmp_path / f"index/tombstones/{damaged}.json").write_text("{")
    for _ in range(2):
        with pytest.raises(ClipBatchError):
            removed(store)
    infos = {info.digest: info for info in list_removals(store.url)}
    assert infos[unknown].rows is None and infos[damaged].rows is None
    undone = undo(store.url, unknown)
    assert (undone.rows, describe_undo(undone)) == (None, f"removal {unknown} no longer counts")
    with pytest.raises(CorruptError, match=f"{damaged}.json is not the list"):
        removed(store)
    undo(store.url, damaged)
    assert removed(store) == 0


def test_a_dry_run_writes_nothing_and_shows_rows(store: Store, tmp_path: Path) -> None:
    report = remove_values(store.url, [*(f"0-{row}" for row in range(30)), "x"], dry_run=True)
    assert (report.rows, report.missing, report.dry_run, len(report.sample)) == (30, 1, True, 10)
    assert all(row.caption == f"caption {row.key}" and row.score is None for row in report.sample)
    assert not (tmp_path / "index/tombstones").exists() and not list((tmp_path / "index").glob("*/tombstones"))
    assert remove_values(store.url, report_values(report)).sample == ()


def test_the_values_of_a_removal_are_told(store: Store) -> None:
    said: list[str] = []
    report = remove_values(store.url, ["a, b"], progress=said.append)
    assert said == [f"1 value of key is removed, as tombstones/{report.digest}.json"]
    assert "1 value without a row in it, such as 'a, b'; --undo" in describe_report(report)


def report_values(report: RemoveReport) -> list[str]:
    return [str(row.key) for row in report.sample]


def test_texts_that_no_metadata_can_have_are_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match="is no Unicode text"):
        remove_values(store.url, ["a", "\ud800x"])
    with pytest.raises(ConfigError, match="note is None"):
        remove_values(store.url, ["a"], note=None)  # type: ignore[arg-type]
    assert removals.histories(store) == {}
    report = remove_values(store.url, ["\n", "é\0", "🔥" * 1000, "0-1"], note="\ud800")
    assert (report.rows, report.missing, list_removals(store.url)[0].note) == (1, 3, "\ud800")


def test_undoing_while_a_merge_publishes(store: Store, home: Path) -> None:
    """Whatever comes first: the version that is live at the end has the rows of what was undone, and no others."""
    digests = [remove_values(store.url, [f"0-{row}"]).digest for row in range(6)]
    with ThreadPoolExecutor(2) as pool:
        merging = pool.submit(merge, f"{home}/out", store.url, MergeConfig(queries=5, shard_rows=30, seed=5))
        for digest in digests[:3]:
            undo(store.url, digest)
        made = merging.result().version
    assert load_manifest(store).version == made and removed(store) == 3


@pytest.mark.parametrize("url", ["", "flaky://undone/index"])
def test_of_several_who_undo_one_does(store: Store, url: str) -> None:
    Flaky.reset()
    place = Store(url) if url else store
    digest = removals.add(place, "key", ["0-1"])

    def attempt(_: int) -> bool:
        try:
            removals.undo(place, digest)
        except ConfigError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(8))) == 1
        assert set(pool.map(lambda _: removals.add(place, "key", ["0-1"]), range(8))) == {digest}
    assert removals.histories(place) == {digest: [0, 1, 2]} and removals.names(place) == [digest]
    Flaky.reset()


def test_an_event_of_a_list_that_was_deleted_by_hand_does_not_undo_the_next_one(store: Store) -> None:
    digest = removals.add(store, "key", ["0-1"])
    removals.undo(store, digest)
    store.remove(f"tombstones/{digest}.json")
    assert removals.histories(store) == {} and list_removals(store.url) == []
    removals.add(store, "key", ["0-1"])
    assert removals.names(store) == [digest] and removed(store) == 1


NAMES = st.builds(
    RowName,
    st.sampled_from(["s3://b/0.tar", "s3://b/1.tar", None]),
    st.sampled_from([0, 512, None]),
    st.sampled_from(["a", "b", "é", None]),
)


@settings(max_examples=150)
@given(
    files=st.lists(st.tuples(st.lists(st.lists(NAMES, max_size=6), max_size=3), st.booleans()), max_size=3),
    lists=st.lists(st.builds(RowList.of, st.lists(NAMES, max_size=5)), max_size=3),
)
def test_named_rows_are_found_as_one_by_one(
    files: Sequence[tuple[list[list[RowName]], bool]], lists: list[RowList]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows: list[RowName] = []
        shards = []
        for number, (batches, dictionary) in enumerate(files):
            flat = [row for batch in batches for row in batch]
            text = pa.array([row.shard for row in flat], pa.string())
            whole = pa.record_batch(
                {
                    "shard": text.dictionary_encode() if dictionary else text,
                    "offset": pa.array([row.offset for row in flat], pa.int64()),
                    "key": pa.array([row.key for row in flat], pa.string()),
                }
            )
            with pa.OSFile(f"{folder}/{number}", "wb") as sink, pa.ipc.new_file(sink, whole.schema) as writer:
                done = 0
                for batch in batches:
                    writer.write_batch(whole.slice(done, len(batch)))
                    done += len(batch)
            shards.append((f"{folder}/{number}", len(rows)))
            rows += flat
        mixed = [*lists, RemovalList.of("key", ["a"])]
        *found, by_key = removed_rows.find_removed(mixed, shards)
    for one, (ids, missing) in zip(lists, found, strict=True):
        assert ids.tolist() == [id for id, row in enumerate(rows) if row in one.rows]
        assert missing == tuple(str(row) for row in one.rows if row not in rows)
    assert by_key.ids.tolist() == [id for id, row in enumerate(rows) if row.key == "a"]


@given(st.lists(NAMES))
def test_a_list_of_rows_is_read_as_it_was_written(rows: list[RowName]) -> None:
    Flaky.reset()
    store = Store("flaky://rows/index")
    digest = removals.record(store, RowList.of(rows))
    assert removals.record(store, RowList.of(reversed(rows))) == digest
    assert removals.load(store, digest) == RowList.of(rows)
    assert set(RowList.of(rows).rows) == set(rows)
    Flaky.reset()


@pytest.mark.parametrize("damage", [None, "cut", "sizes", "digests", "beyond", "unsorted", "empty"])
def test_many_lists_are_cached_in_one_file(
    store: Store, tmp_path: Path, damage: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removed_rows, "MANY", 4)
    manifest = load_manifest(store)
    for row in range(10):
        removals.add(store, "n", [str(row)])
    assert removed(store) == 20 and store.list(f"{manifest.version}/tombstones") == ["packed.npz"]
    packed = tmp_path / f"index/{manifest.version}/tombstones/packed.npz"
    whole = packed.read_bytes()
    content = dict(np.load(packed))
    if damage == "cut":
        packed.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        packed.write_bytes(b"")
    elif damage:
        harmed: dict[str, Any] = {
            "sizes": {"sizes": content["sizes"] + 1},
            "digests": {"digests": content["digests"][1:]},
            "beyond": {"ids": content["ids"] + 50},
            "unsorted": {"ids": content["ids"][::-1]},
        }
        np.savez(packed, **{**content, **harmed[damage]})
    known = removed_rows.removed_if_known(store, manifest)
    assert (known is None) == (damage is not None) and (known is None or len(known) == 20)
    assert removed(store) == 20 and unpack(packed.read_bytes(), manifest.rows).keys() == set(removals.names(store))
    one = remove_values(store.url, ["5"], "n").digest  # stands already
    undo(store.url, one)
    assert removed(store) == 18
    remove_values(store.url, ["0-5", "x"])
    assert removed(store) == 19 and len(store.list(f"{manifest.version}/tombstones")) == 3


def test_files_of_many_lists_are_packed_once_they_are_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removed_rows, "MANY", 4)
    manifest = load_manifest(store)
    for row in range(5):
        remove_values(store.url, [str(row)], "n")
    folder = f"{manifest.version}/tombstones"
    assert len(store.list(folder)) == 5
    assert removed(store) == 10 and "packed.npz" in store.list(folder)
    for digest in removals.names(store):
        store.remove(f"{folder}/{digest}.npy")
    known = removed_rows.removed_if_known(store, manifest)
    assert known is not None and len(known) == removed(store)


@given(st.lists(st.lists(st.integers(0, 30), max_size=5), max_size=4))
def test_union(lists: list[list[int]]) -> None:
    found = removed_rows.union([np.unique(np.array(one, np.int64)) for one in lists])
    assert found.tolist() == sorted({id for one in lists for id in one})


@pytest.mark.slow
def test_on_s3_with_lost_answers_races_and_no_right_to_write(
    store: Store, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    storage = StorageConfig(s3.options)
    remote = Store(f"s3://{BUCKET}/{uuid.uuid4().hex}", s3.options)
    for name in corpus.names_in(store):
        remote.replace(name, Path(store.path(name)).read_bytes())
    with s3.fault("lost", lambda method, path: method == "PUT", times=4) as lost:
        digest = remove_values(remote.url, ["0-1", "0-2"], storage=storage, note="lost").digest
        assert undo(remote.url, digest, storage).rows == 2
    assert lost.hits == 4 and removals.histories(remote) == {digest: [0, 1]}
    assert [info.note for info in list_removals(remote.url, storage)] == ["lost"]

    def attempt(_: int) -> bool:
        try:
            undo(remote.url, digest, storage)
        except ConfigError:
            return False
        return True

    remove_values(remote.url, ["0-2", "0-1"], storage=storage)
    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(attempt, range(4))) == 1
    assert removals.histories(remote) == {digest: [0, 1, 2, 3]}
    query = Query(embedding=clustered(100, 8, 5)[0][3], threshold=0.9999)
    with s3.fault("expired", lambda method, path: method == "PUT"):
        for change in (
            lambda: remove_values(remote.url, ["0-5"], storage=storage),
            lambda: remove_found(remote.url, query, storage=storage),
        ):
            with pytest.raises((ClipBatchError, OSError)) as refused:
                change()
            assert "\n" not in str(refused.value) and "0-5" not in str(refused.value)
        assert remove_found(remote.url, query, storage=storage, dry_run=True).rows == 1
        assert [info.active for info in list_removals(remote.url, storage)] == [False]
    assert remove_found(remote.url, query, storage=storage).rows == removed(remote) == 1
    report = verify_searches(remote.url, True, storage)
    assert (report.problems, report.searched) == ({}, 1)
