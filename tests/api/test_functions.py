"""status, verify, filter, remove, versions and sweep as functions, and the service as an application."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import FunctionType
from typing import Any

import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

import clip_batch
from clip_batch import (
    ConfigError,
    EmbedConfig,
    Hit,
    MergeConfig,
    OutputStatus,
    PlanConfig,
    PlanError,
    Query,
    Searcher,
    SweepConfig,
    VerifyReport,
    embed,
    make_plan,
    merge,
)
from clip_batch.cli import main
from clip_batch.config import html
from tests import corpus


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of twelve pictures, and INDEX."""
    home = tmp_path_factory.mktemp("functions")
    corpus.good_tar(f"{home}/a.tar", 12)
    make_plan(home / "a.tar", home / "out", PlanConfig(model="fake:8"))
    embed(home / "out", EmbedConfig(device="cpu"))
    merge(home / "out", home / "index")
    return home


@pytest.mark.parametrize("name", ["storage", "config", "plan", "embed", "merge"])
@pytest.mark.parametrize(
    "function",
    [
        lambda home, **more: clip_batch.status(home / "out", **more),
        lambda home, **more: clip_batch.verify(home / "out", **more),
        lambda home, **more: clip_batch.filter(home / "index", "a", home / "found", **more),
        lambda home, **more: clip_batch.remove(home / "index", ["k"], dry_run=True, **more),
        lambda home, **more: clip_batch.removals(home / "index", **more),
        lambda home, **more: clip_batch.undo_removal(home / "index", "0", **more),
        lambda home, **more: clip_batch.versions(home / "index", **more),
        lambda home, **more: clip_batch.index_status(home / "index", **more),
        lambda home, **more: clip_batch.gc_index(home / "index", dry_run=True, **more),
        lambda home, **more: clip_batch.sweep(home / "out", **more),
        lambda home, **more: clip_batch.make_app(home / "index", **more),
        lambda home, **more: clip_batch.embed_table([{"image": b""}], home / "table", **more),
    ],
)
def test_another_thing_in_the_place_of_a_section_is_refused(home: Path, function: Any, name: str) -> None:
    says = f"{name} is 'demo': it must be of clip_batch|unexpected keyword argument '{name}'"
    with pytest.raises((ConfigError, TypeError), match=says):
        function(home, **{name: "demo"})


@pytest.mark.parametrize(
    "call",
    [
        lambda home: clip_batch.filter(home / "index", 3, home / "found"),
        lambda home: clip_batch.filter(home / "index", None, home / "found"),
        lambda home: clip_batch.filter(home / "index", "a", home / "found", k="3"),
        lambda home: clip_batch.filter(home / "index", "a", home / "found", threshold="3"),
        lambda home: clip_batch.filter(home / "index", "a", home / "found", columns=3),
        lambda home: clip_batch.filter(home / "index", "a", home / "found", columns="key"),
        lambda home: clip_batch.filter(home / "index", "a", home / "found", images_from="x"),
        lambda home: clip_batch.remove(home / "index", query="a"),
        lambda home: clip_batch.remove(home / "index", where=3),
        lambda home: clip_batch.remove(home / "index", ["a"], 3),
        lambda home: clip_batch.undo_removal(home / "index", 3),
        lambda home: clip_batch.versions(home / "index", use=3),
        lambda home: clip_batch.versions(home / "index", drop=3),
        lambda home: clip_batch.gc_index(home / "index", keep="3"),
        lambda home: clip_batch.gc_index(home / "index", older_than="3"),
        lambda home: embed(home / "out", partitions=3),
        lambda home: embed(home / "out", partitions=["a"]),
        lambda home: make_plan(3, home / "other"),
        lambda home: make_plan(home / "a.tar", 3),
        lambda home: make_plan(home / "a.tar", home / "other", excluding=3),
        lambda home: merge(3, home / "other"),
        lambda home: clip_batch.read(3),
        lambda home: Searcher(3),
        lambda home: clip_batch.make_app(3),
        lambda home: clip_batch.make_app({}),
        lambda home: clip_batch.make_app({"a": 3}),
    ],
)
def test_a_wrong_argument_is_an_error_of_ours(home: Path, call: Any) -> None:
    with pytest.raises(clip_batch.ClipBatchError) as caught:
        call(home)
    assert "\n" not in str(caught.value)


def test_they_are_functions() -> None:
    for name in (
        "status",
        "verify",
        "filter",
        "remove",
        "removals",
        "undo_removal",
        "versions",
        "index_status",
        "gc_index",
        "sweep",
        "make_app",
        "read",
    ):
        assert isinstance(getattr(clip_batch, name), FunctionType), name


def test_status_and_verify_have_typed_results(home: Path) -> None:
    done = clip_batch.status(home / "out")
    assert isinstance(done, OutputStatus) and (done.done, done.rows, done.missing) == (1, 12, [])
    for source, checked in (("out", 1), ("index", 1)):
        report = clip_batch.verify(home / source, deep=True)
        assert isinstance(report, VerifyReport) and report.ok and report.checked == checked and report.rows == 12
    with pytest.raises(PlanError):
        clip_batch.status(home)
    with pytest.raises(PlanError):
        clip_batch.verify(home)


def test_filter_takes_a_text_or_a_query(home: Path, tmp_path: Path) -> None:
    done = clip_batch.filter(home / "index", "a cat", tmp_path / "a", k=3, images=True, columns=["key"])
    assert (done.rows, done.images) == (3, 3)
    assert pq.read_table(tmp_path / "a" / "rows").column_names == ["id", "score", "key"]
    with pytest.raises(ConfigError, match="3 pictures of another query"):
        clip_batch.filter(home / "index", "a cat", tmp_path / "a", threshold=-1.0)
    assert clip_batch.filter(home / "index", "a cat", tmp_path / "a", k=3).images == 0  # the same, without pictures
    assert clip_batch.filter(home / "index", "a cat", tmp_path / "a", threshold=-1.0).rows == 12
    assert clip_batch.filter(home / "index", Query(id=3, k=2), tmp_path / "a").rows == 2
    with pytest.raises(ConfigError, match="give them there"):
        clip_batch.filter(home / "index", Query(id=3), tmp_path / "a", k=2)
    with pytest.raises(ConfigError, match="images_from is 'web'"):
        clip_batch.filter(home / "index", "a", tmp_path / "a", images=True, images_from="web")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="image_path"):
        clip_batch.filter(home / "index", "a", tmp_path / "a", images=True, images_from="path")


def test_rows_are_removed_by_an_example_picture(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(home / "index", tmp_path / "index")
    with Searcher(tmp_path / "index") as searcher:
        picture = searcher.image(5)
        key = searcher.metadata([5], ["key"])[0]["key"]
    assert picture is not None
    (tmp_path / "me.jpg").write_bytes(picture)
    query = Query(image=tmp_path / "me.jpg", threshold=0.99)
    report = clip_batch.remove(tmp_path / "index", query=query, dry_run=True)
    assert report.rows >= 1 and key in {row.key for row in report.sample}
    words = ["remove", "--index", f"{tmp_path}/index", "--image", f"{tmp_path}/me.jpg", "--threshold", "0.99"]
    assert main(words) == 0
    assert f"--undo {report.digest} takes it back" in capsys.readouterr().out
    assert clip_batch.versions(tmp_path / "index")[0].alive == 12 - report.rows
    assert main([*words[:4], f"{tmp_path}", *words[5:]]) == 2
    assert "is no file" in capsys.readouterr().err


def test_rows_are_removed_by_a_list_or_a_file(home: Path, tmp_path: Path) -> None:
    merge(home / "out", tmp_path / "index")
    keys = clip_batch.read(tmp_path / "index").to_table(columns=["key"])["key"].to_pylist()
    assert clip_batch.remove(tmp_path / "index", keys[:2]).rows == 2
    (tmp_path / "keys.txt").write_text(keys[2])
    assert clip_batch.remove(tmp_path / "index", tmp_path / "keys.txt").rows == 1
    (version,) = clip_batch.versions(tmp_path / "index")
    assert (version.rows, version.alive, version.live) == (12, 9, True)
    wrong: list[tuple[Any, str]] = [
        ([], "keys has no value"),
        (tmp_path / "absent.txt", "absent.txt does not exist: name a file that has a value on each line"),
        ("12", "^the file of keys 12 does not exist"),
        (5, "keys is 5: it must be a list of values"),
    ]
    for value, says in wrong:
        with pytest.raises(ConfigError, match=says):
            clip_batch.remove(tmp_path / "index", value)


def test_folders_that_are_files_are_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    plan = PlanConfig(model="fake:8")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        for write in (
            lambda path: clip_batch.embed_table([{"image": corpus.jpeg(1)}], path, plan),
            lambda path: make_plan(home / "a.tar", path, plan),
            lambda path: merge(home / "out", path),
            lambda path: clip_batch.filter(home / "index", "a cat", path, k=1),
        ):
            with pytest.raises(ConfigError, match="file is no folder: name another one"):
                write(path)
        for read in (embed, clip_batch.status, clip_batch.verify, lambda path: merge(path, tmp_path / "index")):
            with pytest.raises(PlanError, match="no plan at"):
                read(path)
        for ask in (Searcher, clip_batch.versions):
            with pytest.raises(ConfigError, match="no index at"):
                ask(path)


def test_versions_are_used_and_dropped(home: Path, tmp_path: Path) -> None:
    first = merge(home / "out", tmp_path / "index").version
    second = merge(home / "out", tmp_path / "index", MergeConfig(seed=1)).version
    assert [info.live for info in clip_batch.versions(tmp_path / "index")] == [False, True]
    listed = clip_batch.versions(tmp_path / "index", use=first, drop=second)
    assert [(info.version, info.live) for info in listed] == [(first, True)]
    with pytest.raises(ConfigError, match="no index at"):
        clip_batch.versions(tmp_path / "nowhere")


def test_sweep_recommends(home: Path) -> None:
    tried = clip_batch.sweep(home / "out", SweepConfig(keys_to_try=["Flat"], sample=12), merge=MergeConfig(queries=2))
    assert [candidate.key for candidate in tried.candidates] == ["Flat"]


def test_make_app_serves(home: Path) -> None:
    for indices in (home / "index", [str(home / "index")], {"index": home / "index"}):
        with TestClient(clip_batch.make_app(indices)) as client:
            assert client.post("/v1/search", json={"text": "a cat", "k": 2}).json()["index"] == "index"
    with pytest.raises(ConfigError):
        clip_batch.make_app({"a": 5})  # type: ignore[dict-item]


def test_hits_have_their_image(home: Path) -> None:
    with Searcher(home / "index") as searcher:
        result = searcher.find(Query(text="a cat", k=2))
        for columns in (None, ["key"]):
            for hit in searcher.find("a cat", columns).hits:
                assert hit.image() == searcher.image(hit.id) and hit.image().startswith(b"\xff\xd8")
        assert result._repr_html_().count("data:image/jpeg;base64,") == 2
        json.dumps([vars(hit) | {"_read": None} for hit in result.hits])
    with pytest.raises(LookupError, match="is not bound to a search"):
        Hit(1, 0.5, {}).image()


def test_notebooks_show_tables_and_escape_all_text(home: Path) -> None:
    shown = clip_batch.status(home / "out")._repr_html_()
    assert "<th style='text-align:left'>rows</th><td>12</td>" in shown
    assert "<td>True</td>" in clip_batch.verify(home / "out")._repr_html_()
    evil = "<script>alert('x')</script>"
    assert "<script" not in html.table({evil: {evil: evil}})
    picture = html.pictures([Hit(1, 0.5, {"caption": evil})], lambda hit: evil.encode(), evil)
    assert "<script" not in picture and "no picture to show" in picture and "0.500" in picture
    many = html.pictures([Hit(row, 0.5, {}) for row in range(60)], lambda hit: None)
    assert "and 10 more" in many and html.pictures([], lambda hit: None).count("no hits") == 1
