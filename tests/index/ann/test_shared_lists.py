from __future__ import annotations

import numpy as np
import pytest

from clip_batch.index.ann import faiss_index, faiss_search, shared_lists
from clip_batch.index.ann.faiss_search import Removed
from clip_batch.index.ann.libfaiss import Index, load
from tests.fabricated import clustered

IMAGES, TEXTS = clustered(1200, 32, 30)
ROWS = 300
KEYS = [
    "IVF16,Flat",
    "IVF16,SQ8",
    "IVF16,PQ8x4",
    "IVF16,PQ16x4fs",
    "IVF16,PQ16x4fsr",
    "IVF16,RaBitQ",
    "IVF16,RaBitQfs",
    "HR,IVF16,RaBitQfs4",
    "IVF16_HNSW8,Flat",
    "PCA16,IVF16,SQ8",
    "OPQ2,IVF16,PQ2x4",
]


def shards(key: str, rows: int = len(IMAGES)) -> list[Index]:
    """Copies of one template, filled with `ROWS` rows each."""
    faiss = load()
    template = faiss_index.train(key, IMAGES)
    made = [faiss.clone_index(template) for _ in range(0, rows, ROWS)]
    for number, index in enumerate(made):
        faiss_index.add(index, IMAGES[number * ROWS : (number + 1) * ROWS], np.arange(ROWS))
    return made


@pytest.mark.parametrize("key", KEYS)
def test_a_shared_probe_finds_what_each_shard_finds_by_itself(key: str) -> None:
    indices = shards(key)
    shared = shared_lists.share(indices)
    assert shared is not None
    removed = Removed(np.arange(0, ROWS, 3))
    for effort, k, some in ((1, 10, None), (4, 10, removed), (16, ROWS, None), (None, 10, None), (99, 3, removed)):
        for queries in (TEXTS[:1], TEXTS[:7]):
            probe = shared_lists.probe(shared, queries, effort)
            for number, index in enumerate(indices):
                parameters = shared_lists.parameters(probe, some)
                scores, ids = shared_lists.search(shared, number, probe, k, parameters)
                expected = faiss_search.search(index, queries, k, effort, some)
                np.testing.assert_array_equal(ids, expected[1])
                np.testing.assert_array_equal(scores, expected[0])


def test_only_the_first_shard_assigns() -> None:
    indices = shards("IVF16,Flat")
    shared = shared_lists.share(indices)
    assert shared is not None
    expected = [faiss_search.search(index, TEXTS[:5], 10, 4) for index in indices]
    for index in indices[1:]:
        index.quantizer.reset()
    probe = shared_lists.probe(shared, TEXTS[:5], 4)
    for number, (scores, ids) in enumerate(expected):
        found = shared_lists.search(shared, number, probe, 10, shared_lists.parameters(probe))
        np.testing.assert_array_equal(found[1], ids)
        np.testing.assert_array_equal(found[0], scores)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("IVF16,Flat", "IVF8,Flat"),
        ("IVF16,Flat", "IVF16,SQ8"),
        ("IVF16,Flat", "PCA16,IVF16,Flat"),
        ("IVF16,Flat", "Flat"),
        ("Flat", "Flat"),
        ("HNSW8", "HNSW8"),
    ],
)
def test_kinds_that_share_no_lists(first: str, second: str) -> None:
    assert shared_lists.share([*shards(first, ROWS), *shards(second, ROWS)]) is None


@pytest.mark.parametrize("key", ["IVF16,Flat", "HR,IVF16,Flat"])
def test_shards_of_two_trainings_share_no_lists(key: str) -> None:
    other = faiss_index.train(key, TEXTS, seed=7)
    assert shared_lists.share([*shards(key, ROWS), other]) is None
    assert shared_lists.share([]) is None
