"""The `Model` protocol: images and captions to unit vectors of one space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from clip_batch.errors import EncoderError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float32]
    """Vectors (n, dim)."""

    Pixels = npt.NDArray[np.uint8 | np.float32]
    """One image (3, height, width), or a batch of them (n, 3, height, width)."""

NO_TEXT = "this index's model has no text side: search by image, embedding or id"
"""Why a model cannot encode a text."""


class NeedsExact(EncoderError):
    """A model's transform is one that only `exact` preprocessing supports."""


class CannotCompile(EncoderError):
    """A model cannot be compiled on this machine."""


class Model(Protocol):
    """Encodes images and texts as vectors of one space. Several threads call its methods at the same time."""

    dim: int
    """Dimension of the vectors."""

    has_text: bool
    """Whether the model encodes texts; otherwise `encode_texts` raises EncoderError."""

    def preprocess(self, data: bytes | memoryview, max_pixels: int) -> Pixels:
        """The pixels of one image file, as the model takes them: uint8 (3, height, width).

        A model whose transform does not end in torchvision's ToTensor and Normalize gets the transform's result, in
        float32. DecodeError: the image cannot be used, or has more than `max_pixels`.
        """

    def encode_images(self, batch: Pixels) -> Array:
        """The vectors, float32 (n, dim) of unit norm, of n results of `preprocess`, stacked."""

    def encode_texts(self, texts: Sequence[str]) -> Array:
        """The vectors, float32 (n, dim) of unit norm, of n texts."""


def encode_pairs(
    encoder: Model, batch: Pixels | None, captions: Sequence[str | None] | None, precision: str = "fp32"
) -> tuple[Array | None, Array | None]:
    """Image vectors and text vectors, float32 (n, dim), of n images, as `encode_images` takes them, and their captions.

    None for images or captions gives None for their vectors; so does a model without a text side for those of captions.
    A text vector without a caption is zero. EncoderError: a vector has a NaN or an infinity; the remedy depends on the
    `precision` of the model.
    """
    import numpy as np

    images = None if batch is None else encoder.encode_images(batch)
    texts = None
    if captions is not None and encoder.has_text:
        texts = np.zeros((len(captions), encoder.dim), dtype=np.float32)
        captioned = [index for index, caption in enumerate(captions) if caption is not None]
    if texts is not None and captions is not None and captioned:
        texts[captioned] = encoder.encode_texts([caption for caption in captions if caption is not None])
    for name, vectors in (("image", images), ("text", texts)):
        if vectors is not None and not np.isfinite(vectors).all():
            remedy = "check its weights" if precision == "fp32" else "try --precision fp32"
            raise EncoderError(f"the encoder gave a NaN or inf {name} vector: {remedy}")
    return images, texts
