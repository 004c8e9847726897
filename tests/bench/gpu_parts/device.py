"""The machine and its ceilings: versions, matrix products, copies, and whether it decodes JPEGs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from functools import partial

import torch

from tests.bench.gpu_parts import Part, Skipped
from tests.bench.gpu_parts.timing import median_seconds

LIBRARIES = (
    *("torch", "torchvision", "torchao", "torchcodec", "triton", "transformers", "timm", "open_clip_torch", "numpy"),
    *("pyarrow", "pillow", "simplejpeg", "onnxruntime", "onnxruntime-gpu", "faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs"),
)

TOWER = {"ViT-L-14's first of the MLP": (4096, 1024), "ViT-L-14's second of the MLP": (1024, 4096)}
"""Products of ViT-L-14's tower, by outputs and inputs; the rows are tokens."""


def run(part: Part) -> None:
    part.attempt("products", 1, products, part)  # importing torch takes half of the time, so the first come first
    part.attempt("versions", 0, versions, part)
    part.attempt("copies", 1.5, copies, part)
    part.attempt("attention", 0.5, attention, part)
    part.attempt("nvJPEG", 1, nvjpeg, part)


def versions(part: Part) -> None:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["cuda"], found["cudnn"] = str(torch.version.cuda), str(torch.backends.cudnn.version())
    part.figure("versions", found)
    tools = {name: shutil.which(name) for name in ("g++", "gcc", "nvcc", "nvidia-smi", "nvidia-cuda-mps-control")}
    part.figure("tools", {**tools, "python": sys.executable})
    part.figure(
        "free_gb", {path: shutil.disk_usage(path).free / 1e9 for path in ("/dev/shm", "/tmp") if os.path.exists(path)}
    )
    part.row("cores", "cores of this process", "", len(os.sched_getaffinity(0)))
    if part.options.cuda:
        names = "name,driver_version,memory.total,power.limit,clocks.max.sm,mig.mode.current,pcie.link.gen.current"
        command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        part.figure("device", dict(zip(names.split(","), done.stdout.strip().split(", "), strict=False)))
        properties = torch.cuda.get_device_properties(part.options.device)
        part.note(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, torch {found['torch']}")


def products(part: Part) -> None:
    """The rate of matrix products of random numbers, the larger first."""
    device, cuda = part.options.device, part.options.cuda
    dtype = torch.bfloat16 if cuda else torch.float32
    side, tokens = (8192, 512 * 257) if cuda else (512, 257)
    torch.manual_seed(0)
    sizes = {f"product of {side} x {side}": (side, side, side)}
    sizes |= {name: (tokens, *size) for name, size in TOWER.items()} if cuda else {}
    for number, (name, (rows, outputs, inputs)) in enumerate(sizes.items()):
        left = torch.randn(rows, inputs, device=device, dtype=dtype)
        right = torch.randn(outputs, inputs, device=device, dtype=dtype)
        taken = median_seconds(partial(torch.nn.functional.linear, left, right), device, 0.4 if cuda else 0.1)
        tflops = 2e-12 * rows * outputs * inputs / taken
        part.row(f"product_{number}", f"{name}, {part.options.precision}", "TFLOP/s", tflops)
        if not number:
            part.figure("ceiling_tflops", tflops)


def attention(part: Part) -> None:
    """The attention of one block of ViT-L-14's tower, 24 of which are a batch."""
    device, size = part.options.device, (512, 16, 257, 64) if part.options.cuda else (1, 16, 257, 64)
    dtype = torch.bfloat16 if part.options.cuda else torch.float32
    query, key, value = torch.randn(3, *size, device=device, dtype=dtype)
    work = partial(torch.nn.functional.scaled_dot_product_attention, query, key, value)
    taken = median_seconds(work, device, 0.2 if part.options.cuda else 0.1)
    part.row("attention", f"ViT-L-14's attention of a block, {size[0]} images", "ms", 1000 * taken)


def copies(part: Part) -> None:
    """Copies of a batch's bytes to the device, from pageable and pinned memory, and on the device."""
    if not part.options.cuda:
        raise Skipped("needs CUDA")
    device = part.options.device
    size = 512 * 3 * 224 * 224
    pageable = torch.randint(0, 256, (size,), dtype=torch.uint8)
    pinned, there = pageable.pin_memory(), torch.empty(size, dtype=torch.uint8, device=device)
    vectors = torch.randn(512 * 768, device=device)
    for name, source in (("pinned", pinned), ("pageable", pageable)):
        taken = median_seconds(lambda source=source: there.copy_(source, non_blocking=True), device, 0.2)  # type: ignore[misc]
        part.row(f"copy_{name}", f"to the device, 77 MB of {name} memory", "GB/s", size / taken / 1e9)
    taken = median_seconds(lambda: pageable.pin_memory(), "cpu", 0.2)
    part.row("pin", "pinning 77 MB, as each batch was", "ms", 1000 * taken)
    taken = median_seconds(lambda: vectors.cpu(), "cpu", 0.2)
    part.row("back", "1.6 MB of vectors back", "ms", 1000 * taken)
    large = torch.randint(0, 256, (2**31,), dtype=torch.uint8, device=device)
    other = torch.empty_like(large)
    taken = median_seconds(lambda: other.copy_(large), device, 0.2)
    part.row("copy_device", "on the device, bytes read and written", "GB/s", 2 * 2**31 / taken / 1e9)


def nvjpeg(part: Part) -> None:
    if not part.options.cuda:
        raise Skipped("needs CUDA")
    from torchvision.io import decode_jpeg

    from tests.bench.data_path import photo

    file = torch.frombuffer(bytearray(photo(0, 256)), dtype=torch.uint8)
    pixels = decode_jpeg([file], device=part.options.device)[0]
    part.note(f"nvJPEG through torchvision works: {tuple(pixels.shape)} on {pixels.device}")
