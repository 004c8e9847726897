from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from clip_batch.errors import ConfigError, CorruptError
from clip_batch.index.ann import faiss_index, faiss_search, ondisk
from tests.fabricated import clustered

Arrays = tuple[np.ndarray, np.ndarray]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    faiss_index.use_threads(1)


def make_shards(folder: Path, key: str, vectors: np.ndarray, ends: list[int], skip: int = 0) -> list[tuple[str, int]]:
    """A template and shards of rows [ends[i], ends[i + 1]); every `skip`-th row has no vector."""
    faiss_index.write(faiss_index.train(key, vectors), str(folder / "template.index"))
    shards = []
    for number, (low, high) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        made = faiss_index.read(str(folder / "template.index"))
        ids = np.arange(high - low)
        ids = ids[ids % skip > 0] if skip else ids
        faiss_index.add(made, vectors[low:high][ids], ids)
        faiss_index.write(made, path := str(folder / f"{number}.index"))
        shards.append((path, low))
    return shards


def gather(shards: list[tuple[str, int]], queries: np.ndarray, k: int, effort: int) -> Arrays:
    """What a Searcher does: ask each shard, keep the best."""
    parts = []
    for path, offset in shards:
        scores, ids = faiss_search.search(faiss_index.read(path, mapped=True), queries, k, effort)
        parts.append((np.where(ids >= 0, scores, -np.inf), np.where(ids >= 0, ids + offset, -1)))
    scores, ids = (np.hstack([part[at] for part in parts]) for at in (0, 1))
    best = np.lexsort((ids, -scores), axis=-1)[:, :k]
    return np.take_along_axis(scores, best, 1), np.take_along_axis(ids, best, 1)


@pytest.mark.parametrize("key", ["IVF16,Flat", "IVF64_HNSW32,SQ8", "PCA16,IVF16,SQ8", "IVF16,PQ16x4", "IVF16,RaBitQ"])
@pytest.mark.parametrize("skip", [0, 5])
def test_the_joined_index_answers_as_its_shards_do(
    key: str, skip: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    vectors, queries = clustered(3000, 32, 30)
    (tmp_path / "made").mkdir()
    shards = make_shards(tmp_path / "made", key, vectors, [0, 1700, 1701, 1701, 3000], skip)
    ondisk.join(str(tmp_path / "made" / "template.index"), shards, str(tmp_path / "made" / "all.index"))
    (tmp_path / "made").rename(tmp_path / "moved")
    moved = [(path.replace("/made/", "/moved/"), offset) for path, offset in shards]
    for mapped in (True, False):
        whole = faiss_index.read(str(tmp_path / "moved" / "all.index"), mapped)
        assert whole.ntotal == sum(faiss_index.read(path).ntotal for path, _ in moved)
        for effort in (1, 4, 16):
            scores, ids = faiss_search.search(whole, queries[:100], 20, effort)
            wanted_scores, wanted = gather(moved, queries[:100], 20, effort)
            np.testing.assert_allclose(np.where(ids >= 0, scores, -np.inf), wanted_scores, atol=1e-6)
            assert np.mean(ids == wanted) > 0.99  # equal codes may change places
    removed = np.arange(0, 3000, 2)
    assert not np.isin(faiss_search.search(whole, queries[:50], 10, 16, removed)[1], removed).any()
    faiss_index.prepare_reconstruct(whole)
    vector = faiss_index.reconstruct(whole, 1702)
    assert vector is not None and vector @ vectors[1702] > 0.3
    assert faiss_index.reconstruct(whole, 3000) is None
    data = tmp_path / "moved" / "all.index.ivfdata"
    assert data.stat().st_blocks * 512 >= data.stat().st_size  # no holes
    assert str(tmp_path).encode() not in (tmp_path / "moved" / "all.index").read_bytes()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("Flat", "no inverted lists to join"),
        ("IVF4,PQ8x4fs", "fast-scan lists"),
        ("IVF4,RaBitQfs", "fast-scan lists"),
        ("IVF4,SQ8,RFlat", "IndexRefineFlat, which cannot be joined.*--rerank"),
    ],
)
def test_kinds_that_cannot_be_joined(key: str, message: str, tmp_path: Path) -> None:
    vectors, _ = clustered(400, 16, 5)
    shards = make_shards(tmp_path, key, vectors, [0, 200, 400])
    with pytest.raises(ConfigError, match=message):
        ondisk.join(str(tmp_path / "template.index"), shards, str(tmp_path / "all.index"))


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    vectors, _ = clustered(400, 16, 5)
    shards = make_shards(tmp_path, "IVF4,Flat", vectors, [0, 400])
    template, path = str(tmp_path / "template.index"), tmp_path / "all.index"
    ondisk.join(template, shards, str(path))
    data = path.with_name("all.index.ivfdata")
    data.write_bytes(data.read_bytes()[:-8])
    with pytest.raises(CorruptError, match=r"all\.index\.ivfdata does not belong to"):
        faiss_index.read(str(path), mapped=True)
    faiss_index.write(faiss_index.train("IVF8,Flat", vectors), template)
    with pytest.raises(CorruptError, match=r"0\.index is not of the template"):
        ondisk.join(template, shards, str(path))


MEASURED = """
import sys
from clip_batch.index.ann import faiss_index, ondisk
def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024
template, path, *shards = sys.argv[1:]
faiss_index.read(template)
before = anonymous()
ondisk.join(template, [(shard, 50_000 * at) for at, shard in enumerate(shards)], path)
print(anonymous() - before)
"""


@pytest.mark.slow
def test_joining_takes_no_memory_and_little_time(tmp_path: Path) -> None:
    """4096 lists of 8 shards: 400,000 rows of 264 bytes."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((50_000, 64)).astype(np.float32)
    template = faiss_index.train("IVF4096_HNSW32,Flat", vectors[:8192])
    faiss_index.write(template, str(tmp_path / "template.index"))
    faiss_index.add(template, vectors, np.arange(50_000))
    faiss_index.write(template, str(tmp_path / "0.index"))
    names = [str(tmp_path / name) for name in ("template.index", "all.index", *["0.index"] * 8)]
    start = time.monotonic()
    run = [sys.executable, "-c", MEASURED, *names]
    grown = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    seconds, size = time.monotonic() - start, (tmp_path / "all.index.ivfdata").stat().st_size
    assert size >= 400_000 * 264
    assert grown < size / 4
    assert seconds < 60
    print(f"{size:,} bytes joined in {seconds:.1f} s with {grown:,} more of anonymous memory")
