"""The scenes of tests/bench/scenes.py: reproducible, and none of a query is in a set."""

from __future__ import annotations

import numpy as np
import pytest

from tests.bench import scenes
from tests.bench.scenes import Pictures, Scenes


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return Pictures()


def sets(drawn: Scenes) -> set[frozenset[int]]:
    return {frozenset(scene) - {-1} for scene in drawn.tolist()}


def test_no_query_has_the_pictures_of_a_scene_in_the_set(pictures: Pictures) -> None:
    rows = scenes.draw(pictures, 20_000, np.random.default_rng(0))
    queries = scenes.draw(pictures, 2_000, np.random.default_rng(1), held_out=True)
    assert not sets(rows) & sets(queries)
    assert sets(scenes.draw(pictures, 2_000, np.random.default_rng(1))) & sets(rows)  # pairs do come twice


def test_a_scene_is_two_to_four_pictures(pictures: Pictures) -> None:
    drawn = scenes.draw(pictures, 3_000, np.random.default_rng(0))
    sizes = (drawn >= 0).sum(axis=1)
    counts = np.bincount(sizes)
    assert counts[:2].sum() == 0 and len(counts) == 5 and (counts[2:] > 700).all()
    assert all(len(set(scene)) == len(scene) for scene in drawn[sizes == 4].tolist())


def test_the_same_seed_makes_the_same(pictures: Pictures) -> None:
    made = []
    for _ in range(2):
        rng = np.random.default_rng(7)
        drawn = scenes.draw(pictures, 40, rng)
        pixels, words = scenes.compose(pictures, drawn, rng), scenes.paraphrases(pictures, drawn, rng)
        made.append((pixels, scenes.captions(pictures, drawn), words))
    np.testing.assert_array_equal(made[0][0], made[1][0])
    assert made[0][1:] == made[1][1:]
    assert made[0][0].shape == (40, 3, scenes.SIDE, scenes.SIDE)
    assert sum(caption == text for caption, text in zip(*made[0][1:], strict=True)) < 4


def test_every_picture_is_drawn_into_the_scene(pictures: Pictures) -> None:
    drawn = scenes.draw(pictures, 50, np.random.default_rng(0))
    pixels = scenes.compose(pictures, drawn, np.random.default_rng(0))
    first = pictures.whole[drawn[:, 0]].transpose(0, 3, 1, 2)
    assert (pixels <= first).all()
    assert ((pixels < first).any(axis=(1, 2, 3))).all()
