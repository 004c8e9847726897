"""A search service in memory, for the tests of programs that use `Client`: no network, no index, no model."""

from __future__ import annotations

import hashlib
import json
import random
import reprlib
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import httpx2

from clip_batch.errors import ConfigError
from clip_batch.types import Hit

_KINDS = ("text", "image", "image_url", "embedding", "id", "queries")


class FakeService:
    """Answers `Client(url, transport=FakeService(hits).transport)` as a service does whose every search finds `hits`.

    A search returns the first k of `hits` that reach its `threshold`, with the metadata `columns` that it asks for; it
    judges nothing else. A text or an image has the same vector (dim,) of unit norm each time, and another one than
    every other text or image. `images` maps the ids of hits to image files. `requests` lists the method, path and JSON
    body of each request so far. An AsyncClient takes the same transport.

    Example:

        service = FakeService([Hit(7, 0.31, {"caption": "a red bicycle"})])
        with Client("http://search", transport=service.transport) as client:
            assert client.search(text="anything", k=1)[0].id == 7
        assert service.requests[-1] == ("POST", "/v1/search", {"text": "anything", "k": 1})
    """

    def __init__(
        self, hits: Sequence[Hit], index: str = "index", dim: int = 8, images: Mapping[int, bytes] | None = None
    ) -> None:
        if not isinstance(hits, Sequence) or not all(isinstance(hit, Hit) for hit in hits):
            raise ConfigError(f"hits is {reprlib.repr(hits)}: it must be a list of Hit")
        self.hits, self.index, self.dim, self.images = list(hits), index, dim, dict(images or {})
        self.requests: list[tuple[str, str, Any]] = []
        self.transport = httpx2.MockTransport(self._answer)
        self._errors: deque[httpx2.Response | Exception] = deque()

    def __repr__(self) -> str:
        return f"FakeService({len(self.hits)} hits)"

    def fail(self, status: int, detail: str = "as the test asks", times: int = 1) -> None:
        """Answer the next `times` requests with an HTTP status, such as 503, and an error message."""
        if isinstance(status, bool) or not isinstance(status, int) or not 400 <= status <= 599:
            raise ConfigError(f"status is {status!r}: it must be an HTTP status of an error, 400 to 599")
        if isinstance(times, bool) or not isinstance(times, int) or times < 0:
            raise ConfigError(f"times is {times!r}: it must be a whole number, 0 or more")
        headers = {"retry-after": "0"} if status in (429, 503) else {}
        self._errors += [httpx2.Response(status, json={"detail": detail}, headers=headers) for _ in range(times)]

    def disconnect(self, times: int = 1) -> None:
        """Do not answer the next `times` requests, as a service that is not running."""
        self._errors += [httpx2.ConnectError("all connection attempts failed") for _ in range(times)]

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        body: Any = json.loads(request.content) if request.content else None
        path = unquote(request.url.path)
        self.requests.append((request.method, path, body))
        if self._errors:
            error = self._errors.popleft()
            if isinstance(error, Exception):
                raise error
            return error
        match request.method, path.strip("/").split("/"):
            case "POST", ["v1", "search"]:
                return self._search(body)
            case "POST", ["v1", "embed"]:
                vectors = {kind: [self._vector(item) for item in body.get(kind) or []] for kind in ("texts", "images")}
                return httpx2.Response(200, json={"encoder": "fake", "dim": self.dim, **vectors})
            case "GET", ["v1", "indices"]:
                return httpx2.Response(200, json={"indices": [self._description()]})
            case "GET", ["v1", "image", self.index, id] if id.isdigit() and int(id) in self.images:
                return httpx2.Response(200, content=self.images[int(id)])
            case "POST", ["metadata"]:
                rows = {hit.id: {"id": hit.id, "metadata": hit.metadata} for hit in self.hits}
                return httpx2.Response(200, json=[rows[id] for id in body["ids"] if id in rows])
            case "GET", ["healthz" | "readyz"]:
                return httpx2.Response(200, json={"status": "ok", "problems": {}})
        return httpx2.Response(404, json={"detail": f"{path}: not found"})

    def _search(self, body: dict[str, Any]) -> httpx2.Response:
        if sum(body.get(kind) not in (None, "") for kind in _KINDS) != 1:
            return httpx2.Response(422, json={"detail": f"give exactly one of {', '.join(_KINDS)}"})
        if body.get("index", self.index) != self.index:
            return httpx2.Response(404, json={"detail": f"no index {body['index']!r}; there is {self.index}"})
        threshold, columns = body.get("threshold", -1.0), body.get("columns")
        hits = [hit for hit in self.hits if hit.score >= threshold][: body.get("k", 10)]
        answers = [
            {
                "id": hit.id,
                "score": hit.score,
                "image": f"/v1/image/{self.index}/{hit.id}?version=fake" if hit.id in self.images else None,
                "metadata": hit.metadata if columns is None else {name: hit.metadata.get(name) for name in columns},
            }
            for hit in hits
        ]
        rest = {"index": self.index, "version": "fake", "scanned": len(self.hits), "complete": True}
        return httpx2.Response(200, json={"hits": answers, **rest})

    def _vector(self, item: str) -> list[float]:
        """A vector (dim,) of unit norm that depends on the item alone."""
        numbers = random.Random(hashlib.sha256(item.encode()).digest())
        values = [numbers.gauss(0, 1) for _ in range(self.dim)]
        norm = sum(value * value for value in values) ** 0.5
        return [value / norm for value in values]

    def _description(self) -> dict[str, Any]:
        """The index as GET /v1/indices describes it."""
        columns = list(dict.fromkeys(name for hit in self.hits for name in hit.metadata))
        about = {"name": self.index, "version": "fake", "rows": len(self.hits), "dim": self.dim, "encoder": "fake"}
        return {**about, "modalities": ["image", "text"], "text": True, "columns": columns, "recall": {}}
