"""The original image of a row, read from its tar by the byte range that the metadata records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clip_batch.search import lineage

if TYPE_CHECKING:
    from clip_batch.serve.search.live import OpenVersion

_MEDIA = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"RIFF": "image/webp", b"GIF8": "image/gif"}

COLUMNS = ("shard", "offset", "length")
"""Of the metadata: where the image lies."""


def has_image(row: dict[str, Any]) -> bool:
    """Whether a row's metadata says where its image lies."""
    return all(row.get(name) is not None for name in COLUMNS)


def original(version: OpenVersion, row: int) -> bytes | None:
    """The image bytes of a row; None where its metadata names none, or its tar is not there any more. Blocks."""
    if not version.planned(row) or not set(COLUMNS) <= set(version.columns):
        return None
    (where,) = version.searcher.metadata([row], list(COLUMNS))
    if not has_image(where):
        return None
    return lineage.image(where, version.searcher.storage)


def media_type(data: bytes) -> str:
    """What a browser may take the bytes for; nothing that it would run."""
    found = next((kind for magic, kind in _MEDIA.items() if data.startswith(magic)), None)
    return found or "application/octet-stream"
