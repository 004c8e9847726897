from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_batch.embeddings import reader
from clip_batch.index.ann import clusters, faiss_index
from clip_batch.index.merge import duplicate_report, duplicates
from clip_batch.index.merge.duplicates import Duplicates, find
from clip_batch.storage.store import Store
from tests.fabricated import Vectors, bucket, make_out, unit


@pytest.fixture(autouse=True)
def one_thread() -> None:
    faiss_index.use_threads(1)


def crowded(rows: int, dim: int, seed: int, share: float = 0.5) -> Vectors:
    """Unit vectors of float16 precision, many of them near to, or equal to, an earlier one."""
    rng = np.random.default_rng(seed)
    made = unit(rng.standard_normal((rows, dim)))
    for row in range(1, rows):
        if rng.random() < share:
            step = rng.choice([0, 0.05, 0.2, 0.5])
            made[row] = unit((made[rng.integers(row)] + step * made[row])[None])[0]
    return made.astype(np.float16).astype(np.float32)


def one_list(block: Vectors) -> reader.Rows:
    return np.zeros((len(block), 1), dtype=np.int64)


def opened(folder: str | Path, images: Vectors, sizes: list[int], texts: Vectors | None = None) -> reader.Embeddings:
    plan = make_out(folder, images, images if texts is None else texts, sizes)
    return reader.open_embeddings(Store(str(folder)), plan)


def greedy(images: Vectors, lists: np.ndarray, threshold: float) -> tuple[list[int], list[int], list[float]]:
    """One row after another, in Python and float64: the plain meaning of what is looked for."""
    exact = images.astype(np.float64)
    norms = np.linalg.norm(exact, axis=1, keepdims=True)
    exact = np.divide(exact, norms, where=norms > 0, out=np.zeros_like(exact))
    rows: list[int] = []
    partners: list[int] = []
    scores: list[float] = []
    kept: list[int] = []
    for row in range(len(images)):
        if images[row].any():
            for earlier in kept:
                equal = np.array_equal(images[row], images[earlier])
                score = 1.0 if equal else float(exact[row] @ exact[earlier])
                if equal or (threshold < 1 and lists[row] == lists[earlier] and score >= threshold):
                    rows.append(row)
                    partners.append(earlier)
                    scores.append(score)
                    break
            else:
                kept.append(row)
    return rows, partners, scores


def same(found: Duplicates, wanted: tuple[list[int], list[int], list[float]]) -> None:
    assert found.rows.tolist() == wanted[0]
    assert found.kept.tolist() == wanted[1]
    np.testing.assert_allclose(found.score, wanted[2], atol=1e-6)
    assert (found.rows.dtype, found.kept.dtype, found.score.dtype) == (np.int64, np.int64, np.float32)


def cells(count: int, dim: int) -> tuple[Vectors, duplicates.Callable[[Vectors], reader.Rows]]:
    centroids = unit(np.random.default_rng(7).standard_normal((count, dim)))
    return centroids, clusters.some_nearest_of(centroids, 1)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(sum),
    count=st.integers(1, 4),
    threshold=st.sampled_from([0.8, 0.9, 0.99, 1.0]),
    budget=st.sampled_from([500, 2_000, 1 << 30]),
    seed=st.integers(0, 10_000),
)
def test_as_the_plain_greedy_way(sizes: list[int], count: int, threshold: float, budget: int, seed: int) -> None:
    images = crowded(sum(sizes), 16, seed)
    _, assign = cells(count, 16)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "TILE", 8)
        patch.setattr(duplicates, "BLOCK", 16)
        found = find(opened(folder, images, sizes), "image", assign, threshold, budget=budget)
    exact = unit(images)
    same(found, greedy(images, assign(exact)[:, 0], threshold))
    # what is left out repeats an earlier row that is itself kept
    assert not np.isin(found.kept, found.rows).any()
    assert (found.kept < found.rows).all()
    cosine = np.sum(exact[found.rows] * exact[found.kept], axis=1)
    assert (cosine >= threshold - 1e-5).all()


@settings(max_examples=15)
@given(
    cuts=st.lists(st.integers(0, 300), max_size=5),
    block=st.integers(10, 400),
    budget=st.integers(1_000, 1 << 14),
    seed=st.integers(0, 99),
)
def test_parts_blocks_and_memory_change_nothing(cuts: list[int], block: int, budget: int, seed: int) -> None:
    images = crowded(300, 8, seed)
    _, assign = cells(5, 8)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        whole = find(opened(f"{folder}/one", images, [300]), "image", assign, 0.95)
        patch.setattr(duplicates, "TILE", 32)
        patch.setattr(duplicates, "BLOCK", block)
        sizes = np.diff([0, *sorted(cuts), 300]).tolist()
        split = find(opened(f"{folder}/many", images, sizes), "image", assign, 0.95, budget=budget)
    assert len(whole.rows) > 50
    for field in ("rows", "kept", "score"):
        assert np.array_equal(getattr(whole, field), getattr(split, field)), field


def test_equal_rows_are_found_in_different_lists(tmp_path: Path) -> None:
    images = crowded(60, 16, 0, share=0)
    images[50:] = images[:10]
    scatter = iter(range(10_000))
    lines: list[str] = []

    def assign(block: Vectors) -> reader.Rows:
        return np.array([[next(scatter)] for _ in block])

    source = opened(tmp_path, images, [20, 40])
    found = find(source, "image", assign, 0.9, lines.append)
    assert found.rows.tolist() == list(range(50, 60)) and found.kept.tolist() == list(range(10))
    assert (found.score == 1).all()
    assert lines[0] == "10 rows equal an earlier one"
    assert lines[1].startswith("0 more")


def test_a_copy_of_what_is_left_out_repeats_what_is_kept(tmp_path: Path) -> None:
    images = crowded(3, 16, 0, share=0)
    images[1] = unit((images[0] + 0.1 * images[2])[None])[0].astype(np.float16)
    images[2] = images[1]
    found = find(opened(tmp_path, images, [3]), "image", one_list, 0.9)
    assert found.rows.tolist() == [1, 2] and found.kept.tolist() == [0, 0]
    assert found.score[0] == found.score[1] < 1


def test_no_false_match_where_hashes_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = crowded(20, 16, 0, share=0)

    class Same:
        def digest(self) -> bytes:
            return bytes(16)

    monkeypatch.setattr(duplicates.hashlib, "blake2b", lambda row, digest_size: Same())
    found = find(opened(tmp_path, images, [20]), "image", lambda block: np.arange(len(block))[:, None], 1.0)
    assert found.rows.tolist() == []


def test_captions_that_are_missing_repeat_nothing(tmp_path: Path) -> None:
    texts = crowded(30, 16, 3, share=0)
    images = crowded(30, 16, 4, share=0)
    texts[5:15] = 0
    texts[20] = texts[2]
    source = opened(tmp_path, images, [10, 20], texts)
    for threshold in (0.9, 1.0):
        found = find(source, "text", one_list, threshold)
        assert (found.rows.tolist(), found.kept.tolist()) == ([20], [2])


def test_report_names_both_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicate_report, "REPORT_ROWS", 7)
    images = crowded(90, 8, 5)
    source = opened(tmp_path / "out", images, [30, 0, 60])
    found = find(source, "image", one_list, 0.9)
    assert len(found.rows) > 20
    duplicate_report.write(found, source, 0.9, str(tmp_path / "report.parquet"))
    lines = pq.read_table(tmp_path / "report.parquet").to_pylist()
    assert len(lines) == len(found.rows)
    for line, row, kept, score in zip(lines, found.rows, found.kept, found.score, strict=True):
        for prefix, at in (("", row), ("kept_", kept)):
            partition, place = (0, at) if at < 30 else (2, at - 30)
            assert (line[f"{prefix}partition"], line[f"{prefix}row"]) == (partition, place)
            assert line[f"{prefix}key"] == f"{partition}-{place}"
            assert line[f"{prefix}shard"] == f"{bucket(tmp_path / 'out')}/{partition:05d}.tar"
        assert line["score"] == score


def test_report_of_nothing_has_its_columns(tmp_path: Path) -> None:
    source = opened(tmp_path / "out", crowded(9, 8, 5, share=0), [9])
    found = find(source, "image", one_list, 1.0)
    duplicate_report.write(found, source, 1.0, str(tmp_path / "report.parquet"))
    table = pq.read_table(tmp_path / "report.parquet")
    assert table.num_rows == 0
    names = [*duplicate_report.NAMES]
    assert table.column_names == [*names, *(f"kept_{name}" for name in names), "score", "kept_id", "group", "reason"]


@pytest.mark.parametrize(("visits", "least"), [(1, 0.85), (2, 0.999)])
def test_pairs_on_the_border_of_lists_are_found(tmp_path: Path, visits: int, least: float) -> None:
    rng = np.random.default_rng(1)
    first = unit(rng.standard_normal((1000, 32)))
    images = unit(np.concatenate([first, first + rng.standard_normal((1000, 32)) * 0.1 / 32**0.5]))
    images = images.astype(np.float16).astype(np.float32)
    centroids = clusters.train(images, 20)
    found = find(opened(tmp_path, images, [2000]), "image", clusters.some_nearest_of(centroids, visits), 0.98)
    assert least <= len(found.rows) / 1000 <= (0.99 if visits == 1 else 1)
    assert (found.kept == found.rows - 1000).all()


def pair_of_lists(block: Vectors) -> reader.Rows:
    """Lists by the sign of the first number; whoever is near the border is among the rows of both."""
    own = (block[:, 0] < 0).astype(np.int64)
    return np.stack([own, np.where(np.abs(block[:, 0]) < 0.3, 1 - own, -1)], axis=1)


def on_a_circle(degrees: list[float]) -> Vectors:
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16).astype(np.float32)


def test_the_ends_of_a_chain_are_kept(tmp_path: Path) -> None:
    images = on_a_circle([80, 88, 96, 104])  # each is like its neighbours alone, on both sides of the border
    found = find(opened(tmp_path, images, [4]), "image", pair_of_lists, np.cos(np.deg2rad(9)))
    assert (found.rows.tolist(), found.kept.tolist()) == ([1, 3], [0, 2])
    images = on_a_circle([88, 80, 96])  # the middle comes first
    found = find(opened(tmp_path / "other", images, [3]), "image", pair_of_lists, np.cos(np.deg2rad(9)))
    assert (found.rows.tolist(), found.kept.tolist()) == ([1, 2], [0, 0])


def test_a_row_whose_partner_another_list_leaves_out_is_compared_again(tmp_path: Path) -> None:
    # In the list of the last two, the third repeats the second alone, which repeats the first in the other list.
    images = on_a_circle([60, 68, 76, 77])
    lists = iter([[0, -1], [0, 1], [1, -1], [1, -1]])
    found = find(
        opened(tmp_path, images, [4]),
        "image",
        lambda block: np.array([next(lists) for _ in block]),
        np.cos(np.deg2rad(9)),
    )
    assert (found.rows.tolist(), found.kept.tolist()) == ([1, 3], [0, 2])


@settings(max_examples=60)
@given(
    count=st.integers(2, 60),
    lists=st.integers(1, 5),
    threshold=st.sampled_from([0.8, 0.9, 0.97]),
    budget=st.sampled_from([300, 1 << 30]),
    seed=st.integers(0, 10_000),
)
def test_what_is_kept_is_apart_and_what_is_left_out_is_near(
    count: int, lists: int, threshold: float, budget: int, seed: int
) -> None:
    images, rng = crowded(count, 4, seed), np.random.default_rng(seed)
    of_rows = np.stack([rng.integers(lists, size=count), rng.integers(-1, lists, size=count)], axis=1)
    of_rows[of_rows[:, 0] == of_rows[:, 1], 1] = -1
    with tempfile.TemporaryDirectory() as folder:
        found = find(opened(folder, images, [count]), "image", lambda block: of_rows, threshold, budget=budget)
    exact = unit(images.astype(np.float64))
    kept = np.setdiff1d(np.arange(count), found.rows)
    assert np.isin(found.kept, kept).all()
    cosines = exact @ exact.T
    assert (cosines[found.rows, found.kept] >= threshold - 1e-6).all()
    in_common = [[bool({*of_rows[a]} & {*of_rows[b]} - {-1}) for b in kept] for a in kept]
    close = (cosines[np.ix_(kept, kept)] >= threshold + 1e-6) & np.array(in_common)
    assert not (close & ~np.eye(len(kept), dtype=bool)).any()
