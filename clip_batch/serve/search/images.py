"""The images of rows: originals, read from the tar or Parquet file at the place in the metadata, and smaller copies."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from clip_batch.config import ServeConfig, parse_bytes
from clip_batch.encoders.device import cores
from clip_batch.errors import DecodeError
from clip_batch.samples import kinds
from clip_batch.search import lineage
from clip_batch.serve.http.errors import Refused
from clip_batch.serve.search.threads import Threads
from clip_batch.serve.search.thumbnails import SHOWN, rounded, thumbnail
from clip_batch.storage import web
from clip_batch.storage.bytes_cache import BytesCache
from clip_batch.storage.cache import cache_home

if TYPE_CHECKING:
    from clip_batch.serve.search.live import OpenVersion

URLS = ("url", "image_url", "link")
"""The metadata columns that may hold the web address of a row's image, the most likely first."""

PROXIED = 1280
"""Width of the copy of an image by URL for a request that names none: what strangers wrote is never passed on."""


_READERS, _FETCHERS = 4, 8
"""Threads that decode images, each of which may take hundreds of megabytes for a large one, and that fetch them."""


class Images:
    """Reads images and makes copies, in threads of their own, so that neither delays searches."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._limit = parse_bytes(config.max_body)
        self._cache = BytesCache(os.path.join(cache_home(), "thumbnails"), parse_bytes(config.thumbnail_cache))
        self._reading = Threads("images", min(cores(), _READERS), 4 * config.max_pending)
        self._fetching = Threads("images by URL", _FETCHERS, 4 * config.max_pending)

    def close(self) -> None:
        """End the threads."""
        self._reading.close()
        self._fetching.close()

    async def read(self, version: OpenVersion, row: int, width: int | None = None) -> bytes:
        """Return the original image of a row or, with `width`, a copy about as wide.

        Raises Refused (404) if it has none, or none that can be read.
        """
        place = await self._reading.run(_place, version, row, self.columns(version))
        if lineage.has_place(place) and version.planned(row):
            return await self._reading.run(self._copy, version, row, place, width)
        if (url := self.url(place)) is None:
            raise Refused(404, "this row's image cannot be read: its metadata does not locate it", "row")
        return await self._fetching.run(self._proxied, url, width)

    def columns(self, version: OpenVersion) -> list[str]:
        """Return the metadata columns that locate a row's image."""
        names = (*lineage.COLUMNS, *(URLS if self._config.page_images == "proxy" else ()))
        return [name for name in names if name in version.columns]

    def url(self, row: dict[str, Any]) -> str | None:
        """Return the web address of a row's image if this server fetches it, otherwise None."""
        if self._config.page_images != "proxy":
            return None
        return next((url for name in URLS if (url := web_address(row.get(name)))), None)

    def has_image(self, version: OpenVersion, id: int, row: dict[str, Any]) -> bool:
        """Return whether `read` may find an image of a row; `row` has its `columns`."""
        shown = lineage.shows(version.manifest, id, row, version.searcher.storage)
        return shown or self.url(row) is not None

    def _copy(self, version: OpenVersion, row: int, place: dict[str, Any], width: int | None) -> bytes:
        manifest = version.manifest
        key = f"{manifest.version} {manifest.created} {manifest.rows} {row} {rounded(width or 0)}"
        if width is not None and (data := self._cache.get(key)) is not None:
            return data
        original = lineage.image(place, version.searcher.storage)
        if original is None:
            raise Refused(404, "this row's image cannot be read: its file is gone, or has changed", "row")
        if width is None:
            return original
        try:
            return self._smaller(key, original, width)
        except DecodeError as error:
            if error.reason == "undecodable_image":
                return original  # browsers show some images that are cut, and formats that this Pillow lacks
            raise Refused(404, f"no smaller copy of this row's image: {error}", "row") from None

    def _proxied(self, url: str, width: int | None) -> bytes:
        width = width or PROXIED
        key = f"{url} {rounded(width)}"
        if (data := self._cache.get(key)) is not None:
            return data
        try:
            original = web.fetch(url, self._limit, self._config.fetch_timeout, self._config.image_url_private)
        except web.FetchError as error:
            raise Refused(404, f"this row's image by URL {error}", "row") from None
        try:
            return self._smaller(key, original, width)
        except DecodeError as error:
            raise Refused(404, f"this row's image by URL is {error}", "row") from None

    def _smaller(self, key: str, original: bytes, width: int) -> bytes:
        """Make a copy and keep it. Raises DecodeError as `thumbnail`."""
        data = thumbnail(original, rounded(width), self._config.max_pixels)
        if data is not original:
            self._cache.put(key, data)
        return data


def original(version: OpenVersion, row: int) -> bytes | None:
    """Return the image bytes of a row, or None if its metadata locates none or its file is gone. Blocks."""
    columns = [name for name in lineage.COLUMNS if name in version.columns]
    if not version.planned(row) or "shard" not in columns:
        return None
    return lineage.image(_place(version, row, columns), version.searcher.storage)


def web_address(value: object) -> str | None:
    """Return a value if it is a URL of http or https, otherwise None."""
    if not isinstance(value, str) or not value.lower().startswith(("http://", "https://")):
        return None
    try:
        return value if urlsplit(value).hostname else None
    except ValueError:
        return None


def media_type(data: bytes) -> str:
    """Return the media type of an image's bytes; never a type whose content a browser would execute."""
    name = (kinds.picture(data) or "").lower()
    return f"image/{name}" if name in SHOWN else "application/octet-stream"


def image_path(index: str, version: OpenVersion, row: int) -> str:
    """Return the path of a row's image on this server. It names the version, as other versions have other ids."""
    return f"/v1/image/{quote(index, safe='')}/{row}?version={version.manifest.version}"


def _place(version: OpenVersion, row: int, columns: list[str]) -> dict[str, Any]:
    (place,) = version.searcher.metadata([row], columns)
    return place
