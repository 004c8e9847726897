from __future__ import annotations

import json
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_batch.cli import main
from clip_batch.config import MergeConfig, StorageConfig
from clip_batch.errors import ConfigError, ConflictError, CorruptError
from clip_batch.index import removals, removed_rows
from clip_batch.index.ann import faiss_index
from clip_batch.index.manifest import Manifest, load_manifest
from clip_batch.index.merge.merge import merge
from clip_batch.index.metadata import MetadataFile
from clip_batch.index.paths import CURRENT, PUBLICATIONS, VersionPaths
from clip_batch.index.publications import current_version, publications, read_state
from clip_batch.index.remove import read_values, remove
from clip_batch.index.versions import describe, drop, use, versions
from clip_batch.plan.plan import load_plan
from clip_batch.search.searcher import Searcher
from clip_batch.storage import retry
from clip_batch.storage.store import Store
from tests import corpus
from tests.fabricated import clustered, make_out
from tests.servers.flaky import Flaky
from tests.servers.s3_server import BUCKET, S3
from tests.servers.s3_server import s3 as s3
from tests.servers.s3_server import s3_server as s3_server

CONFIG = MergeConfig(queries=5, shard_rows=40)
SIZES = {"first": [60, 40], "second": [60, 60]}


def state_of(store: Store) -> tuple[str | None, ...]:
    """What a server watches: the live version and the removal lists."""
    return current_version(store), *removals.names(store)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    faiss_index.use_threads(1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """OUTs `first` and `second`, merged into `index` in that order; the folder, and each one's version."""
    home = tmp_path_factory.mktemp("versions")
    found = {}
    for name, sizes in SIZES.items():
        images, texts = clustered(sum(sizes), 8, 5)
        make_out(home / name, images, texts, sizes)
        found[name] = merge(f"{home}/{name}", f"{home}/index", replace(CONFIG, anew=True)).version
    return home, found


@pytest.fixture
def home(made: tuple[Path, dict[str, str]], tmp_path: Path) -> Path:
    """A copy of all that, to do harm to."""
    shutil.copytree(made[0], tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def store(home: Path) -> Store:
    return Store(str(home / "index"))


@pytest.fixture
def first(made: tuple[Path, dict[str, str]]) -> str:
    return made[1]["first"]


@pytest.fixture
def second(made: tuple[Path, dict[str, str]]) -> str:
    return made[1]["second"]


def shown(store: Store, version: str | None = None) -> set[str]:
    """The keys of a version (the live one) that answers may contain, as whoever opens it finds them."""
    manifest = load_manifest(store, version)
    shards = [
        (store.path(f"{shard.version or manifest.version}/metadata/{shard.name}.arrow"), shard.offset)
        for shard in manifest.shards
    ]
    keys = np.array([row["key"] for path, _ in shards for row in rows_of(path)])
    alive = np.ones(manifest.rows, dtype=bool)
    alive[removed_rows.removed_ids(store, manifest, shards)] = False
    return set(keys[alive].tolist())


def rows_of(path: str) -> list[dict[str, str]]:
    table = MetadataFile(path)
    rows: list[dict[str, str]] = table.take(np.arange(table.rows), ["key"]).to_pylist()
    return rows


def all_keys(name: str) -> set[str]:
    return {f"{part}-{row}" for part, size in enumerate(SIZES[name]) for row in range(size)}


def key_file(home: Path, *keys: str) -> str:
    path = home / f"{secrets.token_hex(4)}.txt"
    path.write_text("".join(f"{key}\n" for key in keys))
    return str(path)


def rewrite(store: Store, version: str, change: Callable[[Manifest], Manifest]) -> None:
    manifest = change(load_manifest(store, version))
    store.replace(VersionPaths(version).manifest, manifest.to_json().encode())


def test_a_folder_that_is_no_index_has_no_versions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("nowhere", ""):
        assert main(["versions", "--index", f"{tmp_path}/{name}"]) == 2
        assert "no index at" in capsys.readouterr().err


def test_versions_are_listed_by_age_with_what_they_hold(store: Store, home: Path, first: str, second: str) -> None:
    old, new = versions(store)
    assert (old.version, old.live, old.finished, old.rows) == (first, False, True, 100)
    assert (new.version, new.live, new.finished, new.rows) == (second, True, True, 120)
    assert old.created < new.created
    assert new.key == {"image": "Flat", "text": "Flat"}
    assert new.recall["image"]["text"]["10"] == 1.0
    assert (old.alive, new.alive) == (100, 120)
    remove(store.url, key_file(home, "0-1", "1-50"))
    (home / "index/0123456789ab").mkdir()
    (home / "index/0123456789ac").mkdir()
    (home / "index/0123456789ac/manifest.json").write_text("{}")
    (home / "index/lost+found").mkdir()
    old, new, bare, broken = versions(store)
    assert (old.alive, new.alive) == (None, 118)  # the old one was not looked through yet
    assert (bare.version, bare.finished, bare.problem) == ("0123456789ab", False, "")
    assert (broken.version, broken.finished) == ("0123456789ac", False)
    assert "is not a manifest" in broken.problem
    text = describe([old, new, bare, broken], "a b")
    lines = text.splitlines()
    assert lines[0].startswith(f"  {first}  20") and "100 rows, removals not counted yet; image Flat (" in lines[0]
    assert lines[1] == f"    {old.bytes / 1000:.1f} kB"
    assert lines[2] == f"    of {old.sources[0].output} (100 rows)"
    assert lines[3].startswith("    live 20") and " to 20" in lines[3]
    assert lines[4].startswith(f"* {second}  20") and "120 rows, 2 removed; image Flat (recall@10 " in lines[4]
    assert "1.000 for text queries" in lines[4] and "text Flat" in lines[4]
    assert lines[7].startswith("    live since 20")
    assert lines[8] == "  0123456789ab  not finished"
    assert "is not a manifest" in lines[9]
    assert lines[10] == f"to go back: clip-batch versions --index 'a b' --use {first}"
    assert json.dumps([asdict(info) for info in (old, new, bare, broken)])
    assert versions(Store(str(home / "nowhere"))) == []
    assert describe([]) == "no versions"


def test_versions_say_who_needs_whom_and_when_each_was_live(store: Store, home: Path, first: str, second: str) -> None:
    images, texts = clustered(20, 8, 5)
    make_out(home / "third", images, texts, [20])
    third = merge(home / "third", store.url, replace(CONFIG, add=True)).version
    use(store, first)
    old, base, added = versions(store)
    assert (old.needs, old.needed_by, old.shared_bytes) == ((), (), 0)
    assert (base.needs, base.needed_by, base.template) == ((), (third,), second)
    assert (added.needs, added.base, added.template) == ((second,), second, second)
    assert added.shared_bytes == base.bytes and [source.rows for source in added.sources] == [120, 20]
    assert 0 < added.bytes == load_manifest(store, third).size - base.bytes
    assert [period.end is None for period in old.was_live] == [False, True]
    assert base.was_live[0].end == added.was_live[0].start < added.was_live[0].end == old.was_live[1].start  # type: ignore[operator]
    text = describe([old, base, added])
    assert f"of {second}; added to {second}" in text and f"kB; needed by {third}" in text
    assert text.endswith(f"--use {third}")  # that was live before


def test_removed_rows_stay_removed_back_and_forth_and_through_a_merge(store: Store, home: Path, first: str) -> None:
    assert shown(store) == all_keys("second")
    report = remove(store.url, key_file(home, "0-7", "1-59", "9-9"))  # 1-59 is in the second alone
    assert (report.values, report.rows, report.missing, report.examples) == (3, 2, 1, ("9-9",))
    assert report.version == current_version(store)
    assert shown(store) == all_keys("second") - {"0-7", "1-59"}
    use(store, first)
    assert current_version(store) == first
    assert shown(store) == all_keys("first") - {"0-7"}
    remove(store.url, key_file(home, "0-8"))
    use(store, report.version)
    assert shown(store) == all_keys("second") - {"0-7", "0-8", "1-59"}
    later = merge(str(home / "second"), store.url, replace(CONFIG, seed=1))
    assert current_version(store) == later.version != report.version
    assert shown(store) == all_keys("second") - {"0-7", "0-8", "1-59"}
    assert len(versions(store)) == 3


def test_a_search_opened_after_a_removal_has_none_of_its_rows(store: Store, home: Path, first: str) -> None:
    with Searcher(store.url) as searcher:
        before = state_of(store)
        everything = searcher.search(searcher.reconstruct([0]), k=120)[0]
        assert len(everything) == 120
        remove(store.url, key_file(home, *(hit.metadata["key"] for hit in everything[:50])))
        assert len(searcher.search(searcher.reconstruct([0]), k=120)[0]) == 120  # its state is of when it opened
        query = searcher.reconstruct([0])
    assert state_of(store) != before
    with Searcher(store.url) as searcher:
        for modality in ("image", "text"):
            found = searcher.search(query, k=120, modality=modality)[0]
            assert {hit.id for hit in found} == {hit.id for hit in everything[50:]}
        with pytest.raises(ConfigError, match=f"row {everything[0].id} was removed"):
            searcher.metadata([everything[0].id])
    use(store, first)
    with Searcher(store.url) as searcher:
        gone = {hit.metadata["key"] for hit in everything[:50]}
        assert {hit.metadata["key"] for hit in searcher.search(query, k=100)[0]} == all_keys("first") - gone


def test_removal_by_other_columns(store: Store, home: Path) -> None:
    (home / "numbers.csv").write_text("note,n\nx,3\ny,007\nz,500\n")
    report = remove(store.url, str(home / "numbers.csv"), "n")
    assert (report.rows, report.missing, report.examples) == (4, 1, ("500",))  # n is the row in its partition
    tars = key_file(home, load_plan(Store(f"{home}/second")).partitions[1].slices[0].shard.url)
    assert remove(store.url, tars, "shard").rows == 60
    assert shown(store) == {f"0-{row}" for row in range(60)} - {"0-3", "0-7"}


def test_what_cannot_be_removed_is_refused_and_leaves_no_list(store: Store, home: Path) -> None:
    for keys, column, message in (
        (key_file(home, "a"), "url", r"no metadata column 'url' .*there are key, shard, offset"),
        (key_file(home, "3", "x7"), "n", "'x7' is no int64"),
        (str(home / "absent.txt"), "key", r"absent.txt does not exist"),
    ):
        with pytest.raises(ConfigError, match=message):
            remove(store.url, keys, column)
    assert removals.names(store) == []
    many = remove(store.url, key_file(home, *(f"x{number}" for number in range(30))))  # that is no mistake
    assert (many.rows, many.missing, many.examples) == (0, 30, ("x0", "x1", "x10", "x11", "x12"))
    with pytest.raises(ConfigError, match="no index at"):
        remove(str(home / "nowhere"), key_file(home, "a"))


def test_key_files(tmp_path: Path) -> None:
    def values(name: str, data: bytes | pa.Table, column: str = "key") -> list[str]:
        path = tmp_path / name
        pq.write_table(data, path) if isinstance(data, pa.Table) else path.write_bytes(data)
        return read_values(str(path), column)

    assert values("a.txt", b"\xef\xbb\xbfone\r\n\r\n  \n two\nthree") == ["one", " two", "three"]
    assert values("a", b"007\n") == ["007"]
    assert values("a.txt", "one\r\n猫\n".encode("utf-16")) == ["one", "猫"]
    assert values("a.csv", b'\xef\xbb\xbfkey,note\r\n"a,b\nc",x\r\n,y\r\n007,\r\n') == ["a,b\nc", "007"]
    assert values("a.parquet", pa.table({"key": ["a", None, "", "b"], "x": [1, 2, 3, 4]})) == ["a", "b"]
    assert values("b.parquet", pa.table({"id": pa.array([1, 2**62])}), "id") == ["1", str(2**62)]
    assert values("c.PARQUET", pa.table({"key": pa.array(["a", "b", "a"]).dictionary_encode()})) == ["a", "b", "a"]
    for name, data, message in (
        ("x.txt", b"\n \n", "has no value"),
        ("x.txt", b"\xff\xfe\n", "cannot be read"),
        ("x.csv", b"", "no column 'key': there are"),
        ("x.csv", b'key,n\na,1\n"b,2\nc,3\n', "the row of line 3: unexpected end"),
        ("x.csv", b"n,key\n1,a\n2\n", "the row of line 3 has not as many cells"),
        ("x.csv", b"key\na,b\n", "the row of line 2 has not as many cells"),
        ("x.csv", b"id\n3\n", "no column 'key': there are id"),
        ("x.csv", b'key\n"' + b"x" * 200_000 + b'"\n', "cannot be read"),
        ("x.parquet", b"PAR1", "cannot be read"),
        ("x.parquet", pa.table({"id": [1]}), "no column 'key': there are id"),
        ("x.parquet", pa.table({"key": [1.5]}), "column 'key' is double"),
    ):
        with pytest.raises(ConfigError, match=message):
            values(name, data)


@pytest.mark.slow
def test_removals_at_once(store: Store, home: Path) -> None:
    """In processes, as people would: the same list and different ones."""
    lists = [key_file(home, "0-1", "0-2"), key_file(home, "0-2", "0-3"), key_file(home, "1-1")]
    code = "import sys; from clip_batch.index.remove import remove; print(remove(*sys.argv[1:]).digest)"
    racing = [
        subprocess.Popen([sys.executable, "-c", code, store.url, keys], stdout=subprocess.PIPE, text=True)
        for keys in [*lists, *lists]
    ]
    digests = [process.communicate()[0].strip() for process in racing]
    assert [process.returncode for process in racing] == [0] * 6
    assert digests[:3] == digests[3:]
    assert removals.names(store) == sorted(digests[:3])
    assert shown(store) == all_keys("second") - {"0-1", "0-2", "0-3", "1-1"}
    assert not list(home.rglob("*.tmp-*"))


def test_removals_while_a_merge_publishes(store: Store, home: Path) -> None:
    """Whatever meets whatever: what was removed is in no answer of the version that stands at the end."""
    stop, failed = threading.Event(), []
    gone: list[str] = []

    def keep_removing() -> None:
        for row in range(60):
            if stop.is_set():
                return
            try:
                remove(store.url, key_file(home, f"0-{row}", f"1-{row}"))
                gone.append(f"{row}")
                assert not {f"0-{row}", f"1-{row}"} & shown(store)
            except BaseException as error:
                failed.append(error)
                raise

    with ThreadPoolExecutor(2) as pool:
        removing = pool.submit(keep_removing)
        try:
            made = [
                merge(str(home / "first"), store.url, replace(CONFIG, seed=seed, anew=True)).version for seed in (2, 3)
            ]
        finally:
            stop.set()
        removing.result()
    assert gone and not failed
    assert current_version(store) == made[-1]
    for version in (*made, None):
        assert not {f"{part}-{row}" for part in "01" for row in gone} & shown(store, version)


@pytest.mark.slow
def test_a_kill_between_the_list_and_its_cache(store: Store, home: Path) -> None:
    code = (
        "import os, sys; from clip_batch.index import removed_rows; from clip_batch.index.remove import remove\n"
        "removed_rows.cache = lambda *_: os.kill(os.getpid(), 9)\n"
        "remove(*sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, store.url, key_file(home, "0-5")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(removals.names(store)) == 1
    assert not store.exists(f"{current_version(store)}/tombstones")
    assert shown(store) == all_keys("second") - {"0-5"}
    assert store.exists(f"{current_version(store)}/tombstones/{removals.names(store)[0]}.npy")


def test_only_a_whole_version_is_used(store: Store, home: Path, first: str, second: str) -> None:
    (home / "index/0123456789ab").mkdir()
    for name in ("0123456789ab", "ffffffffffff", "", "../index"):
        with pytest.raises(ConfigError, match="no finished version") as refused:
            use(store, name)
        assert first in str(refused.value) and second in str(refused.value)
    index = home / f"index/{first}/image/0001.index"
    whole = index.read_bytes()
    index.write_bytes(whole[:-1])
    with pytest.raises(CorruptError, match=rf"0001.index has {len(whole) - 1} bytes, not {len(whole)}"):
        use(store, first)
    index.unlink()
    with pytest.raises(CorruptError, match=r"0001.index is missing: use another version"):
        use(store, first)
    index.write_bytes(whole)
    digest = removals.add(store, "not_there", ["x"])  # opted out by a column that this version cannot tell of
    with pytest.raises(ConfigError, match=rf"no metadata column 'not_there' .*{digest}"):
        use(store, first)
    assert current_version(store) == second
    store.remove(f"tombstones/{digest}.json")
    assert use(store, first) == load_manifest(store, first)
    assert current_version(store) == first


def test_files_of_other_versions_are_looked_at_too(store: Store, first: str, second: str) -> None:
    """The second, as if it had been added to the first: shards of both, one joined index of the first."""
    base = load_manifest(store, first)
    single = {"image": {f"{first}/image/0000.index": base.shards[0].files["image/0000.index"]}}
    shards = tuple(replace(shard, version=first) for shard in base.shards)
    rewrite(store, second, lambda made: replace(made, shards=shards, rows=base.rows, single=single))
    use(store, first)
    assert shown(store, second) == all_keys("first")
    use(store, second)
    store.remove(f"{first}/metadata/0001.arrow")
    with pytest.raises(CorruptError, match=rf"{first}/metadata/0001.arrow is missing"):
        use(store, second)


def test_dropping(store: Store, home: Path, first: str, second: str) -> None:
    with pytest.raises(ConfigError, match=rf"{second} is live: use another"):
        drop(store, second)
    with pytest.raises(ConfigError, match="no version 'ffffffffffff'; there are"):
        drop(store, "ffffffffffff")
    standing = load_manifest(store, second)
    for change in (
        {"shards": (replace(standing.shards[0], version=first), *standing.shards[1:])},
        {"template": first},
        {"single": {"image": {f"{first}/image.index": {"bytes": 1, "sha256": ""}}}},
    ):
        rewrite(store, second, lambda made, change=change: replace(made, **change))  # type: ignore[misc]
        with pytest.raises(ConfigError, match=rf"{second} has index shards, or the template, of {first}"):
            drop(store, first)
        rewrite(store, second, lambda made: standing)
    (home / "index/0123456789ab").mkdir()
    with pytest.raises(ConfigError, match="0123456789ab is not finished and may be based on"):
        drop(store, first)
    (home / "index/0123456789ab/manifest.json").write_text("{}")
    with pytest.raises(CorruptError, match="is not a manifest"):
        drop(store, first)
    assert shown(store, first) == all_keys("first")
    drop(store, "0123456789ab")
    remove(store.url, key_file(home, "0-1"))
    drop(store, first)
    assert [info.version for info in versions(store)] == [second]
    assert store.list("") == sorted([CURRENT, PUBLICATIONS, second, "tombstones"])
    assert shown(store) == all_keys("second") - {"0-1"}


class Meeting(Store):
    """Calls `then` once, before or after the first operation of a kind."""

    before: tuple[str, Callable[[], object]] | None = None

    def _meet(self, what: str) -> None:
        if self.before and self.before[0] == what:
            (_, then), self.before = self.before, None
            then()

    def remove(self, name: str) -> None:
        self._meet("remove")
        super().remove(name)

    def create(self, name: str, data: bytes, check_first: bool = True) -> bool:
        self._meet("create")
        return super().create(name, data, check_first)


def test_dropping_what_is_made_live_meanwhile(store: Store, first: str, second: str) -> None:
    meeting = Meeting(store.url)
    meeting.before = "create", lambda: use(store, first)
    with pytest.raises(ConfigError, match=rf"{first} is live: use another version first"):
        drop(meeting, first)
    assert current_version(store) == first
    assert shown(store) == all_keys("first")
    meeting.before = "create", lambda: drop(store, second)
    with pytest.raises(ConflictError, match=rf"{second} was deleted meanwhile"):
        use(meeting, second)
    assert current_version(store) == first
    assert shown(store) == all_keys("first")


def test_using_what_is_being_dropped(store: Store, first: str, second: str) -> None:
    def refused() -> None:
        with pytest.raises(ConflictError, match=rf"{first} is being deleted: .* --drop {first} completes that"):
            use(store, first)
        raise KeyboardInterrupt  # drop is killed, once the log says what it does

    meeting = Meeting(store.url)
    meeting.before = "remove", refused
    with pytest.raises(KeyboardInterrupt):
        drop(meeting, first)
    assert current_version(store) == second
    drop(store, first)
    assert [info.version for info in versions(store)] == [second]
    assert read_state(store).dropping == ()


def test_of_two_uses_at_once_one_says_so(store: Store, first: str, second: str, home: Path) -> None:
    third = merge(str(home / "second"), store.url, replace(CONFIG, seed=1)).version
    meeting = Meeting(store.url)
    meeting.before = "create", lambda: use(store, second)
    with pytest.raises(ConflictError, match=rf"serves version {second} now, not {third}.*run the command again"):
        use(meeting, first)
    assert current_version(store) == second
    use(store, first)
    assert [entry.version for entry in publications(store)] == [first, second, third, second, first]


def test_current_that_names_no_version_is_mended_by_use(
    store: Store, first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store.replace(CURRENT, b"../../etc\n")
    for command in ("versions", "verify", "merge --output " + store.url):
        if command != "versions":
            assert main([*command.split(), "--index", store.url]) in (1, 2)
    assert main(["versions", "--index", store.url, "--use", first]) == 0
    assert f"* {first}" in capsys.readouterr().out
    assert shown(store) == all_keys("first")


def test_on_a_remote_store(home: Path, first: str, second: str) -> None:
    Flaky.reset()
    remote = Store("flaky://home/index")
    for name in corpus.names_in(Store(str(home / "index"))):
        remote.replace(name, (home / "index" / name).read_bytes())
    lines: list[str] = []
    report = remove(remote.url, key_file(home, "0-3", "1-45"), progress=lines.append)
    assert (report.version, report.rows, report.missing) == (second, 2, 0)
    assert lines == [f"2 values of key are removed, as tombstones/{report.digest}.json"]
    use(remote, first)
    assert current_version(remote) == first
    assert [info.alive for info in versions(remote)] == [99, 118]
    drop(remote, second)
    assert [info.version for info in versions(remote)] == [first]
    Flaky.reset()


@pytest.mark.slow
def test_on_s3_with_lost_answers_races_and_no_right_to_write(
    home: Path, first: str, second: str, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    storage = StorageConfig(s3.options)
    remote = Store(f"s3://{BUCKET}/{uuid.uuid4().hex}", s3.options)
    for name in corpus.names_in(Store(str(home / "index"))):
        remote.replace(name, (home / "index" / name).read_bytes())
    lists = [key_file(home, "0-1", "0-2"), key_file(home, "0-2", "1-59")] * 2
    with s3.fault("lost", lambda method, path: method == "PUT", times=3) as lost, ThreadPoolExecutor(4) as pool:
        reports = list(pool.map(lambda keys: remove(remote.url, keys, storage=storage), lists))
    assert lost.hits == 3
    assert reports[:2] == reports[2:] and [report.rows for report in reports[:2]] == [2, 2]
    assert len(removals.names(remote)) == 2
    with s3.fault("expired", lambda method, path: method == "PUT" and "tombstones" in path) as refused:
        use(remote, first)  # the cache cannot be written
    assert refused.hits == 2
    assert [info.alive for info in versions(remote)] == [None, 117]
    use(remote, first)
    assert [info.alive for info in versions(remote)] == [98, 117]
    drop(remote, second)
    assert remote.list("") == sorted([CURRENT, PUBLICATIONS, first, "tombstones"])
