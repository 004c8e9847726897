"""A row is in an index once, whatever OUTs it came through: overlapping, grown, repaired, cut otherwise, changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clip_batch
from clip_batch.cli import main
from clip_batch.config import DatabaseConfig, MergeConfig
from clip_batch.embeddings.part_writer import PartWriter
from clip_batch.embeddings.repair import repair
from clip_batch.embeddings.verify import verify_output
from clip_batch.errors import ConfigError, CorruptError
from clip_batch.export.clip_retrieval import export_clip_retrieval
from clip_batch.export.databases.fill import export_sql
from clip_batch.export.filter import filter_rows
from clip_batch.index import held
from clip_batch.index.ann import faiss_index
from clip_batch.index.gc import gc_index
from clip_batch.index.held import Content, Places
from clip_batch.index.manifest import Manifest, load_manifest
from clip_batch.index.merge.job import open_job
from clip_batch.index.merge.merge import merge
from clip_batch.index.remove import remove_values
from clip_batch.index.status import describe
from clip_batch.index.verify import verify_index
from clip_batch.index.versions import folders_of, versions
from clip_batch.plan import paths, stored
from clip_batch.plan.pack import PartitionTarget
from clip_batch.plan.plan import load_plan
from clip_batch.search.query import Query
from clip_batch.search.searcher import Searcher
from clip_batch.storage.store import Store
from clip_batch.types import EncoderSpec, Partition, Plan, Shard, Slice
from tests.fabricated import ENCODER, Vectors, unit

CONFIG = MergeConfig(queries=5, shard_rows=40)
DIM = 8

Piece = tuple[str, int, int]
"""The rows [first, last + 1) of a tar, by the tar's name."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    faiss_index.use_threads(1)


def vectors(names: Sequence[str]) -> Vectors:
    """A vector for each row, by its name alone."""
    seeds = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) for name in names]
    return unit(np.array([np.random.default_rng(seed).standard_normal(DIM) for seed in seeds]).reshape(-1, DIM))


def make_out(
    out: Path | str,
    partitions: Sequence[Sequence[Piece]],
    tars: str = "/data",
    etag: dict[str, str] | None = None,
    skip: Sequence[int] = (),
    failed: Sequence[str] = (),
    compressed: bool = False,
    modalities: Sequence[str] = ("image", "text"),
    encoder: EncoderSpec = ENCODER,
    format: str = "tar",
) -> Plan:
    """An OUT of some pieces of tars, whose rows have the keys <tar>-<row>; `etag` has the versions of tars."""
    store, etags = Store(str(out)), etag or {}

    def shard(name: str) -> Shard:
        size = None if format == "files" else 10**6
        suffix = "" if format == "files" else ".tar.gz" if compressed else ".tar"
        return Shard(f"{tars}/{name}{suffix}", size, etags.get(name, "1"), None)

    slices = [[Slice(shard(name), 512 * first, 512 * last) for name, first, last in each] for each in partitions]
    draft = Plan(
        tuple(Partition(number, tuple(each)) for number, each in enumerate(slices)),
        encoder,
        format,
        modalities=tuple(modalities),
    )
    plan = replace(draft, digest=stored.plan_digest(draft))
    shards = [piece.shard for each in slices for piece in each]
    if not store.exists(paths.PLAN):
        stored.write_plan(store, plan, shards, PartitionTarget("partitions", len(partitions)), {})
    for number, each in enumerate(partitions):
        if number in skip or store.exists(paths.commit(plan.name(number))):
            continue
        rows = []
        for (name, first, last), piece in zip(each, slices[number], strict=True):
            for row in range(first, last):
                if f"{name}-{row}" not in failed:
                    rows.append((name, row, piece.shard))
        with PartWriter(store, plan, number, DIM) as writer:
            if rows:
                lines = [
                    {
                        "key": f"{name}-{0 if compressed else row}",
                        "shard": shard.url,
                        "offset": None if compressed or format == "files" else 512 * row,
                        "length": None if compressed or format == "files" else 10,
                        "caption": f"{name}-{row} {shard.etag if format == 'tar' else ''}".strip(),
                    }
                    for name, row, shard in rows
                ]
                images = vectors([f"{name}-{row}-{shard.etag if format == 'tar' else ''}" for name, row, shard in rows])
                have = [images if kind in modalities else None for kind in ("image", "text")]
                writer.add(lines, *have)  # type: ignore[arg-type]
            assert writer.commit(encoder.fingerprint)
    return plan


def rows_of(index: Path | str) -> Counter[tuple[str, str]]:
    """How often each caption can be found in an index, by searches for its own vector; every row finds itself."""
    found: Counter[tuple[str, str]] = Counter()
    with Searcher(str(index)) as searcher:
        alive = np.setdiff1d(np.arange(searcher.manifest.rows), searcher.removed)
        table = searcher.table(alive, ["shard", "caption"]).to_pylist()
        modality = next(iter(searcher.manifest.key))
        if len(alive):
            own = unit(searcher.reconstruct(alive, modality))
            for id, hits in zip(alive, searcher.search(own, 1, modality), strict=True):
                assert hits[0].score > 0.999 and hits[0].id == id
        assert all(hit.id in alive for hit in searcher.search(np.ones(DIM, np.float32) / DIM**0.5, 1000, modality)[0])
        for row in table:
            found[row["shard"].rpartition("/")[2].partition(".")[0], row["caption"]] += 1
    return found


def expected(*pieces: Piece, etag: str = "1") -> Counter[tuple[str, str]]:
    return Counter((name, f"{name}-{row} {etag}") for name, first, last in pieces for row in range(first, last))


def add(out: Path | str, index: Path | str, **changes: object) -> tuple[Manifest, str]:
    """Add an OUT; the manifest, and what was said."""
    lines: list[str] = []
    made = merge(str(out), str(index), replace(CONFIG, add=True, **changes), progress=lines.append)  # type: ignore[arg-type]
    assert verify_index(Store(str(index)), deep=True).problems == {}
    return made, "\n".join(lines)


def test_a_new_out_over_grown_input_adds_what_is_new(tmp_path: Path) -> None:
    make_out(tmp_path / "old", [[("a", 0, 30)], [("b", 0, 20)]])
    make_out(tmp_path / "grown", [[("a", 0, 10)], [("a", 10, 30), ("b", 0, 5)], [("b", 5, 20), ("c", 0, 7)]])
    first = merge(str(tmp_path / "old"), str(tmp_path / "index"), CONFIG)
    assert first.sources[0].standing == 0
    made, said = add(tmp_path / "grown", tmp_path / "index")
    assert "50 rows stand already and are not added again; 7 are new" in said
    assert (made.rows, made.sources[1].rows, made.sources[1].standing) == (57, 57, 50)
    assert rows_of(tmp_path / "index") == expected(("a", 0, 30), ("b", 0, 20), ("c", 0, 7))
    again, said = add(tmp_path / "grown", tmp_path / "index")
    assert again == made and "knows all rows of" in said and "nothing is added" in said


def test_the_same_tars_cut_otherwise_are_nothing_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_out(tmp_path / "one", [[("a", 0, 30), ("b", 0, 20)]])
    make_out(tmp_path / "two", [[("a", 0, 7)], [("a", 7, 30)], [("b", 0, 20)]])
    made = merge(str(tmp_path / "one"), str(tmp_path / "index"), CONFIG)
    words = ["merge", "--output", f"{tmp_path}/two", "--index", f"{tmp_path}/index", "--add", "--shard-rows", "40"]
    assert main(words) == 0
    assert "50 rows stand already" in capsys.readouterr().err
    assert load_manifest(Store(f"{tmp_path}/index")) == made
    for task in (["train"], ["shards", "--slot", "0", "--slots", "2"], ["manifest"]):
        assert main([*words, "--task", *task]) == 0
        assert load_manifest(Store(f"{tmp_path}/index")) == made


def test_what_a_merge_without_a_new_row_leaves_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(f"{tmp_path}/index")
    make_out(tmp_path / "one", [[("a", 0, 30), ("b", 0, 20)]])
    make_out(tmp_path / "two", [[("a", 0, 7)], [("a", 7, 30)], [("b", 0, 20)]])
    made = merge(str(tmp_path / "one"), store.url, CONFIG)
    add(tmp_path / "two", store.url)
    (left,) = {*folders_of(store)} - {made.version}
    status, (_, info) = clip_batch.index_status(store.url), versions(store)
    assert status.merges == () and "is being merged" not in describe(status)
    assert info.adds_nothing and not info.finished
    assert main(["versions", "--index", store.url]) == 0
    shown = capsys.readouterr().out
    assert f"{left}  adds nothing" in shown and "not finished" not in shown
    report = gc_index(store)
    assert [(each.name, each.reason) for each in report.removed] == [(left, "its merge found no new row")]
    assert folders_of(store) == [made.version]
    made_again, said = add(tmp_path / "two", store.url)
    assert made_again == made and "50 rows stand already" in said


def test_an_out_completed_after_allow_partial_adds_the_rest(tmp_path: Path) -> None:
    pieces: list[list[Piece]] = [[("a", 0, 30)], [("a", 30, 45), ("b", 0, 20)]]
    make_out(tmp_path / "out", pieces, skip=[1])
    merge(str(tmp_path / "out"), str(tmp_path / "index"), replace(CONFIG, allow_partial=True))
    make_out(tmp_path / "out", pieces)
    made, said = add(tmp_path / "out", tmp_path / "index")
    assert "30 rows stand already and are not added again; 35 are new" in said
    assert [(source.rows, source.standing, source.missing) for source in made.sources] == [(30, 0, (1,)), (65, 30, ())]
    assert rows_of(tmp_path / "index") == expected(("a", 0, 45), ("b", 0, 20))


def test_a_repaired_out_adds_what_had_failed(tmp_path: Path) -> None:
    make_out(tmp_path / "out", [[("a", 0, 30)], [("b", 0, 20)]], failed=["b-3"])
    merge(str(tmp_path / "out"), str(tmp_path / "index"), CONFIG)
    path = next((tmp_path / "out/img_emb").glob("img_emb_0001-*"))
    path.write_bytes(path.read_bytes()[:-8])
    store = Store(f"{tmp_path}/out")
    repair(store, verify_output(store).problems)
    make_out(tmp_path / "out", [[("a", 0, 30)], [("b", 0, 20)]])
    made, said = add(tmp_path / "out", tmp_path / "index")
    assert "49 rows stand already and are not added again; 1 are new" in said
    assert made.rows == 50
    assert rows_of(tmp_path / "index") == expected(("a", 0, 30), ("b", 0, 20))


def test_a_copy_of_an_out_is_nothing_new_and_its_rows_are_not_read(tmp_path: Path) -> None:
    make_out(tmp_path / "out", [[("a", 0, 30)], [("b", 0, 20)]])
    made = merge(str(tmp_path / "out"), str(tmp_path / "index"), CONFIG)
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/metadata")
    assert add(tmp_path / "copy", tmp_path / "index")[0] == made


def test_a_changed_tar_is_refused_by_name_or_replaced(tmp_path: Path) -> None:
    make_out(tmp_path / "old", [[("a", 0, 30)], [("b", 0, 20)]])
    make_out(tmp_path / "new", [[("a", 0, 12)], [("b", 0, 20)], [("c", 0, 4)]], etag={"a": "2"})
    index = tmp_path / "index"
    first = merge(str(tmp_path / "old"), str(index), CONFIG)
    with pytest.raises(
        ConfigError, match=r"/data/a.tar with another content .*version 2\) than index version"
    ) as caught:
        add(tmp_path / "new", index)
    assert "merge with --replace" in str(caught.value) and "b.tar" not in str(caught.value)
    assert load_manifest(Store(str(index))) == first
    made, said = add(tmp_path / "new", index, replace=True)
    assert "20 rows stand already and are not added again; 16 are new" in said
    assert "30 rows of the index are replaced" in said
    whole = expected(("b", 0, 20), ("c", 0, 4)) + expected(("a", 0, 12), etag="2")
    assert rows_of(index) == whole
    assert made.rows == 66
    make_out(tmp_path / "more", [[("a", 0, 12), ("d", 0, 3)]], etag={"a": "2"})  # what is dead now does not stand
    later, said = add(tmp_path / "more", index)
    assert "12 rows stand already and are not added again; 3 are new" in said
    assert later.replaced == made.replaced
    whole += expected(("d", 0, 3))
    assert rows_of(index) == whole
    make_out(tmp_path / "stale", [[("a", 0, 30)]])
    with pytest.raises(ConfigError, match="another content"):  # the old content does not come back unasked
        add(tmp_path / "stale", index)
    anew = merge([], str(index), replace(CONFIG, anew=True))
    assert (anew.rows, anew.replaced, anew.base) == (39, {}, "")
    assert rows_of(index) == whole
    assert merge([], str(index), replace(CONFIG, anew=True)) == anew
    back, _ = add(tmp_path / "stale", index, replace=True)
    assert back.rows == 69
    assert rows_of(index) == whole - expected(("a", 0, 12), etag="2") + expected(("a", 0, 30))


def test_what_was_replaced_comes_back_when_it_is_asked_for(tmp_path: Path) -> None:
    index, old = tmp_path / "index", [[("a", 0, 30)], [("b", 0, 20)]]
    make_out(tmp_path / "old", old, skip=[1])
    make_out(tmp_path / "new", [[("a", 0, 12)]], etag={"a": "2"})
    merge(str(tmp_path / "old"), str(index), replace(CONFIG, allow_partial=True))
    add(tmp_path / "new", index, replace=True)
    make_out(tmp_path / "old", old)  # completed: what it has of the changed tar stays replaced
    made, _ = add(tmp_path / "old", index)
    assert rows_of(index) == expected(("b", 0, 20)) + expected(("a", 0, 12), etag="2")
    assert add(tmp_path / "old", index)[0] == made
    back, said = add(tmp_path / "old", index, replace=True)
    assert "12 rows of the index are replaced" in said
    assert rows_of(index) == expected(("a", 0, 30), ("b", 0, 20))
    assert add(tmp_path / "old", index)[0] == back
    anew = merge([], str(index), replace(CONFIG, anew=True))  # the contents are those of the version that was live
    assert anew.rows == 50
    assert rows_of(index) == expected(("a", 0, 30), ("b", 0, 20))


def test_every_reader_is_without_replaced_rows(tmp_path: Path) -> None:
    index = f"{tmp_path}/index"
    make_out(tmp_path / "old", [[("a", 0, 30)], [("b", 0, 20)]])
    make_out(tmp_path / "new", [[("a", 0, 12)]], etag={"a": "2"})
    merge(str(tmp_path / "old"), index, CONFIG)
    add(tmp_path / "new", index, replace=True)
    whole = {caption for _, caption in expected(("b", 0, 20)) + expected(("a", 0, 12), etag="2")}
    (version,) = [one for one in versions(Store(index)) if one.live]
    assert (version.rows, version.alive) == (62, 32)
    assert set(clip_batch.read(index).to_table(["caption"])["caption"].to_pylist()) == whole
    assert filter_rows(Searcher(index), Query(embedding=vectors(["x"])[0], k=99), Store(f"{tmp_path}/found")).rows == 32
    export_clip_retrieval(index, f"{tmp_path}/theirs")
    theirs = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / "theirs/metadata").iterdir())])
    assert set(theirs["caption"].drop_null().to_pylist()) == whole
    assert faiss_index.read(f"{tmp_path}/theirs/image.index").ntotal == 32
    export_sql(index, DatabaseConfig(sql=f"{tmp_path}/rows.db"))
    with sqlite3.connect(f"{tmp_path}/rows.db") as base:
        names = [name for (name,) in base.execute("select name from sqlite_master where type = 'table'")]
        (table,) = [name for name in names if name.endswith(version.version)]
        assert {caption for (caption,) in base.execute(f"select caption from {table}")} == whole
    remove_values(index, ["b-3"])
    assert sum(rows_of(index).values()) == 31
    assert clip_batch.verify(index, deep=True).ok


def test_a_folder_without_commits_grows_by_its_files(tmp_path: Path) -> None:
    out, index = tmp_path / "theirs", f"{tmp_path}/index"

    def write(number: int, rows: int) -> None:
        for kind in ("img_emb", "text_emb", "metadata"):
            (out / kind).mkdir(parents=True, exist_ok=True)
        names = [f"{number}-{row}" for row in range(rows)]
        for kind in ("img_emb", "text_emb"):
            np.save(out / kind / f"{kind}_{number}.npy", vectors(names).astype(np.float16))
        pq.write_table(pa.table({"caption": names}), out / f"metadata/metadata_{number}.parquet")

    write(0, 20)
    merge(str(out), index, CONFIG)
    write(1, 7)
    made, said = add(out, index)
    assert "20 rows stand already and are not added again; 7 are new" in said
    assert made.rows == 27
    assert add(out, index)[0] == made
    write(0, 25)
    with pytest.raises(ConfigError, match=r"theirs#0 with another content"):
        add(out, index)
    made, said = add(out, index, replace=True)
    assert "20 rows of the index are replaced" in said
    with Searcher(index) as searcher:
        assert searcher.manifest.rows - len(searcher.removed) == 32


def test_rows_are_replaced_by_a_whole_tar_alone(tmp_path: Path) -> None:
    make_out(tmp_path / "old", [[("a", 0, 30)]])
    make_out(tmp_path / "new", [[("a", 0, 12)], [("a", 12, 30)]], etag={"a": "2"}, skip=[1])
    merge(str(tmp_path / "old"), str(tmp_path / "index"), CONFIG)
    with pytest.raises(ConfigError, match=r"lacks partitions 1, which have rows of /data/a.tar"):
        add(tmp_path / "new", tmp_path / "index", replace=True, allow_partial=True)


def test_removed_rows_stay_removed_whatever_out_brings_them_again(tmp_path: Path) -> None:
    make_out(tmp_path / "old", [[("a", 0, 30)]])
    make_out(tmp_path / "new", [[("a", 0, 15)], [("a", 15, 30), ("b", 0, 5)]])
    merge(str(tmp_path / "old"), str(tmp_path / "index"), CONFIG)
    remove_values(str(tmp_path / "index"), ["a-3", "a-20", "b-1"])
    made, _ = add(tmp_path / "new", tmp_path / "index")
    whole = expected(("a", 0, 30), ("b", 0, 5)) - Counter({("a", "a-3 1"): 1, ("a", "a-20 1"): 1, ("b", "b-1 1"): 1})
    assert made.rows == 35
    assert rows_of(tmp_path / "index") == whole
    merge([], str(tmp_path / "index"), replace(CONFIG, anew=True))
    assert rows_of(tmp_path / "index") == whole


def test_repeated_keys_of_a_compressed_tar_are_several_rows(tmp_path: Path) -> None:
    make_out(tmp_path / "old", [[("a", 0, 5)]], compressed=True)
    make_out(tmp_path / "new", [[("a", 0, 5), ("b", 0, 2)]], compressed=True)
    merge(str(tmp_path / "old"), str(tmp_path / "index"), CONFIG)
    _, said = add(tmp_path / "new", tmp_path / "index")
    assert "5 rows stand already and are not added again; 2 are new" in said
    assert rows_of(tmp_path / "index") == expected(("a", 0, 5), ("b", 0, 2))


def test_a_folder_of_pictures_grows_by_its_keys(tmp_path: Path) -> None:
    make_out(tmp_path / "old", [[("p", 0, 20)]], format="files", etag={"p": "listing of 20"})
    make_out(tmp_path / "new", [[("p", 0, 10)], [("p", 10, 25)]], format="files", etag={"p": "listing of 25"})
    merge(str(tmp_path / "old"), str(tmp_path / "index"), CONFIG)
    made, said = add(tmp_path / "new", tmp_path / "index")
    assert "20 rows stand already and are not added again; 5 are new" in said
    assert sum(rows_of(tmp_path / "index").values()) == 25 == made.rows


def test_one_place_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    places = Places()
    same = [f"{tmp_path}/real/a.tar", f"file://{tmp_path}/real/a.tar", "link/a.tar", f"{tmp_path}/x/../real//a.tar"]
    assert {places.of(url) for url in same} == {f"{tmp_path}/real/a.tar"}
    assert places.of("link/") == places.of(f"{tmp_path}/real")
    assert places.of("s3a://bucket/a/") == places.of("S3://bucket/a") != places.of("s3://bucket/A")
    assert places.of("s3://bucket/a//b") != places.of("s3://bucket/a/b")  # two keys of a store
    make_out(tmp_path / "one", [[("a", 0, 30)]], tars=f"{tmp_path}/real")
    make_out(tmp_path / "two", [[("a", 0, 30), ("b", 0, 3)]], tars="link")
    merge(str(tmp_path / "one"), str(tmp_path / "index"), CONFIG)
    assert add(tmp_path / "two", tmp_path / "index")[0].rows == 33


def test_contents_that_are_known_are_compared() -> None:
    assert Content(5, "1").differs(Content(5, "2")) and Content(5, None).differs(Content(6, None))
    assert not Content(5, None).differs(Content(5, "2"))
    assert not Content(None, "names").differs(Content(None, "more names"))
    assert not Content().differs(Content(5, "1"))


def older(index: Path) -> None:
    """Make the live version one that a clip-batch from before there were files `held` wrote."""
    version = (index / "CURRENT").read_text().strip()
    path = index / version / "manifest.json"
    data = json.loads(path.read_text())
    for source in data["sources"]:
        for name in source.pop("held"):
            (index / name).unlink()
        del source["standing"]
    del data["replaced"]
    path.write_text(json.dumps(data))
    record = next((index / version).glob("template/record.json"))
    data = json.loads(record.read_text())
    data["files"] = {name: file for name, file in data["files"].items() if not name.startswith("held")}
    del data["standing"], data["left_out"]
    record.write_text(json.dumps(data))


def test_an_older_index_is_asked_by_its_metadata(tmp_path: Path) -> None:
    index = tmp_path / "index"
    make_out(tmp_path / "old", [[("a", 0, 30)], [("b", 0, 20)]])
    make_out(tmp_path / "new", [[("a", 0, 10)], [("a", 10, 33)], [("c", 0, 7)]])
    merge(str(tmp_path / "old"), str(index), CONFIG)
    older(index)
    made, said = add(tmp_path / "new", index)
    assert "30 rows stand already and are not added again; 10 are new" in said
    assert rows_of(index) == expected(("a", 0, 33), ("b", 0, 20), ("c", 0, 7))
    assert add(tmp_path / "old", index)[0] == made


def test_rows_left_out_as_duplicates_are_known_too(tmp_path: Path) -> None:
    make_out(tmp_path / "old", [[("a", 0, 30)]])
    store = Store(f"{tmp_path}/old")
    plan = load_plan(store)
    path = next((tmp_path / "old/img_emb").glob("*.npy"))
    commit = json.loads(store.read(paths.commit(plan.name(0))))
    matrix = np.load(path)
    matrix[7], matrix[8] = matrix[3], matrix[3]
    np.save(path, matrix)
    commit["files"][f"img_emb/{path.name}"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "old" / paths.commit(plan.name(0))).write_text(json.dumps(commit))
    first = merge(str(tmp_path / "old"), str(tmp_path / "index"), replace(CONFIG, dedup=1.0))
    assert first.rows == 28
    make_out(tmp_path / "new", [[("a", 0, 9)], [("a", 9, 30), ("b", 0, 2)]])
    made, said = add(tmp_path / "new", tmp_path / "index")
    assert "30 rows stand already and are not added again; 2 are new" in said
    assert made.rows == 30


# several OUTs at once


def test_several_outs_are_one_index(tmp_path: Path) -> None:
    make_out(tmp_path / "one", [[("a", 0, 60)], [("b", 0, 20)]])
    make_out(tmp_path / "two", [[("b", 0, 20)], [("c", 0, 70)]])
    outs = [f"{tmp_path}/one", f"{tmp_path}/two"]
    lines: list[str] = []
    made = merge(outs, f"{tmp_path}/index", CONFIG, progress=lines.append)
    assert "20 rows stand already and are not added again; 150 are new" in "\n".join(lines)
    assert [(source.output, source.rows, source.standing) for source in made.sources] == [
        (outs[0], 80, 0),
        (outs[1], 90, 20),
    ]
    assert [shard.source for shard in made.shards] == [0, 0, 1, 1, 1]
    assert rows_of(tmp_path / "index") == expected(("a", 0, 60), ("b", 0, 20), ("c", 0, 70))
    assert merge(outs, f"{tmp_path}/index", CONFIG) == made
    assert verify_index(Store(f"{tmp_path}/index"), deep=True).problems == {}
    make_out(tmp_path / "three", [[("c", 60, 80)]])
    later, _ = add(tmp_path / "three", tmp_path / "index")
    assert (later.rows, later.base, len(later.sources)) == (160, made.version, 3)
    assert rows_of(tmp_path / "index") == expected(("a", 0, 60), ("b", 0, 20), ("c", 0, 80))
    words = ["merge", "--output", *outs, f"{tmp_path}/three", "--index", f"{tmp_path}/whole", "--shard-rows", "40"]
    for task in (["train"], ["shards", "--slot=0", "--slots=2"], ["shards", "--slot=1", "--slots=2"], ["manifest"]):
        assert main([*words, "--task", *task]) == 0
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "index")


def test_one_out_twice_is_one_out(tmp_path: Path) -> None:
    make_out(tmp_path / "one", [[("a", 0, 60)]])
    made = merge([f"{tmp_path}/one", f"{tmp_path}/one"], f"{tmp_path}/index", CONFIG)
    assert made.rows == 60
    assert rows_of(tmp_path / "index") == expected(("a", 0, 60))


@pytest.mark.parametrize("key", ["Flat", "IVF4,Flat"])
def test_an_out_without_captions_stands_beside_one_with(tmp_path: Path, key: str) -> None:
    make_out(tmp_path / "both", [[("a", 0, 50)]])
    make_out(tmp_path / "images", [[("b", 0, 45)]], modalities=["image"])
    outs, config = [f"{tmp_path}/both", f"{tmp_path}/images"], replace(CONFIG, index_key=key)
    made = merge(outs, f"{tmp_path}/index", config)
    assert (set(made.key), made.rows) == ({"image", "text"}, 95)
    assert rows_of(tmp_path / "index") == expected(("a", 0, 50), ("b", 0, 45))
    with Searcher(f"{tmp_path}/index") as searcher:
        (hits,) = searcher.search(vectors(["a-7-1"]), 90, "text", effort=4 if key != "Flat" else None)
        assert hits[0].metadata["key"] == "a-7" and len(hits) == 50
    make_out(tmp_path / "more", [[("c", 0, 9)]], modalities=["image"])
    assert add(tmp_path / "more", tmp_path / "index", index_key=key)[0].rows == 104
    merge(outs[:1], f"{tmp_path}/single", replace(config, modalities=["image"]))
    if key != "Flat":
        joined = merge(outs, f"{tmp_path}/joined", replace(config, layout="single"))
        assert len(joined.single["image"]) == 2
        assert rows_of(tmp_path / "joined") == expected(("a", 0, 50), ("b", 0, 45))


def test_outs_of_captions_alone_and_of_images_alone_are_one_index(tmp_path: Path) -> None:
    make_out(tmp_path / "both", [[("a", 0, 50)]])
    make_out(tmp_path / "texts", [[("b", 0, 45)]], modalities=["text"])
    make_out(tmp_path / "images", [[("c", 0, 45)]], modalities=["image"])
    config = replace(CONFIG, index_key="IVF4,Flat")
    for number, names in enumerate((["texts", "images"], ["texts", "both", "images"])):
        index = f"{tmp_path}/index{number}"
        made = merge([f"{tmp_path}/{name}" for name in names], index, config)
        assert set(made.key) == {"image", "text"}
        assert verify_index(Store(index), deep=True).problems == {}
        with Searcher(index) as searcher:
            for kind, own, rows in (("text", "b-7-1", 45 + 50 * number), ("image", "c-7-1", 45 + 50 * number)):
                (hits,) = searcher.search(vectors([own]), 200, kind, effort=4)
                assert hits[0].metadata["key"] == own[:3] and len(hits) == rows


def test_duplicates_are_looked_for_across_outs(tmp_path: Path) -> None:
    make_out(tmp_path / "one", [[("a", 0, 50)]], tars="/here")
    make_out(tmp_path / "two", [[("a", 0, 60)]], tars="/there")  # the same pictures in other tars
    made = merge([f"{tmp_path}/one", f"{tmp_path}/two"], f"{tmp_path}/index", replace(CONFIG, dedup=1.0))
    assert (made.rows, made.duplicates["rows"]) == (60, 50)


def test_a_changed_tar_within_one_merge(tmp_path: Path) -> None:
    make_out(tmp_path / "one", [[("a", 0, 50)], [("b", 0, 5)]])
    make_out(tmp_path / "two", [[("a", 0, 45)]], etag={"a": "2"})
    outs = [f"{tmp_path}/one", f"{tmp_path}/two"]
    with pytest.raises(ConfigError, match=rf"another content \(/data/a.tar.* than {tmp_path}/one"):
        merge(outs, f"{tmp_path}/index", CONFIG)
    made = merge(outs, f"{tmp_path}/index", replace(CONFIG, replace=True, dedup=1.0))
    assert made.rows == 50
    assert rows_of(tmp_path / "index") == expected(("b", 0, 5)) + expected(("a", 0, 45), etag="2")


def test_a_changed_tar_whose_rows_all_repeat_other_live_ones_still_replaces_its_old_rows(tmp_path: Path) -> None:
    make_out(tmp_path / "one", [[("a", 0, 30)]])
    make_out(tmp_path / "copy", [[("a", 0, 30)]], tars="/copy", etag={"a": "2"})
    config = replace(CONFIG, dedup=1.0)
    merge([f"{tmp_path}/one", f"{tmp_path}/copy"], f"{tmp_path}/index", config)
    make_out(tmp_path / "new", [[("a", 0, 30)]], etag={"a": "2"})
    made = merge(f"{tmp_path}/new", f"{tmp_path}/index", replace(config, add=True, replace=True))
    assert (made.rows, made.duplicates["live"]) == (60, 30)
    assert rows_of(tmp_path / "index") == expected(("a", 0, 30), etag="2")


def test_several_outs_of_different_encoders_are_refused(tmp_path: Path) -> None:
    make_out(tmp_path / "one", [[("a", 0, 5)]])
    make_out(tmp_path / "two", [[("b", 0, 5)]], encoder=replace(ENCODER, weights="1" * 64))
    outs = [f"{tmp_path}/one", f"{tmp_path}/two"]
    with pytest.raises(ConfigError, match=rf"two has encoder fake:8 .* {tmp_path}/one has .*INDEX of its own"):
        merge(outs, f"{tmp_path}/index", CONFIG)
    assert not (tmp_path / "index").exists()


def test_sources_that_are_gone_are_named(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_out(tmp_path / name, [[(name, 0, 15)]])
    outs = [f"{tmp_path}/one", f"{tmp_path}/two"]
    made = merge(outs, f"{tmp_path}/index", CONFIG)
    shutil.rmtree(outs[1])
    with pytest.raises(ConfigError, match=rf"cannot be read: {outs[1]} \(.*name what is left with --output"):
        merge([], f"{tmp_path}/index", replace(CONFIG, anew=True))
    with pytest.raises(ConfigError, match="exclude each other"):
        merge([], f"{tmp_path}/index", replace(CONFIG, anew=True, add=True))
    with pytest.raises(ConfigError, match="--output OUT is needed"):
        merge([], f"{tmp_path}/index", CONFIG)
    assert load_manifest(Store(f"{tmp_path}/index")) == made
    assert merge(outs[0], f"{tmp_path}/index", replace(CONFIG, anew=True)).rows == 15


def test_a_damaged_list_of_what_is_held_is_named(tmp_path: Path) -> None:
    make_out(tmp_path / "one", [[("a", 0, 50)]])
    made = merge(f"{tmp_path}/one", f"{tmp_path}/index", CONFIG)
    (name,) = made.sources[0].held
    path = tmp_path / "index" / name
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    assert f"shards held of {tmp_path}/one" in verify_index(Store(f"{tmp_path}/index"), deep=True).problems
    with pytest.raises(CorruptError, match="is not what was written"):
        add(tmp_path / "one", tmp_path / "index")
    assert rows_of(tmp_path / "index") == expected(("a", 0, 50))


KILL = """
import os, signal, sys
from clip_batch.config import MergeConfig
from clip_batch.index.merge.merge import merge
from clip_batch.storage.store import Store

left, create = [int(sys.argv[1])], Store.create

def killed(self, name, data, check_first=True):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return create(self, name, data, check_first)

Store.create = killed
merge(sys.argv[3:], sys.argv[2], MergeConfig(queries=5, shard_rows=40))
"""


@pytest.mark.slow
def test_kill_9_between_tasks_resumes(tmp_path: Path) -> None:
    make_out(tmp_path / "one", [[("a", 0, 60)], [("b", 0, 20)]])
    make_out(tmp_path / "two", [[("b", 0, 20)], [("c", 0, 70)]])
    outs, index = [f"{tmp_path}/one", f"{tmp_path}/two"], f"{tmp_path}/index"
    version = open_job(outs, index, CONFIG).version
    for number in (1, 2, 3, 4):
        done = subprocess.run(
            [sys.executable, "-c", KILL, str(number), index, *outs],
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    made = merge(outs, index, CONFIG)
    assert made.version == version
    assert rows_of(index) == expected(("a", 0, 60), ("b", 0, 20), ("c", 0, 70))
    assert verify_index(Store(index), deep=True).problems == {}


# names of rows


@given(st.lists(st.integers(0, 4), max_size=40), st.lists(st.integers(0, 4), max_size=40))
def test_the_second_of_equal_rows_is_another_one(known: list[int], new: list[int]) -> None:
    one, other = (np.array([[value, 7] for value in values], dtype=np.uint64).reshape(-1, 2) for values in (known, new))
    told = held.are_in(held.numbered(other), held.numbered(one))
    left, seen = Counter(known), Counter[int]()
    for value, stands in zip(new, told, strict=True):
        seen[value] += 1
        assert stands == (seen[value] <= left[value])


TARS = {"a": 25, "b": 12, "c": 31}


@st.composite
def plan_of(draw: st.DrawFn) -> list[list[Piece]]:
    """Some of the tars, cut anywhere and packed into partitions."""
    pieces: list[Piece] = []
    for name in draw(st.lists(st.sampled_from(sorted(TARS)), min_size=1, unique=True)):
        cuts = sorted({0, TARS[name], *draw(st.lists(st.integers(1, TARS[name] - 1), max_size=2))})
        pieces += [(name, first, last) for first, last in zip(cuts, cuts[1:], strict=False)]
    ends = sorted({0, len(pieces), *draw(st.lists(st.integers(0, len(pieces)), max_size=3))})
    return [pieces[first:last] for first, last in zip(ends, ends[1:], strict=False)]


@pytest.mark.slow
@given(
    st.lists(st.tuples(plan_of(), st.sets(st.integers(0, 3)), st.booleans()), min_size=2, max_size=4),
    st.sets(st.sampled_from([f"{name}-{row}" for name in TARS for row in range(0, 12, 3)])),
)
@settings(max_examples=25, deadline=None)
def test_each_row_once_whatever_is_merged_in_which_order(
    steps: list[tuple[list[list[Piece]], set[int], bool]], failed: set[str]
) -> None:
    """OUTs of the same tars cut differently, some partitions lacking, some rows failed in the first OUT alone."""
    with tempfile.TemporaryDirectory() as home:
        waiting: list[str] = []
        model: set[tuple[str, str]] = set()
        for number, (partitions, skip, at_once) in enumerate(steps):
            skip = skip if len(skip & {*range(len(partitions))}) < len(partitions) else set()
            out = f"{home}/out{number}"
            make_out(out, partitions, skip=sorted(skip), failed=sorted(failed) if number == 0 else [])
            merged = [piece for at, each in enumerate(partitions) if at not in skip for piece in each]
            rows = {key for key, _ in expected(*merged).items()}
            rows -= {(name.partition("-")[0], f"{name} 1") for name in failed} if number == 0 else set()
            if not rows:
                return
            model |= rows
            waiting.append(out)
            if at_once and number < len(steps) - 1:
                continue
            merge(waiting, f"{home}/index", replace(CONFIG, add=True, allow_partial=True))
            waiting.clear()
            assert rows_of(f"{home}/index") == Counter(model)
        assert verify_index(Store(f"{home}/index"), deep=True).problems == {}
