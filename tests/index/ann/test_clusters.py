from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_batch.index.ann import clusters, faiss_search, gpu
from clip_batch.index.ann.libfaiss import load
from tests.fabricated import clustered, unit


def mean_cosine(centroids: np.ndarray, vectors: np.ndarray, ids: np.ndarray) -> float:
    return float(np.einsum("nd,nd->n", centroids[ids], vectors).mean())


@settings(max_examples=20)
@given(groups=st.lists(st.integers(0, 50), min_size=1, max_size=12), more=st.integers(0, 100))
def test_shares_are_in_proportion_and_none_is_more_than_a_group_has(groups: list[int], more: int) -> None:
    sizes = np.array(groups)
    if not sizes.sum():
        return
    count = min(int((sizes > 0).sum()) + more, int(sizes.sum()))
    shares = clusters._shares(sizes, count)
    assert sum(shares) == count
    assert all(1 <= share <= size if size else share == 0 for share, size in zip(shares, groups, strict=True))


def test_centroids_of_groups_are_nearly_as_good_as_those_of_one_k_means() -> None:
    vectors, _ = clustered(20_000, 32, 100, spread=2.0)
    whole = clusters._kmeans(vectors, 512, 0)
    grouped = clusters.train(vectors, 512)
    assert grouped.shape == (512, 32)
    np.testing.assert_allclose(np.linalg.norm(grouped, axis=1), 1, atol=1e-5)
    best = faiss_search.nearest(vectors, whole, 1)[0].mean()
    assert faiss_search.nearest(vectors, grouped, 1)[0].mean() > 0.98 * best
    np.testing.assert_array_equal(grouped, clusters.train(vectors, 512), "the seed decides all")


def test_as_many_centroids_as_vectors_and_vectors_that_are_equal() -> None:
    vectors, _ = clustered(600, 16, 600)
    assert np.isfinite(clusters.train(vectors, 600)).all()
    equal = np.repeat(vectors[:2], 400, axis=0)
    centroids = clusters.train(equal, 300)
    assert centroids.shape == (300, 16)
    assert np.isfinite(centroids).all()


@pytest.mark.parametrize("count", [100, 2000])
def test_the_nearest_centroid_is_found_nearly_always(count: int) -> None:
    """Of 100 all are compared, of 2,000 those of the nearest groups; both in the dimensions that tell them apart."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((64, 12)))[0].T
    vectors = unit(rng.standard_normal((30_000, 12)) @ basis + 0.02 * rng.standard_normal((30_000, 64)) + 0.3)
    centroids = clusters.train(vectors, count)
    axes = clusters.axes_of(centroids)
    assert axes is not None
    assert axes.shape[1] < 20
    found = clusters.nearest_of(centroids)(vectors)
    scores, exact = faiss_search.nearest(vectors, centroids, 1)
    assert np.mean(found == exact[:, 0]) > 0.8
    assert mean_cosine(centroids, vectors, found) > scores.mean() - 0.005


def test_where_all_dimensions_matter_none_is_left_out() -> None:
    centroids = unit(np.random.default_rng(0).standard_normal((200, 16)))
    assert clusters.axes_of(centroids) is None
    found = clusters.nearest_of(centroids)(centroids)
    np.testing.assert_array_equal(found, np.arange(200))


def test_a_gpu_trains_and_assigns(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the call: faiss's own functions for GPUs are replaced by the CPU's, which must be asked."""
    faiss, asked = load(), []

    class Kmeans(faiss.Kmeans):  # type: ignore[misc, name-defined]
        def __init__(self, *arguments: Any, gpu: bool, **options: Any) -> None:
            asked.append(gpu)
            super().__init__(*arguments, **options)

    def to_gpus(index: Any) -> Any:
        asked.append("moved")
        return index

    vectors, _ = clustered(8000, 16, 50)
    expected = clusters.nearest_of(clusters.train(vectors, 1500))(vectors)
    monkeypatch.setattr(faiss, "Kmeans", Kmeans)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", to_gpus)
    assert gpu.count() == 2
    found = clusters.nearest_of(clusters.train(vectors, 1500))(vectors)
    assert {True, "moved"} == set(asked)
    assert asked[-1] == "moved", "a GPU compares with all centroids, however many"
    assert np.mean(found == expected) > 0.9
