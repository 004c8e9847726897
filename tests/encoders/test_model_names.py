"""open_clip's names are read without importing it, and are those that it has; the list of models is made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clip_batch.cli import main
from clip_batch.encoders import open_clip_names
from clip_batch.encoders.model_list import model_list
from clip_batch.encoders.open_clip_names import DEFAULT_TAGS, default_tag, models, tags
from clip_batch.errors import EncoderError, InputError


def test_every_model_with_several_tags_has_a_default_that_exists() -> None:
    several = {model for model in models() if len(tags(model)) > 1}
    assert several and {model: default_tag(model) for model in several} == DEFAULT_TAGS
    assert default_tag("ViT-L-14-336") == "openai" and default_tag("ViT-M-16") == "" == default_tag("none")


def test_names_that_are_wrong_are_refused_with_the_nearest() -> None:
    with pytest.raises(
        EncoderError, match=r"no model 'ViT-B32': the nearest are --model ViT-B-32, .*clip-batch models"
    ):
        open_clip_names.settings("ViT-B32", "openai")
    with pytest.raises(EncoderError, match=r"'opnai' is neither a file nor a tag of RN50: the nearest are .*openai"):
        open_clip_names.settings("RN50", "opnai")
    assert open_clip_names.settings("ViT-B-32", "LAION2B-s34b-b79k")["hf_hub"].startswith("laion/")


def test_the_list_has_what_a_choice_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--laion--CLIP-ViT-B-32-DataComp.XL-s13B-b90K/snapshots/1"
    snapshot.mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    words = ["vit-b-32", "DataComp.XL"]
    (row,) = model_list(words)
    assert (row.model, row.tag, row.default, row.cached) == ("ViT-B-32", "datacomp_xl_s13b_b90k", True, False)
    assert (row.dim, row.image_size, row.gflop, row.licence) == (512, 224, 8.82, "MIT or Apache-2.0")
    (snapshot / "open_clip_model.safetensors").touch()
    (snapshot / "README.md").write_text("---\nlicense: other\n---\n")
    (row,) = model_list([*words, "cached"])
    assert row.cached and row.licence == "other"
    with pytest.raises(InputError, match="no model with weights has klip in its name"):
        model_list(["klip"])
    assert all(row.gflop for row in model_list())


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "ViT-L-14", "datacomp", "--json"]) == 0
    names = {(row["model"], row["tag"]) for row in json.loads(capsys.readouterr().out)}
    assert ("ViT-L-14", "datacomp_xl_s13b_b90k") in names
    assert main(["models", "demo"]) == 0
    assert "demo: 192 numbers, 64 pixels" in capsys.readouterr().out
    assert main(["models", "ViT-g-14"]) == 0
    said = capsys.readouterr().out
    assert "ViT-g-14: 1024 numbers, 224 pixels, 534 GFLOP an image" in said
    assert (
        "laion2b_s34b_b88k                  default, MIT or Apache-2.0 (laion/CLIP-ViT-g-14-laion2B-s34B-b88K)" in said
    )


@pytest.mark.slow
def test_open_clip_has_the_same_names() -> None:
    import open_clip

    from docs.gflop import gflop

    assert {*open_clip.list_models()} == {*models()}
    for model in models():
        assert open_clip.get_model_config(model) == models()[model]
        assert {tag: open_clip.get_pretrained_cfg(model, tag) for tag in tags(model)} == tags(model)
        assert open_clip.list_pretrained_tags_by_model(model) == list(tags(model))
    counted = json.loads(open_clip_names.GFLOP.read_text())
    assert gflop(models()["ViT-B-32"]) == counted["ViT-B-32"]
