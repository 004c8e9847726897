"""The state that the search routes share, and how a query becomes a vector."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING

from clip_batch.config import DatabaseConfig, parse_bytes
from clip_batch.encoders import NO_TEXT
from clip_batch.encoders.device import cores
from clip_batch.errors import DecodeError
from clip_batch.search.heads import load_heads
from clip_batch.search.rows import Vectors
from clip_batch.search.vectors import checked_vector, mixed_vector, row_vector, unit_vector
from clip_batch.serve.http.errors import Refused
from clip_batch.serve.search.images import Images
from clip_batch.serve.search.live import Indices, OpenVersion
from clip_batch.serve.search.memory import DecodeMemory
from clip_batch.serve.search.metrics import Metrics
from clip_batch.serve.search.schema import QueryModel, WeightedQuery
from clip_batch.serve.search.threads import Threads
from clip_batch.storage import web

if TYPE_CHECKING:
    from clip_batch.config import ServeConfig, StorageConfig
    from clip_batch.encoders.encoder import Pixels


_DOWNLOADS = 8
"""Threads that download images by URL; they are apart so that slow hosts do not delay searches."""

_FILTERS = 2
"""Threads that answer searches with filters; they are apart so that slow filters delay no other search."""


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
        self.images = Images(config)
        self.indices = Indices(urls, config, storage, databases, self.metrics)
        self.threads = Threads("search", config.serve_threads or 2 * cores(), 4 * config.max_pending)
        self.filters = Threads("filters", _FILTERS, 8 * _FILTERS)
        self._decoders = Threads("images", cores(), config.max_pending)
        self._memory = DecodeMemory(parse_bytes(config.decode_memory))
        self._downloads = Threads("download", _DOWNLOADS, 4 * _DOWNLOADS)

    async def close(self) -> None:
        """Close the indices and end the threads."""
        await self.indices.close()
        self.threads.close()
        self.images.close()
        self.filters.close()
        self._decoders.close()
        self._downloads.close()

    async def text(self, version: OpenVersion, text: str) -> Vectors:
        """Return the unit vector (d,) of a text. Raises Refused (400) if the index's model has no text side."""
        encoding = await self.indices.encoding(version)
        if not encoding.encoder.has_text:
            raise Refused(400, f"text: {NO_TEXT}", "text")
        return await encoding.text(text)

    async def image(self, version: OpenVersion, data: bytes, field: str = "image") -> Vectors:
        """Return the unit vector (d,) of an image file's bytes. Raises Refused (400) if they cannot be decoded."""
        encoding = await self.indices.encoding(version)

        def prepare() -> Pixels:
            with self._memory.reserved(data, self.config.max_pixels), self.metrics.steps["image_prepro_time"].time():
                return encoding.encoder.preprocess(data, self.config.max_pixels)

        try:
            return await encoding.image(await self._decoders.run(prepare))
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

    async def vector(self, version: OpenVersion, query: QueryModel, path: str = "") -> Vectors:
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
            field = f"{path}embedding"
            return unit_vector(checked_vector(query.embedding, version.manifest.dim, field), field)
        assert query.id is not None
        field, rows = f"{path}id", version.manifest.rows
        if query.id >= rows:
            raise Refused(404, f"{field}: the index has rows 0 to {rows - 1}", field)
        return unit_vector(await self.threads.run(row_vector, version.searcher, query.id), field)

    async def mixed(self, version: OpenVersion, terms: list[tuple[str, WeightedQuery]]) -> Vectors:
        """Return the unit vector (d,) of the weighted sum of (path, query) terms.

        Raises Refused (400) if they cancel each other out.
        """
        vectors = [await self.vector(version, query, path) for path, query in terms]
        return mixed_vector([query.weight for _, query in terms], vectors)


def decode_base64(text: str, field: str) -> bytes:
    """Return the bytes of a base64 text, which may be a data: URL. Raises Refused (422) if it is not base64."""
    try:
        return base64.b64decode("".join(text.rpartition(",")[2].split()), validate=True)
    except ValueError as error:
        raise Refused(422, f"{field} is not base64: {error}", field) from None
