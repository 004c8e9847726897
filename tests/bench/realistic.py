"""Makes vectors like CLIP's for benchmarks: clustered, of few real dimensions, captions apart from images."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from tests.fabricated import Place, commit, make_plan, unit

Vectors = npt.NDArray[np.float32]

LATENT = 96
"""Dimensions in which the vectors really vary, before a little noise in all of them."""

BLOCK = 2_048
"""Rows that are made at once: so few that their arrays stay in the processor's cache."""


def realistic(rows: int, dim: int, part: int, extra: int, seed: int = 0) -> Iterator[tuple[Vectors, Vectors]]:
    """Image and caption vectors float32 (n, dim), unit norm, in parts of `part` rows; then a part of `extra` more.

    As CLIP's: a common mean, topics, within them clusters of power-law size that overlap, a decaying
    spectrum; captions near their image, but apart from all images by one offset (the modality gap).
    """
    rng = np.random.Generator(np.random.SFC64(seed))
    basis = np.linalg.qr(rng.standard_normal((dim, LATENT)))[0].T.astype(np.float32)
    spectrum = ((1 + np.arange(LATENT)) ** -0.4).astype(np.float32)
    basis *= (spectrum / np.linalg.norm(spectrum))[:, None]
    mean, gap = unit(rng.standard_normal((2, dim)))
    clusters = max(rows // 100, 10)
    topics = rng.standard_normal((64, LATENT), dtype=np.float32)
    centers = 0.45 * topics[rng.integers(64, size=clusters)]
    centers += 0.45 * rng.standard_normal((clusters, LATENT), dtype=np.float32)
    weights = np.cumsum((1.0 + np.arange(clusters)) ** -0.7)
    weights /= weights[-1]

    def normal(count: int, deviation: float) -> Vectors:
        drawn = rng.standard_normal((count, LATENT), dtype=np.float32)
        drawn *= deviation
        return drawn

    def embedded(latent: Vectors, offset: Vectors, noise: float) -> Vectors:
        """Unit vectors of latent ones, with noise of a norm in all dimensions (uniform, which is sooner drawn)."""
        vectors = rng.random((len(latent), dim), dtype=np.float32)
        vectors -= 0.5
        vectors *= noise * (12 / dim) ** 0.5
        vectors += latent @ basis
        vectors += offset
        return unit(vectors)

    def block(count: int) -> tuple[Vectors, Vectors]:
        latent = normal(count, 0.75)
        latent += centers[np.searchsorted(weights, rng.random(count))]
        caption = latent + normal(count, 0.5)
        return embedded(latent, 0.8 * mean, 0.15), embedded(caption, 0.8 * (mean + gap), 0.3)

    for count in [*(min(part, rows - start) for start in range(0, rows, part)), extra]:
        images, texts = np.empty((2, count, dim), dtype=np.float32)
        for start in range(0, count, BLOCK):
            stop = min(start + BLOCK, count)
            images[start:stop], texts[start:stop] = block(stop - start)
        yield images, texts


def write_out(out: Place, rows: int, dim: int, part: int, extra: int) -> tuple[Vectors, Vectors]:
    """Write `rows` rows of `realistic` as an OUT with a commit for each `part`; returns the part of `extra` more.

    A part is committed while the next one is made.
    """
    plan = make_plan(out, -(-rows // part))
    made = realistic(rows, dim, part, extra)
    with ThreadPoolExecutor(1) as thread:
        writing = None
        for partition in range(len(plan.partitions)):
            vectors = next(made)
            if writing:
                writing.result()
            writing = thread.submit(commit, out, plan, partition, *vectors)
        last = next(made)
        if writing:
            writing.result()
    return last
