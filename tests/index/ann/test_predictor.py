from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_batch.errors import CorruptError
from clip_batch.index.ann import clusters, faiss_index, faiss_search, predictor, shared_lists
from clip_batch.index.ann.predictor import Predictor
from tests.fabricated import towers, unit

LISTS, DIM = 64, 24
Built = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Centroids, images, the list of each, and texts."""


@pytest.fixture(scope="module")
def built() -> Built:
    images, texts = towers(8_000, DIM)
    centroids = clusters.train(images, LISTS)
    return centroids, images, clusters.nearest_of(centroids)(images), texts


def by_centroids(centroids: np.ndarray, scale: float) -> Predictor:
    return Predictor(np.float32(scale) * centroids, np.zeros(len(centroids), np.float32))


def share_found(chosen: np.ndarray, right: np.ndarray) -> float:
    """The share of the right lists (n, k) that are among the chosen (n, m)."""
    return float(np.mean([np.isin(some, visited).mean() for some, visited in zip(right, chosen, strict=True)]))


def test_what_is_learned_finds_more_than_the_nearest_centroids(built: Built) -> None:
    centroids, images, of_row, texts = built
    learned = predictor.learned(centroids, texts[:4_000], of_row[faiss_search.nearest(texts[:4_000], images, 30)[1]])
    queries = texts[4_000:]
    right = of_row[faiss_search.nearest(queries, images, 10)[1]]
    chosen = predictor.visits(learned, queries, 4)
    visited = round((chosen >= 0).sum(axis=1).mean())
    nearest = faiss_search.nearest(queries, centroids, visited)[1]
    assert share_found(chosen, right) > share_found(nearest, right) + 0.05


def test_the_scale_is_that_of_the_shares() -> None:
    rng = np.random.default_rng(0)
    centroids, queries = unit(rng.standard_normal((LISTS, DIM))), unit(rng.standard_normal((400, DIM)))
    for scale in (predictor.SCALES[1], predictor.SCALES[5]):
        shares = np.exp(scale * queries @ centroids.T)
        lists = np.stack([rng.choice(LISTS, 30, p=share / share.sum()) for share in shares])
        found = predictor.scaled(centroids, queries, lists)
        np.testing.assert_allclose(found.weights, scale * centroids, rtol=1e-6)
        assert not found.bias.any()


def test_learning_again_learns_the_same(built: Built) -> None:
    centroids, images, of_row, texts = built
    lists = of_row[faiss_search.nearest(texts[:600], images, 10)[1]]
    one, other = (predictor.learned(centroids, texts[:600], lists, epochs=2, seed=3) for _ in range(2))
    assert np.array_equal(one.array, other.array)


def test_a_query_that_is_sure_visits_few_lists() -> None:
    weights = np.zeros((16, DIM), np.float32)
    weights[3, 0] = 20
    queries = np.zeros((2, DIM), np.float32)
    queries[0, 0] = 1
    chosen = predictor.visits(Predictor(weights, np.zeros(16, np.float32)), queries, 4)
    assert chosen[0].tolist() == [3] + [-1] * 15
    assert sorted(chosen[1]) == list(range(16))  # each has a share of 1/16


def test_a_list_is_visited_where_all_shares_are_below_the_least() -> None:
    bias = np.array([0.1, 0.2], np.float32)
    assert predictor.visits(Predictor(np.zeros((2, DIM), np.float32), bias), np.zeros((1, DIM), np.float32), 1) == [[1]]


@given(seed=st.integers(0, 2**32 - 1), effort=st.integers(1, 20), scale=st.floats(0.1, 200), bias=st.floats(0, 20))
def test_lists_are_visited_once_in_the_order_of_their_shares(seed: int, effort: int, scale: float, bias: float) -> None:
    rng = np.random.default_rng(seed)
    vectors, queries = unit(rng.standard_normal((2, LISTS, DIM))).astype(np.float32)
    made = Predictor(np.float32(scale) * vectors, (bias * rng.random(LISTS)).astype(np.float32))
    scores, visited = made.scores(queries), predictor.visits(made, queries, effort)
    assert visited.shape[1] <= min(predictor.MOST * effort, LISTS)
    for row, lists in zip(scores, visited, strict=True):
        some = lists[lists >= 0]
        assert (lists[len(some) :] == -1).all()
        assert len(set(some)) == len(some) >= 1
        assert row[some].tolist() == sorted(row, reverse=True)[: len(some)]


@pytest.mark.parametrize("bias", [0, 1])
def test_more_effort_visits_more_and_loses_nothing(built: Built, bias: int) -> None:
    centroids, _, _, texts = built
    made = Predictor(12 * centroids, np.linspace(0, bias, LISTS, dtype=np.float32))
    visits = [predictor.visits(made, texts[:50], effort) for effort in (4, 8, 16, 24, 28)]
    for few, many in pairwise(visits):
        assert all(set(some) <= set(more) | {-1} for some, more in zip(few.tolist(), many.tolist(), strict=True))
    assert (visits[-1] >= 0).sum() > (visits[0] >= 0).sum()


def test_many_queries_choose_what_each_chooses_alone(built: Built) -> None:
    centroids, _, _, texts = built
    made = by_centroids(centroids, 20)
    together = predictor.visits(made, texts[:600], 5)
    for query, lists in zip(texts[:600], together, strict=True):
        assert predictor.visits(made, query[None], 5)[0].tolist() == lists[lists >= 0].tolist()


def test_a_predictor_by_centroids_visits_the_nearest(built: Built) -> None:
    centroids, _, _, texts = built
    visited = predictor.visits(by_centroids(centroids, 20), texts[:200], 6)
    nearest = faiss_search.nearest(texts[:200], centroids, visited.shape[1])[1]
    assert (np.where(visited < 0, nearest, visited) == nearest).all()


def test_a_predictor_is_kept_in_a_file(built: Built) -> None:
    made = Predictor(built[0], np.linspace(-1, 1, LISTS, dtype=np.float32))
    file = io.BytesIO()
    np.save(file, made.array)
    file.seek(0)
    read = Predictor.of_array(np.load(file))
    assert np.array_equal(read.weights, made.weights)
    assert np.array_equal(read.bias, made.bias)
    assert read.weights.flags.c_contiguous  # faiss reads it as it lies
    for value in (np.nan, np.inf):
        damaged = made.array
        damaged[3, 1] = value
        with pytest.raises(CorruptError, match="not finite: run clip-batch verify --deep"):
            Predictor.of_array(damaged)


@pytest.mark.parametrize("lists", [1, 2, 4, 64, 1000, 100_000])
def test_efforts_rise_and_stay_below_all_lists(lists: int) -> None:
    efforts = predictor.efforts(lists)
    assert efforts[0] == 1
    assert all(one < other <= max(1.5 * one, one + 1) for one, other in pairwise(efforts))
    assert lists == 1 or min(lists, predictor.MOST_EFFORT) / 1.5 <= efforts[-1] + 1 <= lists


KEYS = [f"IVF{LISTS},Flat", f"IVF{LISTS},SQ8", f"IVF{LISTS},PQ12x4fs", f"RR{DIM},IVF{LISTS},RaBitQfs"]


@pytest.mark.parametrize("key", KEYS)
def test_faiss_searches_the_chosen_lists_alone(built: Built, key: str) -> None:
    images, queries = built[1], built[3][:40]
    index = faiss_index.train(key, images)
    faiss_index.add(index, images, np.arange(len(images)))
    of_row = faiss_index.assigner(index)(images)
    shared = shared_lists.share([index])
    assert shared is not None
    made = by_centroids(shared.centroids, 8)
    probe = shared_lists.probe(shared, queries, 6, made)
    assert (probe.lists == -1).any()
    _, ids = shared_lists.search(shared, 0, probe, 5, shared_lists.parameters(probe))
    for rows, lists in zip(ids, probe.lists, strict=True):
        alone = np.flatnonzero(np.isin(of_row, lists))
        assert set(rows[rows >= 0]) <= set(alone)
        assert (rows >= 0).sum() == min(5, len(alone))
    for query, lists, scores in zip(queries[:, None], probe.lists, probe.scores, strict=True):
        one = shared_lists.probe(shared, query, 6, made)
        assert one.lists[0].tolist() == lists[lists >= 0].tolist()
        np.testing.assert_allclose(one.scores[0], scores[lists >= 0], atol=1e-5)


@pytest.mark.parametrize("key", KEYS)
def test_all_lists_are_those_of_the_nearest_centroids(built: Built, key: str) -> None:
    index = faiss_index.train(key, built[1][:2000])
    shared = shared_lists.share([index])
    assert shared is not None
    made, queries = by_centroids(shared.centroids, 8), built[3][:5]
    predicted, near = (shared_lists.probe(shared, queries, LISTS, how) for how in (made, None))
    assert np.array_equal(predicted.lists, near.lists)
