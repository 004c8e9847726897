"""Models of transformers, with and without a text side, from plan to search and page."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_batch import encoders
from clip_batch.cli import main
from clip_batch.errors import EncoderError
from tests import corpus, tiny
from tests.servers.serving import served


def embedded(tmp_path: Path, model: str) -> tuple[str, str]:
    """OUT and INDEX of two small tars by a model, by the commands."""
    tars = [corpus.good_tar(str(tmp_path / f"{number}.tar"), 20, number) for number in range(2)]
    out, index = str(tmp_path / "out"), str(tmp_path / "index")
    flags = ["--input", *tars, "--output", out, "--model", model, "--device", "cpu", "--partition-count", "2"]
    assert main(["embed", *flags, "--no-progress"]) == 0
    assert main(["verify", "--output", out, "--deep"]) == 0
    assert main(["merge", "--output", out, "--index", index]) == 0
    assert main(["verify", "--index", index, "--deep"]) == 0
    return out, index


@pytest.mark.slow
def test_a_transformers_model_from_plan_to_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = f"hf:{tiny.clip(tmp_path / 'model')}"
    _, index = embedded(tmp_path, model)
    (tmp_path / "query.jpg").write_bytes(corpus.jpeg(1_000_003 + 4))
    capsys.readouterr()
    assert main(["search", "--index", index, "--image", str(tmp_path / "query.jpg"), "--json", "-k", "1"]) == 0
    [hit] = json.loads(capsys.readouterr().out)
    assert hit["metadata"]["key"] == "001000004" and hit["score"] > 0.999
    text = ["search", "--index", index, "--text", "caption 4 of tar 1", "--modality", "text", "--json", "-k", "1"]
    moved = shutil.copytree(tmp_path / "model", tmp_path / "moved")
    shutil.rmtree(tmp_path / "model")
    assert main(text) == 2
    capsys.readouterr()
    assert main([*text, "--model", f"hf:{moved}"]) == 0
    [hit] = json.loads(capsys.readouterr().out)
    assert hit["score"] > 0.999


@pytest.mark.slow
def test_a_model_of_images_alone_from_plan_to_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import base64

    out, index = embedded(tmp_path, f"hf:{tiny.dinov2(tmp_path / 'model')}")
    assert not os.path.exists(f"{out}/text_emb")
    query = corpus.jpeg(1_000_003 + 4)
    (tmp_path / "query.jpg").write_bytes(query)
    capsys.readouterr()
    assert main(["search", "--index", index, "--image", str(tmp_path / "query.jpg"), "--json", "-k", "1"]) == 0
    [hit] = json.loads(capsys.readouterr().out)
    assert hit["metadata"]["key"] == "001000004" and hit["metadata"]["caption"] == "caption 4 of tar 1"
    assert main(["search", "--index", index, "--text", "caption"]) == 2
    error = capsys.readouterr().err
    assert "no text side" in error and error.count("\n") == 1
    with served(index) as client:
        image = base64.b64encode(query).decode()
        found = client.post("/v1/search", json={"image": image, "k": 2}).json()
        assert found["hits"][0]["metadata"]["key"] == "001000004"
        row, vector = found["hits"][0]["id"], client.post("/v1/embed", json={"images": [image]}).json()["images"][0]
        for asked in ({"id": row}, {"embedding": vector}):
            assert client.post("/v1/search", json={**asked, "k": 1}).json()["hits"][0]["id"] == row
        for place, body in (
            ("/v1/search", {"text": "a"}),
            ("/v1/search", {"queries": [{"id": row}, {"text": "a"}]}),
            ("/v1/embed", {"texts": ["a"]}),
            ("/knn-service", {"text": "a", "modality": "image", "num_images": 3, "indice_name": "index"}),
        ):
            refused = client.post(place, json=body)
            assert refused.status_code == 400 and "no text side" in refused.json()["detail"], place
        assert client.get("/v1/indices").json()["indices"][0]["text"] is False
        assert client.get("/readyz").status_code == 200


def test_another_model_than_the_indexs_is_named_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, index = embedded(tmp_path, "fake:8")
    capsys.readouterr()
    assert main(["search", "--index", index, "--text", "a", "--model", "fake:16"]) == 2
    told = capsys.readouterr().err
    assert (
        "the index was made by fake:8 with weights " in told
        and "which fake:16 does not have here: leave --model" in told
    )
    assert "--output" not in told and "  " not in told and told.count("\n") == 1


@pytest.mark.parametrize(("precision", "remedy"), [("fp32", "check its weights"), ("fp16", "try --precision fp32")])
def test_the_remedy_for_nan_fits_the_precision(precision: str, remedy: str) -> None:
    encoder: Any = encoders.load(encoders.resolve("fake:4"))
    encoder.encode_images = lambda batch: np.full((len(batch), 4), np.nan, np.float32)
    with pytest.raises(EncoderError, match=f"a NaN or inf image vector: {remedy}$"):
        encoders.encode_pairs(encoder, np.zeros((1, 3, 8, 8), np.uint8), [None], precision)


def test_a_gpu_that_is_not_there_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EncoderError, match=r"--device cuda:7: .* sees none here: give --device cpu"):
        encoders.load(encoders.resolve("demo"), "cuda:7")


def test_an_unknown_tag_names_three_tags_and_the_command_that_lists_all() -> None:
    near = r"are --pretrained laion2b_s34b_b79k, (\w+), (\w+); clip-batch models ViT-B-32 lists all"
    with pytest.raises(EncoderError, match=near) as caught:
        encoders.resolve("ViT-B-32", "laion2b_s34b")
    assert len(str(caught.value)) < 250
