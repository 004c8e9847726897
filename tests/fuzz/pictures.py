"""Decodes mutated pictures in every way: `python -m tests.fuzz.pictures 10000 [SEED]`.

Each is decoded by `open_image`, upright and as it is, and by the `fast` and `scaled` ways of a model. It prints what
became of them, the slowest, and the peak memory. It stops at any error but DecodeError, at a picture that takes over
ten seconds, and at two gigabytes; the picture lies then in a folder that it names.
"""

from __future__ import annotations

import random
import signal
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

from clip_batch.encoders import preprocess, transforms
from clip_batch.errors import DecodeError
from clip_batch.samples.decode import open_image
from tests import corpus
from tests.fuzz.mutate import images, mutated
from tests.fuzz.run import peak

SECONDS, MEMORY, MAX_PIXELS = 10.0, 2 * 2**30, 178_956_970


def pictures() -> dict[str, bytes]:
    """Those of `mutate.images`, and pictures with much beside their pixels."""
    made, picture = images(), corpus.picture(6, 40)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "a cat " * 90, zip=True)
    text.add_itxt("workflow", "a dog " * 90, zip=True)
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        if kind in Image.SAVE:
            made[f"exif.{kind.lower()}"] = corpus.encode(picture, kind, exif=exif.tobytes())
    made["plain.heic"] = corpus.HEIC
    made["text.png"] = corpus.encode(picture, "PNG", pnginfo=text, icc_profile=bytes(500))
    made["lossless.webp"] = corpus.encode(picture.convert("RGBA"), "WEBP", lossless=True)
    made["pages.tif"] = corpus.encode(picture, "TIFF", save_all=True, append_images=[picture], compression="jpeg")
    made["deep.tif"] = corpus.encode(picture.convert("F"), "TIFF", compression="tiff_adobe_deflate")
    made["whole.tif"] = corpus.encode(picture.convert("CMYK"), "TIFF", compression="tiff_lzw", strip_size=2**20)
    made["bits.tif"] = corpus.encode(picture.convert("1"), "TIFF", compression="group4")
    made["views.mpo"] = corpus.encode(picture, "MPO", save_all=True, append_images=[picture])
    made["bmp.ico"] = corpus.encode(picture, "ICO", bitmap_format="bmp", sizes=[(16, 16), (32, 32)])
    made["rle.tga"] = corpus.encode(picture, "TGA", compression="tga_rle")
    return made


def with_right_checksums(data: bytes) -> bytes:
    """A mutated PNG whose chunks have the checksums of what they hold, so that decoders believe it."""
    made, at = data[:8], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        body = data[at + 4 : at + 8 + length]
        made += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return made


def hostile(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """The names and bytes of `count` mutated pictures."""
    rng, made = random.Random(seed), pictures()
    for _ in range(count):
        name = rng.choice(list(made))
        data = bytearray(mutated(rng, made[name]))
        if data and rng.random() < 0.3:  # sizes and counts stand at the beginning
            at = rng.randrange(min(len(data), 200))
            data[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\x7f\xff", b"\x30\x30\x30\x30", b"\0\0\0\0"))
        yield name, with_right_checksums(bytes(data)) if name.endswith("png") and rng.random() < 0.7 else bytes(data)


def ways() -> dict[str, Any]:
    """The ways to decode, by name."""
    clip = Compose([Resize(32), CenterCrop(32), transforms.to_rgb, ToTensor(), Normalize([0.5] * 3, [0.5] * 3)])
    found: dict[str, Any] = {"open": open_image, "upright": lambda data, limit: open_image(data, limit, upright=True)}
    return found | {mode: preprocess.from_transform(clip, mode, upright=True).prepare for mode in ("fast", "scaled")}


def forget_peak() -> None:
    """Let `peak` count from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def too_slow(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Decode, and keep the picture where something is wrong."""
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    kept = Path(tempfile.mkdtemp(prefix="fuzz-"))
    signal.signal(signal.SIGALRM, too_slow)
    outcomes, slowest, most = Counter[str](), 0.0, 0
    every = ways()
    for name, data in hostile(seed, count):
        (kept / name).write_bytes(data)  # it stays if the process is killed
        reasons = set()
        for way, decode in every.items():
            forget_peak()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            started = time.perf_counter()
            try:
                decode(data, MAX_PIXELS)
                reasons.add("decoded")
            except DecodeError as error:
                reasons.add(error.reason)
            except BaseException as error:
                raise AssertionError(f"{kept / name} by {way}: {type(error).__name__}: {error}") from error
            signal.setitimer(signal.ITIMER_REAL, 0)
            slowest, most = max(slowest, time.perf_counter() - started), max(most, peak())
            assert most < MEMORY, f"{kept / name} by {way}: {most:,} bytes of memory"
        assert len(reasons) == 1, f"{kept / name}: {reasons}"
        outcomes.update(reasons)
        (kept / name).unlink()
    kept.rmdir()
    told = ", ".join(f"{number:,} {reason}" for reason, number in outcomes.most_common())
    print(f"{count:,} mutated pictures: {told}; slowest {slowest:.2f} s, peak memory {most / 2**20:,.0f} MiB")


if __name__ == "__main__":
    main()
