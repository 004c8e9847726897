"""Writes tars for tests: good ones of random JPEGs, and one of each thing that goes wrong.

Everything is random by seed, so that two runs write the same bytes.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_batch.samples import read_slice
from clip_batch.storage.store import Store
from clip_batch.storage.tree import list_tree
from clip_batch.types import EncoderSpec, Failure, Partition, PassedOver, Plan, Sample, Shard, Slice

Files = Sequence[tuple[str, bytes]]


HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAX1tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAACJpbG9jAAAAAERA"
    "AAEAAQAAAAABoQABAAAAAAAAACQAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRtAAAAAAABAAAA/WlwcnAAAADdaXBjbwAA"
    "AHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQAqQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbq"
    "5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29scm5jbHgAAQANAAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAAAAAoY2xhcAAAAEAAAAABAAAA"
    "IAAAAAEAAAAAAAAAAv///+AAAAACAAAAEHBpeGkAAAAAAwgICAAAABhpcG1hAAAAAAAAAAEAAQWBAgMFhAAAACxtZGF0AAAAICgBrwtg9eWDr//5zDW+"
    "6uj5rmVUvcyd/ox5v0XwifTg"
)
"""64 x 32 pixels in HEIC, which Pillow alone does not write: blue, then red."""


def picture(seed: int = 0, side: int = 32, mode: str = "RGB") -> Image.Image:
    """Smooth random colours: no two seeds look alike, and JPEG keeps them so."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).convert(mode)


def encode(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def jpeg(seed: int = 0, side: int = 32) -> bytes:
    return encode(picture(seed, side))


def write_tar(path: str, files: Files, format: int = tarfile.USTAR_FORMAT, mode: str = "w") -> str:
    """A tar of (name, content) in that order; `mode` "w:gz" compresses it."""
    with tarfile.open(path, mode, format=format) as tar:  # type: ignore[call-overload]
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def good_files(
    n: int,
    seed: int = 0,
    side: int = 32,
    captions: Sequence[bool] | None = None,
    broken: Sequence[bool] | None = None,
    json_fields: dict[str, Any] | None = None,
) -> list[tuple[str, bytes]]:
    """Members of n samples (jpg, txt, json); `captions` says which have one, `broken` which JPEGs are cut."""
    files = []
    for i in range(n):
        key = f"{seed:03d}{i:06d}"
        image = jpeg(seed * 1_000_003 + i, side)
        files.append((f"{key}.jpg", image[: len(image) // 2] if broken and broken[i] else image))
        if captions is None or captions[i]:
            files.append((f"{key}.txt", f"caption {i} of tar {seed}".encode()))
        fields = {"number": i, "seed": seed} if json_fields is None else json_fields
        files.append((f"{key}.json", json.dumps(fields).encode()))
    return files


def good_tar(path: str, n: int, seed: int = 0, **options: Any) -> str:
    """A well-formed tar of `good_files`; its path."""
    return write_tar(path, good_files(n, seed, **options))


def bomb(side: int = 30_000) -> bytes:
    """A PNG of side x side black pixels, in about 110 kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeeze = zlib.compressobj(9)
    rows = b"".join(squeeze.compress(bytes(1 + side // 8)) for _ in range(side)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def animated(format: str, side: int = 16) -> bytes:
    """A red frame, then a blue one."""
    red, blue = (Image.new("RGB", (side, side), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if format == "WEBP" else {}
    return encode(red, format, save_all=True, append_images=[blue], duration=100, **options)


def rotated(side: int = 32) -> bytes:
    """A JPEG of 2:1 whose EXIF says: turn by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(picture(7, side).resize((2 * side, side)), exif=exif)


def grey16(kind: str = "PNG") -> bytes:
    """A ramp over all of 16 bits, 16 x 16 pixels."""
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    return encode(Image.fromarray(ramp), kind)


def transparent_palette() -> bytes:
    image = picture(3).quantize(8)
    return encode(image, "PNG", transparency=bytes(range(0, 256, 32)))


def odd_images() -> dict[str, bytes]:
    """Images that are unusual and fine, by name (with the extension they go by)."""
    return {
        "cmyk.jpg": encode(picture(1, mode="CMYK")),
        "grey.jpg": encode(picture(2, mode="L")),
        "grey16.png": grey16(),
        "palette.png": encode(picture(3).quantize(8), "PNG"),
        "transparent_palette.png": transparent_palette(),
        "alpha.png": encode(picture(4, mode="RGBA"), "PNG"),
        "grey_alpha.png": encode(picture(4, mode="LA"), "PNG"),
        "gif.jpg": animated("GIF"),
        "animated.webp": animated("WEBP"),
        "animated.png": animated("PNG"),
        "rotated.jpg": rotated(),
        "one_pixel.png": encode(picture(5, 1), "PNG"),
        "one_bit.png": encode(picture(5, mode="1"), "PNG"),
    }


def bad_images() -> dict[str, tuple[bytes, str]]:
    """Images that cannot be had, by name, with the reason."""
    return {
        "cut.jpg": (jpeg(1)[:-200], "undecodable_image"),
        "cut.png": (encode(picture(1), "PNG")[:-40], "undecodable_image"),
        "empty.jpg": (b"", "undecodable_image"),
        "html.jpg": (b"<html>404</html>", "undecodable_image"),
        "eps.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "undecodable_image"),
        "bomb.png": (bomb(), "too_many_pixels"),
        "needle.png": (encode(Image.new("L", (1, 20_000)), "PNG"), "extreme_aspect"),
    }


def flip_header_bit(path: str, name: str) -> int:
    """Break the header of one member (its checksum no longer fits); the byte where that header starts."""
    with tarfile.open(path) as tar:
        offset = tar.getmember(name).offset
    with open(path, "r+b") as file:
        file.seek(offset + 130)
        byte = file.read(1)[0]
        file.seek(offset + 130)
        file.write(bytes([byte ^ 1]))
    return offset


def cut_file(path: str, name: str, keep: int = 10) -> None:
    """Truncate a tar `keep` bytes into the content of one member."""
    with tarfile.open(path) as tar:
        offset = tar.getmember(name).offset_data
    with open(path, "r+b") as file:
        file.truncate(offset + keep)


def plan_of(format: str = "tar", **options: Any) -> Plan:
    """A plan without partitions, enough to read by."""
    return Plan((Partition(0, ()),), EncoderSpec("fake:8", "", "0"), format=format, **options)


def read(path: str, start: int = 0, stop: int | None = None, **options: Any) -> list[Sample | Failure]:
    """Every sample and failure of a tar."""
    found = read_slice(Slice(Shard(path), start, stop), plan_of(**options))
    return [item for item in found if not isinstance(item, PassedOver)]


def passed_over(path: str, start: int = 0, stop: int | None = None, **options: Any) -> dict[str, int]:
    """Number of a tar's members that are part of no sample and of no failure, by extension."""
    *_, last = [PassedOver(path, {}), *read_slice(Slice(Shard(path), start, stop), plan_of(**options))]
    return last.files if isinstance(last, PassedOver) else {}


def samples(path: str) -> Iterator[Sample]:
    return (item for item in read(path) if isinstance(item, Sample))


def failures(items: Iterable[Sample | Failure]) -> list[tuple[str | None, str]]:
    """(key, reason) of each failure."""
    return [(item.key, item.reason) for item in items if isinstance(item, Failure)]


def unprivileged(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run Python as a user whom the modes of files bind, as they do not bind root."""
    root = os.geteuid() == 0
    if root and not shutil.which("setpriv"):
        pytest.skip("root, and no setpriv to give up root's rights")
    drop = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if root else []
    return subprocess.run([*drop, sys.executable, *arguments], capture_output=True, text=True, timeout=120)


def names_in(store: Store) -> list[str]:
    """The sorted names of all files in a store that are not hidden."""
    return [entry.url.removeprefix(f"{store.url}/") for entry in list_tree(store.url, store.options).entries]


def tar_keys(path: str) -> list[str]:
    """The keys of a tar by the standard library, in order, each once."""
    with tarfile.open(path) as tar:
        return list(dict.fromkeys(member.name.partition(".")[0] for member in tar))
