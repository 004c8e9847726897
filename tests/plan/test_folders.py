"""Folders of files: what a plan froze of them, and how they are extended, changed and embedded again."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clip_batch.cli import main
from clip_batch.config import EmbedConfig, PlanConfig, StorageConfig
from clip_batch.embeddings.commits import read_commits
from clip_batch.embeddings.embed import embed
from clip_batch.embeddings.reader import open_embeddings
from clip_batch.embeddings.verify import verify_output
from clip_batch.errors import CorruptError, InputError, PlanError
from clip_batch.plan import paths
from clip_batch.plan.plan import load_plan, make_plan
from clip_batch.storage.store import Store
from tests import corpus
from tests.embeddings.test_tar_edges import table
from tests.servers.s3_server import BUCKET, S3
from tests.servers.s3_server import s3 as s3
from tests.servers.s3_server import s3_server as s3_server

CONFIG = PlanConfig(model="fake:8", format="files")
EXTEND = replace(CONFIG, extend=True)
CPU = EmbedConfig(device="cpu", progress=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for number in range(4):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(corpus.jpeg(number))
    (tmp_path / "in" / "0.txt").write_text("a cat")
    return tmp_path / "in"


def put(folder: Path, name: str, data: bytes) -> None:
    """Write a file with a time of its own, however coarse the disk's clock is."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    put.time += 1  # type: ignore[attr-defined]
    os.utime(path, (put.time, put.time))  # type: ignore[attr-defined]


put.time = int(time.time()) + 10  # type: ignore[attr-defined]


def rows(out: str) -> dict[str, str | None]:
    found = [(row["key"], row["caption"]) for row in table(out, "metadata")]
    assert len(dict(found)) == len(found), "each sample once"
    return dict(found)


def failed(out: str) -> dict[str, str]:
    if not any(commit.failed for commit in read_commits(Store(out)).values()):
        return {}
    return {row["key"]: row["reason"] for row in table(out, paths.FAILURES)}


def planned(folder: Path, out: str, config: PlanConfig = CONFIG) -> list[str]:
    said = list[str]()
    make_plan(folder, out, config, progress=said.append)
    return said


def sound(out: str) -> bool:
    return verify_output(Store(out), deep=True).problems == {}


def test_new_pictures_are_added_and_rows_of_before_stay(folder: Path, out: str) -> None:
    make_plan(folder, out, CONFIG)
    embed(out, CPU)
    before = read_commits(Store(out))
    for step, name in enumerate(("a new.jpg", "sub/b.png", "0.png")):  # before, among and beside those of before
        put(folder, name, corpus.jpeg(10 + step))
        with pytest.raises(PlanError, match=rf"has grown \(1 picture added: {name}\): plan with --extend"):
            make_plan(folder, out, CONFIG)
        assert (
            f"1 picture added: {name}: 1 partition added as generation {step + 1}" in planned(folder, out, EXTEND)[-1]
        )
        [outcome] = embed(out, CPU)
        assert (outcome.partition, outcome.rows) == (step + 1, 1)
        assert planned(folder, out, EXTEND)[-1] == planned(folder, out)[-1] == "unchanged"
    assert read_commits(Store(out))[0] == before[0] and sound(out)
    assert rows(out) == {"0": "a cat", "1": None, "2": None, "3": None, "a new": None, "sub/b": None, "0.png": "a cat"}


def test_a_worker_lists_nothing(folder: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_plan(folder, out, replace(CONFIG, partition_samples=2))
    put(folder, "00.jpg", corpus.jpeg(7))  # would move every place in a listing

    def refuse(*_: object) -> None:
        raise AssertionError("a worker walks the folder")

    monkeypatch.setattr("clip_batch.samples.files.list_tree", refuse)
    embed(out, CPU)
    assert rows(out) == {"0": "a cat", "1": None, "2": None, "3": None}


def test_what_changed_in_place_is_said_and_embedded_again(
    folder: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_plan(folder, out, replace(CONFIG, partition_samples=2))
    embed(out, CPU)
    before = read_commits(Store(out))
    put(folder, "2.jpg", corpus.jpeg(12, side=48))
    put(folder, "3.txt", b"a dog")
    said = planned(folder, out, replace(CONFIG, partition_samples=2))
    assert "2 planned pictures changed since: 2.jpg (" in said[-2] and "3.jpg (3.txt added)" in said[-2]
    assert said[-2].endswith(f"clip-batch repair --output {out} --retry-failed changed embeds them again, as run does")
    assert said[-1] == "unchanged"
    report = verify_output(Store(out), deep=True)
    assert list(report.problems) == report.outdated == ["0001"] and "3.txt added" in report.problems["0001"]
    assert verify_output(Store(out)).problems == {}
    assert main(["repair", "--output", out, "--device", "cpu", "--retry-failed", "changed"]) == 0
    assert rows(out) == {"0": "a cat", "1": None, "2": None, "3": "a dog"} and sound(out)
    after = read_commits(Store(out))
    assert after[0] == before[0] and after[1].attempt != before[1].attempt
    assert Store(out).list(paths.RENEWED) == [f"0001-{before[1].attempt}.json"]
    assert planned(folder, out, replace(CONFIG, partition_samples=2))[-2:-1] != said[-2:-1]
    put(folder, "3.txt", b"two dogs")  # once more, and back: each is noticed
    assert verify_output(Store(out), deep=True).outdated == ["0001"]
    assert main(["repair", "--output", out, "--device", "cpu", "--deep"]) == 0
    assert rows(out)["3"] == "two dogs" and sound(out)
    (folder / "3.txt").unlink()
    assert "3.jpg (3.txt removed)" in verify_output(Store(out), deep=True).problems["0001"]
    assert main(["repair", "--output", out, "--device", "cpu", "--deep"]) == 0
    assert rows(out)["3"] is None and sound(out)
    assert main(["gc", "--output", out, "--everything"]) == 0 and sound(out)
    capsys.readouterr()
    assert main(["status", "--output", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 4


def test_pictures_that_are_gone_are_named_and_their_rows_stay_until_they_are_asked_for(folder: Path, out: str) -> None:
    make_plan(folder, out, CONFIG)
    embed(out, CPU)
    picture = (folder / "1.jpg").read_bytes()
    (folder / "1.jpg").unlink()
    put(folder, "new.jpg", corpus.jpeg(9))
    said = planned(folder, out, EXTEND)
    assert "1 planned picture gone: 1.jpg: clip-batch repair" in said[-2] and "new.jpg" in said[-1]
    embed(out, CPU)
    assert set(rows(out)) == {"0", "1", "2", "3", "new"}
    assert verify_output(Store(out), deep=True).problems["0000"].startswith("1 picture gone: 1.jpg; clip-batch repair")
    assert main(["repair", "--output", out, "--device", "cpu", "--retry-failed", "gone"]) == 0
    assert set(rows(out)) == {"0", "2", "3", "new"} and failed(out) == {"1": "unreadable_file"} and sound(out)
    assert planned(folder, out)[-1] == "unchanged" and "gone" not in planned(folder, out)[-2]
    put(folder, "1.jpg", picture)
    assert main(["repair", "--output", out, "--device", "cpu", "--retry-failed", "unreadable_file"]) == 0
    assert set(rows(out)) == {"0", "1", "2", "3", "new"} and failed(out) == {} and sound(out)


def test_a_failure_is_mended(folder: Path, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    put(folder, "bad.jpg", b"noise")
    make_plan(folder, out, CONFIG)
    embed(out, CPU)
    assert failed(out) == {"bad": "undecodable_image"}
    assert main(["status", "--output", out]) == 0
    told = f"once they are mended: clip-batch repair --output {out} --retry-failed undecodable_image\n"
    assert told in capsys.readouterr().out
    put(folder, "bad.jpg", corpus.jpeg(8))
    assert main(["repair", "--output", out, "--device", "cpu", "--retry-failed", "undecodable_image"]) == 0
    assert failed(out) == {} and "bad" in rows(out) and sound(out)
    assert main(["repair", "--output", out, "--retry-failed", "undecodable"]) == 2
    assert "undecodable is no reason of a failure: they are changed, gone, bad_compression" in capsys.readouterr().err


def test_a_caption_that_waited_for_its_picture(folder: Path, out: str) -> None:
    put(folder, "late.txt", b"soon")
    make_plan(folder, out, CONFIG)
    embed(out, CPU)
    assert failed(out) == {"late": "missing_image"}
    put(folder, "late.jpg", corpus.jpeg(5))
    make_plan(folder, out, EXTEND)
    embed(out, CPU)
    assert rows(out)["late"] == "soon" and sound(out)


def test_captions_alone_are_not_embedded_again_because_their_picture_came(tmp_path: Path, out: str) -> None:
    put(tmp_path / "in", "a.txt", b"one")
    config = replace(EXTEND, modalities=["text"])
    make_plan(tmp_path / "in", out, config)
    embed(out, CPU)
    put(tmp_path / "in", "a.jpg", corpus.jpeg(1))
    put(tmp_path / "in", "b.txt", b"two")
    make_plan(tmp_path / "in", out, config)
    embed(out, CPU)
    assert rows(out) == {"a": "one", "b": "two"}


def test_several_folders_and_a_new_one(folder: Path, tmp_path: Path, out: str) -> None:
    put(tmp_path / "more", "m.jpg", corpus.jpeg(20))
    make_plan([folder], out, EXTEND)
    embed(out, CPU)
    put(folder, "4.jpg", corpus.jpeg(4))
    plan = make_plan([folder, tmp_path / "more"], out, EXTEND)
    embed(out, CPU)
    assert set(rows(out)) == {"0", "1", "2", "3", "4", "m"} and len(plan.generations) == 2 and sound(out)
    with pytest.raises(PlanError, match=r"1 input removed: .*/more"):
        make_plan([folder], out, EXTEND)


def test_a_folder_is_planned_anew_while_nothing_is_committed(folder: Path, out: str) -> None:
    make_plan(folder, out, EXTEND)
    put(folder, "1.jpg", corpus.jpeg(31))
    said = planned(folder, out, EXTEND)
    assert "they replace the plan that was there" in said[-1] and "1.jpg (" in said[-1]
    assert len(Store(out).list(paths.LISTINGS)) == 1
    embed(out, CPU)
    assert sound(out)


def test_a_damaged_listing_is_named(folder: Path, out: str) -> None:
    make_plan(folder, out, CONFIG)
    [listing] = Path(out, paths.LISTINGS).iterdir()
    data = listing.read_bytes()
    listing.write_bytes(data[:-1])
    with pytest.raises(CorruptError, match="is not the listing that was planned: restore it"):
        make_plan(folder, out, CONFIG)
    [outcome] = embed(out, CPU)
    assert outcome.state == "failed" and "is not the listing that was planned" in outcome.error


def test_a_plan_of_an_older_version_is_kept(folder: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folders are known by a digest of their names."""
    from clip_batch.plan import plan as planning

    with monkeypatch.context() as patch:
        patch.setattr(planning, "freeze_folders", lambda shards, folders: (shards, {}))
        plan = make_plan(folder, out, CONFIG)
    assert not Store(out).list(paths.LISTINGS) and len(plan.partitions[0].slices[0].shard.etag or "") == 16
    assert planned(folder, out)[-1] == "unchanged"
    embed(out, CPU)
    assert set(rows(out)) == {"0", "1", "2", "3"} and sound(out)
    put(folder, "new.jpg", corpus.jpeg(9))
    with pytest.raises(PlanError, match=r"planned by an older version, which knew its names alone"):
        make_plan(folder, out, EXTEND)


def test_names_that_are_not_utf8(tmp_path: Path, out: str) -> None:
    folder = tmp_path / "in"
    put(folder, "caf\udce9.jpg", corpus.jpeg(1))
    make_plan(folder, out, CONFIG)
    embed(out, CPU)
    assert planned(folder, out)[-1] == "unchanged"
    put(folder, "th\udce9.jpg", corpus.jpeg(2))
    make_plan(folder, out, EXTEND)
    embed(out, CPU)
    assert set(rows(out)) == {"caf\\xe9", "th\\xe9"} and sound(out)


@pytest.mark.slow
def test_on_s3(s3: S3, tmp_path: Path) -> None:
    storage: Any = StorageConfig(storage_options=s3.options)
    home, url = Store(f"s3://{BUCKET}/pictures", s3.options), f"s3://{BUCKET}/pictures-out"
    for number in range(3):
        home.create(f"{number}.jpg", corpus.jpeg(number))
    out = Store(url, s3.options)
    make_plan(home.url, url, CONFIG, storage=storage)
    embed(url, CPU, storage=storage)
    home.create("00.jpg", corpus.jpeg(7))
    home.replace("1.jpg", corpus.jpeg(8))
    said = list[str]()
    plan = make_plan(home.url, url, EXTEND, storage=storage, progress=said.append)
    assert "1.jpg (" in said[-2] and "00.jpg" in said[-1]
    embed(url, CPU, storage=storage)
    assert open_embeddings(out, plan).rows == 4
    assert verify_output(out, True, s3.options).outdated == ["0000"]
    words = ["--storage-options", json.dumps(s3.options), "--device", "cpu", "--retry-failed", "changed"]
    assert main(["repair", "--output", url, *words]) == 0
    assert verify_output(out, True, s3.options).problems == {} and open_embeddings(out, load_plan(out)).rows == 4
    shutil.rmtree(tmp_path)


def test_pictures_that_another_out_has_planned_are_left_out(folder: Path, tmp_path: Path, out: str) -> None:
    make_plan(folder, out, CONFIG)
    put(folder, "0.png", corpus.jpeg(7))  # beside a picture of its stem
    put(folder, "new.jpg", corpus.jpeg(8))
    other, said = f"{tmp_path}/other", list[str]()
    make_plan(folder, other, CONFIG, excluding=out, progress=said.append)
    assert f"4 pictures left out, as {out} has planned them" in said
    embed(other, CPU)
    assert rows(other) == {"0.png": "a cat", "new": None} and sound(other)
    make_plan(folder, other, EXTEND, excluding=out)
    put(folder, "newer.jpg", corpus.jpeg(9))
    make_plan(folder, out, EXTEND, excluding=other)
    embed(out, CPU)
    assert set(rows(out)) == {"0", "1", "2", "3", "newer"}
    with pytest.raises(InputError, match="nothing is left to plan"):
        make_plan(folder, f"{tmp_path}/third", CONFIG, excluding=[out, other])
