"""Photographs of many sizes and shapes, cut from those in scikit-image, which is fetched and not kept."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.corpus import encode, write_tar

COUNT = 160
CAMERA = 12
"""How many of them are as large as a camera makes them."""

SHAPES = (1.5, 0.67, 1.33, 0.75, 1.0, 1.78, 3.6, 0.35)

CAPTIONS = {
    "astronaut.png": "an astronaut in an orange suit",
    "coffee.png": "a cup of coffee on a table",
    "chelsea.png": "a tabby cat looks at the camera",
    "rocket.jpg": "a rocket on the launch pad",
    "hubble_deep_field.jpg": "galaxies in the Hubble deep field",
    "motorcycle_left.png": "a motorcycle in a garage",
    "moon.png": "the surface of the moon",
    "camera.png": "a cameraman with a tripod",
}
"""Photographs in the public domain, or dedicated to it: see skimage/data/README.txt."""


def originals(folder: Path) -> list[tuple[str, Image.Image]]:
    """Fetch scikit-image's wheel and return its photographs with captions; the test is skipped where that fails."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    fetched = subprocess.run([*command, "scikit-image"], capture_output=True, text=True, timeout=120, check=False)
    wheels = list(folder.glob("*.whl"))
    if fetched.returncode or not wheels:
        pytest.skip(f"scikit-image cannot be fetched: {fetched.stderr.strip()[-200:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        images = [(caption, wheel.read(f"skimage/data/{name}")) for name, caption in CAPTIONS.items()]
    return [(caption, Image.open(io.BytesIO(data)).convert("RGB")) for caption, data in images]


def photograph(image: Image.Image, shape: float, pixels: int, choose: random.Random) -> Image.Image:
    """Cut a part of a shape (width / height) out of a photograph, of so many pixels, with a sensor's noise."""
    width = min(image.width, image.height * shape) * choose.uniform(0.6, 1)
    left, top = choose.uniform(0, image.width - width), choose.uniform(0, image.height - width / shape)
    size = round((pixels * shape) ** 0.5), round((pixels / shape) ** 0.5)
    part = image.resize(size, Image.Resampling.BICUBIC, (left, top, left + width, top + width / shape))
    noise = np.random.default_rng(choose.randrange(10**6)).integers(-5, 6, (size[1], size[0], 1), np.int16)
    return Image.fromarray((np.asarray(part) + noise).clip(0, 255).astype(np.uint8))


def photographs(folder: Path) -> str:
    """Write a tar of `COUNT` photographs with captions and metadata in `folder`, and return its path."""
    choose, sources = random.Random(0), originals(folder)
    files = []
    for i in range(COUNT):
        caption, image = sources[i % len(sources)]
        pixels = 10_000_000 if i % (COUNT // CAMERA) == 0 else choose.choice([300_000, 800_000, 1_500_000])
        exif = Image.Exif()
        exif[0x0112] = 6 if i % 11 == 0 else 1
        data = encode(
            photograph(image, SHAPES[(i // len(sources)) % len(SHAPES)], pixels, choose), quality=90, exif=exif
        )
        fields = {"year": 2015 + i % 9, "camera": f"camera {i % 3}", "taken": f"20{15 + i % 9}-0{1 + i % 9}-12"}
        files += [
            (f"{i:04}.jpg", data),
            (f"{i:04}.txt", caption.encode()),
            (f"{i:04}.json", json.dumps(fields).encode()),
        ]
    return write_tar(str(folder / "photographs.tar"), files)
