from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_batch.index.ann.order import best


@settings(max_examples=100)
@given(
    pairs=st.lists(
        st.tuples(
            st.sampled_from([-np.inf, -1.0, -0.5, -0.0, 0.0, 1e-30, 0.5, 1.0, np.inf]), st.integers(0, 2**32 - 1)
        ),
        max_size=30,
        unique_by=lambda pair: pair[1],
    ),
    k=st.integers(1, 40),
    beyond=st.sampled_from([0, 2**33]),
)
def test_the_order_is_by_score_then_by_id(pairs: list[tuple[float, int]], k: int, beyond: int) -> None:
    ids = np.array([[beyond + id for _, id in pairs]], dtype=np.int64)
    scores = np.array([[score for score, _ in pairs]], dtype=np.float32)
    if len(pairs):  # a place without a hit, as faiss has it
        ids, scores = np.append(ids, [[-1]], axis=1), np.append(scores, [[-np.inf]], axis=1)
        scores[0, np.isneginf(scores[0]) & (ids[0] >= 0)] = -2
    found, places = best(scores, ids, k)
    wanted = sorted(zip(-scores[0], ids[0], strict=True))[:k]
    assert places[0].tolist() == [id for _, id in wanted] + [-1] * (k - len(wanted))
    np.testing.assert_array_equal(found[0, : len(wanted)], [-score for score, _ in wanted])
    assert np.isneginf(found[0, len(wanted) :]).all()
