"""The commands of docs/life.md run, one after another, and each part of the year has its effect."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from clip_batch import read, removals
from clip_batch.cli import main
from clip_batch.demo import data
from clip_batch.index.manifest import load_manifest
from clip_batch.storage.store import Store
from tests import ROOT

pytestmark = pytest.mark.slow

MONTHS = re.findall(r"## (\w+):.*?```sh\n(.*?)```", (ROOT / "docs/life.md").read_text(), re.DOTALL)

Rows = dict[tuple[str, str], int]


def rows() -> Rows:
    """How often each row of the index is found, by its tar's name and its key."""
    with read("index") as found:
        table = found.to_table(columns=["shard", "key"]).to_pydict()
    counts: Rows = {}
    for shard, key in zip(table["shard"], table["key"], strict=True):
        counts[Path(shard).name, key] = counts.get((Path(shard).name, key), 0) + 1
    return counts


def run(command: str) -> None:
    """Run a command: in this process, where it needs no shell, as that spares loading torch each time."""
    words = shlex.split(command, comments=True)
    if words[0] == "clip-batch" and "||" not in words:
        assert main(words[1:]) == 0, command
        return
    folders = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    subprocess.run(["bash", "-euc", command], env={**os.environ, "PATH": folders}, check=True, timeout=600)


def test_a_year(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for stage in ("EMBED", "SEARCH"):
        monkeypatch.setenv(f"CLIP_BATCH_{stage}_DEVICE", "cpu")
    written = data.write_tars("all", 60)
    Path("tars").mkdir()
    Path("incoming/corrected").mkdir(parents=True)
    for number in range(7):
        folder = "tars" if number < 4 else "incoming"
        shutil.move(written[number], f"{folder}/{number:02d}.tar")
    shutil.move(written[7], "incoming/corrected/02.tar")
    months, said = dict(MONTHS), dict[str, str]()
    assert len(MONTHS) == 10

    def live(month: str, **names: Callable[[], str]) -> Rows:
        """The rows of the index after the commands of a month, one by one; `names` has what a person looks up."""
        for command in months.pop(month).splitlines():
            for name, look_up in names.items():
                command = command.replace(name, look_up()) if name in command else command
            run(command)
        said[month] = "".join(capsys.readouterr())
        found = rows()
        assert set(found.values()) == {1}
        return found

    def tars(found: Rows) -> set[str]:
        return {tar for tar, _ in found}

    january = live("January")
    assert tars(january) == {f"{number:02d}.tar" for number in range(4)}
    february = live("February")
    assert january.items() < february.items() and len(tars(february)) == 6
    march = live("March")
    assert february.items() < march.items() and tars(march) - tars(february) == {"06.tar"}
    assert "stand" in said["March"]
    face, mistake = sorted(january)[:2]
    with tarfile.open("tars/00.tar") as tar:
        picture = tar.extractfile(f"{face[1]}.jpg")
        assert picture
        Path("face.jpg").write_bytes(picture.read())

    def by_mistake() -> str:
        return next(info.digest for info in removals("index") if info.note == "a mistake")

    april = live("April", KEY=lambda: mistake[1], DIGEST=by_mistake)
    assert face not in april and mistake in april and len(march) - len(april) < 5
    may = live("May")
    assert {row for row in april if row[0] != "02.tar"} == {row for row in may if row[0] != "02.tar"}
    assert not {row for row in april if row[0] == "02.tar"} & may.keys()
    assert live("June") == may
    before = load_manifest(Store("index")).version
    assert live("August") == may
    latest = load_manifest(Store("index")).version
    assert latest != before
    assert live("September", VERSION=lambda: before, LATEST=lambda: latest) == may
    assert live("October") == may
    assert live("December") == may
    assert sum(info.active for info in removals("index")) == 1
    assert not months
