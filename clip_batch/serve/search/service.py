"""The state that the search routes share, and how a query becomes a vector."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from clip_batch.config import DatabaseConfig, parse_bytes
from clip_batch.encoders import NO_TEXT
from clip_batch.encoders.device import cores
from clip_batch.errors import DecodeError
from clip_batch.search.heads import load_heads
from clip_batch.serve.http.errors import Refused
from clip_batch.serve.search.live import Indices, OpenVersion
from clip_batch.serve.search.metrics import Metrics
from clip_batch.serve.search.schema import QueryModel, WeightedQuery
from clip_batch.serve.search.threads import Threads
from clip_batch.storage import web

if TYPE_CHECKING:
    from clip_batch.config import ServeConfig, StorageConfig
    from clip_batch.encoders import Pixels

Vector = npt.NDArray[np.float32]

_DOWNLOADS = 8
"""Threads that download images by URL; they are apart so that slow hosts do not delay searches."""


class Service:
    """Options, indices, heads, threads and metrics of one server. Raises ConfigError if an option does not fit."""

    def __init__(
        self,
        urls: Mapping[str, str],
        config: ServeConfig,
        storage: StorageConfig,
        databases: DatabaseConfig = DatabaseConfig(),
    ) -> None:
        self.config, self.storage = config, storage
        self.max_body = parse_bytes(config.max_body)
        self.metrics = Metrics()
        self.heads = load_heads(config, storage)
        self.indices = Indices(urls, config, storage, databases, self.metrics)
        self.threads = Threads("search", config.serve_threads or 2 * cores(), 4 * config.max_pending)
        self._downloads = Threads("download", _DOWNLOADS, 4 * _DOWNLOADS)

    async def close(self) -> None:
        """Close the indices and end the threads."""
        await self.indices.close()
        self.threads.close()
        self._downloads.close()

    async def text(self, version: OpenVersion, text: str) -> Vector:
        """Return the unit vector (d,) of a text. Raises Refused (400) if the index's model has no text side."""
        encoding = await self.indices.encoding(version)
        if not encoding.encoder.has_text:
            raise Refused(400, f"text: {NO_TEXT}", "text")
        return await encoding.text(text)

    async def image(self, version: OpenVersion, data: bytes, field: str = "image") -> Vector:
        """Return the unit vector (d,) of an image file's bytes. Raises Refused (400) if they cannot be decoded."""
        encoding = await self.indices.encoding(version)

        def prepare() -> Pixels:
            with self.metrics.steps["image_prepro_time"].time():
                return encoding.encoder.preprocess(data, self.config.max_pixels)

        try:
            return await encoding.image(await self.threads.run(prepare))
        except DecodeError as error:
            raise Refused(400, f"{field} cannot be used: {error}", field) from None

    async def download(self, url: str) -> bytes:
        """Return the bytes at a URL. Raises Refused (400) if `image_url` is off or the download fails."""
        if not self.config.image_url:
            raise Refused(400, "image_url is off on this server (--image-url turns it on)", "image_url")
        settings = self.max_body, self.config.fetch_timeout, self.config.image_url_private
        try:
            with self.metrics.steps["download_time"].time():
                return await self._downloads.run(web.fetch, url, *settings)
        except web.FetchError as error:
            raise Refused(400, f"image_url {error}", "image_url") from None

    async def vector(self, version: OpenVersion, query: QueryModel, path: str = "") -> Vector:
        """Return the unit vector (d,) of a query; `path` is the place of the query in the request.

        Raises Refused (4xx) if it has no vector.
        """
        if query.text is not None:
            return await self.text(version, query.text)
        if query.image is not None:
            return await self.image(version, decode_base64(query.image, f"{path}image"), f"{path}image")
        if query.image_url is not None:
            return await self.image(version, await self.download(query.image_url), f"{path}image_url")
        if query.embedding is not None:
            return unit(checked(query.embedding, version, f"{path}embedding"), f"{path}embedding")
        assert query.id is not None
        field, rows = f"{path}id", version.manifest.rows
        if query.id >= rows:
            raise Refused(404, f"{field}: the index has rows 0 to {rows - 1}", field)
        modality = "image" if "image" in version.modalities else version.modalities[0]
        (vector,) = await self.threads.run(version.searcher.reconstruct, [query.id], modality)
        return unit(vector, field)

    async def mixed(self, version: OpenVersion, terms: list[tuple[str, WeightedQuery]]) -> Vector:
        """Return the unit vector (d,) of the weighted sum of (path, query) terms.

        Raises Refused (400) if they cancel each other out.
        """
        vectors = [query.weight * await self.vector(version, query, path) for path, query in terms]
        return unit(np.sum(vectors, axis=0), "queries")


def decode_base64(text: str, field: str) -> bytes:
    """Return the bytes of a base64 text, which may be a data: URL. Raises Refused (422) if it is not base64."""
    try:
        return base64.b64decode("".join(text.rpartition(",")[2].split()), validate=True)
    except ValueError as error:
        raise Refused(422, f"{field} is not base64: {error}", field) from None


def checked(values: list[float], version: OpenVersion, field: str) -> Vector:
    """Return `values` as a vector (d,). Raises Refused (400) if it is not finite or not of the index's dimension."""
    with np.errstate(over="ignore"):
        vector = np.asarray(values, np.float32)
    if len(vector) != version.manifest.dim:
        raise Refused(400, f"{field} has {len(vector)} numbers, this index {version.manifest.dim}", field)
    if not np.isfinite(vector).all():
        raise Refused(400, f"{field} has numbers that are not finite in float32", field)
    return vector


def unit(vector: Vector, field: str) -> Vector:
    """Return a vector (d,) scaled to norm 1. Raises Refused (400) if its norm is almost zero."""
    exact = vector.astype(np.float64)
    norm = float(np.linalg.norm(exact))
    if norm < 1e-6:
        raise Refused(400, f"{field} gives a vector of length 0, which is similar to nothing", field)
    scaled: Vector = (exact / norm).astype(np.float32)
    return scaled
