"""Fetch an image that a request names by URL (see `clip_batch.storage.web`)."""

from __future__ import annotations

from clip_batch.serve.http.errors import Refused
from clip_batch.storage import web


def fetch(url: str, limit: int, timeout: float, private: bool = False) -> bytes:
    """As `web.fetch`, but what goes wrong is Refused (400)."""
    try:
        return web.fetch(url, limit, timeout, private)
    except web.FetchError as error:
        raise Refused(400, f"image_url {error}", "image_url") from None
