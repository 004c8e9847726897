"""gc --index: what nothing needs goes, whatever the live version needs stays."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import clip_batch
from clip_batch.cli import main
from clip_batch.config import MergeConfig
from clip_batch.errors import ConfigError, ConflictError, CorruptError
from clip_batch.index import removals
from clip_batch.index.ann import faiss_index
from clip_batch.index.gc import DAY, describe, gc_index
from clip_batch.index.manifest import IndexShard, Manifest, load_manifest
from clip_batch.index.merge import merge as stage
from clip_batch.index.merge.job import open_job
from clip_batch.index.merge.merge import merge
from clip_batch.index.paths import VersionPaths
from clip_batch.index.publications import live_version, publish, read_state
from clip_batch.index.remove import remove_values
from clip_batch.index.verify import verify_index
from clip_batch.index.versions import broken, drop, folders_of, use, versions
from clip_batch.storage.store import Store
from clip_batch.types import EncoderSpec
from tests.fabricated import clustered, make_out
from tests.servers.flaky import Flaky

CONFIG = MergeConfig(queries=5, shard_rows=40)
ADD = replace(CONFIG, add=True)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    faiss_index.use_threads(1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Five versions, each but the last two anew, the last added to the one before it: oldest first."""
    home = tmp_path_factory.mktemp("gc")
    for number, name in enumerate(("a", "b")):
        make_out(home / name, *clustered(60, 8, 3, number), [60])
    found = [merge(home / "a", home / "index", replace(CONFIG, seed=seed)).version for seed in range(4)]
    found.append(merge(home / "b", home / "index", replace(ADD, seed=3)).version)
    return home, found


@pytest.fixture
def home(made: tuple[Path, list[str]], tmp_path: Path) -> Path:
    for name in ("a", "b", "index"):
        shutil.copytree(made[0] / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def store(home: Path) -> Store:
    return Store(home / "index")


@pytest.fixture
def names(made: tuple[Path, list[str]]) -> list[str]:
    return made[1]


def age(folder: Path, days: float) -> None:
    """Let files look older."""
    then = time.time() - days * DAY
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (then, then))


def test_what_nothing_needs_goes(home: Path, store: Store, names: list[str]) -> None:
    dry = gc_index(store, keep=1, older_than=0, dry_run=True)
    assert dry.dry_run and folders_of(store) == sorted(names)
    report = gc_index(store, keep=1, older_than=0)
    assert replace(report, dry_run=True) == dry
    assert [garbage.name for garbage in report.removed] == sorted(names[:3])
    assert report.kept == {names[4]: "live", names[3]: "was live before"}
    assert report.removed[0].reason.startswith("was live until 20")
    assert report.bytes == sum(garbage.bytes for garbage in report.removed) > 10_000
    assert folders_of(store) == sorted(names[3:])
    assert verify_index(store, deep=True).ok
    assert read_state(store).dropping == ()
    again = gc_index(store, keep=0, older_than=0)
    assert again.removed == () and again.kept == {names[4]: "live", names[3]: f"{names[4]} needs it"}
    assert merge(home / "b", home / "index", replace(ADD, seed=3)).version == names[4]  # nothing is built anew
    text = describe(dry)
    assert f"{names[4]} is kept: live" in text and "3 items would be deleted, " in text


def test_what_is_young_or_was_live_before_stays(store: Store, names: list[str], home: Path) -> None:
    assert gc_index(store, keep=0).removed == ()
    assert gc_index(store, keep=9, older_than=0).removed == ()
    report = gc_index(store, keep=2, older_than=0)
    assert [garbage.name for garbage in report.removed] == sorted(names[:2])
    use(store, names[2])
    assert gc_index(store, keep=1, older_than=0).kept == {
        names[2]: "live",
        names[4]: "was live before",
        names[3]: f"{names[4]} needs it",
    }


def test_a_version_that_a_merge_is_building_stays(home: Path, store: Store, names: list[str]) -> None:
    job = open_job(f"{home}/a", f"{home}/index", replace(ADD, seed=9))
    stage.train(open_job(f"{home}/a", f"{home}/index", replace(CONFIG, seed=9, anew=True)))
    make_out(home / "c", *clustered(40, 8, 3, 7), [40])
    job = open_job(f"{home}/c", f"{home}/index", replace(ADD, seed=9))
    stage.train(job)
    use(store, names[0])
    age(home / "index", 8)
    Path(store.path(job.paths.template_record)).touch()
    report = gc_index(store, keep=0, older_than=1)
    assert report.kept[job.version] == "a merge may be building it"
    assert report.kept[names[4]] == "was live lately" and names[3] in report.kept
    log = sorted((home / "index/publications").iterdir())
    for path in log:
        path.write_text(json.dumps({**json.loads(path.read_text()), "created": time.time() - 8 * DAY}))
    report = gc_index(store, keep=0, older_than=1)
    assert report.kept == {
        names[0]: "live",
        job.version: "a merge may be building it",
        names[4]: f"{job.version} needs it",
        names[3]: f"{job.version} needs it",
    }
    age(home / "index" / job.version, 8)
    report = gc_index(store, keep=0, older_than=1)
    assert job.version in [garbage.name for garbage in report.removed]
    assert report.removed and folders_of(store) == [names[0]]


def test_left_overs_in_a_version_go(home: Path, store: Store, names: list[str]) -> None:
    live = home / "index" / names[4]
    left = {
        f"attempts/0002-{'ab' * 4}/image/0002.index": "an attempt that did not win",
        f"template/{'cd' * 4}/queries.npz": "an attempt to train that did not win",
        f"metadata/.0002.arrow.tmp-{'ef' * 4}": "a file that was not written to its end",
        f"tombstones/{'0' * 16}.npy": "the rows of a removal list that is no longer there",
    }
    for name in left:
        (live / name).parent.mkdir(parents=True, exist_ok=True)
        (live / name).write_bytes(b"12345")
    digest = remove_values(store.url, ["0-1"]).digest
    young = gc_index(store, keep=9)
    assert [garbage.reason for garbage in young.removed] == [list(left.values())[-1]]
    report = gc_index(store, keep=9, older_than=0)
    assert sorted(garbage.reason for garbage in report.removed) == sorted(list(left.values())[:3])
    assert report.removed[0].name == f"{names[4]}/attempts/0002-{'ab' * 4}" and report.bytes == 15
    assert not [name for name in left if (live / name).exists()]
    assert store.exists(VersionPaths(names[4]).removed_ids(digest)) and removals.names(store) == [digest]
    assert gc_index(store, keep=9, older_than=0).removed == ()
    assert verify_index(store, deep=True).ok


def test_nothing_is_deleted_where_nobody_knows_what_is_needed(store: Store, names: list[str], home: Path) -> None:
    manifest = home / "index" / names[4] / "manifest.json"
    good = manifest.read_bytes()
    manifest.write_text("{}")
    with pytest.raises(CorruptError, match="is not a manifest"):
        gc_index(store, older_than=0)
    assert folders_of(store) == sorted(names)
    manifest.write_bytes(good)
    with pytest.raises(ConfigError, match="no index at"):
        gc_index(Store(home / "nowhere"))


def test_what_becomes_live_meanwhile_stays(store: Store, names: list[str]) -> None:
    class Meeting(Store):
        def create(self, name: str, data: bytes, check_first: bool = True) -> bool:
            if acts:
                acts.pop()()
            return super().create(name, data, check_first)

    acts = [lambda: use(store, names[0])]
    report = gc_index(Meeting(store.url), keep=0, older_than=0)
    assert folders_of(store) == sorted([names[0], *names[3:]]) == list(report.kept)
    assert report.kept[names[0]] == "live" and report.kept[names[4]] == "was live lately"


@pytest.mark.parametrize("point", range(8))
def test_a_kill_at_any_point_is_completed(
    store: Store, names: list[str], monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    left = [point]

    def around(real):  # type: ignore[no-untyped-def]
        def disturbed(*arguments: object) -> object:
            left[0] -= 1
            if left[0] == -1:
                raise KeyboardInterrupt
            return real(*arguments)

        return disturbed

    with monkeypatch.context() as patched:
        for name in ("create", "replace", "remove", "remove_folder"):
            patched.setattr(Store, name, around(getattr(Store, name)))
        with pytest.raises(KeyboardInterrupt):
            gc_index(store, keep=0, older_than=0)
    assert verify_index(store).ok
    doomed = read_state(store).dropping
    for version in doomed:
        with pytest.raises((ConfigError, ConflictError)):
            use(store, version)
    report = gc_index(store, keep=0, older_than=0)
    assert {garbage.name for garbage in report.removed} <= set(names[:3])
    assert folders_of(store) == sorted(names[3:]) and read_state(store).dropping == ()
    assert verify_index(store, deep=True).ok


def test_the_command(store: Store, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gc"]) == 2
    assert "--output OUT or --index INDEX is needed" in capsys.readouterr().err
    flags = ["gc", "--index", store.url, "--keep", "0", "--older-than", "0"]
    assert main([*flags, "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [garbage["name"] for garbage in report["removed"]] == sorted(names[:3]) and report["dry_run"]
    assert main(flags) == 0
    assert "3 items deleted" in capsys.readouterr().out
    assert len(versions(store)) == 2


def test_from_python(store: Store, names: list[str]) -> None:
    assert clip_batch.gc_index(store.url, keep=0, older_than=0, dry_run=True).bytes > 10_000
    for wrong in ({"keep": -1}, {"older_than": -1.0}, {"older_than": float("nan")}):
        with pytest.raises(ConfigError, match="numbers, 0 or more"):
            clip_batch.gc_index(store.url, **wrong)  # type: ignore[arg-type]


def test_on_a_remote_store(home: Path, names: list[str]) -> None:
    Flaky.reset()
    local, remote = Store(home / "index"), Store("flaky://home/index")
    for name in local.files(""):
        remote.replace(name, local.read(name))
    assert remote.files("") == local.files("")
    report = gc_index(remote, keep=0, older_than=0)
    assert report.bytes == sum(sum(local.files(name).values()) for name in names[:3])
    assert folders_of(remote) == sorted(names[3:])
    assert verify_index(remote, deep=True).ok
    Flaky.reset()


ENCODER = EncoderSpec("fake:8", "", "0" * 64)


class Histories(RuleBasedStateMachine):
    """Random histories of an index whose versions are manifests and one file a shard."""

    @initialize()
    def begin(self) -> None:
        self.root = tempfile.mkdtemp(prefix="clip-batch-gc-")
        self.store = Store(self.root)
        self.names = map("{:012x}".format, count())

    def teardown(self) -> None:
        shutil.rmtree(getattr(self, "root", "/nowhere"), ignore_errors=True)

    def finished(self) -> list[str]:
        return [name for name in folders_of(self.store) if self.store.exists(VersionPaths(name).manifest)]

    @rule(add=st.booleans(), live=st.booleans())
    def merge(self, add: bool, live: bool) -> None:
        version, before = next(self.names), live_version(self.store)
        base = load_manifest(self.store, before) if add and before else None
        name = f"{len(base.shards) if base else 0:04d}"
        self.store.replace(VersionPaths(version).index("image", name), b"12345")
        files = {VersionPaths().index("image", name): {"bytes": 5, "sha256": ""}}
        shards = [replace(shard, version=shard.version or str(before)) for shard in base.shards] if base else []
        shards.append(IndexShard(name, 1, len(shards), files))  # type: ignore[arg-type]
        manifest = Manifest(
            version, 0.0, 8, len(shards), ENCODER, "", {}, {}, {}, 0.9, (), False, tuple(shards),
            base=before or "" if add else "", template=base.template if base else version,
        )  # fmt: skip
        self.store.create(VersionPaths(version).manifest, manifest.to_json().encode())
        if live:
            publish(self.store, version, before)

    @rule()
    def begin_a_merge(self) -> None:
        self.store.replace(VersionPaths(next(self.names)).attempt("0000", "ab") + "/file", b"1")

    @precondition(lambda self: self.finished())
    @rule(data=st.data(), dropping=st.booleans())
    def use_or_drop(self, data: st.DataObject, dropping: bool) -> None:
        version = data.draw(st.sampled_from(self.finished()))
        try:
            if dropping:
                drop(self.store, version)
            else:
                publish(self.store, version, live_version(self.store))
        except (ConfigError, ConflictError):
            pass

    @precondition(lambda self: folders_of(self.store))
    @rule(keep=st.integers(0, 3), left=st.integers(0, 12), young=st.booleans())
    def gc(self, keep: int, left: int, young: bool) -> None:
        begun = read_state(self.store).dropping  # by a gc that was killed
        before = {name: load_manifest(self.store, name) for name in self.finished() if name not in begun}

        class Dying(Store):
            def _die(self) -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt

            def create(self, *arguments: object) -> bool:  # type: ignore[override]
                self._die()
                return super().create(*arguments)  # type: ignore[arg-type]

            def remove(self, name: str) -> None:
                self._die()
                super().remove(name)

            def remove_folder(self, folder: str) -> None:
                self._die()
                super().remove_folder(folder)

        try:
            report = gc_index(Dying(self.root), keep, 1 if young else 0)
        except KeyboardInterrupt:
            return
        if young:
            assert {garbage.name for garbage in report.removed}.isdisjoint(before)
        for version in report.kept:
            assert version not in before or not broken(self.store, before[version].files)
        assert set(folders_of(self.store)) == set(report.kept)

    @invariant()
    def the_live_version_is_whole(self) -> None:
        if not hasattr(self, "store"):
            return
        if (live := live_version(self.store)) is not None:
            assert not broken(self.store, load_manifest(self.store, live).files)


TestHistories = Histories.TestCase
TestHistories.pytestmark = [pytest.mark.slow]  # type: ignore[attr-defined]
TestHistories.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
