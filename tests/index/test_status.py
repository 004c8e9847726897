"""status --index, and what verify --index says of CURRENT and the log."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

import clip_batch
from clip_batch.cli import main
from clip_batch.config import MergeConfig
from clip_batch.errors import ConfigError
from clip_batch.index.ann import faiss_index
from clip_batch.index.manifest import load_manifest
from clip_batch.index.merge import merge as stage
from clip_batch.index.merge.job import open_job
from clip_batch.index.merge.merge import merge
from clip_batch.index.paths import CURRENT, VersionPaths, publication
from clip_batch.index.publications import append, read_state
from clip_batch.index.remove import remove_values
from clip_batch.index.status import describe, index_status
from clip_batch.index.verify import verify_index
from clip_batch.index.versions import use
from clip_batch.storage.store import Store
from tests.fabricated import clustered, make_out

CONFIG = MergeConfig(queries=5, shard_rows=40)
ADD = replace(CONFIG, add=True)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    faiss_index.use_threads(1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """OUTs a and b, an index of a, then of both; the versions."""
    home = tmp_path_factory.mktemp("status")
    for number, (name, sizes) in enumerate({"a": [60, 40], "b": [20, 20, 20]}.items()):
        make_out(home / name, *clustered(sum(sizes), 8, 3, number), sizes, skip=[1] if name == "a" else ())
    first = merge(home / "a", home / "index", replace(CONFIG, allow_partial=True))
    return home, [first.version, merge(home / "b", home / "index", replace(ADD, allow_partial=True)).version]


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


def test_the_live_version_in_one_view(store: Store, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    remove_values(store.url, ["0-1"])
    manifest, status = load_manifest(store), clip_batch.index_status(store.url)
    assert isinstance(status, clip_batch.IndexStatus)
    assert (status.version, status.rows, status.removed, status.removal_lists) == (names[1], 120, 2, 1)
    assert [source.rows for source in status.sources] == [60, 60]
    assert status.recall == manifest.recall and status.drift == manifest.drift and status.bytes == manifest.size
    assert status.other_versions == 1 and status.merges == () and not status.problems
    assert status.next[0].startswith("clip-batch status --output ") and status.next[0].endswith("/a")
    assert status.next[-1] == f"clip-batch serve --index {store.url}"
    assert main(["status", "--index", store.url]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"version {names[1]} is live since 20") and "2 removed by 1 list" in text
    assert "/a: 60 rows, without partitions 1" in text and "image Flat (recall@10 " in text
    assert "recall@10 of the rows added last" in text and "1 other version" in text
    assert main(["status", "--index", store.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == names[1]
    for flags, code in (([], 2), (["--index", f"{store.url}/nowhere"], 2)):
        assert main(["status", *flags]) == code
    assert "no index at" in capsys.readouterr().err


def test_unfinished_merges_tell_how_far_they_are(home: Path, store: Store, names: list[str]) -> None:
    config = replace(CONFIG, shard_rows=20, seed=1, anew=True)
    job = open_job(f"{home}/b", store.url, config)
    stage.train(job)
    (progress,) = index_status(store).merges
    assert (progress.version, progress.trained, progress.replaces) == (job.version, True, names[1])
    assert (progress.shards_built, progress.shards, progress.rows) == (0, 3, 60)
    assert (progress.rows_per_second, progress.eta_seconds) == (0.0, None) and progress.idle_seconds is not None
    stage.build_shard(job, 0)
    begun = time.time() - 7300
    os.utime(store.path(job.paths.template_record), (begun, begun))
    built = Path(store.path(job.paths.shard_record("0000")))
    os.utime(built, (begun + 10, begun + 10))
    (progress,) = index_status(store).merges
    assert (progress.shards_built, progress.rows_per_second, progress.eta_seconds) == (1, 2.0, 20)
    line = describe(index_status(store)).splitlines()[-4]
    assert line.startswith(
        f"version {job.version} is being merged: trained, 1 of 3 index shards built, 2 rows/s, ETA 0:0"
    )
    for path in Path(store.path(job.version)).rglob("*"):
        os.utime(path, (begun, begun))
    status = index_status(store)
    assert status.next[0] == job.command and "--anew" in job.command and f"--output {home}/b" in job.command
    assert main(status.next[0].split()[1:]) == 0
    assert index_status(store).version == job.version and index_status(store).merges == ()


def test_an_out_that_was_added_twice_is_shown_once_and_the_merge_that_is_due(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, store, data = f"{tmp_path}/a", Store(f"{tmp_path}/index"), clustered(100, 8, 3, 0)
    make_out(tmp_path / "a", *data, [60, 30, 10], skip=[1, 2])
    merge(out, store.url, replace(CONFIG, allow_partial=True))
    make_out(tmp_path / "a", *data, [60, 30, 10], skip=[0, 2])
    assert index_status(store).next[0] == f"clip-batch status --output {out}"
    make_out(tmp_path / "a", *data, [60, 30, 10], skip=[0, 1])
    due = f"clip-batch merge --add --output {out} --index {store.url}"
    assert index_status(store).next[0] == due
    assert main([*due.split()[1:], "--queries", "5"]) == 0
    assert [source.rows for source in load_manifest(store).sources] == [60, 100]
    status = index_status(store)
    assert status.rows_of == {out: 100} and status.next[0].startswith("clip-batch serve")
    assert [line for line in describe(status).splitlines() if line.startswith("  of ")] == [f"  of {out}: 100 rows"]
    capsys.readouterr()
    assert main(["versions", "--index", store.url]) == 0
    assert f"    of {out} (100 rows)\n" in capsys.readouterr().out
    shutil.rmtree(out)
    assert index_status(store).rows_of == status.rows_of


def test_an_index_is_no_out(home: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["status"], ["gc"], ["merge", "--index", f"{home}/other"]):
        assert main([*words, "--output", store.url]) == 2
        assert f"{store.url} is an index, no embeddings folder" in capsys.readouterr().err


def test_out_and_index_are_apart(
    home: Path, store: Store, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path for path in home.rglob("*"))
    shutil.copytree(home / "a", home / "index" / "publications" / "a")
    (home / "link").symlink_to(home / "b")
    for out, index in (
        (f"{home}/b", f"{home}/b"),
        (f"{home}/b", f"{home}/link"),
        (f"{home}/b", f"{home}/b/metadata/index"),
        (f"{home}/index/publications/a", store.url),
    ):
        assert main(["merge", "--output", out, "--index", index, "--queries", "5"]) == 2
        assert "share a folder: give an INDEX apart" in capsys.readouterr().err
    shutil.rmtree(home / "index" / "publications" / "a")
    (home / "link").unlink()
    assert sorted(path for path in home.rglob("*")) == before
    merge(home / "b", home / "b" / "index", CONFIG)


def test_replace_where_it_has_no_effect(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["merge", "--output", f"{home}/b", "--index", f"{home}/other", "--queries", "5", "--replace"]
    assert main(words) == 0
    assert "--replace has no effect here" in capsys.readouterr().err
    assert main([*words, "--add"]) == 0
    assert "no effect" not in capsys.readouterr().err


def test_an_addition_that_was_outrun_is_not_run_again(home: Path, store: Store, names: list[str]) -> None:
    use(store, names[0])
    job = open_job(f"{home}/b", store.url, replace(ADD, seed=1))
    stage.train(job)
    assert not index_status(store).merges[0].outrun
    use(store, names[1])
    for path in Path(store.path(job.version)).rglob("*"):
        os.utime(path, (0, 0))
    status = index_status(store)
    assert status.merges[0].outrun and job.command not in status.next
    assert f"version {job.version} was outrun by another that went live" in describe(status)


def test_before_anything_is_live(home: Path) -> None:
    store = Store(home / "new")
    job = open_job(f"{home}/b", store.url, CONFIG)
    stage.train(job)
    status = index_status(store)
    assert (status.version, status.rows, len(status.merges)) == (None, 0, 1)
    assert describe(status).startswith(f"nothing is live in {store.url} yet\nversion {job.version} is being merged")
    with pytest.raises(ConfigError, match="no index at"):
        index_status(Store(home / "nowhere"))


def test_a_deletion_that_was_not_completed(store: Store, names: list[str]) -> None:
    use(store, names[0])
    append(store, state := read_state(store), state.version, {names[1]})
    status = index_status(store)
    assert status.deleting == (names[1],) and status.other_versions == 0
    assert f"clip-batch gc --index {store.url}" in status.next
    assert f"the deletion of version {names[1]} was not completed" in describe(status)


def test_verify_knows_the_log(store: Store, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    first, second = names
    index = store.url
    assert verify_index(store).ok and verify_index(store).checked == len(load_manifest(store).shards)
    ahead = "0123456789ab"
    shutil.copytree(store.path(second), store.path(ahead))
    manifest = Path(store.path(VersionPaths(ahead).manifest))
    manifest.write_text(manifest.read_text().replace(f'"version": "{second}"', f'"version": "{ahead}"'))
    for content, name, problem in (
        (f"{first}\n", CURRENT, f"is behind the log, whose last entry is version {second}: .* --index {index}"),
        (None, CURRENT, "is behind the log"),
        (f"{ahead}\n", CURRENT, f"which the log lacks, .*clip-batch versions --index {index} --use {ahead} enters it"),
        ("ffffffffffff\n", "what is live", f"manifest.json is missing.* --use goes back to .*{second}"),
        ("../../etc\n", "what is live", "is not the name of a version"),
    ):
        store.remove(CURRENT) if content is None else store.replace(CURRENT, content.encode())
        report = verify_index(store)
        assert not report.ok and name in report.problems, (content, report)
        assert re.search(problem, report.problems[name])
        assert content is None or store.read(CURRENT).decode() == content  # verify mends nothing
        assert main(["verify", "--index", index]) == 1
        assert report.problems[name] in capsys.readouterr().err
    use(store, second)
    assert verify_index(store).ok
    store.remove(publication(1))
    assert "entry 2 does not follow entry 0" in verify_index(store).problems["log of publications"]
    store.replace(publication(2), b"{}")
    assert "is not an entry of the log" in verify_index(store).problems["what is live"]


def test_verify_of_an_index_of_an_older_release(store: Store) -> None:
    store.remove_folder("publications")
    assert verify_index(store).ok
    assert index_status(store).live_since is None
