"""The web page's files. They are read once and served with a policy that lets them load nothing from elsewhere."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response

KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Content-Security-Policy (W3C, level 3): scripts, styles and data come from this service alone, and none are inline.
`blob:` is for pictures that the user chose, or that were fetched with a token."""

FROM_ANYWHERE = POLICY.replace("img-src 'self' blob:", "img-src 'self' blob: http: https:")
"""The policy where the browser itself loads the images that only have a URL (`--page-images direct`)."""

HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_page(app: FastAPI, images_by_url: bool = False) -> None:
    """Add the routes `/` and `/page/{name}`. They serve only files that are in the folder `page` at this moment.

    With `images_by_url` the page may load images from any address.
    """
    assets: dict[str, tuple[bytes, dict[str, Any]]] = {}
    headers = {"content-security-policy": FROM_ANYWHERE if images_by_url else POLICY, **HEADERS}
    folder = files("clip_batch.serve") / "page"
    found = [(file.name, file) for file in folder.iterdir()]
    found += [(f"words/{file.name}", file) for file in (folder / "words").iterdir()]
    for name, file in found:
        kind = KINDS.get("." + name.rpartition(".")[2])
        if kind:
            data = file.read_bytes()
            tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
            assets[name] = data, {**headers, "etag": tag, "content-type": f"{kind}; charset=utf-8"}

    @app.get("/page/{name:path}", include_in_schema=False)
    def asset(name: str, request: Request) -> Response:
        if name not in assets:
            raise HTTPException(404, "the page has no such file")
        data, headers = assets[name]
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers)

    @app.get("/", include_in_schema=False)
    def home(request: Request) -> Response:
        return asset("index.html", request)
