"""Ten thousand mixed requests, some of them malformed: no 500, no wrong answer, no leak."""

from __future__ import annotations

import base64
import http.client
import json
import random
import re
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.corpus import jpeg
from tests.servers.processes import mine
from tests.servers.serving import ROWS, make_index, running

pytestmark = pytest.mark.slow

REQUESTS, CLIENTS = 10_000, 8


def requests(draw: random.Random) -> tuple[str, str, Any, int]:
    """Return (method, path, body, expected status) of a random request."""
    seed, number = draw.randrange(2), draw.randrange(ROWS // 2)
    picture = base64.b64encode(jpeg(seed * 1_000_003 + number)).decode()
    text = " ".join(draw.choices(["a", "red", "cat", "caption", "tar", str(draw.random())], k=3))
    deep: Any = {"text": text, "k": 10, "deduplicate": True, "filters": [{"column": "number", "max": 9}]}
    return draw.choice(
        [
            ("POST", "/v1/search", {"image": picture, "k": 1, "check": (seed, number)}, 200),
            ("POST", "/v1/search", {"text": text}, 200),
            ("POST", "/v1/search", deep, 200),
            ("POST", "/v1/search", {"queries": [{"text": text}, {"id": 3, "weight": -0.5}]}, 200),
            ("POST", "/knn-service", {"text": text, "num_images": 5, "modality": "image"}, 200),
            ("POST", "/metadata", {"ids": [number]}, 200),
            ("POST", "/v1/embed", {"texts": [text]}, 200),
            ("GET", f"/v1/image/index/{number}", None, 200),
            ("GET", "/metrics", None, 200),
            ("GET", "/v1/image/index/1000", None, 404),
            ("POST", "/v1/search", {"image": picture[: draw.randrange(4, 40) // 4 * 4]}, 400),
            ("POST", "/v1/search", {"embedding": [1.0]}, 400),
            ("POST", "/v1/search", {"text": 3}, 422),
            ("POST", "/knn-service", b"\xff{", 422),
            ("POST", "/nowhere", {}, 404),
        ]
    )


def resident(variable: str) -> int:
    """Return the bytes of anonymous memory of the server."""
    (pid,) = mine(variable)
    match = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match
    return int(match[1]) * 1024


def test_ten_thousand_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOAK", str(tmp_path))
    wrong: list[Any] = []

    def client(address: Any, seed: int, count: int) -> None:
        draw, connection = random.Random(seed), http.client.HTTPConnection(address.hostname, address.port, timeout=60)
        for _ in range(count):
            method, path, body, status = requests(draw)
            check = body.pop("check", None) if isinstance(body, dict) else None
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, data)
            response = connection.getresponse()
            content = response.read()
            if response.status != status:
                wrong.append((method, path, body, response.status, content[:200]))
            elif check:
                metadata = json.loads(content)["hits"][0]["metadata"]
                if (metadata["seed"], metadata["number"]) != check:
                    wrong.append((check, metadata))
        connection.close()

    def ask(count: int, seed: int) -> int:
        threads = [
            threading.Thread(target=client, args=(urlsplit(url), seed * 100 + number, count // CLIENTS))
            for number in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return resident(f"SOAK={tmp_path}") if not wrong else 0

    with running({"index": make_index(tmp_path)}, "--text-cache", "1MB") as url:
        settled = ask(REQUESTS * 3 // 10, 1)
        after = ask(REQUESTS * 7 // 10, 2)
    assert wrong == []
    assert after < settled + 8 * 2**20, (settled, after)
