"""Unusual folders from plan to verify: what becomes of them is in rows, failures and the plan, and is printed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from clip_batch.cli import main
from clip_batch.plan.plan import load_plan
from clip_batch.storage.store import Store
from tests import corpus
from tests.embeddings.test_tar_edges import run, table

FILES = ("--format", "files")


def put(folder: Path, *names: str) -> None:
    """Different pictures, and captions that are their own names."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(name) if name.endswith("txt") else corpus.jpeg(number))


def rows(out: str) -> list[tuple[str, str | None]]:
    return [(row["key"], row["caption"]) for row in table(out, "metadata")]


def test_images_of_one_stem(tmp_path: Path, out: str) -> None:
    put(tmp_path / "pics", *(f"{place}/cat.{end}" for place in "ab" for end in ("jpg", "JPG", "png", "txt")))
    run(f"{tmp_path}/pics", out, *FILES)
    assert rows(out) == [(f"{place}/cat.{end}", f"{place}/cat.txt") for place in "ab" for end in ("JPG", "jpg", "png")]


def test_what_is_no_picture_is_counted(tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "pics", "a.jpg", "b.dng", "c.DNG", "README", ".hidden.jpg", "00000_stats.json", "00000.parquet")
    (tmp_path / "pics" / "link.jpg").symlink_to("nowhere")
    plan = ["plan", "--input", f"{tmp_path}/pics", "--output", out, "--model", "fake:8", *FILES]
    assert main([*plan, "--json"]) == 0
    said = capsys.readouterr()
    counts = {"dng": 2, "no extension": 1, "json": 1, "parquet": 1, "hidden": 1, "link": 1}
    assert json.loads(said.out)["passed_over"] == counts == load_plan(Store(out)).passed_over
    text = "passed over: 2 dng, 1 hidden, 1 json, 1 link, 1 no extension, 1 parquet"
    assert text in said.err and "--image-extensions jpg jpeg png webp" in said.err and " dng\n" in said.err
    assert main(["embed", "--output", out]) == 0
    assert main(["verify", "--output", out]) == 0
    assert f"1 row, {text}" in capsys.readouterr().out
    assert main(plan) == 0
    assert text in capsys.readouterr().out


def test_folders_and_tars_of_names_that_are_not_utf8(tmp_path: Path, out: str) -> None:
    folder = tmp_path / "d\udce9j\udce0"
    put(folder, "caf\udce9.jpg", "caf\udce9.txt", "caf\udce8.jpg", "plain.jpg", r"\xe9.jpg", "lone\udce9.txt")
    run(str(folder), out, *FILES)
    assert rows(out) == [("\\\\xe9", None), ("caf\\xe8", None), ("caf\\xe9", "caf\ufffd.txt"), ("plain", None)]
    assert [(row["key"], row["reason"]) for row in table(out, "failures")] == [("lone\\xe9", "missing_image")]
    assert {row["shard"] for row in table(out, "metadata")} == {f"{tmp_path}/d\\xe9j\\xe0"}


def test_a_tar_in_a_folder_whose_name_is_not_utf8(tmp_path: Path, out: str) -> None:
    from clip_batch.search.lineage import image

    folder = tmp_path / "d\udce9j\udce0"
    folder.mkdir()
    tar = corpus.good_tar(f"{folder}/0.tar", 2)
    run(str(folder), out)
    [first, _] = table(out, "metadata")
    assert first["shard"] == f"{tmp_path}/d\\xe9j\\xe0/0.tar"
    assert image(first) == next(corpus.samples(tar)).image


def test_linked_folders(tmp_path: Path, out: str) -> None:
    put(tmp_path / "pics", "one/a.jpg")
    put(tmp_path / "disk", "b.jpg")
    (tmp_path / "pics" / "two").symlink_to("../disk")
    (tmp_path / "pics" / "one" / "up").symlink_to("..")
    run(f"{tmp_path}/pics", out, *FILES)
    assert rows(out) == [("one/a", None), ("two/b", None)]
    assert load_plan(Store(out)).passed_over == {"link": 1}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["files", "tar"])
def test_a_folder_that_may_not_be_listed(tmp_path: Path, out: str, kind: str) -> None:
    for number in range(3):
        put(tmp_path / "in" / str(number), f"{number}.jpg")
        corpus.good_tar(f"{tmp_path}/in/{number}/{number}.tar", 1, seed=number)
    (tmp_path / "in" / "1").chmod(0)
    plan = ["-m", "clip_batch", "embed", "--output", out, "--model", "fake:8", "--device", "cpu", "--format", kind]
    specs = [f"{tmp_path}/in"] if kind == "files" else [f"{tmp_path}/in", f"{tmp_path}/in/**/*.tar"]
    for spec in specs:
        refused = corpus.unprivileged([*plan, "--input", spec])
        assert refused.returncode == 1
        assert f"cannot be listed: {tmp_path}/in/1 (Permission denied); mend the permissions" in refused.stderr
    done = corpus.unprivileged([*plan, "--input", specs[-1], "--unreadable", "record"])
    verified = corpus.unprivileged(["-m", "clip_batch", "verify", "--output", out, "--deep"])
    (tmp_path / "in" / "1").chmod(0o700)
    assert (done.returncode, verified.returncode) == (0, 0), done.stderr + verified.stderr
    assert "2 samples embedded, 1 listed as failed" in done.stdout
    [failure] = table(out, "failures")
    assert (failure["key"], failure["shard"], failure["reason"]) == (None, f"{tmp_path}/in/1", "unreadable_folder")


@pytest.mark.slow
def test_an_input_that_may_not_be_listed(tmp_path: Path, out: str) -> None:
    put(tmp_path / "yes", "a.jpg", "b.caf\udce9")
    put(tmp_path / "no", "b.jpg")
    (tmp_path / "no").chmod(0)
    embed = ["-m", "clip_batch", "embed", "--output", out, "--model", "fake:8", "--device", "cpu", *FILES]
    done = corpus.unprivileged([*embed, "--input", f"{tmp_path}/*", "--unreadable", "record"])
    assert done.returncode == 0, done.stderr
    assert rows(out) == [("a", None)]
    assert [row["shard"] for row in table(out, "failures")] == [f"{tmp_path}/no"]
    assert load_plan(Store(out)).passed_over == {r"caf\xe9": 1}


@pytest.mark.slow
def test_an_unreadable_picture_is_a_failure(tmp_path: Path, out: str) -> None:
    put(tmp_path / "pics", "0.jpg", "1.jpg", "2.jpg")
    (tmp_path / "pics" / "1.jpg").chmod(0)
    embed = ["embed", "--input", f"{tmp_path}/pics", "--output", out, "--model", "fake:8", "--device", "cpu", *FILES]
    done = corpus.unprivileged(["-m", "clip_batch", *embed])
    assert done.returncode == 0 and "2 samples embedded, 1 listed as failed" in done.stdout, done.stderr
    [failure] = table(out, "failures")
    assert (failure["key"], failure["reason"]) == ("1", "unreadable_file")
    assert failure["message"] == (
        "1.jpg cannot be read (Permission denied): mend it, and run clip-batch repair --retry-failed unreadable_file"
    )
