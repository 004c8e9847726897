"""Nothing outside of `--allow` is opened by a running worker, whatever a request names and however it leads there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clip_batch.cli import main
from clip_batch.serve.http.errors import Refused
from clip_batch.serve.worker.allow import Allowed
from tests.corpus import good_tar
from tests.serve.worker.test_worker import post, workers


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `inside`, which a worker may use, beside `outside`, which it may not, with links to it."""
    folder = tmp_path_factory.mktemp("house")
    inside, outside = folder / "inside", folder / "outside"
    for place in (inside / "model", inside / "named", inside / "pictures", inside / "linked", outside / "model"):
        place.mkdir(parents=True)
    good_tar(str(outside / "0.tar"), 4)
    good_tar(str(inside / "good.tar"), 4)
    (outside / "model/onnx.json").write_text(json.dumps({"image": "image.onnx"}))
    (outside / "secret.json").write_text("{}")
    (outside / "0.jpg").write_bytes(b"picture")
    (inside / "linked/0.tar").symlink_to(outside / "0.tar")
    (inside / "linked/again").symlink_to(inside / "linked")  # a circle
    (inside / "pictures/0.jpg").symlink_to(outside / "0.jpg")
    (inside / "model/onnx.json").symlink_to(outside / "model/onnx.json")
    (inside / "named/config.json").write_text(json.dumps({"modelBase": str(outside / "model")}))
    (inside / "named/model.safetensors").write_bytes(b"weights")
    (inside / "named-below").mkdir()
    (inside / "named-below/onnx.json").write_text(json.dumps({"image": "../../outside/model/onnx.json"}))
    return folder


@pytest.fixture(scope="module")
def url(house: Path) -> Iterator[str]:
    with workers(house / "inside", 1, "--device", "cpu") as [(url, _)]:
        yield url


PREFIXES = ("", "local-dir:", "hf:", "hf-hub:", "timm:", "onnx:", "openvino:", "cn-clip:", "other:")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_no_family_of_models_opens_a_folder_elsewhere(house: Path, url: str, prefix: str) -> None:
    inside, outside = house / "inside", house / "outside"
    body = {"output": f"{inside}/out", "input": [f"{inside}/good.tar"]}
    for model in (
        f"{outside}/model",
        f"{inside}/../outside/model",
        os.path.relpath(outside / "model"),
        f"{inside}/model",  # with a link to a file elsewhere
        f"{inside}/named-below",  # whose JSON names one
        f"file://{outside}/model",
        "~/model",
        "s3://bucket/model",
    ):
        status, answer = post(f"{url}/v1/plan", **body, model=f"{prefix}{model}")
        assert (status, answer["field"]) == (403, "model"), (model, answer)


def test_both_models_of_a_pair_and_what_they_name(house: Path, url: str) -> None:
    inside, outside = house / "inside", house / "outside"
    body = {"output": f"{inside}/out", "input": [f"{inside}/good.tar"]}
    for model in (f"mclip:{outside}/model+ViT-B-32", f"mclip:a/b+{outside}/model", f"mclip:{inside}/named+ViT-B-32"):
        status, answer = post(f"{url}/v1/plan", **body, model=model, pretrained="openai")
        assert (status, answer["field"]) == (403, "model"), (model, answer)
    status, answer = post(f"{url}/v1/plan", **body, model="ViT-B-32", pretrained=f"{inside}/../outside/secret.json")
    assert (status, answer["field"]) == (403, "pretrained")


def test_no_input_leads_elsewhere(house: Path, url: str) -> None:
    inside = house / "inside"
    for spec, options in (
        (f"{inside}/linked/*.tar", {}),
        (f"{inside}/**/0.tar", {}),
        (f"{inside}/linked/{{0,1}}.tar", {}),
        (f"{inside}/linked/again/again/0.tar", {}),
        (f"{inside}/linked", {}),
        (f"{inside}/pictures", {"format": "files"}),
        (f"{inside}/pict*", {"format": "files"}),
    ):
        status, answer = post(f"{url}/v1/plan", output=f"{inside}/out", input=[spec], model="fake:8", **options)
        assert (status, answer["field"]) == (403, "input.0"), (spec, answer)
    assert not (inside / "out").exists()


def test_an_output_with_links_and_a_plan_made_elsewhere(house: Path, url: str) -> None:
    inside, outside = house / "inside", house / "outside"
    (inside / "led").mkdir()
    (inside / "led/_clip_batch").symlink_to(outside)
    for path, body in (("plan", {"input": [f"{inside}/good.tar"], "model": "fake:8"}), ("embed", {"partition": 0})):
        status, answer = post(f"{url}/v1/{path}", output=f"{inside}/led", **body)
        assert (status, answer["field"]) == (403, "output"), answer
    assert post(f"{url}/v1/merge", output=f"{inside}/led", index=f"{inside}/index")[0] == 403
    assert sorted(path.name for path in outside.iterdir()) == ["0.jpg", "0.tar", "model", "secret.json"]

    planned = inside / "planned"
    assert main(["plan", "--input", f"{inside}/good.tar", "--model", "fake:8", "--output", str(planned)]) == 0
    plan = json.loads((planned / "_clip_batch/plan.json").read_text())
    assert post(f"{url}/v1/embed", output=str(planned), partition=0)[0] == 200

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: renamed(item) for name, item in value.items()}
        return f"onnx:{outside}/model" if value == "fake:8" else value

    other = inside / "other"
    assert main(["plan", "--input", f"{inside}/good.tar", "--model", "fake:8", "--output", str(other)]) == 0
    (other / "_clip_batch/plan.json").write_text(json.dumps(renamed(plan)))
    status, answer = post(f"{url}/v1/embed", output=str(other), partition=0)
    assert (status, answer["field"]) == (403, "output"), answer


def test_models_that_are_allowed(house: Path) -> None:
    allowed = Allowed([str(house / "inside")])
    (house / "inside/fine").mkdir(exist_ok=True)
    (house / "inside/fine/config.json").write_text(json.dumps({"_name_or_path": "openai/clip", "base": "good.tar"}))
    for model in (
        "ViT-B-32",
        "demo",
        "auto",
        "fake:8",
        "hf:openai/clip-vit-base-patch32",
        "timm:a.b",
        "mclip:a/b+C-32",
    ):
        allowed.check_model(model, "")
    allowed.check_model(f"hf:{house}/inside/fine", "openai")
    with pytest.raises(Refused, match="not below"):
        allowed.check_model("ViT-B-32", f"{house}/outside/secret.json")
