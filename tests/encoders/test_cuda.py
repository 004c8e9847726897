"""Models on a GPU: a CPU's vectors, each caller's own rows, memory that stays.

    python -m pytest -W default -m "cuda and not alone" -n 8 --dist loadgroup -rA tests/*/test_cuda*.py
    python -m pytest -W default -m "cuda and alone" tests/*/test_cuda*.py

-rA with --show-capture=stdout shows what was measured. CLIP_BATCH_TEST_DEVICE=cpu runs what can be run without a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from clip_batch import encoders
from clip_batch.encoders.device import gpus, host_array, pick_device
from clip_batch.errors import EncoderError
from tests import tiny
from tests.encoders.test_families import LIMIT, pictures

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.slow,
    pytest.mark.timeout(100),
    pytest.mark.filterwarnings("default"),  # torch's compiler has warnings for its users, which are not ours to heed
]

SIZE = 16
"""Images of a batch that models are compiled for."""

BOUNDS = {"fp32": 1e-6, "fp16": 1e-5, "bf16": 5e-4}
"""How far below 1 the cosine of a vector and a CPU's in fp32 may be: on a CPU it is 1e-6 in fp16 and 1e-4 in bf16."""


def _demo(folder: Path) -> tuple[str, str]:
    return "demo", ""


def _mclip(folder: Path) -> tuple[str, str]:
    from clip_batch.encoders.embedded import model_path

    return f"mclip:{tiny.mclip(folder)}+local-dir:{model_path()}", ""


def _onnx(folder: Path) -> tuple[str, str]:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    from clip_batch.encoders.onnx_export import export_onnx
    from tests.conftest import DEVICE, NO_GPU

    if DEVICE.startswith("cuda") and "CUDAExecutionProvider" not in runtime.get_available_providers():
        pytest.skip(f"{NO_GPU}: ONNX Runtime was built without CUDA")
    export_onnx("demo", "", str(folder / "export"))
    return f"onnx:{folder / 'export'}", ""


def _hf(make: Callable[[Path], str], folder: Path) -> tuple[str, str]:
    return f"hf:{make(folder)}", ""


def _timm(name: str, folder: Path) -> tuple[str, str]:
    return f"timm:{name}", tiny.timm_model(folder, name)


def _cn_clip(folder: Path) -> tuple[str, str]:
    return "cn-clip:ViT-B-16", tiny.ofa_clip(folder)


MODELS: dict[str, Callable[[Path], tuple[str, str]]] = {
    "demo": _demo,
    "clip": functools.partial(_hf, tiny.clip),
    "siglip": functools.partial(_hf, tiny.siglip),
    "siglip2": functools.partial(_hf, tiny.siglip2),
    "chinese_clip": functools.partial(_hf, tiny.chinese_clip),
    "dinov2": functools.partial(_hf, tiny.dinov2),
    "timm-vit": functools.partial(_timm, "test_vit"),
    "timm-resnet": functools.partial(_timm, "test_resnet"),
    "cn-clip": _cn_clip,
    "mclip": _mclip,
    "onnx": _onnx,
}
"""By name: what makes a model of a family in an empty folder, and gives its name and its weights."""


class Made(NamedTuple):
    """A model, and what it gives for `pictures` and `tiny.TEXTS` on a CPU."""

    model: str
    pretrained: str
    images: np.ndarray
    texts: np.ndarray | None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    @functools.cache
    def make(name: str) -> Made:
        model, pretrained = MODELS[name](tmp_path_factory.mktemp(name))
        encoder = encoders.load(encoders.resolve(model, pretrained), "cpu")
        return Made(model, pretrained, *vectors(encoder))

    return make


def vectors(encoder: encoders.Model) -> tuple[np.ndarray, np.ndarray | None]:
    images = encoder.encode_images(np.stack([encoder.preprocess(file, LIMIT) for file in pictures()]))
    return images, encoder.encode_texts(tiny.TEXTS) if encoder.has_text else None


def below_one(found: np.ndarray, wanted: np.ndarray) -> float:
    """How far below 1 the lowest cosine of two vectors of one row is; NaN if there is one."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype == np.float32
    a, b = found.astype(float), wanted.astype(float)
    return float(1 - ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def _families() -> Iterator[object]:
    """All families in fp32 and bf16, two in fp16; those of one family run in one process, which makes it once."""
    for name in MODELS:
        for precision in BOUNDS:
            if precision == "fp32" or (name != "onnx" and (precision == "bf16" or name in ("demo", "clip"))):
                yield pytest.param(name, precision, marks=pytest.mark.xdist_group(name))


@pytest.mark.parametrize(("name", "precision"), list(_families()))
def test_vectors_are_a_cpus(name: str, precision: str, device: str, made: Callable[[str], Made]) -> None:
    model, pretrained, *wanted = made(name)
    found = vectors(encoders.load(encoders.resolve(model, pretrained, precision=precision), device))
    assert (found[1] is None) == (wanted[1] is None)
    for kind, ours, theirs in zip(("images", "texts"), found, wanted, strict=True):
        if ours is None or theirs is None:
            continue
        assert np.abs(np.linalg.norm(ours, axis=1) - 1).max() < 1e-5
        far = below_one(ours, theirs)
        print(f"{name} {precision} {kind}: 1 - cosine is up to {far:.1e}")
        assert far < BOUNDS[precision], kind
        if precision == "fp32":
            np.testing.assert_allclose(ours, theirs, atol=5e-4, err_msg=kind)


class Demo(NamedTuple):
    """The demo's model, with the pixels and captions of some of its pictures, no two of which have near vectors."""

    encoder: encoders.Model
    pixels: np.ndarray
    captions: list[str]


def demo(device: str, precision: str = "fp32", compiled: int = 0) -> Demo:
    from clip_batch.demo import data

    encoder = encoders.load(encoders.resolve("demo", precision=precision), device, compiled=compiled)
    table = data.load()
    rows = list(range(0, len(table), 20))
    images, names = table["image"].take(rows).to_pylist(), table["name_en"].take(rows).to_pylist()
    captions = [f"{name}, {name}" if number % 3 else name for number, name in enumerate(names)]
    return Demo(encoder, np.stack([encoder.preprocess(image, LIMIT) for image in images]), captions)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(0, id="eager", marks=pytest.mark.xdist_group("eager")),
        pytest.param(SIZE, id="compiled", marks=pytest.mark.xdist_group("compiled")),
    ],
)
def either(request: pytest.FixtureRequest, device: str) -> Demo:
    """Eager, and compiled for batches of `SIZE`."""
    return demo(device, compiled=request.param)


@pytest.fixture(scope="module")
def on_cpu(device: str) -> Demo:
    return demo("cpu")


@pytest.mark.parametrize("count", [1, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE + 5])
def test_batches_of_any_size_have_a_cpus_vectors(count: int, either: Demo, on_cpu: Demo) -> None:
    encoder, pixels, captions = either
    assert below_one(encoder.encode_images(pixels[:count]), on_cpu.encoder.encode_images(pixels[:count])) < 1e-5
    assert below_one(encoder.encode_texts(captions[:count]), on_cpu.encoder.encode_texts(captions[:count])) < 1e-5


def test_views_of_larger_arrays_are_encoded_as_they_read(either: Demo) -> None:
    encoder, pixels, _ = either
    view = pixels[: 2 * SIZE : 2]
    np.testing.assert_allclose(encoder.encode_images(view), encoder.encode_images(view.copy()), atol=1e-5)


def test_pairs_without_a_caption_have_a_zero_vector_in_place(either: Demo) -> None:
    encoder, pixels, captions = either
    some = [caption if number % 3 else None for number, caption in enumerate(captions[:SIZE])]
    images, texts = encoders.encode_pairs(encoder, pixels[:SIZE], some)
    assert texts is not None
    there = np.array([caption is not None for caption in some])
    assert below_one(images, encoder.encode_images(pixels[:SIZE])) < 1e-5
    assert below_one(texts[there], encoder.encode_texts([one for one in some if one is not None])) < 1e-5
    assert not texts[~there].any()


def test_a_caller_may_overwrite_its_batch_and_keeps_its_vectors(either: Demo, device: str) -> None:
    encoder, pixels, captions = either
    wanted = encoder.encode_images(pixels[:SIZE])
    for count in (SIZE, 1, SIZE, 3 * SIZE):
        batch = host_array(pixels[:count].shape, pixels.dtype, device)  # pinned: a GPU copies it when it likes
        batch[:] = pixels[:count]
        found = encoder.encode_images(batch)
        batch[:] = 255 - batch
        texts = encoder.encode_texts(captions[:count])
        kept = found.copy(), texts.copy()
        for start in range(12):  # other batches in as many buffers as there may be
            encoder.encode_images(pixels[start : start + count])
            encoder.encode_texts(captions[start : start + count])
        assert np.array_equal(found, kept[0]) and np.array_equal(texts, kept[1])
        least = min(count, SIZE)
        np.testing.assert_allclose(found[:least], wanted[:least], atol=1e-5)


@contextlib.contextmanager
def busy(device: str) -> Iterator[None]:
    """Other work on the GPU, on a stream of its own and of uneven length, while the block runs."""
    import torch

    stop = threading.Event()

    def work() -> None:
        rng = random.Random(1)
        with torch.cuda.stream(torch.cuda.Stream(device)):
            square = torch.ones(2048, 2048, device=device)
            while not stop.wait(rng.random() * 0.002):
                for _ in range(rng.randrange(8)):
                    square @ square
                torch.cuda.current_stream(device).synchronize()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work) if device.startswith("cuda") else None
        try:
            yield
        finally:
            stop.set()
            if done:
                done.result()


def _calls(pixels: np.ndarray, captions: Sequence[str]) -> list[tuple[str, list[int], list[str | None]]]:
    """What callers ask in turn: a kind, the numbers of the pictures, and captions or none."""
    rng = random.Random(0)
    found = []
    for _ in range(150):
        rows = rng.sample(range(len(pixels)), rng.choice([1, 3, SIZE - 1, SIZE, SIZE, SIZE + 1, 2 * SIZE]))
        some = [captions[row] if rng.random() < 0.8 else None for row in rows]
        found.append((rng.choice(["images", "texts", "pairs"]), rows, some))
    return found


def test_callers_at_once_get_their_own_rows(either: Demo, device: str) -> None:
    encoder, pixels, captions = either
    calls = _calls(pixels, captions)

    def ask(call: tuple[str, list[int], list[str | None]], pause: float = 0) -> list[np.ndarray]:
        kind, rows, some = call
        batch = pixels[rows]
        time.sleep(pause)
        if kind == "texts":
            return [encoder.encode_texts([captions[row] for row in rows])]
        if kind == "images":
            found = [encoder.encode_images(batch)]
        else:
            images, texts = encoders.encode_pairs(encoder, batch, some)
            assert texts is not None
            found = [images, texts]
        batch[:] = 128  # a caller may reuse its batch at once
        return found

    wanted = [ask(call) for call in calls]
    pauses = [random.Random(number).random() * 0.004 for number in range(len(calls))]
    with busy(device), ThreadPoolExecutor(6) as pool:
        found = list(pool.map(ask, calls, pauses))
    for call, ours, theirs in zip(calls, found, wanted, strict=True):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5, err_msg=str(call))
    images = encoder.encode_images(pixels)
    nearest = np.array([images @ images[row] for row in range(len(images))]) - 2 * np.eye(len(images))
    assert nearest.max() < 0.9999, "pictures are alike: this would prove nothing"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_batch_has_the_same_bits(precision: str, device: str) -> None:
    compiled = SIZE if device.startswith("cuda") and precision == "bf16" else 0
    encoder, pixels, captions = demo(device, precision, compiled)
    first = encoder.encode_images(pixels), encoder.encode_texts(captions)
    for count in (7, 32):
        encoder.encode_images(pixels[:count])
        encoder.encode_texts(captions[:count])
        again = encoder.encode_images(pixels), encoder.encode_texts(captions)
        assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])


def resident() -> int:
    """Bytes of this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_memory_does_not_grow_over_a_thousand_batches(either: Demo, device: str) -> None:
    import torch

    encoder, pixels, captions = either
    sizes = [SIZE, 5, 2 * SIZE, 1, 11]

    def used() -> np.ndarray:
        """Bytes that tensors hold on the GPU, that torch holds there, and of the process."""
        gc.collect()
        if device == "cpu":
            return np.array([0, 0, resident()])
        torch.cuda.synchronize(device)
        return np.array([torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device), resident()])

    batches = 1000 if device.startswith("cuda") else 120
    for number in range(batches):
        if number == 100:
            before = used()
        count = sizes[number % len(sizes)]
        start = number % (len(pixels) - count)
        # as embed does: each batch is an array of its own
        encoders.encode_pairs(encoder, pixels[start : start + count].copy(), captions[start : start + count])
    grown = used() - before
    print(f"grown by (allocated, reserved, resident) {grown} bytes")
    assert (grown <= [2**20, 2**25, 2**25]).all(), grown  # a leak of each batch would be 140 MB


def memory_taken(call: Callable[[], object]) -> int:
    """Bytes that torch takes on the GPU for a call, beyond what it holds."""
    import torch

    call()
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    call()
    taken = torch.cuda.max_memory_reserved() - held
    torch.cuda.empty_cache()
    assert taken > 2**26, "a small batch: it proves nothing"
    return taken


@contextlib.contextmanager
def memory_left(more: int) -> Iterator[None]:
    """Let torch take so many more bytes on the GPU in this process within the block."""
    import torch

    whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / whole)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def refusals() -> int:
    """How often torch found no memory on the GPU so far."""
    import torch

    return int(torch.cuda.memory_stats()["num_ooms"])


@pytest.fixture
def large(cuda: str) -> Demo:
    """An encoder of its own, with a batch of pictures that takes some hundred megabytes."""
    encoder, pixels, captions = demo(cuda)
    return Demo(encoder, np.concatenate([pixels] * 40), captions)


@pytest.mark.parametrize("share", [0.75, 0.3])
def test_a_batch_too_large_for_the_memory_has_the_same_vectors(share: float, large: Demo) -> None:
    encoder, pixels, _ = large
    wanted = encoder.encode_images(pixels)
    with memory_left(int(share * memory_taken(lambda: encoder.encode_images(pixels)))):
        before = refusals()
        found = encoder.encode_images(pixels)
        assert refusals() > before, "there was memory enough: this proves nothing"
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    np.testing.assert_allclose(encoder.encode_images(pixels), wanted, atol=1e-4)


def test_the_size_that_the_memory_holds_is_remembered(large: Demo) -> None:
    encoder, pixels, _ = large
    with memory_left(int(0.75 * memory_taken(lambda: encoder.encode_images(pixels)))):
        before = refusals()
        encoder.encode_images(pixels)
        once = refusals()
        assert once > before, "there was memory enough: this proves nothing"
        encoder.encode_images(pixels)
        assert refusals() == once


@pytest.mark.alone
def test_a_gpu_that_is_full_halves_a_batch(large: Demo) -> None:
    """By the GPU's own refusal, as when other processes use it."""
    import torch

    encoder, pixels, _ = large
    wanted = encoder.encode_images(pixels)
    left = int(0.6 * memory_taken(lambda: encoder.encode_images(pixels)))
    before = refusals()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(free - left, dtype=torch.uint8, device="cuda")
    try:
        found = encoder.encode_images(pixels)
    finally:
        del ballast
        torch.cuda.empty_cache()
    assert refusals() > before, "there was memory enough: this proves nothing"
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_auto_is_a_gpu(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    assert pick_device("auto") == "cuda"
    monkeypatch.setenv("SLURM_LOCALID", "5")
    assert pick_device("auto") == (f"cuda:{5 % gpus()}" if gpus() > 1 else "cuda")


def test_a_gpu_is_found_by_its_number_and_one_that_is_not_there_is_refused(cuda: str, on_cpu: Demo) -> None:
    encoder, pixels, _ = demo("cuda:0")
    assert below_one(encoder.encode_images(pixels), on_cpu.encoder.encode_images(pixels)) < 1e-5
    with pytest.raises(EncoderError, match=f"cuda:{gpus()}: torch needs a GPU of that name"):
        encoders.load(encoders.resolve("demo"), f"cuda:{gpus()}")


def test_compiled_is_no_further_from_a_cpu_than_eager_in_bf16(cuda: str, on_cpu: Demo) -> None:
    eager, compiled = (demo(cuda, "bf16", size) for size in (0, SIZE))
    for count in (SIZE, 3, SIZE + 1, 5 * SIZE):
        pixels, captions = eager.pixels[:count], eager.captions[:count]
        images, texts = on_cpu.encoder.encode_images(pixels), on_cpu.encoder.encode_texts(captions)
        for kind, found, wanted in (
            ("images", [one.encoder.encode_images(pixels) for one in (eager, compiled)], images),
            ("texts", [one.encoder.encode_texts(captions) for one in (eager, compiled)], texts),
        ):
            far = [below_one(vectors, wanted) for vectors in found]
            print(f"{count} {kind} in bf16: 1 - cosine is up to {far[0]:.1e} eager, {far[1]:.1e} compiled")
            assert far[0] < BOUNDS["bf16"] and far[1] < 3 * max(far[0], 3e-5), (count, kind)


def test_fused_and_compiled_towers_give_what_the_model_gives(cuda: str) -> None:
    """A small CLIP whose blocks are those of ViT-B and ViT-L: attention with and without a mask, GELU, patches."""
    import open_clip
    import torch
    from torch._dynamo.utils import counters

    from clip_batch.encoders.fused import LinearGelu, PatchProjection, SelfAttention
    from clip_batch.encoders.inductor import compile_tower

    torch.manual_seed(0)
    vision = {"layers": 3, "width": 128, "patch_size": 16, "image_size": 32}
    exact = open_clip.CLIP(32, vision, {"width": 64, "heads": 2, "layers": 3}).eval()
    tokens = open_clip.get_tokenizer("RN50")(["a cat", "two dogs on a sofa", ""] * 5)
    half, fused = (copy.deepcopy(exact).to(cuda, torch.bfloat16) for _ in range(2))
    tower = compile_tower(fused, fused.encode_image, torch.zeros(2, 3, 32, 32, device=cuda, dtype=torch.bfloat16))
    for kind, count in ((SelfAttention, 6), (LinearGelu, 6), (PatchProjection, 1)):
        assert sum(isinstance(part, kind) for part in fused.modules()) == count
    graphs = counters["stats"]["unique_graphs"]

    def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
        return float((1 - torch.nn.functional.cosine_similarity(found.float().cpu(), wanted)).mean())

    with torch.inference_mode():
        for count in (30, 300, 17):
            pixels = torch.randn(count, 3, 32, 32)
            wanted, ours = exact.encode_image(pixels), pixels.to(cuda, torch.bfloat16)
            assert far(tower(ours), wanted) < 1.5 * far(half.encode_image(ours), wanted) < 1e-3
        wanted, ours = exact.encode_text(tokens), tokens.to(cuda)
        assert far(fused.encode_text(ours), wanted) < 1.5 * far(half.encode_text(ours), wanted) < 1e-3
    assert counters["stats"]["unique_graphs"] <= graphs + 2, "each size of a batch was compiled anew"
