from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_batch.index.ann.recall import TOP
from clip_batch.index.ann.rerank import MOST, PAIRS, candidates, rerank
from clip_batch.storage.npy import unit
from tests.fabricated import clustered


@settings(max_examples=50)
@given(
    rows=st.integers(1, 60), queries=st.integers(1, 5), found=st.integers(1, 40), k=st.integers(1, 50),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_best_by_exact_score_then_by_id(rows: int, queries: int, found: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((rows, 8)).astype(np.float16)
    vectors[rng.integers(rows, size=rows // 2)] = vectors[0]  # ties
    asked = unit(rng.standard_normal((queries, 8)).astype(np.float16))
    ids = np.full((queries, found), -1)
    for line in ids:
        some = rng.permutation(rows)[: rng.integers(0, found + 1)]
        line[: len(some)] = some
    scores, best = rerank(asked, ids, vectors, k)
    assert scores.dtype == np.float32 and best.dtype == np.int64 and best.shape == scores.shape == (queries, k)
    exact = unit(vectors).astype(np.float64)
    for query, line, values, there in zip(asked, best, scores, ids, strict=True):
        there = there[there >= 0]
        places = np.lexsort((there, -(exact[there] @ query).round(5)))[:k]
        np.testing.assert_array_equal(line[: len(places)], there[places])
        np.testing.assert_allclose(values[: len(places)], exact[there[places]] @ query, atol=1e-6)
        assert (line[len(places) :] == -1).all() and (values[len(places) :] == -np.inf).all()


def test_blocks_and_company_change_no_bit_and_a_mapped_file_will_do(tmp_path: Path) -> None:
    images, texts = clustered(3000, 32, 20)
    np.save(tmp_path / "a.npy", images.astype(np.float16))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    rng = np.random.default_rng(0)
    ids = np.stack([rng.choice(3000, 300, replace=False) for _ in range(40)])
    assert ids.size > 2 * PAIRS
    scores, best = rerank(texts[:40], ids, mapped, 10)
    for at in range(0, 40, 7):
        alone = rerank(texts[at : at + 1], ids[at : at + 1], mapped, 10)
        np.testing.assert_array_equal(alone[0][0], scores[at])
        np.testing.assert_array_equal(alone[1][0], best[at])


@given(k=st.integers(1, 200_000), factor=st.integers(1, 100))
def test_candidates_are_enough_and_bounded(k: int, factor: int) -> None:
    found = candidates(k, factor)
    assert found >= max(k, TOP + 1)
    assert found >= min(factor * k, MOST)
    assert found <= max(MOST, k)
