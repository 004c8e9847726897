"""What plan finds out by one forward pass, of tiny random models of transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_batch import encoders
from clip_batch.cli import main
from clip_batch.config import PlanConfig
from clip_batch.embeddings.embed import embed
from clip_batch.errors import EncoderError
from clip_batch.plan.plan import make_plan
from tests import corpus, tiny

pytestmark = pytest.mark.slow

SIZES = {"size": {"height": tiny.SIDE, "width": tiny.SIDE}}


def flava(folder: Path) -> str:
    """Its image and text features are one vector for each patch and token."""
    from transformers import FlavaConfig, FlavaModel, ViTImageProcessor

    tiny.seeded()
    tokenizer = tiny.bert_tokenizer()
    settings = {
        "image_config": tiny.vision(), "text_config": tiny.text(len(tokenizer), max_position_embeddings=64),
        "multimodal_config": tiny.text(8), "image_codebook_config": {"hidden_size": 8, "num_blocks_per_group": 1},
        "hidden_size": 32, "projection_dim": 24, "init_codebook": False,
    }  # fmt: skip
    return tiny.save(folder, FlavaModel(FlavaConfig(**settings)), tokenizer, ViTImageProcessor(**SIZES))


def mae(folder: Path) -> str:
    """It masks patches at random in every pass."""
    from transformers import ViTImageProcessor, ViTMAEConfig, ViTMAEModel

    tiny.seeded()
    return tiny.save(folder, ViTMAEModel(ViTMAEConfig(**tiny.vision())), ViTImageProcessor(**SIZES))


def bert(folder: Path) -> str:
    """A model of texts, in a folder with an image processor."""
    from transformers import BertConfig, BertModel, ViTImageProcessor

    tiny.seeded()
    tokenizer = tiny.bert_tokenizer()
    model = BertModel(BertConfig(**tiny.text(len(tokenizer), max_position_embeddings=64)))
    return tiny.save(folder, model, tokenizer, ViTImageProcessor(**SIZES))


def qwen(folder: Path) -> str:
    """Its processor cuts a picture into patches that its model takes with their places."""
    from transformers import Qwen2VLConfig, Qwen2VLImageProcessor, Qwen2VLModel

    tiny.seeded()
    tokenizer = tiny.bert_tokenizer()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    texts = tiny.text(len(tokenizer), num_key_value_heads=2, max_position_embeddings=64, rope_scaling=rope)
    images = {"embed_dim": 32, "hidden_size": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=texts, vision_config=images)
    return tiny.save(folder, Qwen2VLModel(config), tokenizer, Qwen2VLImageProcessor())


UNFIT: dict[str, tuple[Callable[[Path], str], str]] = {
    "flava": (flava, "not with one vector for each input"),
    "mae": (mae, "another vector each time"),
    "bert": (bert, "has no image side: take another model"),
    "qwen": (qwen, "cannot embed a picture|fast and scaled|one vector"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_model_that_workers_would_refuse_is_refused_by_plan(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, says = UNFIT[kind]
    folder, out = make(tmp_path / "model"), tmp_path / "out"
    tar = corpus.good_tar(str(tmp_path / "a.tar"), 3)
    with pytest.raises(EncoderError, match=says) as caught:
        make_plan(tar, out, PlanConfig(model=f"hf:{folder}"))
    assert "\n" not in str(caught.value)
    capsys.readouterr()
    assert main(["plan", "--input", tar, "--output", str(out), "--model", f"hf:{folder}"]) == 2
    assert "Traceback" not in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(("make", "mode"), [(tiny.clip, "fast"), (tiny.dinov2, "fast"), (tiny.siglip2, "exact")])
def test_auto_is_fast_where_that_is_known_and_else_exact(
    make: Callable[[Path], str], mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = make(tmp_path / "model"), str(tmp_path / "out")
    tar = corpus.good_tar(str(tmp_path / "a.tar"), 3)
    assert main(["plan", "--input", tar, "--output", out, "--model", f"hf:{folder}", "--json"]) == 0
    told = capsys.readouterr()
    assert f"preprocessing: {mode}" in told.err
    planned = json.loads(told.out)
    assert planned["preprocess"] == mode
    assert planned["encoder"] == encoders.resolve(f"hf:{folder}", preprocess=mode).fingerprint
    (outcome,) = embed(out)
    assert outcome.rows == 3
    assert main(["plan", "--input", tar, "--output", out, "--model", f"hf:{folder}"]) == 0
    assert "unchanged" in capsys.readouterr().err


def test_what_fast_does_not_know_is_refused_by_plan(tmp_path: Path) -> None:
    folder = tiny.siglip2(tmp_path / "model")
    tar = corpus.good_tar(str(tmp_path / "a.tar"), 3)
    with pytest.raises(EncoderError, match="plan with --preprocess exact"):
        make_plan(tar, tmp_path / "out", PlanConfig(model=f"hf:{folder}", preprocess="fast"))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_model_for_gpus_is_tried_without_one(precision: Any, tmp_path: Path) -> None:
    tar = corpus.good_tar(str(tmp_path / "a.tar"), 3)
    config = PlanConfig(model=f"hf:{tiny.clip(tmp_path / 'model')}", precision=precision)
    assert make_plan(tar, tmp_path / "out", config).encoder.precision == precision


def test_an_input_without_a_picture_is_tried_with_a_grey_one(tmp_path: Path) -> None:
    tar = corpus.good_tar(str(tmp_path / "a.tar"), 3, broken=[True] * 3)
    plan = make_plan(tar, tmp_path / "out", PlanConfig(model=f"hf:{tiny.clip(tmp_path / 'model')}"))
    assert plan.encoder.preprocess == "fast"


def test_sides_of_two_spaces_are_refused(tmp_path: Path) -> None:
    class Sides:
        """Its captions are longer vectors than its pictures."""

        dim, has_text = 4, True
        preprocess = staticmethod(lambda data, limit: encoders.load(encoders.resolve("fake:4")).preprocess(data, limit))
        encode_images = staticmethod(lambda batch: encoders.load(encoders.resolve("fake:4")).encode_images(batch))
        encode_texts = staticmethod(lambda texts: encoders.load(encoders.resolve("fake:6")).encode_texts(texts))

    from clip_batch.encoders import trial

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "load", lambda *_, **__: Sides())
        with pytest.raises(EncoderError, match="gives a caption 6 numbers, and its dimension is 4"):
            encoders.try_model(encoders.resolve("fake:4"), [corpus.jpeg()])


@pytest.mark.parametrize(("side", "says"), [("encode_images", "pictures"), ("encode_texts", "texts")])
def test_a_side_that_gives_all_the_same_vector_is_refused(side: str, says: str) -> None:
    import numpy as np

    from clip_batch.encoders import trial

    constant = encoders.load(encoders.resolve("fake:4"))
    setattr(constant, side, lambda items: np.full((len(items), 4), 0.5, np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "load", lambda *_, **__: constant)
        with pytest.raises(EncoderError, match=f"gives quite different {says} the same vector: check"):
            encoders.try_model(encoders.resolve("fake:4"), [corpus.jpeg()])


def test_a_folder_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = Path(tiny.clip(tmp_path / "model"))
    for path in folder.glob("*"):
        if path.name not in ("config.json", "model.safetensors", "preprocessor_config.json"):
            path.unlink()
    tar = corpus.good_tar(str(tmp_path / "a.tar"), 3)
    says = f"no tokenizer files .* in {folder}: save the processor there too"
    with pytest.raises(EncoderError, match=says):
        make_plan(tar, tmp_path / "out", PlanConfig(model=f"hf:{folder}"))
    make_plan(tar, tmp_path / "out", PlanConfig(model=f"hf:{folder}", try_model=False))
    with pytest.raises(EncoderError, match=says):
        embed(str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_a_folder_with_code_of_its_own_is_refused_and_not_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(tiny.clip(tmp_path / "model"))
    settings = json.loads((folder / name).read_text())
    settings["auto_map"] = {"AutoModel": "own.Model", "AutoConfig": "own.Config", "AutoImageProcessor": "own.Processor"}
    (folder / name).write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    tar = corpus.good_tar(str(tmp_path / "a.tar"), 3)
    for more in ([], ["--no-try-model"]):
        command = ["plan", "--input", tar, "--output", str(tmp_path / "out"), "--model", f"hf:{folder}", *more]
        assert main(command) == 2
        told = capsys.readouterr()
        assert f"{name} names code of its own (auto_map), which clip-batch never runs" in told.err
        assert told.err.count("\n") == 2  # the inputs, and this
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_a_vision_tower_saved_with_its_projection_gives_the_projection(tmp_path: Path) -> None:
    import numpy as np
    from transformers import CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    whole = tiny.clip(tmp_path / "whole")
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**tiny.vision(projection_dim=24)))
    assert not tower.load_state_dict(CLIPModel.from_pretrained(whole).state_dict(), strict=False).missing_keys
    tower.save_pretrained(tmp_path / "tower")
    shutil.copy(f"{whole}/preprocessor_config.json", tmp_path / "tower")
    both, alone = (encoders.load(encoders.resolve(f"hf:{tmp_path / name}"), "cpu") for name in ("whole", "tower"))
    assert (alone.dim, alone.has_text) == (24, False)
    batch = np.stack([both.preprocess(corpus.jpeg(seed), 10**6) for seed in (1, 2)])
    np.testing.assert_allclose(alone.encode_images(batch), both.encode_images(batch), atol=1e-6)
