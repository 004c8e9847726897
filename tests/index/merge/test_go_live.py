"""A merge goes live onto the version that it began from, and never silently with less than that one holds."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from clip_batch.cli import main
from clip_batch.config import MergeConfig
from clip_batch.errors import ConfigError, ConflictError
from clip_batch.index.ann import faiss_index
from clip_batch.index.manifest import load_manifest
from clip_batch.index.merge import merge as stage
from clip_batch.index.merge.job import MergeJob
from clip_batch.index.merge.merge import merge
from clip_batch.index.publications import TRIES, current_version, live_version, publications
from clip_batch.index.verify import verify_index
from clip_batch.index.versions import use, versions
from clip_batch.storage.store import Store
from tests.fabricated import clustered, commit, make_out, make_plan
from tests.life.deaths import death

CONFIG = MergeConfig(queries=5, shard_rows=40)
ADD = replace(CONFIG, add=True)
SIZES = {"a": [30, 20], "b": [25], "c": [10, 10, 10]}
ROWS = {name: sum(sizes) for name, sizes in SIZES.items()}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    faiss_index.use_threads(1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUTs a, b and c, and an index of a."""
    home = tmp_path_factory.mktemp("live")
    for number, (name, sizes) in enumerate(SIZES.items()):
        make_out(home / name, *clustered(sum(sizes), 8, 3, number), sizes)
    merge(home / "a", home / "index", CONFIG)
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    """The OUTs, and a copy of the index to do harm to."""
    for name in SIZES:
        (tmp_path / name).symlink_to(made / name)
    shutil.copytree(made / "index", tmp_path / "index")
    return tmp_path


def outs(index: Path) -> list[str]:
    """The OUTs that the live version holds, once it is seen to be whole."""
    store = Store(index)
    manifest = load_manifest(store)
    assert verify_index(store, deep=True).problems == {}
    assert manifest.rows == sum(ROWS[Path(source.output).name] for source in manifest.sources)
    assert current_version(store) == manifest.version == publications(store)[-1].version
    return [Path(source.output).name for source in manifest.sources]


def meanwhile(monkeypatch: pytest.MonkeyPatch, task: str, act: Callable[[], object], times: int = 1) -> None:
    """Let another merge do something before a task of this one, `times` times."""
    real, left = getattr(stage, task), [times]

    def task_after(job: MergeJob, *rest: object, **more: object) -> object:
        if left[0]:
            left[0] -= 1
            act()
        return real(job, *rest, **more)

    monkeypatch.setattr(stage, task, task_after)


@pytest.mark.parametrize("task", ["train", "build_shard", "publish"])
def test_an_addition_that_lost_begins_again(home: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    meanwhile(monkeypatch, task, lambda: merge(home / "b", home / "index", ADD))
    lines: list[str] = []
    made = merge(home / "c", home / "index", ADD, progress=lines.append)
    assert outs(home / "index") == ["a", "b", "c"]
    assert any("so" in line and "given up and the merge begins again" in line for line in lines)
    assert len(versions(Store(home / "index"))) == 4  # what was given up stays, for gc
    assert merge(home / "c", home / "index", ADD) == made


def test_first_additions_at_once_to_an_index_that_is_not_there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meanwhile(monkeypatch, "publish", lambda: merge(home / "b", home / "new", ADD))
    merge(home / "c", home / "new", ADD)
    assert outs(home / "new") == ["b", "c"]


def test_an_addition_gives_up_at_last(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(home / "index")
    base = str(current_version(store))
    other = merge(home / "b", home / "index", ADD).version
    swaps = []

    def swap() -> None:
        swaps.append(current_version(store))
        use(store, base if swaps[-1] == other else other)

    meanwhile(monkeypatch, "make_live", swap, times=TRIES + 1)
    with pytest.raises(ConflictError, match=r"serves version .* now, not .* as when this began: run the command again"):
        merge(home / "c", home / "index", ADD)
    assert len(swaps) == TRIES + 1
    assert merge(home / "c", home / "index", ADD).rows == load_manifest(store).rows


def test_separate_tasks_of_an_addition_that_lost_say_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["merge", "--output", f"{home}/c", "--index", f"{home}/index", "--queries", "5", "--shard-rows", "40"]
    shards = ["--task", "shards", "--slot", "0", "--slots", "1"]
    assert main([*command, "--add", *shards]) == 2
    assert "is not trained yet: run clip-batch merge" in capsys.readouterr().err
    assert main([*command, "--add", "--task", "train"]) == 0
    merge(home / "b", home / "index", ADD)
    for task in (shards, ["--task", "manifest"]):
        capsys.readouterr()
        assert main([*command, "--add", *task]) == 1
        error = capsys.readouterr().err
        assert "when this merge was trained, and serves" in error and error.count("\n") == 1
    told = error.split("run clip-batch ")[1].split(", and the other tasks")[0]
    assert main(told.split()) == 0
    for task in (shards, ["--task", "manifest"]):
        assert main([*command, "--add", *task]) == 0
    assert outs(home / "index") == ["a", "b", "c"]


def test_the_base_merged_again_leaves_what_was_added(home: Path) -> None:
    base = load_manifest(Store(home / "index"))
    larger = merge(home / "b", home / "index", ADD)
    lines: list[str] = []
    assert merge(home / "a", home / "index", CONFIG, progress=lines.append) == larger
    said = f"version {base.version} is finished already, and {larger.version}, which was added to it, stays live"
    assert lines == [f"{said} (--anew takes its place)"]
    with pytest.raises(ConfigError) as refused:
        merge(home / "a", home / "index", replace(CONFIG, seed=1), progress=lines.append)
    text = f"live version {larger.version} of {home}/index holds 25 rows of {home}/b besides: "
    text += (
        f"clip-batch merge --add --output {home}/a --index {home}/index adds to it, and merge --anew takes its place"
    )
    assert str(refused.value) == text
    assert len(lines) == 1 and len(versions(Store(home / "index"))) == 2  # nothing was built
    assert outs(home / "index") == ["a", "b"]
    assert merge(home / "a", home / "index", replace(CONFIG, anew=True)) == base  # --anew does not change its name
    assert outs(home / "index") == ["a"]
    merge(home / "b", home / "index", ADD)
    merge(home / "a", home / "index", replace(CONFIG, seed=1, anew=True))
    assert outs(home / "index") == ["a"]


def test_another_out_is_not_put_in_the_place_of_one(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["merge", "--output", f"{home}/b", "--index", f"{home}/index", "--queries", "5"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "holds 50 rows of " in error and "/a besides: " in error
    assert main([*command, "--anew"]) == 0
    assert outs(home / "index") == ["b"]


def test_what_goes_live_while_a_merge_anew_is_built_is_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    anew = replace(CONFIG, seed=1, anew=True)
    merge(home / "b", home / "index", ADD)
    meanwhile(monkeypatch, "publish", lambda: merge(home / "c", home / "index", ADD))
    with pytest.raises(ConflictError, match=r"25 rows of .*/b and 30 rows of .*/c besides, and has gone live"):
        merge(home / "a", home / "index", anew)
    assert outs(home / "index") == ["a", "b", "c"]
    assert merge(home / "a", home / "index", anew).version == current_version(Store(home / "index"))


def test_an_older_state_of_the_same_out_is_refused(tmp_path: Path) -> None:
    images, texts = clustered(40, 8, 3)
    plan = make_plan(tmp_path / "out", 2)
    commit(tmp_path / "out", plan, 0, images[:20], texts[:20])
    shutil.copytree(tmp_path / "out", tmp_path / "older")
    partial = replace(CONFIG, allow_partial=True)
    first = merge(tmp_path / "out", tmp_path / "index", partial)
    commit(tmp_path / "out", plan, 1, images[20:], texts[20:])
    assert merge(tmp_path / "out", tmp_path / "index", partial).rows == 40
    with pytest.raises(ConfigError, match=r"holds 20 rows of .*/out besides"):
        merge(tmp_path / "older", tmp_path / "index", replace(partial, seed=3))
    use(Store(tmp_path / "index"), first.version)
    assert merge(tmp_path / "out", tmp_path / "index", partial).rows == 40  # forward again


def test_an_out_made_again_from_other_tars_does_not_take_the_place_of_the_former_one(tmp_path: Path) -> None:
    make_out(tmp_path / "out", *clustered(20, 8, 3), [20])
    before = merge(tmp_path / "out", tmp_path / "index", CONFIG)
    shutil.move(tmp_path / "out", tmp_path / "former")
    (tmp_path / "elsewhere").mkdir()
    make_out(tmp_path / "elsewhere" / "out", *clustered(30, 8, 3, 1), [30])
    shutil.move(tmp_path / "elsewhere" / "out", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"holds 20 rows of .*/out besides"):
        merge(tmp_path / "out", tmp_path / "index", CONFIG)
    assert live_version(Store(tmp_path / "index")) == before.version
    both = [tmp_path / "former", tmp_path / "out"]
    assert merge(both, tmp_path / "index", CONFIG).rows == 50  # it holds all that is live


def test_a_merge_anew_that_was_killed_long_ago_goes_live_when_it_is_run_again(home: Path) -> None:
    """It takes the place of what is live now, not of what was when the killed one was trained."""
    anew = replace(CONFIG, anew=True)
    with death(8):
        merge(home / "b", home / "index", anew)
    assert outs(home / "index") == ["a"]
    merge(home / "c", home / "index", anew)
    merge(home / "b", home / "index", anew)
    assert outs(home / "index") == ["b"]


RACER = """
import sys, time
from pathlib import Path
from clip_batch.cli import main
me, home, out, rounds = sys.argv[1:5]
for number in range(int(rounds)):
    Path(home, f"ready-{number}-{me}").touch()
    while len(list(Path(home).glob(f"ready-{number}-*"))) < 3:
        time.sleep(0.001)
    if code := main(["merge", "--output", f"{home}/{out}", "--index", f"{home}/index-{number}", *sys.argv[5:]]):
        sys.exit(code)
"""


@pytest.mark.slow
def test_additions_at_once_in_processes(home: Path) -> None:
    """All exit with 0, two of them do the same, and the rows of both OUTs are live: in every round."""
    rounds = 12
    for number in range(rounds):
        shutil.copytree(home / "index", home / f"index-{number}")
    flags = ["--queries", "5", "--shard-rows", "40", "--add"]
    racing = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(me), home, name, str(rounds), *flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for me, name in enumerate("bcb")
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in racing]
    finally:
        for process in racing:
            process.kill()
    assert [process.returncode for process in racing] == [0] * 3, errors
    for number in range(rounds):
        assert sorted(outs(home / f"index-{number}")) == ["a", "b", "c"]


KILLED = """
import os, sys
from clip_batch.cli import main
from clip_batch.index import publications
publications._point = lambda *_: os.kill(os.getpid(), 9)
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_kill_between_the_log_and_current(home: Path) -> None:
    store, before = Store(home / "index"), current_version(Store(home / "index"))
    command = ["merge", "--output", f"{home}/b", "--index", store.url, "--queries", "5", "--shard-rows", "40", "--add"]
    assert subprocess.run([sys.executable, "-c", KILLED, *command], check=False, capture_output=True).returncode == -9
    assert current_version(store) == before
    assert outs(home / "index") == ["a", "b"]  # who looks next mends it
    assert main(command) == 0
    assert outs(home / "index") == ["a", "b"]
