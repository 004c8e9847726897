"""From JPEGs to the model's pixels, by size of the image: on the cores, and on the GPU by nvJPEG.

The resize on the GPU is torchvision's of uint8, as `fast` does it on the cores; how far its pixels are from `fast`'s is
said as the largest and the mean difference.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from open_clip.transform import image_transform
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop_image, resize_image

from clip_batch.encoders import preprocess
from clip_batch.encoders.device import use_torch_threads
from tests.bench.data_path import photo
from tests.bench.gpu_parts import Part
from tests.bench.gpu_parts.encoder import LIMIT
from tests.bench.gpu_parts.timing import rate

BATCH = 64


def run(part: Part) -> None:
    quick = part.options.quick
    for side in (256,) if quick else (256, 512, 1024):
        photos = [photo(seed, side) for seed in range(4 if quick else 12)]
        files = [photos[number % len(photos)] for number in range(BATCH)]
        part.figure(f"bytes_{side}", sum(map(len, files)) / len(files))
        for mode in ("fast", "scaled") if side > 512 else ("fast",):
            part.attempt(f"{side} on the cores", 1, on_cores, part, side, files, mode)
        if part.options.cuda:
            part.attempt(f"{side} by nvJPEG", 1, on_device, part, side, files)
    if not part.options.cuda:
        part.note("nvJPEG: needs CUDA")


def seconds(part: Part) -> float:
    return 0.1 if part.options.quick else 0.8


def on_cores(part: Part, side: int, files: list[bytes], mode: str) -> None:
    prepare = preprocess.from_transform(image_transform(224, is_train=False), mode).prepare
    for threads in sorted({1, 4, len(os.sched_getaffinity(0))}):
        with ThreadPoolExecutor(threads, "decode", use_torch_threads, (1,)) as pool:
            many = files * (1 if threads == 1 else 4)

            def work(pool: ThreadPoolExecutor = pool, many: list[bytes] = many) -> int:
                return len(list(pool.map(lambda file: prepare(file, LIMIT), many)))

            found = rate(work, seconds(part))
        part.row(f"{mode}_{side}_{threads}", f"{side} pixels, {mode}, threads: {threads}", "images/s", found)


def on_device(part: Part, side: int, files: list[bytes]) -> None:
    from torchvision.io import decode_jpeg

    device = part.options.device
    encoded = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]

    def decoded() -> list[torch.Tensor]:
        pixels: list[torch.Tensor] = decode_jpeg(encoded, device=device)
        return pixels

    def resized() -> torch.Tensor:
        return torch.stack([shrunk(pixels) for pixels in decoded()])

    def counted(work: Any) -> int:
        done = len(work())
        torch.cuda.synchronize(device)
        return done

    alone = rate(lambda: counted(decoded), seconds(part))
    part.row(f"nvjpeg_{side}", f"{side} pixels, nvJPEG alone", "images/s", alone)
    found = rate(lambda: counted(resized), seconds(part))
    what = f"{side} pixels, nvJPEG and resize there"
    part.row(f"nvjpeg_resized_{side}", what, "images/s", found, alone, "nvJPEG alone")
    prepare = preprocess.from_transform(image_transform(224, is_train=False), "fast").prepare
    ours = np.stack([prepare(file, LIMIT) for file in files]).astype(np.float32)
    theirs = resized().cpu().numpy().astype(np.float32)
    gap = np.abs(ours - theirs)
    cosine = (ours * theirs).sum() / np.sqrt((ours**2).sum() * (theirs**2).sum())
    figures = {"most": float(gap.max()), "mean": float(gap.mean()), "cosine": float(cosine)}
    part.figure(f"nvjpeg_gap_{side}", figures)
    part.note(f"{side}: nvJPEG's pixels are {gap.mean():.2f} of 255 from fast's, at most {gap.max():.0f}")


def shrunk(pixels: torch.Tensor) -> torch.Tensor:
    """The resize and the crop of CLIP."""
    size = preprocess.resized_size([224], pixels.shape[1], pixels.shape[2])
    result = resize_image(pixels.float(), size, InterpolationMode.BICUBIC, antialias=True)
    return center_crop_image(result.round_().clamp_(0, 255), [224, 224]).to(torch.uint8)
