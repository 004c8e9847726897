from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from clip_batch.index.ann import clusters, faiss_index, faiss_search, shared_lists
from clip_batch.index.ann.shared_lists import Probe
from tests.bench import probing
from tests.bench.probing import Probing
from tests.fabricated import clustered, unit

LISTS, DIM = 64, 24
Built = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Centroids, images, the list of each, and texts."""


def towers(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Image vectors, and text vectors of which half the dimensions mean other things than in the images."""
    images, texts = clustered(rows, DIM, 200, seed, spread=0.5)
    turned = texts.copy()
    turned[:, : DIM // 2] = texts[:, : DIM // 2][:, ::-1]
    return images, unit(turned + np.float32(0.2))


@pytest.fixture(scope="module")
def built() -> Built:
    images, texts = towers(8_000, 0)
    centroids = clusters.train(images, LISTS)
    return centroids, images, clusters.nearest_of(centroids)(images), texts


def choose(predictor: Probing, centroids: np.ndarray, queries: np.ndarray, effort: int) -> np.ndarray:
    near, lists = faiss_search.nearest(queries, centroids, probing.candidates(effort, LISTS))
    return probing.choose(predictor, queries, effort, lists, near)[0]


def share_found(chosen: np.ndarray, right: np.ndarray) -> float:
    """The share of the right lists (n, k) that are among the chosen (n, m)."""
    return float(np.mean([np.isin(some, visited).mean() for some, visited in zip(right, chosen, strict=True)]))


def test_what_is_learned_finds_more_than_the_nearest_centroids(
    built: Built,
) -> None:
    centroids, images, of_row, texts = built
    learned = probing.learn(centroids, texts[:4_000], of_row[faiss_search.nearest(texts[:4_000], images, 30)[1]])
    queries = texts[4_000:]
    right = of_row[faiss_search.nearest(queries, images, 10)[1]]
    chosen = choose(learned, centroids, queries, 4)
    visited = round((chosen >= 0).sum(axis=1).mean())
    nearest = faiss_search.nearest(queries, centroids, visited)[1]
    assert share_found(chosen, right) > share_found(nearest, right) + 0.05


def test_the_scale_is_that_of_the_shares() -> None:
    rng = np.random.default_rng(0)
    centroids, queries = unit(rng.standard_normal((LISTS, DIM))), unit(rng.standard_normal((400, DIM)))
    for scale in (probing.SCALES[1], probing.SCALES[5]):
        shares = np.exp(scale * queries @ centroids.T)
        lists = np.stack([rng.choice(LISTS, 30, p=share / share.sum()) for share in shares])
        assert probing.fit_scale(centroids, queries, lists).scale == pytest.approx(scale)


def test_learning_again_learns_the_same(built: Built) -> None:
    centroids, images, of_row, texts = built
    lists = of_row[faiss_search.nearest(texts[:600], images, 10)[1]]
    one, other = (probing.learn(centroids, texts[:600], lists, epochs=2, seed=3) for _ in range(2))
    assert one.weights is not None
    assert np.array_equal(one.weights, other.weights)  # type: ignore[arg-type]


def test_a_query_that_is_sure_visits_few_lists() -> None:
    lists = np.arange(16)[None].repeat(2, 0)
    scores = np.zeros((2, 16), np.float32)
    scores[0, 3] = 1
    chosen, near = probing.choose(Probing(20.0), np.zeros((2, DIM), np.float32), 4, lists, scores)
    assert chosen[0].tolist() == [3] + [-1] * 15
    assert near[0, 0] == 1
    assert chosen[1].tolist() == list(range(16))  # each has a share of 1/16


def test_a_list_is_visited_where_all_shares_are_below_the_least() -> None:
    chosen, _ = probing.choose(
        Probing(20.0), np.zeros((1, DIM), np.float32), 1, np.array([[7, 2]]), np.array([[0.1, 0.2]], np.float32)
    )
    assert chosen.tolist() == [[2]]


@pytest.mark.parametrize("learned", [False, True])
def test_more_effort_visits_more_and_loses_nothing(built: Built, learned: bool) -> None:
    centroids, _, _, texts = built
    weights = np.hstack([12 * centroids, np.linspace(0, 1, LISTS, dtype=np.float32)[:, None]]) if learned else None
    visits = [choose(Probing(12.0, weights), centroids, texts[:50], effort) for effort in (16, 20, 24, 28)]
    for few, many in pairwise(visits):
        assert all(set(some) <= set(more) | {-1} for some, more in zip(few.tolist(), many.tolist(), strict=True))
    assert (visits[-1] >= 0).sum() > (visits[0] >= 0).sum()


def test_many_queries_choose_what_each_chooses_alone(
    built: Built,
) -> None:
    centroids, _, _, texts = built
    weights = np.hstack([20 * centroids, np.zeros((LISTS, 1), np.float32)])
    together = choose(Probing(20.0, weights), centroids, texts[:100], 5)
    for query, lists in zip(texts[:100], together, strict=True):
        assert choose(Probing(20.0, weights), centroids, query[None], 5)[0].tolist() == lists[lists >= 0].tolist()


@pytest.mark.parametrize("key", [f"IVF{LISTS},Flat", f"IVF{LISTS},SQ8", f"RR{DIM},IVF{LISTS},RaBitQfs"])
def test_faiss_searches_the_chosen_lists_alone(built: Built, key: str) -> None:
    images, queries = built[1], built[3][:40]
    index = faiss_index.train(key, images)
    faiss_index.add(index, images, np.arange(len(images)))
    of_row = faiss_index.assigner(index)(images)
    shared = shared_lists.share([index])
    assert shared is not None
    near = shared_lists.probe(shared, queries, probing.candidates(6, LISTS))
    chosen, scores = probing.choose(Probing(8.0), near.queries, 6, near.lists, near.scores)
    assert (chosen == -1).any()
    probe = Probe(near.queries, chosen, scores)
    _, ids = shared_lists.search(shared, 0, probe, 5, shared_lists.parameters(probe))
    for rows, lists in zip(ids, chosen, strict=True):
        alone = np.flatnonzero(np.isin(of_row, lists))
        assert set(rows[rows >= 0]) <= set(alone)
        assert (rows >= 0).sum() == min(5, len(alone))
