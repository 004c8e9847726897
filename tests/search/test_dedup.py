"""Near duplicates: each connected component is represented by its first row."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clip_batch.search.dedup import representatives


@settings(max_examples=60)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 40), st.just(3)), elements=st.floats(-1, 1, width=16)),
    st.floats(0.5, 0.999),
)
def test_representatives_are_the_first_of_each_component(rows: Any, threshold: float) -> None:
    rows[:, 0] += 1.5
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    near = rows @ rows.T >= threshold
    reach = near | near.T | np.eye(len(rows), dtype=bool)
    for _ in range(len(rows)):
        reach = (reach.astype(int) @ reach.astype(int)) > 0
    assert representatives(rows, threshold).tolist() == [row == reach[row].argmax() for row in range(len(rows))]


def test_representatives_across_blocks() -> None:
    rows = np.random.default_rng(0).standard_normal((2000, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[1000:] = rows[:1000][::-1]
    assert np.flatnonzero(representatives(rows, 0.99)).tolist() == list(range(1000))
    assert representatives(np.ones((700, 1), np.float32), 0.9).sum() == 1
    assert representatives(np.empty((0, 4), np.float32), 0.9).shape == (0,)
