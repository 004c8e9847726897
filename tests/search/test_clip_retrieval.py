"""Reading folders of clip-retrieval and writing folders for it, checked with clip-retrieval where it is installed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_batch.config import MergeConfig, SearchConfig
from clip_batch.embeddings import reader
from clip_batch.embeddings.clip_retrieval import ClipRetrievalEmbeddings, is_folder, open_folder
from clip_batch.errors import ConfigError, CorruptError, EncoderError
from clip_batch.export.clip_retrieval import export_clip_retrieval
from clip_batch.index import removals
from clip_batch.index.ann import faiss_index, faiss_search, libfaiss
from clip_batch.index.ann.concatenate import concatenate
from clip_batch.index.ann.rows import Stacked
from clip_batch.index.merge.merge import merge
from clip_batch.index.metadata import MetadataFile
from clip_batch.search.clip_retrieval import is_index, open_index
from clip_batch.search.searcher import Searcher
from clip_batch.storage.store import Store
from clip_batch.types import EncoderSpec
from tests import ROOT
from tests.corpus import good_tar
from tests.fabricated import ENCODER, clustered, make_out

DIM = 16
SIZES = (300, 0, 120, 80)


def check_rows(source: reader.Embeddings, kinds: Sequence[str]) -> None:
    """Check every row of some kinds of vectors."""
    for kind in kinds:
        captionless = source.read_captionless(0, source.rows) if kind == "text" else None
        source.check_rows(kind, 0, source.read_vectors(kind, 0, source.rows), captionless)


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Write an embeddings folder like clip-retrieval's: eleven parts, unpadded numbers, types that differ by part."""
    images, texts = clustered(550, DIM, 8)
    for folder in ("img_emb", "text_emb", "metadata"):
        (tmp_path / "theirs" / folder).mkdir(parents=True)
    for part in range(11):
        rows = range(50 * part, 50 * part + 50)
        dtype = np.float32 if part == 3 else np.float16
        np.save(tmp_path / f"theirs/img_emb/img_emb_{part}.npy", images[rows].astype(dtype))
        np.save(tmp_path / f"theirs/text_emb/text_emb_{part}.npy", texts[rows].astype(np.float16))
        table = pa.table(
            {
                "image_path": [f"{row:09d}" for row in rows],
                "caption": [f"caption {row}" for row in rows],
                "url": [f"https://example.org/{row}.jpg" for row in rows],
                "width": pa.array([float(row) if row % 7 else None for row in rows]) if part % 2 else list(rows),
                "exif": pa.nulls(50) if part else [{"Make": "A"}] * 50,
                "length": [0.5] * 50,
                "partition": ["theirs"] * 50,
                "__index_level_0__": list(range(50)),
            }
        )
        pq.write_table(table, tmp_path / f"theirs/metadata/metadata_{part}.parquet")
    return tmp_path / "theirs"


def read(folder: Path) -> ClipRetrievalEmbeddings:
    return open_folder(Store(str(folder)), ENCODER)


def test_rows_are_in_the_order_of_the_numbers(theirs: Path) -> None:
    source = read(theirs)
    images, texts = clustered(550, DIM, 8)
    assert (source.rows, source.dim, source.verified) == (550, DIM, False)
    assert [commit.partition for commit in source.commits] == list(range(11))
    assert source.check_files(("image", "text")) == [50] * 11
    check_rows(source, ("image", "text"))
    for kind, wanted in (("image", images), ("text", texts)):
        assert np.array_equal(source.read_vectors(kind, 30, 530), wanted[30:530].astype(np.float16))
    rows, drawn = source.draw("image", [50] * 11, 200, seed=1)
    assert np.array_equal(drawn, images[rows].astype(np.float16))


def test_metadata_gets_one_schema(theirs: Path) -> None:
    table = pa.concat_tables(read(theirs).read_metadata(40, 210))
    assert table.schema.names[:5] == ["key", "shard", "offset", "length", "caption"]
    assert table.schema.names[-2:] == ["partition", "row"]
    assert "__index_level_0__" not in table.schema.names
    assert table.schema.field("width").type == pa.float64()
    first = table.slice(0, 1).to_pylist()[0]
    assert first == {
        "key": "000000040",
        "shard": str(theirs / "metadata/metadata_0.parquet"),
        "offset": None,
        "length": None,
        "caption": "caption 40",
        "image_path": "000000040",
        "url": "https://example.org/40.jpg",
        "width": 40.0,
        "exif": '{"Make": "A"}',
        "json_length": 0.5,
        "json_partition": "theirs",
        "partition": 0,
        "row": 40,
    }
    assert table["key"].to_pylist() == [f"{row:09d}" for row in range(40, 210)]
    assert table["width"].to_pylist()[16:18] == [None, 57.0]


@pytest.mark.parametrize("kind", ["img_emb", "text_emb"])
def test_one_modality_without_metadata(theirs: Path, kind: str) -> None:
    for folder in {"img_emb", "text_emb", "metadata"} - {kind}:
        shutil.rmtree(theirs / folder)
    source = read(theirs)
    modality = "image" if kind == "img_emb" else "text"
    assert source.check_files((modality,)) == [50] * 11
    check_rows(source, (modality,))
    table = pa.concat_tables(source.read_metadata(549, 550))
    shard = str(theirs / kind / f"{kind}_10.npy")
    assert table.to_pylist()[0] == {
        "key": "49", "shard": shard, "offset": None, "length": None, "caption": None, "partition": 10, "row": 49,
    }  # fmt: skip


def test_our_own_folder_without_its_commits_keeps_its_metadata(tmp_path: Path) -> None:
    images, texts = clustered(sum(SIZES), DIM, 8)
    texts[::7] = 0
    plan = make_out(tmp_path / "out", images, texts, SIZES)
    ours = reader.open_embeddings(Store(str(tmp_path / "out")), plan)
    shutil.copytree(tmp_path / "out", tmp_path / "copy", ignore=shutil.ignore_patterns("_clip_batch"))
    assert not is_folder(ours.store)
    assert is_folder(Store(str(tmp_path / "copy")))
    source = read(tmp_path / "copy")
    assert source.check_files(("image", "text")) == ours.check_files(("image", "text"))
    check_rows(source, ("image", "text"))
    wanted = pa.concat_tables(ours.read_metadata(0, ours.rows)).to_pylist()
    assert pa.concat_tables(source.read_metadata(0, ours.rows)).to_pylist() == wanted


def test_a_changed_file_changes_its_tag(theirs: Path) -> None:
    def tags() -> list[Any]:
        return [file["sha256"] for commit in read(theirs).commits for file in commit.files.values()]

    before = tags()
    assert tags() == before
    path = theirs / "img_emb/img_emb_4.npy"
    np.save(path, np.load(path)[::-1])
    assert sum(a != b for a, b in zip(tags(), before, strict=True)) == 1


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def shorten(path: Path) -> None:
    np.save(path, np.load(path)[:-1])


def widen(path: Path) -> None:
    for folder in ("img_emb", "text_emb"):
        np.save(path.parent.parent / folder / f"{folder}_4.npy", np.ones((50, 2 * DIM), dtype=np.float16))


def double(path: Path) -> None:
    np.save(path, np.load(path).astype(np.float64))


def lessen(path: Path) -> None:
    pq.write_table(pq.read_table(path).slice(1), path)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        (
            "img_emb/img_emb_4.npy",
            Path.unlink,
            r"_4.(npy|parquet) has no counterpart in img_emb",
        ),
        ("metadata/metadata_4.parquet", Path.unlink, r"img_emb_4.npy has no counterpart in metadata"),
        ("img_emb/img_emb_4.npy", cut, r"img_emb_4.npy has 1723 bytes, float16 \(50, 16\) takes 1728"),
        ("text_emb/text_emb_4.npy", shorten, r"text_emb_4.npy is \(49, 16\), img_emb/img_emb_4.npy is \(50, 16\)"),
        ("metadata/metadata_4.parquet", lessen, r"metadata_4.parquet has 49 rows, img_emb/img_emb_4.npy has 50"),
        ("metadata/metadata_4.parquet", cut, r"metadata_4.parquet is not readable Parquet"),
        ("img_emb/img_emb_4.npy", widen, r"img_emb_4.npy has 32 dimensions, img_emb/img_emb_0.npy has 16"),
        ("img_emb/img_emb_4.npy", double, r"img_emb_4.npy is float64 \(50, 16\), not float16 or float32"),
        ("img_emb/img_emb_4.npy", lambda p: p.write_bytes(b"no"), r"img_emb_4.npy is not a readable npy file"),
        ("img_emb/img_emb_4.npy", lambda p: p.rename(p.parent / "4.npy"), r"4.npy is not named img_emb_<number>.npy"),
        ("img_emb/img_emb_4.npy", lambda p: shutil.copy(p, p.parent / "img_emb_04.npy"), r"has the number of img_emb/"),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    theirs: Path, name: str, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(theirs / name)
    with pytest.raises(CorruptError, match=message) as error:
        read(theirs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("value", "norm"), [(np.nan, "nan"), (1e30, "inf"), (3.0, "3")])
def test_rows_that_are_not_unit_are_refused_by_name(theirs: Path, value: float, norm: str) -> None:
    path = theirs / "img_emb/img_emb_3.npy"
    rows = np.load(path)
    rows[7] = 0
    rows[7, 0] = value
    np.save(path, rows)
    with pytest.raises(CorruptError, match=rf"img_emb_3.npy: row 7 has norm {norm}, not 1: write that file again"):
        check_rows(read(theirs), ("image",))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata").mkdir()
    with pytest.raises(CorruptError, match="nothing to merge"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("key", "exact"),
    [
        ("Flat", True),
        ("HNSW16", True),
        ("IVF16,Flat", True),
        ("IVF16_HNSW8,SQ8", True),
        ("L2norm,IVF16,PQ4x4", True),
        ("IVF16,RaBitQ", True),
        ("L2norm,IVF16,PQ4x4,RFlat", False),
        ("IVF16,PQ4x4fs,RFlat", False),
    ],
)
@pytest.mark.parametrize("gone", [[], [3, 299, 300, 601]])
def test_one_index_of_many_finds_what_they_find(
    tmp_path: Path, key: str, exact: bool, gone: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    images, queries = clustered(900, DIM, 8)
    template = faiss_index.train(key, images)
    faiss_index.write(template, str(tmp_path / "template"))
    parts, present = [], np.arange(900) % 300 >= 2  # as texts without a caption
    for shard in range(3):
        made = faiss_index.with_ids(faiss_index.read(str(tmp_path / "template")))
        rows = np.flatnonzero(present[300 * shard : 300 * (shard + 1)])
        faiss_index.add(made, images[300 * shard + rows], rows)
        faiss_index.write(made, str(tmp_path / f"{shard}"))
        parts.append((faiss_index.read(str(tmp_path / f"{shard}"), mapped=True), 300 * shard))
    removed = np.array(gone, dtype=np.int64)
    effort = 512 if key.startswith("HNSW") else 16
    scores, ids = zip(*(faiss_search.search(part, queries[:50], 20, effort, removed[removed // 300 == i] - offset)
                        for i, (part, offset) in enumerate(parts)), strict=True)  # fmt: skip
    scores, ids = np.hstack(scores), np.hstack([one + 300 * i for i, one in enumerate(ids)])
    best = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    wanted = np.take_along_axis(ids, best, 1)
    concatenate(parts, removed, effort, str(tmp_path / "whole"))
    whole = faiss_index.read(str(tmp_path / "whole"))
    assert capfd.readouterr() == ("", ""), "faiss warns by itself"
    assert whole.ntotal == present.sum() - len(removed[present[removed]])
    found = faiss_search.search(whole, queries[:50], 10)[1]  # with the effort of the file
    assert np.mean(found == wanted) > (0.999 if exact else 0.9)
    everything = faiss_search.search(whole, queries[:1], 900, 900)[1]
    assert not np.isin(everything, removed).any()
    for row in (2, 302, 899):
        faiss_index.prepare_reconstruct(whole)
        assert faiss_index.reconstruct(whole, row) is not None


def test_fast_scan_codes_are_refused_by_name(tmp_path: Path) -> None:
    images, _ = clustered(900, DIM, 8)
    made = faiss_index.train("IVF16,PQ4x4fs", images)
    faiss_index.add(made, images, np.arange(900))
    with pytest.raises(ConfigError, match="fast-scan codes without exact vectors cannot be exported"):
        concatenate([(made, 0)], np.empty(0, dtype=np.int64), 4, str(tmp_path / "whole"))
    assert not (tmp_path / "whole").exists()


def exported(parts: list[tuple[Any, int]], removed: Sequence[int], images: np.ndarray[Any, Any], path: str) -> Any:
    """The export of some parts, whose rows' exact vectors are `images`."""
    stored = Stacked([images[:300].astype(np.float16), images[300:].astype(np.float16)])
    concatenate(parts, np.array(removed, dtype=np.int64), 32, path, stored)
    return faiss_index.read(path)


@pytest.mark.parametrize("key", ["IVF32,PQ8x4fs", "RR16,IVF32,RaBitQfs", "PCAR12,IVF32,PQ6x4fs", "IVF32_HNSW8,PQ8x4fs"])
def test_fast_scan_codes_become_codes_of_8_bits_of_the_exact_vectors(tmp_path: Path, key: str) -> None:
    images, queries = clustered(900, DIM, 8)
    template = faiss_index.train(key, images)
    faiss_index.write(template, str(tmp_path / "template"))
    parts = []
    for shard in range(3):
        made = faiss_index.read(str(tmp_path / "template"))
        faiss_index.add(made, images[300 * shard + 2 : 300 * shard + 300], np.arange(2, 300))  # two without a caption
        parts.append((made, 300 * shard))
    removed = [3, 299, 601, 602]
    whole = exported(parts, removed, images, str(tmp_path / "whole"))
    assert isinstance(whole, libfaiss.load().IndexIVFScalarQuantizer)
    assert (whole.nprobe, whole.ntotal) == (32, 900 - 6 - 3)  # row 601 has no caption
    there = np.setdiff1d(np.arange(900), [0, 1, 300, 301, 600, 601, *removed])
    faiss_index.prepare_reconstruct(whole)
    again = np.stack([faiss_index.reconstruct(whole, int(row)) for row in there])
    assert np.abs(again - images[there]).max() < 0.02
    wanted = there[faiss_search.nearest(queries[:50], images[there], 10)[1]]
    found = faiss_search.search(whole, queries[:50], 10)[1]
    assert np.mean([np.isin(one, two).mean() for one, two in zip(found, wanted, strict=True)]) > 0.95
    for part, offset in parts:  # a row is in the list of its own part, and there alone
        theirs = libfaiss.load().extract_index_ivf(part).invlists
        for number in range(32):
            ids = libfaiss.load().rev_swig_ptr(theirs.get_ids(number), theirs.list_size(number)) + offset
            ours = libfaiss.load().rev_swig_ptr(whole.invlists.get_ids(number), whole.invlists.list_size(number))
            assert set(ids) - set(removed) == {id for id in ours if offset <= id < offset + 300}


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """An index of three shards, in which some rows have no caption and some are removed."""
    images, texts = clustered(sum(SIZES), DIM, 8)
    texts[::7] = 0
    make_out(tmp_path / "out", images, texts, SIZES)
    merge(str(tmp_path / "out"), str(tmp_path / "index"), MergeConfig(shard_rows=200, queries=20))
    removals.add(Store(str(tmp_path / "index")), "key", ["0-5", "3-70", "2-1"])
    return tmp_path / "index"


def test_an_export_has_the_rows_and_vectors_of_the_index(ours: Path, tmp_path: Path) -> None:
    told: list[str] = []
    export_clip_retrieval(str(ours), str(tmp_path / "export"), progress=told.append)
    assert "clip-retrieval back --indices_paths" in told[-1]
    files = sorted((tmp_path / "export/metadata").iterdir())
    rows = pa.concat_tables(pq.read_table(file) for file in files).to_pylist()
    queries = clustered(sum(SIZES), DIM, 8)[1][:30]
    with Searcher(str(ours)) as searcher:
        assert len(files) == len(searcher.manifest.shards) == 3
        gone = set(searcher.removed.tolist())
        assert len(gone) == 3
        for id, row in enumerate(rows):
            if id in gone:
                assert row == {**dict.fromkeys(row), "image_path": ""}
            else:
                kept = searcher.metadata([id])[0]
                assert row == {**kept, "image_path": kept["key"]}
        for modality in ("image", "text"):
            scores, ids = searcher.search_ids(queries, 10, modality)
            found = faiss_search.search(faiss_index.read(str(tmp_path / f"export/{modality}.index")), queries, 10)
            assert np.array_equal(found[1], ids)
            assert np.allclose(found[0], scores, atol=1e-6)
    with pytest.raises(ConfigError, match="exists already"):
        export_clip_retrieval(str(ours), str(tmp_path / "export"))
    with pytest.raises(ConfigError, match="is remote"):
        export_clip_retrieval(str(ours), "s3://bucket/export")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """An index of three shards with the codes of an index of more than `flat_rows` rows, some of them removed."""
    images, texts = clustered(3000, DIM, 60)
    texts[::7] = 0
    make_out(tmp_path / "out", images, texts, (1800, 1200))
    config = MergeConfig(shard_rows=1000, queries=50, flat_rows=1000)
    manifest = merge(str(tmp_path / "out"), str(tmp_path / "index"), config)
    assert manifest.rerank >= 2
    assert all(key.endswith("x4fs") for key in manifest.key.values())
    removals.add(Store(str(tmp_path / "index")), "key", ["0-5", "1-70", "0-1"])
    return tmp_path / "index"


def test_the_index_that_a_large_out_gets_is_exported(large: Path, tmp_path: Path) -> None:
    export_clip_retrieval(str(large), str(tmp_path / "export"))
    queries = clustered(3000, DIM, 60)[0][:100]
    with Searcher(str(large)) as searcher:
        for modality in ("image", "text"):
            whole = faiss_index.read(str(tmp_path / f"export/{modality}.index"))
            assert whole.nprobe == searcher.manifest.effort[modality]
            there = searcher.stored[modality][np.setdiff1d(np.arange(3000), searcher.removed)].any(axis=1)
            assert whole.ntotal == np.count_nonzero(there)
            wanted, found = searcher.search_ids(queries, 10, modality)[1], faiss_search.search(whole, queries, 10)[1]
            same = [np.isin(one, two).mean() for one, two in zip(found, wanted, strict=True)]
            assert np.mean(same) > 0.9
            assert not np.isin(found, searcher.removed).any()


def test_an_index_on_disk_is_exported_as_one_file(tmp_path: Path) -> None:
    images, texts = clustered(sum(SIZES), DIM, 8)
    make_out(tmp_path / "out", images, texts, SIZES)
    config = MergeConfig(shard_rows=200, queries=20, index_key="IVF8,Flat", layout="single")
    merge(str(tmp_path / "out"), str(tmp_path / "index"), config)
    export_clip_retrieval(str(tmp_path / "index"), str(tmp_path / "export"))
    shutil.rmtree(tmp_path / "out")
    with Searcher(str(tmp_path / "index")) as searcher:
        wanted = searcher.search_ids(texts[:30], 10)[1]
    shutil.rmtree(tmp_path / "index")
    whole = faiss_index.read(str(tmp_path / "export/image.index"))
    assert np.array_equal(faiss_search.search(whole, texts[:30], 10)[1], wanted)


@pytest.fixture
def their_index(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write an index folder like clip-retrieval's, with rows in the order of the files' names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(theirs / "metadata", tmp_path / "their_index/metadata")
    for kind in ("img", "text"):
        reader = np.concatenate([np.load(file) for file in sorted((theirs / f"{kind}_emb").iterdir())])
        made = faiss_index.train("HNSW15", reader.astype(np.float32))
        faiss_index.add(made, reader.astype(np.float32), np.arange(len(reader)))
        faiss_index.write(made, str(tmp_path / f"their_index/{'image' if kind == 'img' else kind}.index"))
    (tmp_path / "their_index/image.json").write_text('{"index_key": "HNSW15", "nb vectors": 550}')
    return tmp_path / "their_index"


def test_their_index_reads_as_one_shard(their_index: Path, tmp_path: Path) -> None:
    store = Store(str(their_index))
    assert is_index(store)
    opened = open_index(store, "fake:16")
    manifest = opened.manifest
    assert (manifest.rows, manifest.dim, len(manifest.shards)) == (550, DIM, 1)
    assert manifest.key == {"image": "HNSW15", "text": "unknown"}
    assert manifest.effort == {"image": None, "text": None}
    assert manifest.encoder == EncoderSpec("fake:16", "", "")
    assert open_index(store).manifest.encoder.pretrained == "openai"
    table = MetadataFile(opened.files[f"{manifest.version}/metadata/0000.arrow"])
    parts = [0, 1, 10, *range(2, 10)]
    assert table.take(range(550), ["key"])["key"].to_pylist() == [f"{50 * p + i:09d}" for p in parts for i in range(50)]
    assert table.take([149], ["partition", "row"]).to_pylist() == [{"partition": 10, "row": 49}]
    images = clustered(550, DIM, 8)[0]
    made = faiss_index.read(opened.files[f"{manifest.version}/image/0000.index"], mapped=True)
    ids = faiss_search.search(made, images, 1, manifest.effort["image"])[1][:, 0]
    keys = table.take(ids, ["key"])["key"].to_pylist()
    assert np.mean([int(key) == row for row, key in enumerate(keys)]) > 0.99
    with Searcher(str(their_index), config=SearchConfig(model="fake:16")) as searcher:
        ((hit, *others),) = searcher.search(images[7], 5)
        assert (hit.metadata["key"], hit.metadata["caption"], len(others)) == ("000000007", "caption 7", 4)
        assert searcher.search(searcher.encode_text(["a cat"]), 3, "text")[0][2].score <= 1
        assert np.allclose(searcher.reconstruct([hit.id])[0], images[7], atol=1e-3)


def test_their_metadata_is_converted_once_for_each_state(their_index: Path, tmp_path: Path) -> None:
    def converted() -> tuple[str, int]:
        open_index(Store(str(their_index)))
        (file,) = (tmp_path / "cache/clip_batch/clip-retrieval").iterdir()
        return file.name, file.stat().st_mtime_ns

    before = converted()
    assert converted() == before
    shutil.copy(their_index / "metadata/metadata_3.parquet", their_index / "metadata/metadata_4.parquet")
    assert converted()[0] != before[0]


def test_what_is_wrong_in_their_index_is_refused_by_name(their_index: Path) -> None:
    store = Store(str(their_index))
    (their_index / "metadata/metadata_4.parquet").unlink()
    with pytest.raises(CorruptError, match=r"image.index has 550 rows, .*metadata has 500"):
        open_index(store)
    shutil.rmtree(their_index / "metadata")
    with pytest.raises(ConfigError, match="metadata has no Parquet files"):
        open_index(store)
    (their_index / "text.index").unlink()
    (their_index / "text.index").mkdir()
    (their_index / "text.index/populated.index").touch()
    with pytest.raises(ConfigError, match=r"text.index is a folder"):
        open_index(store)
    assert not is_index(Store(str(their_index / "nowhere")))


def test_merge_reads_a_folder_without_commits(theirs: Path, tmp_path: Path) -> None:
    config = MergeConfig(shard_rows=200, queries=20, made_by=["fake:16"])
    manifest = merge(str(theirs), str(tmp_path / "index"), config)
    assert [source.verified for source in manifest.sources] == [False]
    assert (manifest.rows, len(manifest.shards), manifest.encoder.model) == (550, 3, "fake:16")
    images, texts = clustered(550, DIM, 8)
    with Searcher(str(tmp_path / "index")) as searcher:
        for modality, queries in (("image", images), ("text", texts)):
            hits = [hit for (hit,) in searcher.search(queries, 1, modality)]
            assert [hit.metadata["key"] for hit in hits] == [f"{row:09d}" for row in range(550)]


def test_what_is_added_is_of_the_encoder_that_was_named(theirs: Path, tmp_path: Path) -> None:
    faiss_index, later = str(tmp_path / "index"), shutil.copytree(theirs, str(tmp_path / "later"))
    for name in ("img_emb/img_emb_0.npy", "text_emb/text_emb_0.npy", "metadata/metadata_0.parquet"):
        (theirs / name).unlink()
    merge(str(theirs), faiss_index, MergeConfig(queries=20, made_by=["fake:16", "one"]))
    with pytest.raises(ConfigError, match="encoder fake:16 two"):
        merge(later, faiss_index, MergeConfig(queries=20, add=True, made_by=["fake:16", "two"]))
    again = merge(later, faiss_index, MergeConfig(queries=20, add=True, made_by=["fake:16", "one"]))
    assert (again.base != "", again.rows) == (True, 550)  # the copy has one part besides


@pytest.mark.slow
def test_the_encoder_of_what_clip_retrieval_made_can_be_named_later(theirs: Path, tmp_path: Path) -> None:
    faiss_index = str(tmp_path / "index")
    merge(str(theirs), faiss_index, MergeConfig(queries=20, made_by=["of-another-time"]))
    with Searcher(faiss_index) as searcher, pytest.raises(EncoderError):
        searcher.encode_text(["a"])
    with Searcher(faiss_index, config=SearchConfig(model="fake:16")) as searcher:
        assert searcher.encode_text(["a"]).shape == (1, 16)


@pytest.fixture(scope="session")
def clip_retrieval() -> str:
    """The interpreter of the environment that `make clip-retrieval` creates."""
    python = os.environ.get("CLIP_RETRIEVAL_PYTHON") or str(ROOT / ".clip-retrieval/bin/python")
    if not Path(python).exists():
        pytest.skip("no clip-retrieval: name its interpreter in CLIP_RETRIEVAL_PYTHON, or make clip-retrieval")
    return python


@pytest.mark.slow
def test_an_index_of_clip_retrieval_itself(
    clip_retrieval: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images, texts = clustered(2000, DIM, 20)
    make_out(tmp_path / "out", images, texts, [180] * 11 + [20])
    command = [
        str(Path(clip_retrieval).parent / "clip-retrieval"),
        "index",
        str(tmp_path / "out"),
        str(tmp_path / "at"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    opened = open_index(Store(str(tmp_path / "at")))
    manifest = opened.manifest
    assert manifest.rows == 2000
    assert set(manifest.key) == {"image", "text"}
    assert "unknown" not in manifest.key.values()
    table = MetadataFile(opened.files[f"{manifest.version}/metadata/0000.arrow"])
    for modality, queries in (("image", images), ("text", texts)):
        made = faiss_index.read(opened.files[f"{manifest.version}/{modality}/0000.index"], mapped=True)
        ids = faiss_search.search(made, queries, 1, manifest.effort[modality])[1][:, 0]
        keys = table.take(ids, ["key"])["key"].to_pylist()
        assert keys == [f"{part}-{row}" for part in range(12) for row in range(180 if part < 11 else 20)]


TINY = """
import json, sys, open_clip, torch
from pathlib import Path
image = {"image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 16}
text = {"layers": 1, "width": 64, "heads": 1, "context_length": 77, "vocab_size": 49408}
Path("tiny.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": image, "text_cfg": text}))
open_clip.add_model_config("tiny.json")
torch.save(open_clip.create_model("tiny").state_dict(), "tiny.pt")
"""
"""Replaces the model by a small random one. clip-retrieval's commands then run as from its command line."""

BACK = f"""{TINY}
from clip_retrieval.clip_back import clip_back
clip_back(indices_paths=sys.argv[1], port=int(sys.argv[2]), clip_model="open_clip:tiny/tiny.pt")
"""

INFERENCE = f"""{TINY}
from clip_retrieval.clip_inference.main import main
main(sys.argv[1], sys.argv[2], input_format="webdataset", enable_metadata=True, output_partition_count=1,
     num_prepro_workers=1, batch_size=16, clip_model="open_clip:tiny/tiny.pt")
"""


@pytest.mark.slow
def test_embeddings_of_clip_retrieval_itself(clip_retrieval: str, tmp_path: Path) -> None:
    for seed in range(2):
        good_tar(str(tmp_path / f"{seed:05d}.tar"), 30, seed)
    tars = str(tmp_path / "{00000..00001}.tar")
    command = [clip_retrieval, "-c", INFERENCE, tars, str(tmp_path / "theirs")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    manifest = merge(str(tmp_path / "theirs"), str(tmp_path / "index"), MergeConfig(queries=5, made_by=["fake:16"]))
    assert (manifest.rows, manifest.dim) == (60, DIM)
    with Searcher(str(tmp_path / "index")) as searcher:
        rows = searcher.metadata(range(60))
        assert sorted(row["key"] for row in rows) == sorted(
            f"{seed:03d}{i:06d}" for seed in range(2) for i in range(30)
        )
        for row in rows:
            assert row["caption"] == f"caption {row['number']} of tar {row['seed']}"
            assert row["key"] == row["image_path"] == f"{row['seed']:03d}{row['number']:06d}"
        path = tmp_path / "theirs/img_emb/img_emb_0.npy"
        hits = [hit for (hit,) in searcher.search(np.load(path), 1)]
        assert [hit.metadata["row"] for hit in hits] == list(range(60))


@contextlib.contextmanager
def served(clip_retrieval: str, index: Path, tmp_path: Path) -> Iterator[Callable[[str, dict[str, Any]], Any]]:
    """A function that asks clip-retrieval's service, which serves an export of an index."""
    export_clip_retrieval(str(index), str(tmp_path / "export"))
    (tmp_path / "run").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [clip_retrieval, "-c", BACK, str(tmp_path / "export/indices_paths.json"), str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path / "run", stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(400):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/indices-list", timeout=5).close()
                break
            assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.5)
        with urllib.request.urlopen(f"{url}/indices-list", timeout=30) as answer:
            assert json.load(answer) == ["export"]

        def ask(path: str, body: dict[str, Any]) -> Any:
            data = json.dumps({**body, "indice_name": "export"}).encode()
            with urllib.request.urlopen(f"{url}/{path}", data, timeout=30) as answer:
                return json.load(answer)

        yield ask
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_an_export_is_served_by_clip_retrieval_itself(clip_retrieval: str, ours: Path, tmp_path: Path) -> None:
    queries = clustered(sum(SIZES), DIM, 8)[1][:20]
    with Searcher(str(ours)) as searcher, served(clip_retrieval, ours, tmp_path) as ask:
        for modality in ("image", "text"):
            for query, hits in zip(queries, searcher.search(queries, 10, modality), strict=True):
                found = ask("knn-service", {"embedding_input": query.tolist(), "modality": modality, "num_images": 10})
                assert [hit["id"] for hit in found] == [hit.id for hit in hits]
                assert [hit["caption"] for hit in found] == [hit.metadata["caption"] for hit in hits]
                assert [hit["image_path"] for hit in found] == [hit.metadata["key"] for hit in hits]
                assert np.allclose([hit["similarity"] for hit in found], [hit.score for hit in hits], atol=1e-5)
        (empty,) = ask("metadata", {"ids": [int(searcher.removed[0])]})
        assert set(empty["metadata"].values()) == {None, ""}


@pytest.mark.slow
def test_the_index_of_a_large_out_is_served_by_clip_retrieval_itself(
    clip_retrieval: str, large: Path, tmp_path: Path
) -> None:
    with Searcher(str(large)) as searcher, served(clip_retrieval, large, tmp_path) as ask:
        rows, shares = np.setdiff1d(np.arange(0, 3000, 100), searcher.removed), []
        queries = searcher.reconstruct(rows)
        for row, query, hits in zip(rows, queries, searcher.search(queries, 10), strict=True):
            body = {"embedding_input": query.tolist(), "modality": "image", "num_images": 10}
            found = {hit["id"]: hit for hit in ask("knn-service", {**body, "deduplicate": True})}
            assert found[row]["similarity"] == pytest.approx(1, abs=0.01)
            same = [hit for hit in hits if hit.id in found]
            shares.append(len(same) / len(hits))
            for hit in same:
                assert found[hit.id]["similarity"] == pytest.approx(hit.score, abs=0.02)
                assert found[hit.id]["caption"] == hit.metadata["caption"]
        assert np.mean(shares) > 0.9
