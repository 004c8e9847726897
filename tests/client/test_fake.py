"""`FakeService` answers both clients as the real service does."""

from __future__ import annotations

import asyncio
import pickle
import re
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from clip_batch.client import AsyncClient, Client, FakeService
from clip_batch.errors import ConfigError, ServiceError, ServiceUnavailable
from clip_batch.types import Hit
from tests import ROOT

HITS = [Hit(3, 0.9, {"caption": "a", "width": 5}), Hit(1, 0.5, {"caption": "b", "width": None}), Hit(2, 0.1, {})]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_batch.client.clients.back_off", lambda attempt: 0.0)


def test_the_snippet_of_serve_md() -> None:
    [snippet] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serve.md").read_text(), re.DOTALL)
    exec(snippet, {})


def test_each_method_of_the_client_is_answered() -> None:
    service = FakeService(HITS, "pictures", 16, {3: b"jpeg"})
    with Client("http://host", transport=service.transport) as client:
        assert client.search(text="x") == client.search(embedding=[1.0, 0.0], index="pictures") == HITS
        assert client.search(id=3, k=1) == HITS[:1]
        assert client.search(queries=[{"text": "x"}, {"id": 1, "weight": -1.0}], threshold=0.5) == HITS[:2]
        assert client.search(image=b"jpeg", columns=["width"])[0].metadata == {"width": 5}
        assert list(client.search_many(["x", "y"], k=1)) == [HITS[:1]] * 2
        vectors = client.embed_text(["x", "y", "x"])
        assert (vectors.dtype, vectors.shape) == (np.float32, (3, 16))
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        assert (vectors[0] == vectors[2]).all() and not (vectors[0] == vectors[1]).any()
        assert client.embed_image(b"jpeg").shape == (1, 16)
        assert client.metadata("pictures", [1, 3]) == [HITS[1].metadata, HITS[0].metadata]
        assert client.image("pictures", 3) == b"jpeg"
        [served] = client.indices()
        assert (served["name"], served["rows"], served["columns"]) == ("pictures", 3, ["caption", "width"])
    assert service.requests[0] == ("POST", "/v1/search", {"text": "x"})


@pytest.mark.parametrize(
    ("query", "status"), [({}, 422), ({"text": "x", "id": 1}, 422), ({"text": "x", "index": "other"}, 404)]
)
def test_a_wrong_search_is_refused_as_the_service_does(query: dict[str, object], status: int) -> None:
    with Client("http://host", transport=FakeService(HITS).transport) as client:
        with pytest.raises(ServiceError) as caught:
            client.search(**query)  # type: ignore[arg-type]
        assert caught.value.status == status
        with pytest.raises(ServiceError, match="not found"):
            client.image("index", 99)


def test_errors_on_demand() -> None:
    service = FakeService(HITS)
    with Client("http://host", transport=service.transport, retries=2) as client:
        service.fail(400, "no such column")
        with pytest.raises(ServiceError, match="no such column"):
            client.search(text="x")
        service.fail(503, times=2)
        assert client.search(text="x") == HITS
        service.disconnect(3)
        with pytest.raises(ServiceUnavailable, match="does not answer"):
            client.search(text="x")
    assert len(service.requests) == 1 + 3 + 3


def test_an_async_client_takes_the_same_transport() -> None:
    async def search() -> list[list[Hit]]:
        async with AsyncClient("http://host", transport=FakeService(HITS).transport) as client:
            return [hits async for hits in client.search_many(["x", "y"])]

    assert asyncio.run(search()) == [HITS, HITS]


def test_it_loads_nothing_heavy() -> None:
    script = (
        "import sys; from clip_batch import FakeService; FakeService([]); print({'numpy', 'fastapi'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_hits_carry_what_the_service_says_and_their_images() -> None:
    service = FakeService(HITS, "pictures", 16, {3: b"\xff\xd8\xff a picture"})
    with Client("http://host", transport=service.transport).wait() as client:
        hits = client.search("anything", k=2)
        assert (hits.index_name, hits.version, hits.scanned, hits.complete) == ("pictures", "fake", 3, True)
        assert hits == HITS[:2] and hits.with_image == {3}
        assert hits[0].image() == b"\xff\xd8\xff a picture"
        assert service.requests[-1] == ("GET", "/v1/image/pictures/3", None)
        with pytest.raises(ServiceError, match="404"):
            hits[1].image()
        shown = hits._repr_html_()
        assert shown.count("data:image/jpeg;base64,") == 1 and shown.count("no picture to show") == 1
        copied = pickle.loads(pickle.dumps(hits[0]))
        assert copied == hits[0] and asdict(copied) == asdict(HITS[0])
        with pytest.raises(ConfigError, match="two texts"):
            client.search("a", text="b")

    async def run() -> None:
        async with AsyncClient("http://host", transport=service.transport) as client:
            hits = await (await client.wait()).search("anything", k=1)
            assert await client.image(hits.index_name, hits[0].id, hits.version) == b"\xff\xd8\xff a picture"

    asyncio.run(run())


def test_wait_gives_up_and_says_why() -> None:
    service = FakeService(HITS)
    with Client("http://host", transport=service.transport) as client:
        service.fail(503, "the encoder is being loaded", times=2)
        assert client.wait(5) is client
        service.disconnect(times=100)
        with pytest.raises(ServiceUnavailable, match=r"is not ready after 0.3 s: all connection attempts failed"):
            client.wait(0.3)
    service = FakeService(HITS)
    service.fail(404)
    with Client("http://host", transport=service.transport) as client, pytest.raises(ServiceError, match="404"):
        client.wait(5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"timeout": "x"}, "timeout is 'x': it must be a number of seconds over 0"),
        ({"timeout": 0}, "timeout is 0"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"retries": "4"}, "retries is '4': it must be a whole number"),
        ({"retries": -1}, "retries is -1"),
        ({"token": 5}, "token is a int"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, Any], says: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ConfigError, match=says):
            kind("http://host", **options)


@pytest.mark.parametrize(("status", "times"), [(200, 1), ("503", 1), (True, 1), (600, 1), (503, -1), (503, "x")])
def test_only_errors_can_be_asked_of_a_fake_service(status: Any, times: Any) -> None:
    with pytest.raises(ConfigError, match="it must be"):
        FakeService(HITS).fail(status, times=times)
