from __future__ import annotations

import itertools
import json
import math
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clip_batch.cli import main
from clip_batch.index.merge import sweep_plot
from clip_batch.index.merge.sweep import Candidate, EffortResult, Sweep
from tests.fabricated import clustered, make_out

SVG = "{http://www.w3.org/2000/svg}"


def candidate(key: str, rerank: int, size: int, *results: tuple[int | None, float, float]) -> Candidate:
    tries = tuple(EffortResult(*result) for result in results)
    best = next((result for result in tries if result.recall >= 0.95), None)
    return Candidate(key, rerank, size, 1000 * size, 0, size < 2000, 1.0, 1.0, tries, best)


FLAT = candidate("Flat", 0, 2048, (None, 1.0, 30.0))
SQ8 = candidate("IVF64,SQ8", 0, 512, (1, 0.4, 0.1), (2, 0.8, 0.3), (4, 0.97, 0.9))
SMALL = candidate("IVF64,PQ<8>", 30, 128, (1, 0.3, 0.05), (2, 0.62, 0.2), (4, 0.6, 0.5))
SWEEP = Sweep("image", 10**6, 512, 1000, 0.95, 10**9, (FLAT, SQ8, SMALL), SQ8)


def circles(picture: ET.Element) -> list[ET.Element]:
    return [circle for circle in picture.iter(f"{SVG}circle") if circle.find(f"{SVG}title") is not None]


def test_marks_lie_by_time_and_recall_and_are_as_large_as_the_vectors() -> None:
    picture = ET.fromstring(sweep_plot.svg(SWEEP))
    flat, sq8, small = circles(picture)
    x, y, r = ([float(mark.attrib[name]) for mark in (flat, sq8, small)] for name in ("cx", "cy", "r"))
    assert x[2] < x[1] < x[0]  # 0.2, 0.9 and 30 ms
    assert y[0] < y[1] < y[2]  # recalls of 1, .97 and .62
    assert (r[1] / r[0]) ** 2 == pytest.approx(512 / 2048, abs=0.02)
    assert r[2] >= sweep_plot.SMALLEST
    assert [mark.attrib["class"] for mark in (flat, sq8, small)] == ["large", "mark", "mark"]
    (ring,) = [circle for circle in picture.iter(f"{SVG}circle") if circle.attrib["class"] == "taken"]
    assert (ring.attrib["cx"], ring.attrib["cy"]) == (sq8.attrib["cx"], sq8.attrib["cy"])
    lines = [line.attrib["points"].split() for line in picture.iter(f"{SVG}polyline")]
    assert [len(points) for points in lines] == [1, 3, 3]
    assert lines[1][-1] == f"{sq8.attrib['cx']},{sq8.attrib['cy']}"


def test_candidates_are_listed_and_nothing_else_is_loaded() -> None:
    text = sweep_plot.svg(SWEEP)
    written = [each.text for each in ET.fromstring(text).iter(f"{SVG}text")]
    for some in ("IVF64,PQ<8> --rerank 30", "0.620", "0.9", "2,048", "recall@10", "milliseconds a query", "0.99", "10"):
        assert some in written
    assert text.replace('xmlns="http://www.w3.org/2000/svg"', "").count("http") == 0
    assert "None reaches the goal" in sweep_plot.svg(replace(SWEEP, recommended=None))


def test_everything_lies_within_the_picture() -> None:
    edge = [candidate(f"K{n}", 0, 64, (None, recall, ms)) for n, (recall, ms) in enumerate([(0.0, 1e-3), (1.0, 1e4)])]
    for candidates in ((FLAT,), (FLAT, SQ8, SMALL), tuple(edge), tuple([SQ8] * 40)):
        picture = ET.fromstring(sweep_plot.svg(replace(SWEEP, candidates=candidates)))
        width, height = (float(picture.attrib[name]) for name in ("width", "height"))
        for each in picture.iter():
            for name, end in (
                ("cx", width),
                ("x", width),
                ("x1", width),
                ("cy", height),
                ("y", height),
                ("y1", height),
            ):
                assert 0 <= float(each.attrib.get(name, 0)) <= end


def test_recalls_near_1_are_told_apart() -> None:
    axes = sweep_plot.Axes.around(SMALL.tries, 0.95)
    assert axes.y(0.95) - axes.y(0.99) > axes.y(0.6) - axes.y(0.64)
    assert (axes.y(axes.least), axes.y(1.0)) == (sweep_plot.TOP + sweep_plot.HEIGHT, sweep_plot.TOP)


def test_numbers_of_marks_do_not_cover_each_other() -> None:
    rng = np.random.default_rng(0)
    marks = [(300 + 60 * x, 200 + 60 * y, 6.0) for x, y in rng.random((12, 2))]
    places = sweep_plot.label_places(marks)
    for (x, y), (left, top) in itertools.combinations(places, 2):
        assert abs(x - left) >= sweep_plot.LABEL or abs(y - top) >= sweep_plot.LABEL
    alone = sweep_plot.label_places([(300, 200, 6.0)])[0]
    assert math.dist(alone, (300, 200)) == pytest.approx(6 + sweep_plot.LABEL / 2)


def test_a_number_away_from_its_mark_has_a_line_to_it() -> None:
    for count in (1, 20):
        picture = ET.fromstring(sweep_plot.svg(replace(SWEEP, candidates=tuple([SQ8] * count))))
        leaders = [line for line in picture.iter(f"{SVG}line") if line.attrib.get("class") == "leader"]
        assert bool(leaders) == (count > 8)


def test_the_command_writes_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, texts = clustered(300, 8, 3)
    make_out(tmp_path / "out", images, texts, [300])
    command = ["sweep", "--output", str(tmp_path / "out"), "--modalities", "image", "--keys-to-try", "Flat", "--json"]
    assert main([*command, "--plot", str(tmp_path / "sweep.png")]) == 2
    assert "must end in .svg" in capsys.readouterr().err
    assert main([*command, "--plot", str(tmp_path / "new" / "sweep.svg")]) == 0
    assert json.loads(capsys.readouterr().out)["recommended"]["key"] == "Flat"
    assert len(circles(ET.parse(tmp_path / "new" / "sweep.svg").getroot())) == 1
