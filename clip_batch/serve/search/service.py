"""What the routes work with, and how a query becomes a vector."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from clip_batch.config import DatabaseConfig, parse_bytes
from clip_batch.encoders import NO_TEXT
from clip_batch.encoders.device import cores
from clip_batch.samples.decode import DecodeError
from clip_batch.search.heads import load_heads
from clip_batch.serve.http.errors import Refused
from clip_batch.serve.http.metrics import Metrics
from clip_batch.serve.http.threads import Threads
from clip_batch.serve.search.fetch import fetch
from clip_batch.serve.search.live import Indices, OpenVersion
from clip_batch.serve.search.schema import QueryModel, WeightedQuery

if TYPE_CHECKING:
    from clip_batch.config import ServeConfig, StorageConfig
    from clip_batch.encoders import Pixels

Vector = npt.NDArray[np.float32]

_FETCHES = 8
"""Images that are fetched by URL at once; slow hosts must not hold the threads that search."""


class Service:
    """Options, indices, heads, threads and metrics of one server. ConfigError where an option does not fit."""

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
        self._fetches = Threads("fetch", _FETCHES, 4 * _FETCHES)

    async def close(self) -> None:
        """Close the indices and end the threads."""
        await self.indices.close()
        self.threads.close()
        self._fetches.close()

    async def text(self, version: OpenVersion, text: str) -> Vector:
        """The unit vector (d,) of a text. Refused (400): the index's model has no text side."""
        encoding = await self.indices.encoding(version)
        if not encoding.encoder.has_text:
            raise Refused(400, f"text: {NO_TEXT}", "text")
        return await encoding.text(text)

    async def image(self, version: OpenVersion, data: bytes, field: str = "image") -> Vector:
        """The unit vector (d,) of an image file's bytes. Refused (400): it is none, or too large."""
        encoding = await self.indices.encoding(version)

        def prepare() -> Pixels:
            with self.metrics.steps["image_prepro_time"].time():
                return encoding.encoder.preprocess(data, self.config.max_pixels)

        try:
            return await encoding.image(await self.threads.run(prepare))
        except DecodeError as error:
            raise Refused(400, f"{field} cannot be used: {error}", field) from None

    async def download(self, url: str) -> bytes:
        """What lies at a URL. Refused (400): image_url is off, or it cannot be had."""
        if not self.config.image_url:
            raise Refused(400, "image_url is off on this server (--image-url turns it on)", "image_url")
        settings = self.max_body, self.config.fetch_timeout, self.config.image_url_private
        with self.metrics.steps["download_time"].time():
            return await self._fetches.run(fetch, url, *settings)

    async def vector(self, version: OpenVersion, query: QueryModel, path: str = "") -> Vector:
        """The unit vector (d,) of a query; `path` is where it stands in the request. Refused (4xx): it has none."""
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
        found = await self.threads.run(version.searcher.reconstruct, [query.id], modality)
        return unit(found[0], field)

    async def mixed(self, version: OpenVersion, terms: list[tuple[str, WeightedQuery]]) -> Vector:
        """The unit vector (d,) of the weighted sum of queries. Refused (400) where they cancel out."""
        vectors = [query.weight * await self.vector(version, query, path) for path, query in terms]
        return unit(np.sum(vectors, axis=0), "queries")


def decode_base64(text: str, field: str) -> bytes:
    """The bytes of base64, after a data: URL's head if there is one. Refused: 422."""
    try:
        return base64.b64decode("".join(text.rpartition(",")[2].split()), validate=True)
    except ValueError as error:
        raise Refused(422, f"{field} is not base64: {error}", field) from None


def checked(values: list[float], version: OpenVersion, field: str) -> Vector:
    """A vector (d,) of the index's dimension. Refused: 400."""
    with np.errstate(over="ignore"):
        vector = np.asarray(values, np.float32)
    if len(vector) != version.manifest.dim:
        raise Refused(400, f"{field} has {len(vector)} numbers, this index {version.manifest.dim}", field)
    if not np.isfinite(vector).all():
        raise Refused(400, f"{field} holds numbers that are not finite in float32", field)
    return vector


def unit(vector: Vector, field: str) -> Vector:
    """A vector (d,) of norm 1. Refused (400) where it is all but zero."""
    wide = vector.astype(np.float64)
    norm = float(np.linalg.norm(wide))
    if norm < 1e-6:
        raise Refused(400, f"{field} gives a vector of length 0, which is like nothing", field)
    found: Vector = (wide / norm).astype(np.float32)
    return found
