"""Smaller copies of images: /v1/image?width=, and images that only have a URL."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from clip_batch.errors import DecodeError
from clip_batch.serve.search import images
from clip_batch.serve.search.thumbnails import SMALL, WIDTHS, thumbnail
from clip_batch.storage import web
from tests.corpus import bomb, encode, jpeg, write_tar
from tests.servers.serving import index_of, served

MOST = 50_000_000


def photograph(width: int = 3000, height: int = 2000, seed: int = 0) -> Image.Image:
    """As large, and as noisy, as a camera makes them; the top is red and the bottom blue."""
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3), np.uint8)
    noise[: height // 2, :, 0] += 160
    noise[height // 2 :, :, 2] += 160
    return Image.fromarray(noise)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_a_photograph_becomes_small_and_keeps_its_shape() -> None:
    data = encode(photograph(), quality=90)
    for width in WIDTHS:
        copy = thumbnail(data, width, MOST)
        assert opened(copy).size == (width, round(width * 2 / 3))
    assert len(thumbnail(data, 320, MOST)) < 40_000 < 1_000_000 < len(data)
    top, bottom = opened(thumbnail(data, 320, MOST)).getpixel((9, 9)), opened(copy).getpixel((9, 1000))
    assert isinstance(top, tuple) and isinstance(bottom, tuple)
    assert top[0] > top[2] + 100 and bottom[2] > bottom[0] + 100


@pytest.mark.parametrize("turn", range(1, 9))
def test_it_is_upright_whatever_its_orientation(turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encode(photograph(900, 600), exif=exif)
    copy = opened(thumbnail(data, 160, MOST))
    assert copy.size == ((160, 107) if turn < 5 else (160, 240))
    assert 0x0112 not in copy.getexif()
    red = {1: "top", 2: "top", 3: "bottom", 4: "bottom", 5: "left", 6: "right", 7: "right", 8: "left"}[turn]
    places = {"top": (80, 5), "bottom": (80, copy.height - 5), "left": (5, 80), "right": (155, 80)}
    pixel = copy.convert("RGB").getpixel(places[red])
    assert isinstance(pixel, tuple) and pixel[0] > pixel[2] + 90


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "I;16", "1"])
def test_every_mode_becomes_a_picture_that_browsers_show(mode: str) -> None:
    image = photograph(800, 500)
    image = (
        image.convert("L").convert(mode)
        if mode == "LA"
        else image.convert("I").convert(mode)
        if mode == "I;16"
        else image.convert(mode)
    )
    copy = opened(thumbnail(encode(image, "TIFF" if mode == "CMYK" else "PNG"), 160, MOST))
    assert (copy.size, copy.format) == ((160, 100), "WEBP" if mode in ("RGBA", "LA") else "JPEG")
    assert copy.mode in ("L", "RGB", "RGBA")


def test_small_images_are_their_own_copies_and_none_is_made_larger() -> None:
    small = jpeg(3)
    assert thumbnail(small, 160, MOST) is small
    heavy = encode(photograph(150, 150), "PNG")
    assert len(heavy) > SMALL
    assert opened(thumbnail(heavy, 320, MOST)).size == (150, 150)


def test_a_panorama_and_a_tower() -> None:
    assert opened(thumbnail(encode(photograph(4000, 400)), 640, MOST)).size == (640, 64)
    assert opened(thumbnail(encode(photograph(300, 4000)), 320, MOST)).size == (96, 1280)


@pytest.mark.parametrize("data", [b"", b"<svg onload=alert(1)>", jpeg()[:100], bomb()])
def test_what_is_no_picture_has_no_copy(data: bytes) -> None:
    with pytest.raises(DecodeError):
        thumbnail(data, 160, 1_000_000)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "clip_batch" / "thumbnails"


PICTURES = [encode(photograph(seed=1), quality=92), jpeg(2), jpeg(9)]
"""A photograph, a small picture, and one of which the tar loses the end."""


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("thumbnails")
    files = [(f"{i}.jpg", data) for i, data in enumerate(PICTURES)]
    tar = write_tar(str(folder / "0.tar"), files)
    index = index_of([tar], folder)
    with tarfile.open(tar) as opened:
        member = opened.getmember("2.jpg")
    with open(tar, "r+b") as file:
        file.seek(member.offset_data + member.size // 3)
        file.write(bytes(member.size - member.size // 3))
    return index


@pytest.fixture
def client(index: str, cache: Path) -> Iterator[TestClient]:
    with served(index) as client:
        yield client


def paths(client: TestClient) -> dict[str, str]:
    """The path of each image, by key."""
    hits = client.post("/v1/search", json={"text": "a", "k": 10}).json()["hits"]
    return {hit["metadata"]["key"]: hit["image"] for hit in hits}


def test_the_service_makes_a_copy_once(client: TestClient, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = paths(client)["0"]
    answer = client.get(f"{path}&width=300")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg")
    assert opened(answer.content).size == (320, 213)
    assert len(answer.content) < 40_000
    assert client.get(path).content == PICTURES[0]
    assert [file.stat().st_size for file in cache.rglob("*") if file.is_file()] == [len(answer.content)]
    monkeypatch.setattr(images, "thumbnail", lambda *_: pytest.fail("it was made again"))
    assert client.get(f"{path}&width=320").content == answer.content
    again = client.get(f"{path}&width=301", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get(path, headers={"if-none-match": answer.headers["etag"]}).status_code == 200


def test_small_and_wrong_widths(client: TestClient) -> None:
    path = paths(client)["1"]
    assert client.get(f"{path}&width=320").content == PICTURES[1]
    cut = paths(client)["2"]
    assert client.get(f"{cut}&width=160").content == client.get(cut).content, "a browser may show a part of it"
    for width in ("0", "-1", "x", "100001"):
        assert client.get(f"{path}&width={width}").status_code == 422


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An index whose pictures cannot be read, and which has addresses of some."""
    folder = tmp_path_factory.mktemp("linked")
    links = ["https://pictures.example/a.jpg", "ftp://pictures.example/b.jpg", "https://pictures.example/c.jpg"]
    files = []
    for i, link in enumerate(links):
        files += [(f"{i}.jpg", jpeg(i)), (f"{i}.json", json.dumps({"url": link}).encode())]
    return index_of([write_tar(str(folder / "0.tar.gz"), files, mode="w:gz")], folder)


def test_pictures_by_url_are_off_unless_asked_for(linked: str, cache: Path) -> None:
    with served(linked) as client:
        assert set(paths(client).values()) == {None}
        assert client.get("/v1/indices").json()["page_images"] == "off"
        assert client.get("/v1/image/index/0").status_code == 404


def test_pictures_by_url_are_fetched_guarded_and_made_smaller(
    linked: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []

    def fetch(url: str, limit: int, timeout: float, private: bool = False) -> bytes:
        fetched.append(url)
        assert private is False
        if "c.jpg" in url:
            raise web.FetchError("private_address", "names pictures.example, which is not a public address")
        return PICTURES[0]

    monkeypatch.setattr(web, "fetch", fetch)
    with served(linked, page_images="proxy") as client:
        found = paths(client)
        assert found["1"] is None
        for width, size in ((160, 160), (None, 1280)):
            answer: Any = client.get(found["0"] + (f"&width={width}" if width else ""))
            assert opened(answer.content).width == size, "never the bytes that a stranger wrote"
        refused = client.get(found["2"])
        assert (refused.status_code, "not a public address" in refused.json()["detail"]) == (404, True)
        client.get(found["0"])
        assert fetched.count("https://pictures.example/a.jpg") == 2
