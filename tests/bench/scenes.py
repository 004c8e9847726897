"""Makes an OUT of real image and text vectors, in any number: scenes of the demo's pictures, by the demo's model.

A scene is two to four pictures on one canvas of the model's size: the first as it is, the others smaller, at random
places. Its caption is their names. The model never saw scenes, so that a caption finds its image about as badly as
captions on the web do, and the two towers stand apart as those of other CLIPs do.

A twentieth of all combinations is held out from every OUT: queries are of these alone.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from clip_batch import encoders
from clip_batch.demo import data
from clip_batch.demo.captions import name_forms
from clip_batch.embeddings.commits import committed
from clip_batch.encoders import Model
from clip_batch.encoders.embedded import model_path
from clip_batch.storage.store import Store
from clip_batch.types import Plan
from tests.fabricated import commit, make_plan

Vectors = npt.NDArray[np.float32]
Scenes = npt.NDArray[np.int64]
"""Row numbers (n, 4) of the demo's table, -1 where a scene has fewer pictures."""

PART_ROWS = 20_000
MOST, SIDE, SMALL = 4, 64, 40
"""Pictures of a scene; pixels of a side of the canvas, and of all pictures but the first."""

TOGETHER = 0.5
"""The probability that a further picture is of the first one's category."""

BATCH = 256
TEMPLATES = "a picture of {}", "{} in one image", "{}", "an illustration with {}", "{} on white"


class Pictures:
    """The demo's pictures in the order of their categories, with the popularity of each: a power law."""

    def __init__(self, seed: int = 0) -> None:
        rows = data.load().to_pylist()
        self.rows = sorted(rows, key=lambda row: row["category"])
        weights = (1.0 + np.random.default_rng(seed).permutation(len(rows))) ** -0.6
        self.ends = np.concatenate([[0], np.cumsum(weights) / weights.sum()])
        categories = [row["category"] for row in self.rows]
        self.first = np.array([categories.index(name) for name in categories])
        self.last = self.first + np.array([categories.count(name) for name in categories])

    @cached_property
    def whole(self) -> npt.NDArray[np.uint8]:
        """Pixels (pictures, 64, 64, 3)."""
        return np.stack([np.asarray(self._open(row)) for row in self.rows])

    @cached_property
    def small(self) -> npt.NDArray[np.uint8]:
        """Pixels (pictures, 40, 40, 3)."""
        sizes = SMALL, SMALL
        return np.stack([np.asarray(self._open(row).resize(sizes, Image.Resampling.BICUBIC)) for row in self.rows])

    @staticmethod
    def _open(row: dict[str, bytes]) -> Image.Image:
        return Image.open(io.BytesIO(row["image"])).convert("RGB")


def draw(pictures: Pictures, count: int, rng: np.random.Generator, held_out: bool = False) -> Scenes:
    """`count` scenes (count, 4), all of them held out from every OUT, or none of them."""
    found = np.empty((0, MOST), dtype=np.int64)
    while len(found) < count:
        chances, cuts = rng.random((2 * PART_ROWS, MOST)), pictures.ends
        first = np.searchsorted(cuts, chances[:, :1], side="right") - 1
        near = rng.random(chances.shape) < TOGETHER
        low = np.where(near, cuts[pictures.first[first]], 0)
        high = np.where(near, cuts[pictures.last[first]], 1)
        scenes = np.searchsorted(cuts, low + chances * (high - low), side="right") - 1
        scenes[:, 0] = first[:, 0]
        scenes = np.minimum(scenes, len(pictures.rows) - 1)
        different = [scenes[:, one] != scenes[:, other] for one in range(MOST) for other in range(one)]
        scenes[np.arange(MOST) >= rng.integers(2, MOST + 1, len(scenes))[:, None]] = -1
        wanted = np.logical_and.reduce(different) & (_held_out(scenes) == held_out)
        found = np.concatenate([found, scenes[wanted]])
    return found[:count]


def _held_out(scenes: Scenes) -> npt.NDArray[np.bool_]:
    """Whether a scene's pictures, in whatever order, are for queries."""
    mixed = (scenes + 2) * 2_654_435_761 % 2**32
    return (mixed.sum(axis=1) >> 8) % 20 == 0


def compose(pictures: Pictures, scenes: Scenes, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Pixels (n, 3, 64, 64) of scenes; where pictures overlap, the darker pixel wins, for they are drawn on white."""
    pixels = pictures.whole[scenes[:, 0]]
    places = rng.integers(0, SIDE - SMALL + 1, (len(scenes), MOST, 2))
    for canvas, scene, corners in zip(pixels, scenes, places, strict=True):
        for picture, (x, y) in zip(scene[1:], corners[1:], strict=True):
            if picture >= 0:
                part = canvas[y : y + SMALL, x : x + SMALL]
                np.minimum(part, pictures.small[picture], out=part)
    return pixels.transpose(0, 3, 1, 2)


def captions(pictures: Pictures, scenes: Scenes) -> list[str]:
    """The names of each scene's pictures."""
    names = [row["name_en"] for row in pictures.rows]
    return [", ".join(names[picture] for picture in scene if picture >= 0) for scene in scenes]


def paraphrases(pictures: Pictures, scenes: Scenes, rng: np.random.Generator) -> list[str]:
    """Other words for each scene: a template, its pictures in another order, by short names, keywords or name forms."""

    def reworded(picture: int) -> str:
        row = pictures.rows[picture]
        short = [name.replace("_", " ") for name in row["short_names"]]
        ways = [short, row["keywords_en"], name_forms(row["name_en"], "en")]
        words = ways[rng.integers(len(ways))] or [row["name_en"]]
        return str(words[rng.integers(len(words))])

    texts = []
    for scene in scenes:
        words = [reworded(picture) for picture in rng.permutation(scene[scene >= 0])]
        texts.append(TEMPLATES[rng.integers(len(TEMPLATES))].format(", ".join(words[:-1]) + " and " + words[-1]))
    return texts


def encode_texts(encoder: Model, texts: Sequence[str]) -> Vectors:
    """Vectors (n, d); texts of similar length are encoded together, which is faster."""
    order = np.argsort([len(text) for text in texts], kind="stable")
    batches = [order[low : low + BATCH] for low in range(0, len(order), BATCH)]
    vectors = np.concatenate([encoder.encode_texts([texts[row] for row in batch]) for batch in batches])
    return np.asarray(vectors[np.argsort(order)])


def encode_images(encoder: Model, pixels: npt.NDArray[np.uint8]) -> Vectors:
    """Vectors (n, d)."""
    return np.concatenate([encoder.encode_images(pixels[low : low + BATCH]) for low in range(0, len(pixels), BATCH)])


def load_encoder() -> Model:
    """The demo's model."""
    return encoders.load(encoders.resolve(f"local-dir:{model_path()}"), "cpu")


def make_out(out: Path, rows: int, encoder: Model | None = None, seed: int = 0) -> Plan:
    """Commit `rows` scenes in parts of 20,000; what an earlier run committed there stays, and is not made again."""
    parts = -(-rows // PART_ROWS)
    plan = make_plan(out, parts)
    pictures, done = Pictures(), committed(Store(str(out)))
    for partition in range(parts):
        if partition in done:
            continue
        encoder = encoder or load_encoder()
        rng = np.random.default_rng([seed, partition])
        scenes = draw(pictures, min(PART_ROWS, rows - partition * PART_ROWS), rng)
        texts = captions(pictures, scenes)
        images = encode_images(encoder, compose(pictures, scenes, rng))
        commit(out, plan, partition, images, encode_texts(encoder, texts), captions=texts)
    return plan


def make_queries(count: int, encoder: Model | None = None, seed: int = 1) -> dict[str, Vectors]:
    """Vectors (count, d) by kind of query: image, caption, paraphrase, all of the same scenes, which are in no OUT."""
    pictures, encoder, rng = Pictures(), encoder or load_encoder(), np.random.default_rng(seed)
    scenes = draw(pictures, count, rng, held_out=True)
    return {
        "image": encode_images(encoder, compose(pictures, scenes, rng)),
        "caption": encode_texts(encoder, captions(pictures, scenes)),
        "paraphrase": encode_texts(encoder, paraphrases(pictures, scenes, rng)),
    }
