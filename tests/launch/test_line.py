"""run: the whole line on one's own data, told apart by looking, resumed by running it again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clip_batch.cli import main
from clip_batch.config import StorageConfig, extras
from clip_batch.errors import ConfigError
from clip_batch.index.manifest import load_manifest
from clip_batch.index.metadata import MetadataFile
from clip_batch.launch.line import default_output, output_folder, url_list
from clip_batch.storage.store import Store
from tests import corpus

QUICK = ["--no-serve", "--no-progress", "--device", "cpu"]


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of five pictures, with a caption of one; its parent is the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Pictures" / "2024").mkdir(parents=True)
    for number in range(5):
        (tmp_path / "Pictures" / "2024" / f"{number}.jpg").write_bytes(corpus.jpeg(number))
    (tmp_path / "Pictures" / "2024" / "0.txt").write_text("a cat")
    (tmp_path / "Pictures" / "notes.md").touch()
    return tmp_path / "Pictures"


def listed(*specs: str) -> str:
    return url_list(specs, "auto", StorageConfig(), print)


def run(*words: str) -> int:
    return main(["run", *words, *QUICK, "--model", "fake:8"])


def test_a_folder_of_pictures_becomes_an_index_in_the_working_directory(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("Pictures", "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"index": "clip-batch-Pictures/index", "rows": 5, "failed": {}}
    lines = said.err.splitlines()
    assert lines[0].startswith("all is written to clip-batch-Pictures; run the same command again")
    assert "step 1 of 3: plan, which freezes what is embedded and by which model; then embed, merge" in lines
    assert any(line.startswith("step 3 of 3: merge") for line in lines)
    assert main(["verify", "--output", "clip-batch-Pictures/embeddings", "--deep"]) == 0
    assert main(["verify", "--index", "clip-batch-Pictures/index", "--deep"]) == 0


def test_runs_of_two_inputs_of_one_name_have_folders_of_their_own(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tar, and a folder in another place, that would be named as the folder of pictures is."""
    corpus.good_tar("Pictures.tar", 3)
    (pictures.parent / "old").mkdir()
    shutil.copytree(pictures, pictures.parent / "old" / "Pictures")
    folders = []
    for words in (["Pictures"], ["Pictures.tar"], ["old/Pictures"], ["Pictures"], [f"{pictures}/"], ["Pictures.tar"]):
        assert run(*words, "--json") == 0
        folders.append(json.loads(capsys.readouterr().out)["index"].removesuffix("/index"))
    name = "clip-batch-Pictures"
    assert folders == [name, f"{name}-2", f"{name}-3", name, name, f"{name}-2"]
    (pictures.parent / name / "run.json").unlink()  # as an earlier clip-batch left it
    assert run("Pictures", "--json") == 0
    assert json.loads(capsys.readouterr().out)["index"] == f"{name}/index"


def test_pictures_beside_tars_are_taken_as_the_format_says(pictures: Path) -> None:
    corpus.good_tar(str(pictures / "a.tar"), 3)
    assert run("Pictures") == 2
    assert run("Pictures", "--format", "tar") == 0


def test_a_long_listing_says_how_far_it_is(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("clip_batch.storage.tree.SECONDS", 0.0)
    assert run("Pictures") == 0
    said = capsys.readouterr().err
    assert said.splitlines()[0].startswith("all is written to")
    assert f"{pictures} is being listed: 1 file in 2 folders so far" in said


def rows_of(index: str) -> dict[str, str | None]:
    """The captions of the live version, by key; no key is there twice."""
    store = Store(index)
    manifest = load_manifest(store)
    tables = [MetadataFile(store.path(manifest.paths(shard).metadata(shard.name))) for shard in manifest.shards]
    rows = [row for table in tables for row in table.take(range(table.rows), ["key", "caption"]).to_pylist()]
    assert len({row["key"] for row in rows}) == len(rows) == manifest.rows
    return {row["key"]: row["caption"] for row in rows}


def test_a_second_run_goes_on_and_takes_what_is_new_and_what_changed(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--output", "out", str(pictures)) == 0  # flags may stand first
    capsys.readouterr()
    assert run("--input", str(pictures), "--output", "out") == 0
    said = capsys.readouterr()
    assert "plan: unchanged" in said.err and "5 samples embedded" in said.out
    (pictures / "new.jpg").write_bytes(corpus.jpeg(9))
    assert run(str(pictures), "--output", "out") == 0
    said = capsys.readouterr()
    assert "plan: the input has grown, 1 picture added: new.jpg: 1 partition added as generation 1" in said.err
    assert "6 samples embedded" in said.out and len(rows_of("out/index")) == 6
    (pictures / "new.txt").write_text("a dog")
    assert run(str(pictures), "--output", "out") == 0
    said = capsys.readouterr()
    assert "plan: 1 planned picture changed since: new.jpg (new.txt added)" in said.err
    assert "embed: pictures changed since they were embedded: 1 partition with them embedded again" in said.err
    assert rows_of("out/index")["new"] == "a dog"
    assert run(str(pictures), "--output", "out") == 0
    said = capsys.readouterr()
    assert "plan: unchanged" in said.err and "is finished already" in said.err


def test_run_rolls_back_nothing_that_was_added_to_its_index(pictures: Path) -> None:
    assert run(str(pictures), "--output", "out") == 0
    Path("more").mkdir()
    for number in range(3):
        Path(f"more/more{number}.jpg").write_bytes(corpus.jpeg(20 + number))
    assert run("more", "--output", "other") == 0
    assert main(["merge", "--output", "other/embeddings", "--index", "out/index", "--add"]) == 0
    assert len(rows_of("out/index")) == 8
    (pictures / "new.jpg").write_bytes(corpus.jpeg(9))
    assert run(str(pictures), "--output", "out") == 0
    assert len(rows_of("out/index")) == 9
    (pictures / "new.txt").write_text("a dog")
    assert run(str(pictures), "--output", "out") == 0
    assert len(rows_of("out/index")) == 9 and rows_of("out/index")["new"] == "a dog"


def test_what_repair_embedded_again_reaches_the_index_with_the_next_run(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also after a kill between embedding and merging, which leaves the same behind; with and without another OUT."""
    assert run(str(pictures), "--output", "out") == 0
    for added in (False, True):
        if added:
            Path("more").mkdir()
            Path("more/more.jpg").write_bytes(corpus.jpeg(20))
            assert run("more", "--output", "other") == 0
            assert main(["merge", "--output", "other/embeddings", "--index", "out/index", "--add"]) == 0
        (pictures / "2024/1.txt").write_text(f"a dog, {added}")
        assert main(["repair", "--output", "out/embeddings", "--retry-failed", "changed", "--device", "cpu"]) == 0
        capsys.readouterr()
        assert main(["merge", "--output", "out/embeddings", "--index", "out/index", "--add"]) == 2
        assert "again since version" in (error := capsys.readouterr().err) and "merge --anew --index" in error
        assert run(str(pictures), "--output", "out") == 0
        assert rows_of("out/index")["2024/1"] == f"a dog, {added}"
    (pictures / "2024/1.jpg").unlink()
    (pictures / "2024/1.txt").unlink()
    assert main(["repair", "--output", "out/embeddings", "--retry-failed", "gone", "--device", "cpu"]) == 0
    assert run(str(pictures), "--output", "out") == 0
    assert rows_of("out/index").keys() == {"2024/0", "2024/2", "2024/3", "2024/4", "more"}


def test_tars_that_changed_are_refused_by_run(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus.good_tar("a.tar", 3)
    assert run("a.tar", "--output", "out") == 0
    corpus.good_tar("a.tar", 4)
    assert run("a.tar", "--output", "out") == 2
    said = capsys.readouterr()
    assert "1 input changed" in said.err and "1 partition committed" in said.err
    assert "clip-batch merge --output OTHER/embeddings --index out/index --add" in said.err


def test_tars_are_told_from_pictures_and_failures_are_counted(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus.write_tar("a.tar", [*corpus.good_files(3), ("x.jpg", b"noise")])
    assert run("a.tar") == 0
    told = "1 listed as failed (1 undecodable_image), each in clip-batch-a/embeddings/_clip_batch/failures/*.parquet"
    assert f"3 samples embedded, {told}" in capsys.readouterr().out
    assert run("a.tar", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 3 and sum(found["failed"].values()) == 1
    (pictures.parent / "bad").mkdir()
    (pictures.parent / "bad" / "1.jpg").write_bytes(b"noise")
    assert run("bad") == 1
    assert "none of the samples could be embedded: clip-batch status --output clip-batch-bad" in capsys.readouterr().err


def test_the_model_of_an_earlier_run_is_kept(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("Pictures") == 0
    assert main(["run", "Pictures", *QUICK]) == 0
    assert "plan: unchanged" in capsys.readouterr().err
    assert main(["run", "Pictures", *QUICK, "--model", "fake:16"]) == 2
    said = capsys.readouterr().err
    assert "model 'fake:8' -> 'fake:16'" in said and "--add" not in said


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ("https://a/1.jpg\nhttps://a/?image=2\n", True),
        ("https://a/1.tar\nhttps://a/2.tar\n", False),
        ("a.tar\n", False),
    ],
)
def test_a_list_of_urls_is_told_by_its_lines(tmp_path: Path, lines: str, found: bool) -> None:
    (tmp_path / "list.txt").write_text(lines)
    assert listed(f"{tmp_path}/list.txt") == (f"{tmp_path}/list.txt" if found else "")
    assert listed(f"{tmp_path}/urls.csv") == f"{tmp_path}/urls.csv"
    with pytest.raises(ConfigError, match="are lists of URLs: give one"):
        listed("a.csv", "b.csv")


def test_a_list_of_urls_goes_to_end2end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "urls.csv").write_text("url\nhttp://127.0.0.1:9/a.jpg\n")
    words = [f"{tmp_path}/urls.csv", "--output", f"{tmp_path}/out", "--img2dataset", "no-such-program"]
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert "urls.csv is a list of URLs: its images are downloaded first" in said and "no-such-program" in said


def test_the_folder_of_a_run_is_answered_with_the_folder_in_it(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("Pictures", "--output", "a run") == 0
    capsys.readouterr()
    out, index = ["--output", "a run"], ["--index", "a run"]
    commands = [["status", *out], ["verify", *out], ["merge", *out, "--index", "i"], ["embed", *out]]
    for words in commands:
        assert main(words) != 0
        assert "but in its embeddings: give --output 'a run/embeddings'" in capsys.readouterr().err.replace(
            f"{Path.cwd()}/", ""
        )
    for words in (["search", *index, "--text", "a"], ["verify", *index], ["serve", *index, "--port", "0"]):
        assert main(words) != 0
        assert "give --index 'a run/index'" in capsys.readouterr().err.replace(f"{Path.cwd()}/", "")


def test_an_empty_folder_is_said_to_hold_nothing_of_any_kind(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures.parent / "empty").mkdir()
    assert run("empty") == 1
    assert "empty holds no pictures, tars or Parquet files: name another folder" in capsys.readouterr().err


def test_names_of_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = {spec: default_output(spec) for spec in ("x/y/", "tars/{0..9}.tar", "s3://b/c/*.tar", "l.txt", "b.tar.gz")}
    assert [*named.values()] == [f"clip-batch-{name}" for name in ("y", "tars", "c", "l", "b")]
    assert default_output(".") == f"clip-batch-{tmp_path.name}"


def test_all_missing_extras_are_named_before_anything_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"it needs torch and faiss, .*: pip install 'clip-batch\[embed,merge\]'"):
        extras.require("embed", "merge")
    assert main(["run", str(tmp_path), "--output", f"{tmp_path}/out"]) == 2
    assert "clip-batch[embed,merge,serve]" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_default_output_lies_beside_an_input_around_it(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(pictures)
    for spec in (".", ".", "../Pictures"):
        assert run(spec) == 0
        assert f"all is written to {pictures.parent}/clip-batch-Pictures; run" in capsys.readouterr().err
    assert sorted(path.name for path in pictures.iterdir()) == ["2024", "notes.md"]
    monkeypatch.chdir(pictures / "2024")
    assert output_folder("", ["..", "."]) == f"{pictures.parent}/clip-batch-Pictures"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("Pictures/out", "--output Pictures/out lies in the input folder Pictures, so that what is written"),
        ("Pictures", "--output Pictures is the input folder Pictures, so that"),
        ("link/out", "--output link/out lies in the input folder Pictures"),
    ],
)
def test_an_output_in_the_input_is_refused_at_once(
    pictures: Path, output: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("link").symlink_to("Pictures")
    assert run("Pictures", "--output", output) == 2
    assert main(["plan", "--input", "Pictures", "--output", output, "--model", "fake:8"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert message in said[0] and all("give an --output that is apart from it" in line for line in said)
    assert len(said) == 2 and sorted(path.name for path in pictures.iterdir()) == ["2024", "notes.md"]


def test_an_input_in_the_output_is_refused(pictures: Path) -> None:
    pictures.rename("embeddings")
    with pytest.raises(ConfigError, match="input folder embeddings/2024 lies in --output"):
        output_folder(".", ["embeddings/2024"])
    assert output_folder("s3://b/out", ["s3://b/out-cats"]) == "s3://b/out"


@pytest.mark.slow
def test_without_network_the_small_model_takes_the_place_of_the_default(pictures: Path, tmp_path: Path) -> None:
    environ: dict[str, Any] = {**os.environ, "HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "clip_batch", "run", "Pictures", *QUICK]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "ViT-B-32 datacomp_xl_s13b_b90k cannot be found" in done.stderr
    assert "the small model in this package is used (--model demo)" in done.stderr
    assert "5 samples embedded" in done.stdout
