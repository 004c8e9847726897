"""Input that is no tar is refused with what takes it; a broken tar is left to its worker."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_batch.cli import main
from clip_batch.errors import ConfigError
from clip_batch.plan.kinds import detect_format, kind_of
from clip_batch.plan.specs import expand_inputs
from tests import corpus

HTML = b"\n<!DOCTYPE html><html><title>404</title></html>"


@pytest.mark.parametrize(
    ("name", "head", "kind"),
    [
        ("a.tar", b"\0" * 512, None),
        ("a.tar", b"", None),
        ("a.tar", None, None),
        ("a.tar", b"noise", None),
        ("a.TAR", b"noise", None),
        ("a.tar.gz", gzip.compress(b"noise", mtime=0), None),
        ("a.tar.gz", b"\x1f\x8bnoise", None),
        ("a.tar.zst", b"\x28\xb5\x2f\xfd", None),
        ("https://host/a.tar?sig=x.jpg", b"noise", None),
        ("a.tar", HTML, "HTML"),
        ("a.tar.gz", gzip.compress(HTML, mtime=0), "HTML"),
        ("a.tar", b"<?xml version='1.0'?><Error>", "XML"),
        ("a.tar", b"PK\x03\x04", "archive"),
        ("a.jpg", b"noise", "picture"),
        ("list.csv.gz", gzip.compress(b"url\n", mtime=0), "list"),
        ("list.csv.xz", b"\xfd7zXZ\0", "list"),
        ("a", b"\x93NUMPY", "npy"),
        ("a", b"noise", "no tar"),
    ],
)
def test_kinds(name: str, head: bytes | None, kind: str | None) -> None:
    assert kind_of(name, head) == kind


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tars_are_tars_whatever_their_name(tmp_path: Path, format: int, mode: str) -> None:
    tar = corpus.write_tar(f"{tmp_path}/x", [("a.jpg", corpus.jpeg()), ("ä" * 40, b"x")], format, mode)
    head = Path(tar).read_bytes()[:512]
    assert kind_of("shard-00", head) is None and kind_of("shard.tar", head) is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(corpus.jpeg(number))
        (tmp_path / f"page{number}.tar").write_bytes(HTML)
    pq.write_table(pa.table({"url": ["https://host/a.jpg"]}), tmp_path / "urls.parquet")
    (tmp_path / "urls.parquet").rename(tmp_path / "nameless")
    (tmp_path / "urls.list").write_text("https://host.invalid/1.jpg\nhttps://host.invalid/2.jpg\n")
    (tmp_path / "img_emb").mkdir()
    (tmp_path / "img_emb" / "img_emb_0.npy").write_bytes(b"\x93NUMPY")
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("*.jpg", "*.jpg is a picture: name its folder"),
        ("0.jpg", "0.jpg is a picture: name its folder"),
        ("[01]*", "0.jpg is a picture: name its folder (nor is any other that was looked at of 2"),
        ("page*.tar", "page0.tar is an HTML page, as servers send in place of a file: check the URL"),
        ("nameless", "nameless is a Parquet file: --format parquet embeds the images or captions in it"),
        ("urls.list", "1.jpg is a picture"),
        ("none.csv", "none.csv is a list: clip-batch end2end --urls downloads and embeds"),
        ("img_emb", "holds no tar (.tar"),
        ("img_emb", "but 1 npy: name another folder, or merge these embeddings with clip-batch merge --output"),
    ],
)
def test_input_without_a_tar_is_refused(
    folder: Path, out: str, spec: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--input", f"{folder}/{spec}", "--output", out, "--model", "fake:8"]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("0.jpg", "0.jpg is a file: --format files takes folders, such as {}"),
        ("*.jpg", "*.jpg matches no folder: it matches files, and --format files takes folders, such as {}"),
        ("img_emb", "holds no sample with extensions jpg"),
    ],
)
def test_input_without_a_folder_of_pictures_is_refused(
    folder: Path, out: str, spec: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--output", out, "--model", "fake:8", "--format", "files"]
    assert main(["plan", "--input", f"{folder}/{spec}", *flags]) == (2 if "is a file" in says else 1)
    assert says.format(folder) in capsys.readouterr().err


@pytest.mark.parametrize("remote", [False, True])
def test_the_format_is_told_by_looking(folder: Path, remote: bool) -> None:
    for name in ("tars/sub", "both", "pictures"):
        (folder / name).mkdir(parents=True)
    tar = corpus.good_tar(f"{folder}/tars/sub/0.tar", 1)
    corpus.good_tar(f"{folder}/both/0.tar", 1)
    (folder / "both" / "1.JPG").write_bytes(corpus.jpeg())
    (folder / "page0.tar").rename(folder / "img_emb" / "page0.html")
    for name in ("page1.tar", "page2.tar"):
        (folder / name).unlink()
    (folder / "0.jpg").rename(folder / "pictures" / "0.jpg")
    root = f"memory:/{folder}" if remote else str(folder)
    if remote:
        fsspec.filesystem("memory").put(f"{folder}/", f"{folder}/", recursive=True)
    found = {
        name: detect_format([f"{root}/{name}"], {})
        for name in ("tars", "tars/sub/0.tar", "pictures", "img_emb", "none", "1.jpg", "a.csv", "b.parquet")
    }
    assert found == {
        "tars": "tar",
        "tars/sub/0.tar": "tar",
        "pictures": "files",
        "img_emb": "tar",
        "none": "tar",
        "1.jpg": "tar",
        "a.csv": "urls",
        "b.parquet": "parquet",
    }
    assert expand_inputs([f"{root}/pictures"]).format == "files"
    assert [shard.url.removeprefix("memory:/") for shard in expand_inputs([f"{root}/tars"]).shards] == [tar]
    with pytest.raises(ConfigError, match="holds 1 tars and 1 pictures: say which are the input, with --format tar or"):
        detect_format([f"{root}/both"], {})


def test_an_html_page_among_tars_is_left_to_its_worker(
    folder: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus.good_tar(f"{folder}/page1.tar", 1)
    assert main(["embed", "--input", f"{folder}/page*.tar", "--output", out, "--model", "fake:8"]) == 0
    assert "1 sample embedded, 2 listed as failed" in capsys.readouterr().out


def test_a_glob_takes_tars_and_counts_the_rest(folder: Path, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    corpus.good_tar(f"{folder}/good.tar", 1)
    (folder / "notes.md").touch()
    assert main(["plan", "--input", f"{folder}/[gin]*", "--output", out, "--model", "fake:8"]) == 0
    said = capsys.readouterr()
    assert "planned 1 shard in 1 partition:" in said.out
    assert "passed over: 1 folder, 1 md, 1 no extension" in said.out
