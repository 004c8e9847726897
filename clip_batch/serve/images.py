"""The original image of a row, read from its tar by the byte range that the metadata records."""

from __future__ import annotations

from typing import Any

from clip_batch.config import StorageConfig
from clip_batch.store import Store

_MEDIA = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"RIFF": "image/webp", b"GIF8": "image/gif"}

COLUMNS = ("shard", "offset", "length")
"""Of the metadata: where the image lies."""


def has_image(row: dict[str, Any]) -> bool:
    """Whether a row's metadata says where its image lies."""
    return all(row.get(name) is not None for name in COLUMNS)


def read_image(row: dict[str, Any], storage: StorageConfig) -> bytes | None:
    """A row's image bytes; None where it has none, or its tar is not there any more.

    `shard` is the planner's own URL (a side-car field of that name never gets there), so data
    cannot name a file of this machine.
    """
    if not has_image(row):
        return None
    folder, _, name = row["shard"].rpartition("/")
    try:
        with Store(folder, storage.storage_options).open(name) as file:
            file.seek(row["offset"])
            data = file.read(row["length"])
    except OSError:
        return None
    return data if len(data) == row["length"] else None


def media_type(data: bytes) -> str:
    """What a browser may take the bytes for; nothing that it would run."""
    found = next((kind for magic, kind in _MEDIA.items() if data.startswith(magic)), None)
    return found or "application/octet-stream"
