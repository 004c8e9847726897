"""A whole family of models as another distribution may have it: SimpleShot, 16 x 16 thumbnails through one matrix."""

import os

import numpy as np
import torch
from torchvision.transforms import Compose, Normalize, Resize, ToTensor

from clip_batch.encoders.preprocess import from_transform
from clip_batch.encoders.torch_encoder import TextSide, TorchEncoder, place
from clip_batch.encoders.transforms import to_rgb
from clip_batch.errors import EncoderError
from clip_batch.storage.store import file_digest

SIDE = 16


def weights_digest(model, pretrained):
    """sha256 over everything that decides a vector: here one file (the numbers in this code never change)."""
    if not os.path.isfile(pretrained):
        raise EncoderError(f"{model} needs its matrix: give --pretrained the path of a .npy")
    return file_digest(pretrained)


def load(spec, device, compiled):
    """An Encoder: TorchEncoder adds the device, the precision, batches, unit norm, --compile and int8."""
    placement = place(spec, device, compiled)
    layer = torch.nn.Linear(3 * SIDE * SIDE, 8, bias=False)
    layer.weight.data = torch.from_numpy(np.load(spec.pretrained))
    layer = layer.eval().to(placement.device, placement.dtype)

    def image_tower(pixels):  # (n, 3, h, w), normalized, on the device
        return layer(pixels.flatten(1))

    def tokenize(texts):  # on the host
        counts = [np.bincount(list(text.encode()) or [0], minlength=3 * SIDE * SIDE) for text in texts]
        return torch.tensor(np.stack([each[: 3 * SIDE * SIDE] for each in counts]))

    def text_tower(tokens):
        return layer(tokens.to(placement.device, placement.dtype))

    transform = Compose([Resize((SIDE, SIDE)), to_rgb, ToTensor(), Normalize([0.5] * 3, [0.5] * 3)])
    preprocessing = from_transform(transform, spec.preprocess, spec.exif_rotation)
    text_side = TextSide(tokenize, text_tower)  # None for a model of images alone
    return TorchEncoder(layer, image_tower, text_side, preprocessing, placement)
