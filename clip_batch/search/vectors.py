"""The vector of a query: the weighted sum of the unit vectors of its terms, scaled to norm 1."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from clip_batch.errors import ConfigError, DecodeError
from clip_batch.search.backend import Backend
from clip_batch.search.query import Query, QueryError, QueryTerm
from clip_batch.search.rows import Vectors
from clip_batch.storage.retry import redact
from clip_batch.storage.store import read_url

MAX_PIXELS = 50_000_000
"""Width times height of an image that searches: strangers may send it."""


def query_vector(backend: Backend, query: Query) -> Vectors:
    """The unit vector (d,) of a query.

    ConfigError: a term is not of the index, is absent, cannot be decoded, or the terms cancel out. EncoderError: the
    encoder that made the index is not here, or cannot read texts. OSError: an image cannot be read.
    """
    terms = query.all_terms()
    return mixed_vector([term.weight for term in terms], [_term_vector(backend, term) for term in terms])


def _term_vector(backend: Backend, term: QueryTerm) -> Vectors:
    if term.text:
        return text_vectors(backend, [term.text]).reshape(-1)
    if term.image:
        data = term.image if isinstance(term.image, bytes) else _read_image(backend, os.fspath(term.image))
        return image_vectors(backend, data).reshape(-1)
    if term.embedding is not None:
        return unit_vector(checked_vector(term.embedding, backend.manifest.dim, "embedding"), "embedding")
    assert term.id is not None
    return unit_vector(row_vector(backend, term.id), "id")


def _read_image(backend: Backend, url: str) -> bytes:
    try:
        return read_url(url, backend.storage.storage_options)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ConfigError(f"image: {redact(url)} is no file: give the path or URL of an image file") from None


def text_vectors(backend: Backend, texts: Sequence[str]) -> Vectors:
    """The unit vectors float32 (n, d) of texts, by the encoder that made the index."""
    return backend.encoder.encode_texts(texts)


def image_vectors(backend: Backend, data: bytes) -> Vectors:
    """The unit vector float32 (1, d) of an image file's bytes. ConfigError: they are not an image."""
    try:
        pixels = backend.encoder.preprocess(data, MAX_PIXELS)
    except DecodeError as error:
        raise ConfigError(f"the query image cannot be used: {error}") from None
    return backend.encoder.encode_images(pixels[None])


def row_vector(backend: Backend, id: int) -> Vectors:
    """The vector (d,) of a row's image, or of its caption in an index of captions alone."""
    modality = "image" if "image" in backend.manifest.key else next(iter(backend.manifest.key))
    return backend.reconstruct([id], modality).reshape(-1)


def checked_vector(values: npt.ArrayLike, dim: int, field: str) -> Vectors:
    """A vector float32 (dim,). QueryError: it has another length, or holds anything but finite numbers."""
    try:
        with np.errstate(over="ignore"):
            array = np.asarray(values)
            if array.dtype.kind not in "iuf" and array.dtype != object:
                raise TypeError
            vector = array.astype(np.float32).reshape(-1)
    except (TypeError, ValueError):
        raise QueryError(field, "it is not a list of numbers") from None
    if len(vector) != dim:
        raise QueryError(field, f"it has {len(vector)} numbers, this index has {dim}")
    if not np.isfinite(vector).all():
        raise QueryError(field, "it holds numbers that are not finite in float32")
    return vector


def unit_vector(vector: Vectors, field: str) -> Vectors:
    """A vector (d,) scaled to norm 1. QueryError: its length is all but zero."""
    wide = vector.astype(np.float64)
    norm = float(np.linalg.norm(wide))
    if norm < 1e-6:
        raise QueryError(field, "it gives a vector of length 0, which is similar to nothing")
    if abs(norm - 1) < 1e-6:  # as near as float32 comes: scores stay those of the vector that was given
        return vector
    scaled: Vectors = (wide / norm).astype(np.float32)
    return scaled


def mixed_vector(weights: Sequence[float], vectors: Sequence[Vectors]) -> Vectors:
    """The unit vector (d,) of the weighted sum of vectors (d,). QueryError: they cancel out."""
    total = np.sum([weight * vector for weight, vector in zip(weights, vectors, strict=True)], axis=0)
    return unit_vector(total, "queries")
