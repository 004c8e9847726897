"""Unusual tars from plan to verify: what becomes of them is in rows, failures and commits, and is printed."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_batch.cli import main
from clip_batch.embeddings.commits import read_commits
from clip_batch.embeddings.verify import verify_output
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
    assert "warnings: 2 name_not_utf8, 1 missing_caption" in capsys.readouterr().out
    rows = [(row["key"], row["caption"]) for row in table(out, "metadata")]
    assert rows == [(r"caf\xe9", "acute"), (r"caf\xe8", "grave"), ("caf", None)]
    assert [row["key"] for row in table(out, "_clip_batch/failures")] == [r"b\xe9"]
