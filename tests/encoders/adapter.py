"""A whole family of models as another distribution may have it: SimpleShot, 16 x 16 thumbnails through one matrix."""

import os

import numpy as np
import torch
from torchvision.transforms import Compose, Normalize, Resize, ToTensor

from clip_batch.encoders import preprocess
from clip_batch.encoders.towers import TorchEncoder, placed
from clip_batch.errors import EncoderError
from clip_batch.storage.store import file_digest

SIDE = 16


def weights_digest(model, pretrained):
    """sha256 over all that decides a vector: here the one file (this code's own numbers never change)."""
    if not os.path.isfile(pretrained):
        raise EncoderError(f"{model} needs its matrix: give --pretrained the path of a .npy")
    return file_digest(pretrained)


def load(spec, device, compiled):
    """An Encoder: TorchEncoder brings device, precision, batches, unit norms, --compile and int8."""
    place = placed(spec, device, compiled)
    layer = torch.nn.Linear(3 * SIDE * SIDE, 8, bias=False)
    layer.weight.data = torch.from_numpy(np.load(spec.pretrained))
    layer = layer.eval().to(*place)

    def image(batch):  # (n, 3, h, w), normalized, on the device
        return layer(batch.flatten(1))

    def texts(lines):  # or None, for a model of images alone
        counts = [
            np.bincount(list(line.encode()) or [0], minlength=3 * SIDE * SIDE)[: 3 * SIDE * SIDE] for line in lines
        ]
        return layer(torch.tensor(np.stack(counts)).to(*place))

    transform = Compose([Resize((SIDE, SIDE)), preprocess.rgb, ToTensor(), Normalize([0.5] * 3, [0.5] * 3)])
    steps, last = preprocess.split(transform)
    return TorchEncoder(
        spec, layer, image, texts, preprocess.preparing(spec.preprocess, steps, last), last, place, compiled
    )
