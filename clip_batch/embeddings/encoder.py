"""`Encoder`: the vectors of pictures and texts in memory, without a plan and without files."""

from __future__ import annotations

import io
import reprlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from clip_batch import encoders
from clip_batch.config import EmbedConfig, PlanConfig, StorageConfig
from clip_batch.config.paths import path_text
from clip_batch.config.texts import query_text
from clip_batch.embeddings.decoders import Decoders
from clip_batch.embeddings.loading import batch_size as size_of_batches
from clip_batch.encoders.encoder import NeedsExact
from clip_batch.errors import ClipBatchError, ConfigError, EncoderError, InputError, one_line
from clip_batch.plan.plan import AUTO
from clip_batch.samples.metadata import orientation, turned
from clip_batch.storage.store import read_url
from clip_batch.types import EncoderSpec

if TYPE_CHECKING:
    from concurrent.futures import Future

    import numpy.typing as npt
    import PIL.Image

    from clip_batch.encoders.encoder import Array, Pixels

    Picture = str | PathLike[str] | bytes | memoryview | PIL.Image.Image | npt.NDArray[np.uint8]
    """An image file's path or URL, its bytes, an image of Pillow, or its pixels: (h, w), or (h, w, 3)."""

T = TypeVar("T")

_AHEAD = 2
"""Batches that are decoded while another one is encoded."""


class Encoder:
    """Encodes pictures and texts as unit vectors of one space, as `embed` does, but in memory.

    `model`, `pretrained`, `preprocess`, `precision` and `exif_rotation` are as in PlanConfig, with EXIF orientation
    applied by default; `device`, `batch_size`, `threads` and `max_pixels` are as in EmbedConfig. `dim` is the
    dimension of the vectors, and `spec` the identity of the model.

    EncoderError: the model cannot be loaded. ConfigError: an option is wrong.

    Example:

        encoder = Encoder("ViT-B-32", "openai")
        scores = encoder.images(["cat.jpg", "dog.jpg"]) @ encoder.texts(["a cat"]).T
    """

    def __init__(
        self,
        model: str = PlanConfig.model,
        pretrained: str = "",
        *,
        preprocess: Literal["auto", "fast", "exact", "scaled"] = "auto",
        precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32",
        exif_rotation: Literal["apply", "ignore"] = "apply",
        device: str = "auto",
        batch_size: int = 0,
        threads: int = 0,
        max_pixels: int = EmbedConfig.max_pixels,
        storage: StorageConfig = StorageConfig(),
    ) -> None:
        StorageConfig.expect(storage=storage)
        plan = PlanConfig(
            model=model, pretrained=pretrained, preprocess=preprocess, precision=precision, exif_rotation=exif_rotation
        )
        self._config = EmbedConfig(batch_size=batch_size, threads=threads, device=device, max_pixels=max_pixels)
        self._storage = storage
        self.spec, self._model = _load(plan, self._config, storage.storage_options)
        self._size = size_of_batches(self._config)

    def __repr__(self) -> str:
        name = f"{self.spec.model} {self.spec.pretrained}".strip()
        return f"<Encoder {name}: {self.dim} dimensions, {self.spec.fingerprint}>"

    @property
    def dim(self) -> int:
        """The dimension of the vectors."""
        return self._model.dim

    def images(self, images: Iterable[Picture]) -> Array:
        """The vectors of pictures, float32 (n, d) of unit norm, in their order; a generator is read batch by batch.

        A picture is a path or URL, the bytes of an image file, an image of Pillow, or an array uint8 (h, w, 3) of RGB
        or (h, w) of grey. InputError names the first picture that cannot be used, by its number from 0 and its path.
        An array of several, such as uint8 (n, h, w, 3), is a list of them. ConfigError: `images` is one picture, or no
        list.
        """
        single = isinstance(images, np.ndarray) and _is_picture(images)
        if single or isinstance(images, str | PathLike) or hasattr(images, "convert") or not _is_list(images):
            raise ConfigError(f"images is {reprlib.repr(images)}: give a list of pictures, such as [picture]")
        batches = map(np.stack, self._decoded(images))
        pairs = (encoders.encode_pairs(self._model, pixels, None, self.spec.precision) for pixels in batches)
        pieces = [vectors for vectors, _ in pairs if vectors is not None]
        return _joined(pieces, self.dim)

    def texts(self, texts: Iterable[str]) -> Array:
        """The vectors of texts, float32 (n, d) of unit norm, in their order.

        ConfigError: `texts` is one text or no list, or one of them is no text or blank; its number is named, from 0.
        EncoderError: the model has no text side.
        """
        if not _is_list(texts):
            raise ConfigError(f"texts is {reprlib.repr(texts)}: give a list of texts, such as [text]")
        if not self._model.has_text:
            raise EncoderError(f"{self.spec.model} has no text side: take a model that has one, or only images")
        checked = (query_text(text, f"text {number}") for number, text in enumerate(texts))
        pieces = [self._model.encode_texts(batch) for batch in _batches(checked, self._size)]
        vectors = _joined(pieces, self.dim)
        if not np.isfinite(vectors).all():
            raise EncoderError("the encoder gave a NaN or inf text vector: try precision fp32, or check its weights")
        return vectors

    def _decoded(self, images: Iterable[Picture]) -> Iterator[list[Pixels]]:
        """The pixels of the pictures, batch by batch; a pool of threads decodes `_AHEAD` batches ahead."""
        waiting: deque[list[Future[Pixels]]] = deque()
        with Decoders(self._config.threads) as decoders:
            try:
                for batch in _batches(enumerate(images), self._size):
                    waiting.append([decoders.submit(self._pixels, number, image) for number, image in batch])
                    if len(waiting) > _AHEAD:
                        yield [future.result() for future in waiting.popleft()]
                while waiting:
                    yield [future.result() for future in waiting.popleft()]
            finally:
                decoders.cancel()

    def _pixels(self, number: int, image: Picture) -> Pixels:
        path = f" ({image})" if isinstance(image, str | PathLike) else ""
        try:
            data = image_bytes(image, self._storage, self.spec.exif_rotation)
            return self._model.preprocess(data, self._config.max_pixels)
        except (ClipBatchError, OSError) as error:
            raise InputError(f"image {number}{path}: {one_line(error, 500)}; leave it out, or mend it") from None


def image_bytes(image: Any, storage: StorageConfig = StorageConfig(), upright: bool = True) -> bytes | memoryview:
    """The bytes of an image file of a `Picture`; an image of Pillow and an array are encoded without loss.

    An image of Pillow is turned by its EXIF orientation if `upright` says so. InputError: it is no picture. OSError:
    its file cannot be read.
    """
    if isinstance(image, bytes | memoryview):
        return image
    if isinstance(image, str | PathLike):
        return read_url(path_text(image, "an image"), storage.storage_options)
    if hasattr(image, "convert") and hasattr(image, "mode"):  # of Pillow, which not every caller has imported
        return _encoded(turned(image, orientation(image)) if upright else image)
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or not _is_picture(pixels):
        what = f"an array of {pixels.dtype} {pixels.shape}" if pixels.ndim else reprlib.repr(image)
        raise InputError(f"{what} is no picture: give a path, bytes, an image of Pillow, or uint8 (height, width, 3)")
    from PIL import Image

    return _encoded(Image.fromarray(pixels))


def _is_picture(pixels: npt.NDArray[Any]) -> bool:
    """Whether an array has the shape of one picture: (h, w), (h, w, 3) or (h, w, 4)."""
    return pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))


def _is_list(items: object) -> bool:
    """Whether items can be taken one by one, and are not the characters of a text or the bytes of a file."""
    return isinstance(items, Iterable) and not isinstance(items, str | bytes | bytearray | memoryview)


def _encoded(image: PIL.Image.Image) -> bytes:
    """An image file with exactly an image's pixels: the fastest format that has its mode."""
    if image.mode == "YCbCr":  # as the model's transform does; Pillow before 12 does not read its own TIFF of it
        image = image.convert("RGB")
    kind = "PPM" if image.mode in ("RGB", "L") else "TIFF" if image.mode in ("CMYK", "LAB", "F", "I") else "PNG"
    plain = image.copy()  # without the tags of its file, which the orientation is among
    plain.info = {name: value for name, value in image.info.items() if name == "transparency"}
    file = io.BytesIO()
    try:
        plain.save(file, kind)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"an image of Pillow's mode {image.mode} cannot be encoded: {one_line(error)}") from None
    return file.getvalue()


def _load(plan: PlanConfig, config: EmbedConfig, options: dict[str, Any]) -> tuple[EncoderSpec, encoders.Model]:
    """The spec and the model, with the first preprocessing that the model supports."""
    modes = AUTO if plan.preprocess == "auto" else (plan.preprocess,)
    upright = plan.exif_rotation == "apply"
    spec = encoders.resolve(plan.model, plan.pretrained, modes[0], plan.precision, options, upright)
    for mode in modes:
        spec = replace(spec, preprocess=mode)
        try:
            return spec, encoders.load(spec, config.device, options, check=False)
        except NeedsExact:
            if mode == modes[-1]:
                raise
    raise AssertionError("there is a mode")


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _joined(pieces: list[Array], dim: int) -> Array:
    return np.concatenate(pieces) if pieces else np.empty((0, dim), np.float32)
