"""Mutated tars, images and side-cars: bits flipped, bytes overwritten, cut, moved, joined; all random by seed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import tarfile
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from tests import corpus

BLOCK = 512

_INTERESTING = (
    b"",
    b"\0" * 8,
    b"\xff" * 8,
    b"\x80" + b"\xff" * 7,
    b"7" * 11,
    b"-1\0",
    b"99999999999",
    b"\x7f\xff\xff\xff",
)
"""Values that parsers of sizes and counts fall over."""


_EXTENSIONS = {"TIFF": "tif", "JPEG2000": "jp2"}


def images() -> dict[str, bytes]:
    """A small picture in each format that Pillow writes and clip-batch takes, and in odd modes, by file name."""
    made = corpus.odd_images()
    made["plain.jpg"] = corpus.jpeg(1)
    made["progressive.jpg"] = corpus.encode(corpus.picture(2), "JPEG", progressive=True, quality=60)
    for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "ICO", "TGA", "JPEG2000"):
        if kind in Image.SAVE:
            made[f"plain.{_EXTENSIONS.get(kind, kind.lower())}"] = corpus.encode(corpus.picture(3), kind)
    made["float.tif"] = corpus.encode(
        Image.fromarray(np.linspace(0, 255, 256, dtype=np.float32).reshape(16, 16)), "TIFF"
    )
    made["grey16.tif"] = corpus.grey16("TIFF")
    made["lzw.tif"] = corpus.encode(corpus.picture(4), "TIFF", compression="tiff_lzw")
    made["jpeg.tif"] = corpus.encode(corpus.picture(4), "TIFF", compression="jpeg")
    return made


def _flip_bits(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _overwrite(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    new = rng.choice(_INTERESTING) if rng.random() < 0.5 else rng.randbytes(rng.choice((1, 4, 32, 600)))
    data[at : at + len(new)] = new


def _truncate(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def _remove(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.choice((1, 3, 100, BLOCK, 3 * BLOCK))]


def _repeat(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    data[at:at] = data[at : at + rng.choice((1, 100, BLOCK, 5 * BLOCK))]


def _zero(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data)) // BLOCK * BLOCK
    length = min(rng.choice((BLOCK, 2 * BLOCK)), len(data) - at)
    data[at : at + length] = bytes(length)


def _swap_blocks(rng: random.Random, data: bytearray) -> None:
    """Swap two blocks, which in a tar are often headers."""
    count = len(data) // BLOCK
    if count > 1:
        one, other = (rng.randrange(count) * BLOCK for _ in range(2))
        data[one : one + BLOCK], data[other : other + BLOCK] = data[other : other + BLOCK], data[one : one + BLOCK]


_ANYWHERE = (_flip_bits, _overwrite, _truncate, _remove, _repeat, _zero, _swap_blocks)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """One to four changes of these bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if changed:
            rng.choice(_ANYWHERE)(rng, changed)
    return bytes(changed)


def with_changed_header(rng: random.Random, tar: bytes) -> bytes:
    """The tar with a changed field in one header, whose checksum is right again: a lie that a parser believes."""
    changed = bytearray(tar)
    headers = [at for at in range(0, len(tar) - BLOCK, BLOCK) if tar[at + 257 : at + 262] == b"ustar"]
    if headers:
        at = rng.choice(headers)
        field, length = rng.choice(((0, 100), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)))
        new = rng.choice(
            (*_INTERESTING, rng.randbytes(length), b"../../x.jpg", b"a\xe9.jpg", b"00000000777", b"1", b"x", b"S")
        )
        changed[at + field : at + field + length] = new[:length].ljust(length, b"\0")
        changed[at + 148 : at + 156] = b" " * 8
        changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + BLOCK])
    return bytes(changed)


def tar_of(rng: random.Random, pictures: dict[str, bytes], broken: Callable[[bytes], bytes] | None = None) -> bytes:
    """A well-formed tar of a few samples; `broken` changes each picture or side-car at times."""
    buffer = io.BytesIO()
    form = rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=buffer, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for number in range(rng.randrange(1, 7)):
            key = rng.choice(("{:06d}", "deep/er/{:03d}", "红{}", "caf\udce9{}", "x" * 98 + "{}", "{}.dotted")).format(
                number
            )
            name = rng.choice(list(pictures))
            extension = name.rpartition(".")[2]
            parts = {extension: pictures[name], "txt": f"a caption {number}".encode()}
            if rng.random() < 0.5:
                parts["json"] = b'{"width": %d, "score": 0.5, "tags": ["a", null]}' % number
            if rng.random() < 0.1:
                parts["cls"] = b"7"
            for extension, content in parts.items():
                content = broken(content) if broken and content and rng.random() < 0.7 else content
                info = tarfile.TarInfo(f"{key}.{extension}")
                if form == tarfile.USTAR_FORMAT and len(info.name) > 99:
                    info.name = info.name[-90:]
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            if rng.random() < 0.1:
                link = tarfile.TarInfo(f"link{number}.jpg")
                link.type = rng.choice((tarfile.LNKTYPE, tarfile.SYMTYPE))
                link.linkname = rng.choice((f"{key}.{extension}"[:90], "nowhere.jpg", link.name))
                tar.addfile(link)
    return buffer.getvalue()


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def tars(seed: int, count: int) -> Iterator[bytes]:
    """`count` tars: in a third the pictures and side-cars are mutated, in the others the tar itself is."""
    rng = random.Random(seed)
    pictures = images()
    for number in range(count):
        if number % 3 == 0:
            yield tar_of(rng, pictures, lambda content: mutated(rng, content))
            continue
        tar = tar_of(rng, pictures)
        if rng.random() < 0.1:
            tar += tar_of(rng, pictures)
        change = mutated if number % 3 == 1 else with_changed_header
        if rng.random() < 0.1:
            compress: Callable[[bytes], bytes] = rng.choice((_gzip, bz2.compress, lzma.compress))
            tar = compress(tar)
            change = mutated
        yield change(rng, tar)
