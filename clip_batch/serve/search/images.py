"""The original image of a row, read from its tar or its Parquet file at the place in the metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from clip_batch.samples import kinds
from clip_batch.search import lineage

if TYPE_CHECKING:
    from clip_batch.serve.search.live import OpenVersion

SHOWN = ("jpeg", "png", "webp", "gif", "bmp", "avif")
"""Formats that browsers show."""


def original(version: OpenVersion, row: int) -> bytes | None:
    """Return the image bytes of a row, or None if its metadata locates none or its file is gone. Blocks."""
    columns = [name for name in lineage.COLUMNS if name in version.columns]
    if not version.planned(row) or "shard" not in columns:
        return None
    (location,) = version.searcher.metadata([row], columns)
    return lineage.image(location, version.searcher.storage)


def media_type(data: bytes) -> str:
    """Return the media type of an image's bytes; never a type whose content a browser would execute."""
    name = (kinds.picture(data) or "").lower()
    return f"image/{name}" if name in SHOWN else "application/octet-stream"


def image_path(index: str, version: OpenVersion, row: int) -> str:
    """Return the path of a row's image on this server. It names the version, as other versions have other ids."""
    return f"/v1/image/{quote(index, safe='')}/{row}?version={version.manifest.version}"
