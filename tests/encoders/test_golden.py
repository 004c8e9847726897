"""embed against a ten-line open_clip loop, and OUT in the hands of the tools it is made for."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from clip_batch.config import EmbedConfig, PlanConfig
from clip_batch.demo import data
from clip_batch.embeddings.commits import read_commits
from clip_batch.embeddings.embed import embed
from clip_batch.embeddings.verify import verify_output
from clip_batch.encoders.embedded import model_path
from clip_batch.plan.plan import load_plan, make_plan
from clip_batch.storage.store import Store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The demo set embedded by the demo model, in 5 partitions."""
    home = tmp_path_factory.mktemp("golden")
    tars = data.write_tars(str(home / "tars"), shards=3)
    output = str(home / "out")
    make_plan(tars, output, PlanConfig(model="demo", partition_samples=400))
    assert {outcome.state for outcome in embed(output, EmbedConfig(batch_size=64))} == {"committed"}
    return output


def stacked(out: str, folder: str) -> np.ndarray:
    commits = sorted(read_commits(Store(out)).items())
    return np.concatenate([np.load(f"{out}/{commit.file(folder)}") for _, commit in commits]).astype(np.float32)


def test_rows_equal_a_plain_open_clip_loop(out: str) -> None:
    import open_clip
    import torch
    from PIL import Image

    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{model_path()}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{model_path()}")
    model.eval()
    images, texts = [], []
    with torch.inference_mode():
        for tar_path in sorted(Path(out).parent.glob("tars/*.tar")):
            with tarfile.open(tar_path) as tar:
                for member in tar:
                    body = tar.extractfile(member).read()  # type: ignore[union-attr]
                    if member.name.endswith(".jpg"):
                        images.append(model.encode_image(transform(Image.open(io.BytesIO(body)))[None]))
                    elif member.name.endswith(".txt"):
                        texts.append(model.encode_text(tokenizer([body.decode()])))
    for folder, rows in (("img_emb", images), ("text_emb", texts)):
        expected = torch.nn.functional.normalize(torch.cat(rows), dim=-1).numpy()
        found = stacked(out, folder)
        assert found.shape == expected.shape
        cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1)
        assert cosine.min() >= 0.99999, folder


def test_it_is_complete_and_its_metadata_finds_the_bytes(out: str) -> None:
    report = verify_output(Store(out), deep=True)
    assert report.problems == {}
    assert report.rows == 1911
    commit = read_commits(Store(out))[2]
    row = pq.read_table(f"{out}/{commit.file('metadata')}").slice(7, 1).to_pylist()[0]
    with open(row["shard"], "rb") as file:
        file.seek(row["offset"])
        body = file.read(row["length"])
    expected = {item["key"]: item["image"] for item in data.load().select(["key", "image"]).to_pylist()}
    assert body == expected[row["key"]]
    assert row["name_zh"]


@pytest.mark.usefixtures("autofaiss")
def test_embedding_reader_and_autofaiss_read_it_as_their_own(out: str, tmp_path: Path) -> None:
    script = f"""
import glob
from embedding_reader import EmbeddingReader
reader = EmbeddingReader({out + "/img_emb"!r}, metadata_folder={out + "/metadata"!r}, meta_columns=["key", "caption"],
                         file_format="parquet_npy")
rows = [(vectors.shape, len(meta)) for vectors, meta in reader(batch_size=500)]
assert reader.count == 1911 and sum(shape[0] for shape, _ in rows) == sum(meta for _, meta in rows) == 1911, rows
from autofaiss import build_index
# on numpy 2 it cannot write its description; tests/test_environments.py has it do so with numpy 1
index, infos = build_index({out + "/img_emb"!r}, save_on_disk=False, max_index_memory_usage="1G", nb_cores=2)
assert index.ntotal == 1911, index.ntotal
print("READ")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.stdout.splitlines()[-1:] == ["READ"], done.stderr[-2000:]


def test_another_model_at_the_same_place_is_refused(out: str, tmp_path: Path) -> None:
    import shutil

    from clip_batch.encoders import load, resolve
    from clip_batch.errors import EncoderError

    folder = tmp_path / "model"
    shutil.copytree(model_path(), folder)
    spec = resolve(f"local-dir:{folder}", preprocess="fast")
    assert spec.fingerprint == load_plan(Store(out)).encoder.fingerprint, "the same bytes are the same encoder"
    weights = folder / "open_clip_model.safetensors"
    os.chmod(weights, 0o644)
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(EncoderError, match="planned were"):
        load(spec, "cpu")


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B-32", "", "weights of ViT-B-32 datacomp_xl_s13b_b90k cannot be found: .*with no network"),
        ("ViT-B-32", "nonsense", "neither a file nor a tag"),
        ("ViT-Z-1", "x", "has no model"),
        ("ViT-M-16", "", "needs weights: give --pretrained a checkpoint's path, as open_clip has no weights of it"),
        ("local-dir:/nowhere", "", "no open_clip_config.json in /nowhere"),
        ("ViT-B-32", "laion2b_s34b_b79k", "with no network"),
    ],
)
def test_a_model_that_is_not_there_is_one_line(model: str, pretrained: str, message: str) -> None:
    from clip_batch.encoders import resolve
    from clip_batch.errors import EncoderError

    with pytest.raises(EncoderError, match=message) as caught:
        resolve(model, pretrained)
    assert "\n" not in str(caught.value)


def test_any_open_clip_model_from_a_local_checkpoint(tmp_path: Path) -> None:
    import open_clip
    import torch

    from clip_batch.encoders import load, resolve

    model = open_clip.create_model("RN50", pretrained=None)
    torch.save(model.state_dict(), tmp_path / "random.pt")
    encoder = load(resolve("RN50", str(tmp_path / "random.pt")), "cpu")
    assert encoder.dim == 1024
    texts = encoder.encode_texts(["a cat", "x" * 10_000, "\0"])
    assert texts.shape == (3, 1024)
    assert np.allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "tower", "cut"),
    [
        ("CLIP", {}, True),
        ("CustomTextCLIP", {}, True),
        ("CLIP", {"pool_type": "eos", "eos_id": 49407}, True),
        ("CustomTextCLIP", {"pool_type": "eos", "eos_id": 49407}, True),
        ("CLIP", {"no_causal_mask": True}, False),
        ("CustomTextCLIP", {"no_causal_mask": True}, False),
        ("CustomTextCLIP", {"pool_type": "last"}, False),
        ("CustomTextCLIP", {"embed_cls": True}, False),
    ],
)
def test_cutting_captions_changes_nothing(kind: str, tower: dict[str, Any], cut: bool) -> None:
    import open_clip
    import torch

    from clip_batch.encoders.text_tower import TrimmedTextTower

    torch.manual_seed(1)
    vision = {"layers": 1, "width": 64, "patch_size": 32, "image_size": 32}
    model = getattr(open_clip, kind)(32, vision, {"width": 64, "heads": 2, "layers": 3, **tower}).eval()
    texts = ["", "a", "two cats on a sofa", "word " * 30, "a long caption " * 40, "\u732b", "<end_of_text> behind it"]
    tokens = open_clip.get_tokenizer("RN50")(texts * 20)
    with torch.inference_mode():
        text, whole = TrimmedTextTower(model), model.encode_text(tokens)
        for some in (slice(None), slice(2, 3), slice(4, 6)):
            torch.testing.assert_close(text(tokens[some]), whole[some], rtol=0, atol=2e-6)
    assert bool(text._trimmed) == cut


@pytest.mark.parametrize(("precision", "least"), [("bf16", 0.9995), ("fp16", 0.99999)])
def test_half_precisions_stay_close(precision: str, least: float) -> None:
    from clip_batch.encoders import load, resolve

    full, half = (load(resolve("demo", precision=name), "cpu") for name in ("fp32", precision))
    pixels = np.stack([full.preprocess(image, 10**6) for image in data.load()["image"].to_pylist()[::100]])
    names = data.load()["name_zh"].to_pylist()[::100]
    assert (full.encode_images(pixels) * half.encode_images(pixels)).sum(1).min() > least
    assert (full.encode_texts(names) * half.encode_texts(names)).sum(1).min() > least
    assert resolve("demo", precision=precision).fingerprint != resolve("demo").fingerprint
