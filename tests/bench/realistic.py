"""Makes vectors like CLIP's for benchmarks: clustered, of few real dimensions, captions apart from images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from tests.fabricated import unit

Vectors = npt.NDArray[np.float32]

LATENT = 96
"""Dimensions in which the vectors really vary, before a little noise in all of them."""


def realistic(rows: int, dim: int, part: int, extra: int, seed: int = 0) -> Iterator[tuple[Vectors, Vectors]]:
    """Image and caption vectors float32 (n, dim), unit norm, in parts of `part` rows; then a part of `extra` more.

    As CLIP's: a common mean, topics, within them clusters of power-law size that overlap, a decaying
    spectrum; captions near their image, but apart from all images by one offset (the modality gap).
    """
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((dim, LATENT)))[0].T.astype(np.float32)
    spectrum = ((1 + np.arange(LATENT)) ** -0.4).astype(np.float32)
    basis *= (spectrum / np.linalg.norm(spectrum))[:, None]
    mean, gap = unit(rng.standard_normal((2, dim)))
    clusters = max(rows // 100, 10)
    topics = rng.standard_normal((64, LATENT))
    centers = 0.45 * topics[rng.integers(64, size=clusters)] + 0.45 * rng.standard_normal((clusters, LATENT))
    weights = (1.0 + np.arange(clusters)) ** -0.7
    weights /= weights.sum()

    def noise(count: int, width: int, norm: float) -> Vectors:
        return rng.standard_normal((count, width), dtype=np.float32) * np.float32(norm)

    for count in [*(min(part, rows - start) for start in range(0, rows, part)), extra]:
        latent = centers[rng.choice(clusters, size=count, p=weights)].astype(np.float32)
        latent += noise(count, LATENT, 0.75)
        caption = latent + noise(count, LATENT, 0.5)
        images = latent @ basis + 0.8 * mean + noise(count, dim, 0.15 / dim**0.5)
        texts = caption @ basis + 0.8 * mean + 0.8 * gap + noise(count, dim, 0.3 / dim**0.5)
        yield unit(images), unit(texts)
