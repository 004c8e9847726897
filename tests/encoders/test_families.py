"""Each family by its real loader, of tiny random models in its own format, against that library's own pipeline."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_batch import encoders
from clip_batch.errors import EncoderError
from tests import corpus, tiny

pytestmark = pytest.mark.slow

LIMIT = 10**7
TEXTS = tiny.TEXTS


def pictures() -> list[bytes]:
    """JPEG and PNG files of odd sizes and kinds, by both sides of a family's size."""
    sizes = [(31, 77), (97, 61), (48, 48), (101, 250), (255, 57), (640, 480)]
    files = [corpus.encode(corpus.picture(n, 64).resize(size), "JPEG", quality=90) for n, size in enumerate(sizes)]
    files += [corpus.encode(corpus.picture(20, 50, mode), "PNG") for mode in ("RGB", "L", "RGBA", "LA")]
    return [*files, corpus.encode(corpus.picture(30).quantize(8), "PNG"), corpus.encode(corpus.picture(5, 1), "PNG")]


def opened() -> list[Image.Image]:
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in pictures()]


def loaded(model: str, pretrained: str = "", preprocess: str = "exact", **options: Any) -> Any:
    return encoders.load(encoders.resolve(model, pretrained, preprocess, **options), "cpu")


def images(encoder: Any) -> np.ndarray:
    found: np.ndarray = encoder.encode_images(np.stack([encoder.preprocess(data, LIMIT) for data in pictures()]))
    return found


def unit(rows: Any) -> np.ndarray:
    """Unit rows of what a library gives."""
    rows = getattr(rows, "pooler_output", rows).detach().numpy()
    found: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return found


def same(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape and found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-4, "all rows are alike: this would prove nothing"


HF: dict[str, Callable[[Path], str]] = {
    "clip": tiny.clip,
    "siglip": tiny.siglip,
    "siglip2": tiny.siglip2,
    "chinese_clip": tiny.chinese_clip,
}


@pytest.mark.parametrize("kind", HF)
def test_transformers_with_two_sides(kind: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModel, AutoProcessor

    folder = HF[kind](tmp_path)
    encoder = loaded(f"hf:{folder}")
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder, backend="pil")
    padding = "max_length" if "siglip" in kind else True
    with torch.no_grad():
        wanted = unit(model.get_image_features(**processor.image_processor(opened(), return_tensors="pt")))
        tokens = processor.tokenizer(TEXTS, return_tensors="pt", padding=padding, truncation=True, max_length=16)
        if "attention_mask" in tokens:  # a text without a token sees its padding
            tokens["attention_mask"][~tokens["attention_mask"].any(dim=1)] = 1
        captions = unit(model.get_text_features(**tokens))
    assert encoder.has_text and encoder.dim == wanted.shape[1]
    same(images(encoder), wanted)
    same(encoder.encode_texts(TEXTS), captions)


@pytest.mark.parametrize("make", [tiny.dinov2, tiny.vit])
def test_transformers_of_images_alone(make: Callable[[Path], str], tmp_path: Path) -> None:
    import torch
    from transformers import AutoImageProcessor, AutoModel

    folder = make(tmp_path)
    encoder = loaded(f"hf:{folder}")
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    with torch.no_grad():
        output = AutoModel.from_pretrained(folder).eval()(**processor(opened(), return_tensors="pt"))
    same(images(encoder), unit(output.last_hidden_state[:, 0]))
    assert not encoder.has_text
    with pytest.raises(EncoderError, match="no text side"):
        encoder.encode_texts(["a"])


@pytest.mark.parametrize("kind", ["clip", "siglip", "chinese_clip", "dinov2"])
def test_exact_pixels_are_the_processors_in_every_bit(kind: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoImageProcessor

    folder = {**HF, "dinov2": tiny.dinov2}[kind](tmp_path)
    encoder = loaded(f"hf:{folder}")
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    for data, image in zip(pictures(), opened(), strict=True):
        pixels = encoder.preprocess(data, LIMIT)
        assert pixels.dtype == np.uint8
        ours = encoder._normalize(torch.from_numpy(pixels[None])).numpy()
        assert np.array_equal(ours, processor(image, return_tensors="np")["pixel_values"])


@pytest.mark.parametrize("kind", HF)
def test_batches_may_be_encoded_at_once(kind: str, tmp_path: Path) -> None:
    encoder = loaded(f"hf:{HF[kind](tmp_path)}")
    batch = np.stack([encoder.preprocess(data, LIMIT) for data in pictures()[:4]])
    asked = [[TEXTS[(start + n) % len(TEXTS)] * (1 + start % 3) for n in range(4)] for start in range(40)]
    one_by_one = [encoders.encode_pairs(encoder, batch, texts) for texts in asked]
    with ThreadPoolExecutor(2) as pool:
        at_once = list(pool.map(lambda texts: encoders.encode_pairs(encoder, batch, texts), asked))
    assert all(
        np.array_equal(a, b) for x, y in zip(one_by_one, at_once, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("mode", ["fast", "scaled"])
@pytest.mark.parametrize("kind", ["clip", "siglip", "chinese_clip", "dinov2"])
def test_fast_and_scaled_pixels_are_near(kind: str, mode: str, tmp_path: Path) -> None:
    folder = {**HF, "dinov2": tiny.dinov2}[kind](tmp_path)
    exact, other = (loaded(f"hf:{folder}", preprocess=way) for way in ("exact", mode))
    most = {"fast": 2, "scaled": 4}[mode]
    for data in pictures():
        ours, theirs = (encoder.preprocess(data, LIMIT).astype(int) for encoder in (other, exact))
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= most
    assert (images(other) * images(exact)).sum(1).min() > 0.9999


@pytest.mark.parametrize("mode", ["fast", "scaled"])
def test_a_transform_that_only_exact_knows_is_refused(mode: str, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="plan with --preprocess exact"):
        loaded(f"hf:{tiny.siglip2(tmp_path)}", preprocess=mode)


def test_normalizing_of_another_kind_is_left_to_the_processor(tmp_path: Path) -> None:
    import torch
    from transformers import AutoImageProcessor, AutoModel

    folder = tiny.clip(tmp_path, {"rescale_factor": 1 / 127.5})
    encoder = loaded(f"hf:{folder}")
    assert encoder.preprocess(pictures()[0], LIMIT).dtype == np.float32
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    with torch.no_grad():
        wanted = AutoModel.from_pretrained(folder).get_image_features(**processor(opened(), return_tensors="pt"))
    same(images(encoder), unit(wanted))


def test_timm_from_a_checkpoint_and_from_a_folder(tmp_path: Path) -> None:
    import timm
    import torch

    tiny.seeded()
    model = timm.create_model("test_vit", pretrained=False).eval()
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    timm.models.save_for_hf(model, str(tmp_path / "folder"))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    batch = torch.stack([transform(image) for image in opened()])
    with torch.no_grad():
        wanted = unit(model.forward_head(model.forward_features(batch), pre_logits=True))
    whole = loaded("timm:test_vit", str(tmp_path / "vit.pth"))
    same(images(whole), wanted)
    same(images(loaded(f"timm:{tmp_path / 'folder'}")), wanted)
    assert not whole.has_text
    for data, pixels in zip(pictures(), batch, strict=True):
        ours = whole._normalize(torch.from_numpy(whole.preprocess(data, LIMIT)[None]))
        assert np.array_equal(ours[0].numpy(), pixels.numpy())
    fast = loaded("timm:test_vit", str(tmp_path / "vit.pth"), "fast")
    assert (images(fast) * wanted).sum(1).min() > 0.999


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-H-14", "RN50"])
def test_chinese_clip_checkpoints_of_ofa_sys(name: str, tmp_path: Path) -> None:
    pytest.importorskip("cn_clip.clip", reason="pip install --no-deps cn_clip")
    import torch
    from cn_clip import clip

    path, model = tiny.cn_clip(tmp_path, name)
    encoder = loaded(f"cn-clip:{name}", path)
    transform = clip.image_transform(model.visual.input_resolution)
    context = clip.utils._tokenizer
    try:
        clip.utils._tokenizer = model.tokenizer
        tokens = clip.tokenize(TEXTS)
    finally:
        clip.utils._tokenizer = context
    with torch.no_grad():
        files = [Image.open(io.BytesIO(data)) for data in pictures()]
        wanted = unit(model.encode_image(torch.stack([transform(image) for image in files])))
        captions = unit(model.encode_text(tokens))
    same(images(encoder), wanted)
    same(encoder.encode_texts(TEXTS), captions)


def test_multilingual_text_towers_beside_an_image_space(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer, XLMRobertaConfig

    from clip_batch.encoders.embedded import model_path

    folder = tiny.mclip(tmp_path)
    encoder = loaded(f"mclip:{folder}+local-dir:{model_path()}")
    same(images(encoder), images(loaded("demo")))
    state = torch.load(tmp_path / "pytorch_model.bin")
    base = AutoModel.from_config(XLMRobertaConfig.from_pretrained(tmp_path / "base")).eval()
    base.load_state_dict({name[12:]: value for name, value in state.items() if name.startswith("transformer.")})
    tokens = AutoTokenizer.from_pretrained(tmp_path)(TEXTS, return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        found, there = base(**tokens)[0], tokens["attention_mask"].unsqueeze(2)
        mean = (found * there).sum(dim=1) / there.sum(dim=1)
        wanted = mean @ state["LinearTransformation.weight"].T + state["LinearTransformation.bias"]
    same(encoder.encode_texts(TEXTS), unit(wanted))


@pytest.fixture
def siglip(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    return f"hf:{tiny.siglip(tmp_path / 'model')}"


@pytest.mark.parametrize("kind", ["demo", "siglip"])
def test_exports_give_their_models_vectors(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("onnxscript")
    from clip_batch.encoders.onnx_export import export_onnx

    model = "demo" if kind == "demo" else request.getfixturevalue(kind)
    to = str(tmp_path / "export")
    export_onnx(model, "", to)
    with pytest.raises(EncoderError, match="is not empty"):
        export_onnx(model, "", to)
    whole = loaded(model)
    for name in (f"onnx:{to}", f"openvino:{to}"):
        if name.startswith("openvino") and not _to_openvino(to):
            continue
        found = loaded(name)
        assert found.has_text == whole.has_text
        same(images(found), images(whole))
        if whole.has_text:
            same(found.encode_texts(TEXTS), whole.encode_texts(TEXTS))
    with pytest.raises(EncoderError, match="plan with fp32"):
        loaded(f"onnx:{to}", precision="bf16")


SIGNALLED = """
import faulthandler, gc, os, signal, sys
from clip_batch import encoders
faulthandler.enable()
held = [encoders.load(encoders.resolve(sys.argv[1]), "cpu") for _ in range(2)]
del held[0]
gc.collect()
held.clear()
gc.collect()
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_signals_are_handled_after_openvino_models_were_released(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from clip_batch.encoders.onnx_export import export_onnx

    folder = str(tmp_path / "export")
    export_onnx("demo", "", folder)
    _to_openvino(folder)
    command = [sys.executable, "-W", "ignore", "-c", SIGNALLED, f"openvino:{folder}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_an_export_runs_on_the_gpu_that_was_named_or_not_at_all(tmp_path: Path) -> None:
    import torch

    from clip_batch.encoders import onnx_runtime

    assert onnx_runtime._providers("cpu") == [("CPUExecutionProvider", {})]
    for device, number in (("cuda:3", "3"), ("cuda", "0")):
        assert onnx_runtime._providers(device)[0] == ("CUDAExecutionProvider", {"device_id": number})
    layer = torch.nn.Linear(2, 2)
    path = str(tmp_path / "layer.onnx")
    onnx_runtime.write_onnx(layer, layer, {"rows": torch.zeros(1, 2)}, path)
    assert onnx_runtime.open_session(path, "cpu").get_providers() == ["CPUExecutionProvider"]
    with pytest.raises(EncoderError, match=r"no CUDA.* --device cpu"):
        onnx_runtime.open_session(path, "cuda:0")


def _to_openvino(folder: str) -> bool:
    """Write the sides of an ONNX folder as OpenVINO's, as the document says; False where that is not installed."""
    try:
        import openvino
    except ImportError:
        return False
    config = Path(folder, "clip_batch.json")
    for side in ("image", "text"):
        if (path := Path(folder, f"{side}.onnx")).exists():
            openvino.save_model(openvino.convert_model(path), path.with_suffix(".xml"), compress_to_fp16=False)
    config.write_text(config.read_text().replace(".onnx", ".xml"))
    return True


def test_lower_precision_is_near_and_another_encoder(siglip: str) -> None:
    whole = loaded(siglip)
    for precision in ("bf16", "fp16", "int8"):
        near = loaded(siglip, precision=precision)
        assert (images(near) * images(whole)).sum(1).min() > 0.99
        assert (near.encode_texts(TEXTS) * whole.encode_texts(TEXTS)).sum(1).min() > 0.99
    assert encoders.resolve(siglip, precision="bf16").fingerprint != encoders.resolve(siglip).fingerprint


def test_weights_that_are_missing_are_refused_not_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny.clip(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(EncoderError, match=r"lack visual_projection.weight"):
        loaded(f"hf:{folder}")
