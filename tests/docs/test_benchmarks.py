"""The result files of the benchmarks are whole, the page shows them, and every script can write one."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from docs.benchmark_page import RESULTS, TEN, benchmark_page, find_row, load_results
from tests import ROOT
from tests.bench import compare, result

SCRIPTS = sorted(path for path in (ROOT / "tests/bench").glob("*.py"))
HELPERS = {"ask", "process", "realistic", "result", "s3_files", "scenes"}
"""Modules of tests/bench that are no benchmarks by themselves."""


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_result_says_how_it_was_measured(path: Path) -> None:
    read = json.loads(path.read_text())
    assert {"benchmark", "stage", "script", "command", "date", "machine", "load", "versions", "rows", "figures"} <= {
        *read
    }
    assert not read["script"] or (ROOT / read["script"]).is_file()
    assert {*read["machine"]} == {"cpu", "cores", "memory_gib"}
    keys = [row["key"] for row in read["rows"]]
    assert keys and len({*keys}) == len(keys)
    for row in read["rows"]:
        assert {*row} == {*result.Row.__dataclass_fields__}


def test_the_page_leads_with_ten_figures() -> None:
    results = load_results()
    assert len(TEN) == 10
    for question, name, key in TEN:
        assert find_row(results, name, key)["ours"] is not None, question
    page = benchmark_page()
    assert all(row["what"] in page for read in results.values() for row in read["rows"])


def test_a_row_that_is_gone_is_named() -> None:
    with pytest.raises(KeyError, match=r"tar\.json has no row 'nothing'"):
        find_row(load_results(), "tar", "nothing")


def test_an_unknown_stage_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd.json").write_text('{"stage": "oddity"}')
    monkeypatch.setattr("docs.benchmark_page.RESULTS", tmp_path)
    with pytest.raises(ValueError, match="oddity"):
        load_results()


def test_report_prints_and_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(result, "RESULTS", tmp_path)
    rows = [result.Row("k", "what", "s", 1.5, 3.0, "peer", 2.0)]
    parser = result.parser("A benchmark.")
    for arguments, written in (
        ([], set()),
        (["--record"], {"tar.json"}),
        (["--record", "other"], {"tar.json", "other.json"}),
    ):
        result.report("tar", "samples", parser.parse_args(arguments), rows, {"seconds": 1.5})
        assert json.loads(capsys.readouterr().out) == {"benchmark": "tar", "seconds": 1.5}
        assert {path.name for path in tmp_path.iterdir()} == written
    read = json.loads((tmp_path / "other.json").read_text())
    assert read["script"] == "tests/bench/tar.py" and read["versions"]["numpy"] and read["load"] >= 0
    assert [(row["key"], row["ratio"], row["cpu_ms"]) for row in read["rows"]] == [("k", 2.0, None)]


def test_the_comparison_sums_up_its_runs_by_medians() -> None:
    runs: list[dict[str, dict[str, compare.Line]]] = []
    for seconds, failed in ((3.0, 0), (1.0, -9), (5.0, 0)):
        ours = {"exit": 0, "seconds": seconds, "cpu_seconds": 2.0, "peak_mb": 10, "key": "IVF4,SQ8"}
        ours[compare.AT] = {"text_10": {"ms": seconds}, "image_10": None}
        theirs = {**ours, "exit": failed, "seconds": 8 * seconds, "key": "HNSW15"}
        runs.append({"defaults": {"autofaiss": theirs, "HNSW32": {"exit": -9, "seconds": 60.0}, compare.OURS: ours}})
    summary = compare.summarize(runs)["defaults"]
    assert summary["autofaiss"]["seconds"] == 32.0 and summary["autofaiss"]["key"] == "HNSW15"  # of the two that ended
    assert (summary[compare.OURS]["seconds"], summary["HNSW32"]) == (3.0, {})
    options = argparse.Namespace(rows=1000, dim=8, memory="1GB", limit=60.0)
    rows = {row.key: row for row in compare._rows(options, {"defaults": summary})}
    assert (rows["seconds"].ours, rows["seconds"].peer, rows["seconds"].ratio) == (3.0, 32.0, 10.67)
    assert rows["seconds"].cpu_ms == 2.0
    assert (rows["seconds_HNSW32"].peer, rows["seconds_HNSW32"].ratio) == ("over 60", None)
    assert (rows["query"].ours, rows["image_query"].ours, rows["rate_8"].ours) == (3.0, None, None)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_can_record(path: Path) -> None:
    text = path.read_text()
    if path.stem not in HELPERS | {"__init__"}:
        assert "result.parser(__doc__)" in text
        assert f'result.report("{path.stem}", ' in text


@pytest.mark.slow
def test_scripts_import() -> None:
    names = [f"tests.bench.{path.stem}" for path in SCRIPTS]
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *names], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
