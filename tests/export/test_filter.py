from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_batch.cli import main
from clip_batch.config import MergeConfig
from clip_batch.errors import ConfigError
from clip_batch.export import filter as filters
from clip_batch.export.filter import filter_rows
from clip_batch.index.ann import faiss_index, faiss_search
from clip_batch.index.merge.merge import merge
from clip_batch.plan.specs import expand_inputs
from clip_batch.search.query import Query
from clip_batch.search.searcher import Searcher
from clip_batch.storage.store import Store
from tests import corpus
from tests.fabricated import clustered, make_out
from tests.servers.webserver import image, web

CONFIG = MergeConfig(queries=20)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    faiss_index.use_threads(1)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, index_key="IVF8,PQ4x4", rerank=3, shard_rows=300)])
def test_every_row_over_a_threshold_and_no_other(
    tmp_path: Path, config: MergeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filters, "GROUP", 50)
    monkeypatch.setattr(filters, "FILE", 200)
    monkeypatch.setattr(faiss_search, "FIRST_DEPTH", 8)
    images, texts = clustered(1000, 16, 4)
    make_out(tmp_path / "out", images, texts, [400, 600])
    merge(str(tmp_path / "out"), str(tmp_path / "index"), config)
    exact = images.astype(np.float16).astype(np.float32) @ images[3]
    near = np.sort(np.abs(exact[np.argsort(exact)][1:] - exact[np.argsort(exact)][:-1]))
    assert near[-1] > 0.01
    wanted = {f"{int(row >= 400)}-{row - 400 * (row >= 400)}" for row in np.flatnonzero(exact >= 0.5)}
    assert 210 < len(wanted) < 900
    with Searcher(str(tmp_path / "index")) as searcher:
        done = filter_rows(searcher, Query(embedding=images[3], threshold=0.5), Store(str(tmp_path / "found")))
    files = sorted((tmp_path / "found/rows").iterdir())
    assert len(files) == -(-done.rows // 200)
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    unsure = {f"{int(row >= 400)}-{row - 400 * (row >= 400)}" for row in np.flatnonzero(np.abs(exact - 0.5) < 1e-3)}
    assert {row["key"] for row in rows} ^ wanted <= unsure
    assert [row["id"] for row in rows] == sorted({row["id"] for row in rows})
    assert min(row["score"] for row in rows) >= 0.5
    assert json.loads((tmp_path / "found/filter.json").read_text())["rows"] == done.rows == len(rows)


def test_the_command_copies_images_into_tars_that_plan_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = [corpus.jpeg(seed, 32) for seed in range(6)]
    corpus.write_tar(
        str(tmp_path / "0.tar"),
        [one for i, data in enumerate(pictures) for one in ((f"k{i}.jpg", data), (f"k{i}.txt", f"no. {i}".encode()))],
    )
    out, index, found = (str(tmp_path / name) for name in ("out", "index", "found"))
    assert main(["embed", "--input", str(tmp_path / "0.tar"), "--output", out, "--model", "fake:8"]) == 0
    assert main(["merge", "--output", out, "--index", index]) == 0
    capsys.readouterr()
    assert main(["filter", "--index", index, "--text", "no. 3", "-k", "4", "--output", found, "--images"]) == 0
    assert "4 rows, 4 images" in capsys.readouterr().out
    rows = pq.read_table(f"{found}/rows/00000.parquet").to_pylist()
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    with tarfile.open(f"{found}/images/00000.tar") as tar:
        names = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    for row in rows:
        assert names[f"{row['id']:012d}.jpg"] == pictures[int(row["key"][1:])]
        assert json.loads(names[f"{row['id']:012d}.json"])["caption"] == row["caption"]
    again = str(tmp_path / "again")
    assert main(["embed", "--input", f"{found}/images/*.tar", "--output", again, "--model", "fake:8"]) == 0
    assert "4 samples embedded" in capsys.readouterr().out
    assert expand_inputs([f"{found}/images/*.tar"], "tar", {}).shards
    (tmp_path / "0.tar").unlink()
    assert main(["filter", "--index", index, "--text", "no. 3", "-k", "4", "--output", found, "--images"]) == 0
    assert "4 images could not be read from a planned file" in capsys.readouterr().out
    assert main(["filter", "--index", index, "--text", "x", "--threshold", "2", "--output", found]) == 0
    assert "0 rows" in capsys.readouterr().out
    assert not (tmp_path / "found/rows").exists()
    assert main(["filter", "--index", index, "--output", found]) == 2


def test_a_killed_filter_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts = clustered(100, 8, 4)
    make_out(tmp_path / "out", images, texts, [100])
    merge(str(tmp_path / "out"), str(tmp_path / "index"), CONFIG)
    monkeypatch.setattr(filters, "GROUP", 10)
    with Searcher(str(tmp_path / "index")) as searcher:
        real, calls = searcher.table, io.StringIO()

        def table(ids: object) -> object:
            calls.write("x")
            if len(calls.getvalue()) > 5:
                raise KeyboardInterrupt
            return real(ids)  # type: ignore[arg-type]

        searcher.table = table  # type: ignore[assignment]
        with pytest.raises(KeyboardInterrupt):
            filter_rows(searcher, Query(embedding=images[0], k=100), Store(str(tmp_path / "found")))
    assert [path for path in (tmp_path / "found").rglob("*") if path.is_file()] == []


def test_a_folder_with_files_of_others_is_left_alone(tmp_path: Path) -> None:
    images, texts = clustered(20, 8, 4)
    make_out(tmp_path / "out", images, texts, [20])
    merge(str(tmp_path / "out"), str(tmp_path / "index"), CONFIG)
    (tmp_path / "mine/images").mkdir(parents=True)
    (tmp_path / "mine/images/cat.jpg").write_bytes(b"a cat")
    query, mine = Query(embedding=images[0], k=2), Store(str(tmp_path / "mine"))
    with Searcher(str(tmp_path / "index")) as searcher:
        with pytest.raises(ConfigError, match=r"no result of a filter \(images\): name another output"):
            filter_rows(searcher, query, mine)
        assert (tmp_path / "mine/images/cat.jpg").read_bytes() == b"a cat"
        for _ in range(2):  # a result of its own is replaced
            assert filter_rows(searcher, query, Store(str(tmp_path / "found"))).rows == 2


@pytest.mark.parametrize("origin", ["path", "url"])
def test_images_of_a_clip_retrieval_index_are_copied_by_path_or_url(
    tmp_path: Path, origin: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import faiss

    monkeypatch.setattr(filters, "_PRIVATE", True)  # the web server of this test has a private address
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    theirs = tmp_path / "theirs"
    (theirs / "metadata").mkdir(parents=True)
    images, _ = clustered(6, 8, 2)
    index = faiss.IndexFlatIP(8)
    index.add(images)
    faiss.write_index(index, str(theirs / "image.index"))
    (tmp_path / "secret.jpg").write_text("not a picture")
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(corpus.jpeg(number))
    with web() as server:
        paths = [*(f"{tmp_path}/{number}.jpg" for number in range(3)), f"{tmp_path}/gone.jpg", f"{tmp_path}/secret.jpg"]
        urls = [*(f"{server.url}/good/{number}.jpg" for number in range(3)), f"{server.url}/missing.jpg", "file:///x"]
        table = pa.table({"image_path": [*paths, None], "url": [*urls, None], "caption": list("abcdef")})
        pq.write_table(table, theirs / "metadata" / "metadata_0.parquet")
        words = ["filter", "--index", str(theirs), "--id", "0", "-k", "6", "--images", "--output", f"{tmp_path}/found"]
        assert main([*words, "--images-from", origin]) == 0
        assert "6 rows, 3 images" in (told := capsys.readouterr().out)
        assert f"3 images could not be read from {'an image_path' if origin == 'path' else 'a url'}" in told
        with tarfile.open(tmp_path / "found/images/00000.tar") as tar:
            assert sorted(tar.getnames())[:3] == [f"{0:012d}.jpg", f"{0:012d}.json", f"{0:012d}.txt"]
            member = tar.extractfile(f"{1:012d}.jpg")
            assert member is not None and member.read() == (corpus.jpeg(1) if origin == "path" else image(1))
        assert main(words) == 0
    assert "0 images" in capsys.readouterr().out, "unless it is asked for, no file that foreign data names is opened"


def test_pictures_of_another_query_stay(tmp_path: Path) -> None:
    images, texts = clustered(200, 16, 4)
    make_out(tmp_path / "out", images, texts, [200])
    merge(str(tmp_path / "out"), str(tmp_path / "index"), CONFIG)
    store = Store(str(tmp_path / "found"))
    first, other = (Query(embedding=images[row], k=5) for row in (3, 4))
    with Searcher(str(tmp_path / "index")) as searcher:
        filter_rows(searcher, other, store)
        filter_rows(searcher, first, store)  # no pictures are lost
        about = tmp_path / "found/filter.json"
        about.write_text(json.dumps({**json.loads(about.read_text()), "images": 3}))
        with pytest.raises(ConfigError, match="3 pictures of another query"):
            filter_rows(searcher, other, store)
        assert json.loads(about.read_text())["images"] == 3
        assert filter_rows(searcher, first, store).rows == 5
