"""What cannot be decoded is named, with the remedy; HEIC is read where a library for it is installed."""

from __future__ import annotations

import gzip
import io

import numpy as np
import pytest
from PIL import Image

from clip_batch.errors import DecodeError
from clip_batch.samples import decode, kinds
from clip_batch.samples.decode import open_image
from tests import corpus

LIMIT = 10**8

AVIF = b"\0\0\0\x1cftypavif" + bytes(16)


def why(data: bytes) -> str:
    with pytest.raises(DecodeError) as caught:
        open_image(data, LIMIT)
    assert caught.value.reason == "undecodable_image"
    assert caught.value.message.isprintable()
    return caught.value.message


def without_its_end(kind: str) -> bytes:
    data = corpus.encode(corpus.picture(1), kind)
    return data[: len(data) * 3 // 4]


@pytest.mark.parametrize(
    ("data", "named", "remedy"),
    [
        (b"", "0 bytes", "again"),
        (bytes(5000), "5,000 bytes that are all zero", "again"),
        (b"\xef\xbb\xbf \n<!DOCTYPE html><title>404</title>", "HTML page", "again"),
        (b"<HTML><svg></svg></HTML>", "HTML page", "again"),
        (b'<?xml version="1.0"?><!-- a cat --><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG", "convert"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML", "again"),
        (b'{"error": "not found"}', 'JSON, not a picture (\'{"error": "not found"}\')', "again"),
        (b"Not found\n", "text, not a picture ('Not found')", "again"),
        ("r\u00e9f\u00e9rence".encode("utf-16"), "text", "again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS", "git lfs pull"),
        (b"%PDF-1.7\n", "PDF", "convert"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript", "convert"),
        (b"8BPS\0\1" + bytes(20), "Photoshop", "export"),
        (gzip.compress(b"x", mtime=0), "gzip", "unpack"),
        (b"PK\3\4" + bytes(30), "archive", "unpack"),
        (b"\0\0\0\x18ftypisom" + bytes(12), "video", "frames"),
        (b"\x1aE\xdf\xa3" + bytes(12), "video", "frames"),
        (b"\xff\x0a\x7f", "JPEG XL", "convert"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL", "convert"),
        (b"\0\0\0\x18ftypcrx " + bytes(12), "raw file", "convert"),
        (b"II*\0\x08\0\0\0" + bytes(30), "TIFF of a kind", "convert"),
        (without_its_end("JPEG"), "a JPEG that breaks off", "again"),
        (without_its_end("PNG"), "a PNG that breaks off", "again"),
        (without_its_end("WEBP"), "a WebP that breaks off", "again"),
        (without_its_end("BMP"), "a broken BMP", "again"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "a PNG that breaks off", "again"),
        (AVIF, "AVIF", "again" if kinds.has_avif() else "pip install 'pillow>=11.3'"),
        (bytes(range(7, 47)), "no picture of a known format", "again"),
    ],
)
def test_what_is_no_picture_is_named(data: bytes, named: str, remedy: str) -> None:
    message = why(data)
    assert named in message and remedy in message.partition(": ")[2]


def test_raw_files_are_not_their_small_preview() -> None:
    preview = Image.new("RGB", (16, 12))
    for tags in ({50706: b"\1\4\0\0"}, {254: 1, 330: 8}):
        assert "raw file" in why(corpus.encode(preview, "TIFF", tiffinfo=tags))
    assert open_image(corpus.encode(preview, "TIFF", tiffinfo={254: 0}), LIMIT).size == (16, 12)


def test_without_a_reader_the_remedy_for_heic_is_to_install_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_add_heif", lambda: False)
    monkeypatch.setattr(decode, "FORMATS", tuple(name for name in decode.FORMATS if name != "AVIF"))
    for data in (corpus.HEIC, corpus.HEIC.replace(b"ftypheic", b"ftypmif1")):
        assert "pip install pillow-heif" in why(data)
    monkeypatch.setattr(kinds, "has_avif", lambda: False)
    assert "pip install 'pillow>=11.3'" in why(AVIF)


def test_heic_is_read_where_a_library_reads_it() -> None:
    pytest.importorskip("pi_heif")
    image = open_image(corpus.HEIC, LIMIT)
    (blue, red) = np.asarray(image)[16, [10, 50]].astype(int)
    assert image.size == (64, 32) and blue[2] > 200 > blue[0] and red[0] > 200 > red[2]
    assert open_image(corpus.HEIC.replace(b"ftypheic", b"ftypmif1"), LIMIT).size == (64, 32)
    assert "a HEIC picture that cannot be decoded" in why(corpus.HEIC[:400])
    with pytest.raises(DecodeError, match="64 x 32 pixels"):
        open_image(corpus.HEIC, 64 * 32 - 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", "AVIF", "ICO"])
def test_formats_are_known_by_their_first_bytes(kind: str) -> None:
    if kind.upper() not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, kind)
    assert kinds.picture(buffer.getvalue()) == kind
    assert open_image(buffer.getvalue(), LIMIT).size == (16, 16)
