"""Unusual tars from plan to verify: what becomes of them is in rows, failures and commits, and is printed."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_batch.cli import main
from clip_batch.config import PlanConfig
from clip_batch.embeddings.commits import read_commits
from clip_batch.embeddings.verify import verify_output
from clip_batch.errors import ConfigError
from clip_batch.plan import paths
from clip_batch.plan.plan import make_plan
from clip_batch.storage.store import Store
from tests import corpus


def table(out: str, folder: str) -> list[dict[str, Any]]:
    """Every row of one folder's Parquet files, in partition order."""
    names = [commit.file(folder) for _, commit in sorted(read_commits(Store(out)).items())]
    rows: list[dict[str, Any]] = pa.concat_tables(pq.read_table(f"{out}/{name}") for name in names if name).to_pylist()
    return rows


def run(inputs: str, out: str, *flags: str, code: int = 0) -> None:
    """Plan and embed with the fake encoder, then verify deeply."""
    assert main(["embed", "--input", inputs, "--output", out, "--model", "fake:8", "--device", "cpu", *flags]) == code
    assert verify_output(Store(out), deep=True).problems == {}


def test_names_that_are_not_utf8(tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = [(f"caf{end}.jpg", corpus.jpeg(number)) for number, end in enumerate(["\udce9", "\udce8", ""])]
    captions = [(f"caf{end}.txt", text) for end, text in (("\udce8", b"grave"), ("\udce9", b"acute"))]
    tar = corpus.write_tar(str(tmp_path / "0.tar"), [*pictures, *captions, ("b\udce9.txt", b"-")], tarfile.GNU_FORMAT)
    run(tar, out)
    told = capsys.readouterr()
    assert "looked at have names that are not UTF-8: their keys are written like caf\\xe9" in told.err
    assert "warnings: 2 name_not_utf8, 1 missing_caption" in told.out
    rows = [(row["key"], row["caption"]) for row in table(out, "metadata")]
    assert rows == [(r"caf\xe9", "acute"), (r"caf\xe8", "grave"), ("caf", None)]
    assert [row["key"] for row in table(out, "_clip_batch/failures")] == [r"b\xe9"]


def test_links_are_embedded_in_every_slice(tmp_path: Path, out: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(6):
        (source / f"{number}0.jpg").write_bytes(corpus.jpeg(number))
        os.link(source / f"{number}0.jpg", source / f"{number}1.jpg")
        os.symlink(f"{number}0.jpg", source / f"{number}2.jpg")
        (source / f"{number}1.txt").write_text(f"caption {number}")
    os.symlink("gone.jpg", source / "gone.jpg")
    subprocess.run(["tar", "--sort=name", "-C", source, "-cf", f"{tmp_path}/0.tar", "."], check=True)
    run(f"{tmp_path}/0.tar", out, "--partition-samples", "4")
    rows, data = table(out, "metadata"), (tmp_path / "0.tar").read_bytes()
    assert [row["key"] for row in rows] == [f"./{number}{copy}" for number in range(6) for copy in range(3)]
    for row in rows:
        assert data[row["offset"] : row["offset"] + row["length"]] == corpus.jpeg(int(row["key"][2]))
    assert {row["key"]: row["caption"] for row in rows if row["caption"]} == {
        f"./{n}1": f"caption {n}" for n in range(6)
    }
    assert len(read_commits(Store(out))) > 2
    assert [row["reason"] for row in table(out, "_clip_batch/failures")] == ["broken_link"]


def test_joined_tars(tmp_path: Path, out: str) -> None:
    first, second = (corpus.good_tar(f"{tmp_path}/{name}", 5) for name in ("a.tar", "b.tar"))
    Path(f"{tmp_path}/c.tar").write_bytes(Path(first).read_bytes() + Path(second).read_bytes())
    run(f"{tmp_path}/c.tar", out, "--partition-samples", "2")
    assert len(read_commits(Store(out))) == 5
    assert [row["key"] for row in table(out, "metadata")] == 2 * [f"{number:09d}" for number in range(5)]


def test_dotted_names_are_told_once_and_can_be_taken(
    tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        (f"22.{n:02d}.{end}", corpus.jpeg(n) if end == "jpg" else b"x") for n in range(9) for end in ("jpg", "txt")
    ]
    tar = corpus.write_tar(str(tmp_path / "0.tar"), [*files, ("good.jpg", corpus.jpeg(10)), ("good.npy", b"-")])
    run(tar, out)
    told = capsys.readouterr()
    assert "partition 0: 9 images are not embedded because of their names: " in told.err
    assert "9 of 10 images that were looked at will not be embedded" in told.err
    assert told.err.count("plan with --key-ends last-dot") == 2  # by plan, and by embed
    assert "1 sample embedded, 9 listed as failed, passed over: 9 txt, 1 npy" in told.out
    assert read_commits(Store(out))[0].passed_over == {"txt": 9, "npy": 1}
    run(tar, f"{out}2", "--key-ends", "last-dot")
    rows = [(row["key"], row["caption"]) for row in table(f"{out}2", "metadata")]
    assert rows == [*((f"22.{n:02d}", "x") for n in range(9)), ("good", None)]


def test_extensions_with_a_dot(tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = [
        (f"{n}.{end}", body) for n in range(3) for end, body in (("input.jpg", corpus.jpeg(n)), ("outputs.txt", b"x"))
    ]
    tar = corpus.write_tar(str(tmp_path / "0.tar"), files)
    run(tar, out, code=1)
    told = capsys.readouterr().err
    flags = "--image-extensions input.jpg --caption-extensions outputs.txt"
    assert "partition 0 is committed without a row: none of 3 embedded; dotted_name 3, such as: " in told
    assert f"plan with {flags}" in told
    run(tar, f"{out}2", *flags.split())
    assert [(row["key"], row["caption"]) for row in table(f"{out}2", "metadata")] == [(str(n), "x") for n in range(3)]
    with pytest.raises(ConfigError, match="--key-ends last-dot"):
        make_plan(tar, f"{out}3", PlanConfig(model="fake:8", key_ends="last-dot", image_extensions=["input.jpg"]))


def packed(name: str, plain: bytes) -> bytes:
    """A tar as its name says."""
    if name.endswith("zst"):
        return bytes(pa.compress(plain, codec="zstd", asbytes=True))
    compress = {"gz": gzip.compress, "z2": bz2.compress, "xz": lzma.compress}.get(name[-2:], bytes)
    return compress(plain)


def test_a_folder_of_tars_of_all_kinds(tmp_path: Path, out: str) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    names = ["0.TAR", "1.Tar.GZ", "2.tar.bz2", "3.tbz2", "4.txz", "5.tar.xz", "6.tar.zst"]
    for number, name in enumerate(names):
        plain = Path(corpus.good_tar(str(tmp_path / "plain"), 2, seed=number)).read_bytes()
        (folder / name).write_bytes(packed(name.lower(), plain))
        (folder / f"{name.partition('.')[0]}_stats.json").write_text('{"successes": 2}')
    run(str(folder), out, "--partition-count", "1")
    assert [row["shard"].rpartition("/")[2] for row in table(out, "metadata")] == [name for name in names for _ in "ab"]
    assert Store(out).read_json(paths.PLAN)["samples"] == 2 * len(names)
    run(f"{folder}/*", f"{out}2", "--partition-samples", "5")
    assert len(table(f"{out}2", "metadata")) == 2 * len(names)


def test_a_broken_image_and_a_good_one_of_one_key_in_a_compressed_tar(tmp_path: Path, out: str) -> None:
    files = [("a.jpg", b"broken"), ("b.jpg", corpus.jpeg(1)), ("a.jpg", corpus.jpeg(2))]
    run(corpus.write_tar(str(tmp_path / "a.tar.gz"), files, mode="w:gz"), out)  # deep verify: rows are in order
    assert [row["key"] for row in table(out, "metadata")] == ["b", "a"]
