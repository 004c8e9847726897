"""What others' steps give with the same model, device and tars, from tars to vectors on the host, without captions.

- NeMo Curator: fp32 CLIP of transformers; images of one size as uint8 (n, h, w, 3) on the host, copied, then resized,
  cropped and normalized by torchvision on the device, `get_image_features`, and division by the norm. Curator decodes
  with DALI on the GPU and copies back; here a DataLoader's processes decode by Pillow, one a core.
- clip-retrieval: open_clip's transform in a DataLoader's processes, pinned memory, the model under autocast to bf16 and
  with TF32, float16 vectors.

Neither writes anything. The first batches do not count.
"""

from __future__ import annotations

import io
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tests.bench.gpu_parts import Options, Part
from tests.bench.gpu_parts.encoder import created
from tests.bench.gpu_parts.files import tars

BATCH = 256
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def run(part: Part) -> None:
    part.attempt("NeMo Curator's steps", 12, curator, part)
    part.attempt("clip-retrieval's steps", 12, clip_retrieval, part)


class Tars(IterableDataset[Any]):
    """The JPEGs of tars, each prepared; every process of a DataLoader reads its share of the tars, again and again."""

    def __init__(self, paths: list[str], prepare: Callable[[Image.Image], Any]) -> None:
        self.paths, self.prepare = paths, prepare

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        mine = self.paths[worker.id :: worker.num_workers] if worker else self.paths
        while mine:
            for path in mine:
                with tarfile.open(path) as tar:
                    for member in tar:
                        if member.name.endswith(".jpg"):
                            opened = tar.extractfile(member)
                            assert opened
                            yield self.prepare(Image.open(io.BytesIO(opened.read())).convert("RGB"))


def pace(part: Part, prepare: Callable[[Image.Image], Any], embed: Callable[[torch.Tensor], Any]) -> float:
    """Images a second of a loop over batches."""
    options = part.options
    cores = len(os.sched_getaffinity(0))
    size = 4 if options.quick else BATCH
    dataset = Tars(tars(options, 64 if options.quick else 4000 * cores), prepare)
    loader = DataLoader(dataset, size, num_workers=1 if options.quick else cores, pin_memory=options.cuda)
    batches = iter(loader)
    for _ in range(3):
        embed(next(batches))
    done, started, seconds = 0, time.perf_counter(), 0.5 if options.quick else min(8, part.left - 3)
    while (spent := time.perf_counter() - started) < seconds:
        done += len(embed(next(batches)))
    return done / spent


def curator(part: Part) -> None:
    from torchvision import transforms
    from transformers import CLIPConfig, CLIPModel

    device = part.options.device
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.device(device):
        model = CLIPModel(CLIPConfig(**sizes(part.options))).eval()
    transform = transforms.Compose([
        transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC, antialias=True),
        transforms.CenterCrop(224),
        transforms.ConvertImageDtype(torch.float32),
        transforms.Normalize(MEAN, STD),
    ])  # fmt: skip

    @torch.no_grad()
    def embed(batch: torch.Tensor) -> Any:
        rows = model.get_image_features(pixel_values=transform(batch.to(device).permute(0, 3, 1, 2)))
        rows = getattr(rows, "pooler_output", rows)  # transformers 5 gives an object
        return (rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True)).cpu().numpy()

    found = pace(part, np.asarray, embed)
    part.row("curator", "NeMo Curator's steps: transformers, fp32", "images/s", found)


def sizes(options: Options) -> dict[str, Any]:
    """The configuration of transformers' ViT-L-14, or of a small model for a quick run."""
    if options.quick:
        return {"vision_config": {"num_hidden_layers": 1}, "text_config": {"num_hidden_layers": 1}}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return {"vision_config": {**vision, "patch_size": 14}, "text_config": text, "projection_dim": 768}


def clip_retrieval(part: Part) -> None:
    from open_clip.transform import image_transform

    device, cuda = part.options.device, part.options.cuda
    torch.backends.cuda.matmul.allow_tf32 = True
    model = created("ViT-B-32" if part.options.quick else "ViT-L-14", device)

    @torch.no_grad()
    def embed(batch: torch.Tensor) -> Any:
        with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=cuda):
            rows = model.encode_image(batch.to(device))
        rows /= rows.norm(dim=-1, keepdim=True)
        return rows.cpu().to(torch.float16).numpy()

    found = pace(part, image_transform(224, is_train=False), embed)
    part.row("clip_retrieval", "clip-retrieval's steps: open_clip, bf16 autocast", "images/s", found)
