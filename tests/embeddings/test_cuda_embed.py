"""embed on a GPU, with the demo's model: a CPU's rows in order, two workers on one GPU, a GPU that is lost.

See tests/encoders/test_cuda.py for how to run it.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest

from clip_batch import encoders
from clip_batch.config import EmbedConfig, PlanConfig, StorageConfig
from clip_batch.embeddings.commits import committed, read_commits
from clip_batch.embeddings.embed import Outcome, embed
from clip_batch.embeddings.slabs import Slabs
from clip_batch.embeddings.status import status
from clip_batch.embeddings.verify import verify_output
from clip_batch.launch.local import run_workers
from clip_batch.plan.plan import load_plan, make_plan
from clip_batch.storage.store import Store
from tests import corpus

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.slow,
    pytest.mark.timeout(100),
    pytest.mark.filterwarnings("default"),  # torch's compiler has warnings for its users, which are not ours to heed
]

TARS, SAMPLES, SIZE = 4, 45, 16
BROKEN = [number % 7 == 3 or 16 <= number < 32 for number in range(SAMPLES)]
"""Some of each batch, and all of the second."""
CAPTIONED = [number % 5 != 1 for number in range(SAMPLES)]
PARTITIONS = 2 * TARS
ROWS = TARS * BROKEN.count(False)


class Rows(NamedTuple):
    """All rows of an output, in order."""

    keys: list[str]
    captions: list[str | None]
    images: np.ndarray
    texts: np.ndarray


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tars")
    return [
        corpus.good_tar(f"{folder}/{seed}.tar", SAMPLES, seed, side=90, captions=CAPTIONED, broken=BROKEN)
        for seed in range(TARS)
    ]


def plan(tars: list[str], out: str, precision: Any = "fp32") -> None:
    frozen = make_plan(tars, out, PlanConfig(model="demo", precision=precision, partition_count=PARTITIONS))
    assert len(frozen.partitions) == PARTITIONS


def config(device: str, **options: Any) -> EmbedConfig:
    return EmbedConfig(device=device, batch_size=SIZE, progress=False, **options)


def read(out: str) -> Rows:
    """The rows of all commits. Everything is committed, each sample once, and as verify wants it."""
    store = Store(out)
    report = verify_output(store, deep=True)
    assert report.ok, report.problems
    assert (report.rows, report.failed) == (ROWS, TARS * BROKEN.count(True))
    assert status(store).failures == {"undecodable_image": TARS * BROKEN.count(True)}
    commits = [commit for _, commit in sorted(read_commits(store).items())]
    assert len(commits) == PARTITIONS
    for name in ("img_emb", "text_emb", "metadata"):
        files = [commit.file(name) for commit in commits if commit.rows]
        assert sorted(os.listdir(f"{out}/{name}")) == sorted(os.path.basename(file or "") for file in files)
    rows = [row for one in commits if one.rows for row in pq.read_table(f"{out}/{one.file('metadata')}").to_pylist()]
    images, texts = (
        np.concatenate([np.load(f"{out}/{one.file(name)}").astype(float) for one in commits if one.rows])
        for name in ("img_emb", "text_emb")
    )
    return Rows([row["key"] for row in rows], [row["caption"] for row in rows], images, texts)


@pytest.fixture(scope="module")
def wanted(tars: list[str], device: str, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """What a CPU gives."""
    out = str(tmp_path_factory.mktemp("cpu") / "out")
    plan(tars, out)
    assert {outcome.state for outcome in embed(out, config("cpu"))} == {"committed"}
    found = read(out)
    samples = [(seed, number) for seed in range(TARS) for number in range(SAMPLES) if not BROKEN[number]]
    assert found.keys == [f"{seed:03d}{number:06d}" for seed, number in samples]
    captions = [f"caption {number} of tar {seed}" if CAPTIONED[number] else None for seed, number in samples]
    assert found.captions == captions
    return found


def check(found: Rows, wanted: Rows, below: float) -> None:
    """The same samples in the same order, each with its own vectors: their cosine is at most so far below 1."""
    assert found.keys == wanted.keys and found.captions == wanted.captions
    captioned = np.array([caption is not None for caption in wanted.captions])
    assert not found.texts[~captioned].any()
    for ours, theirs in ((found.images, wanted.images), (found.texts[captioned], wanted.texts[captioned])):
        norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        assert 1 - ((ours * theirs).sum(1) / norms).min() < below
    own = (found.images @ wanted.images.T).argmax(1)
    assert np.array_equal(own, np.arange(ROWS)), "a vector is nearest to another sample's"


@pytest.mark.parametrize(("precision", "compile"), [("fp32", False), ("fp32", True), ("bf16", False)])
def test_rows_are_a_cpus(precision: str, compile: bool, device: str, tars: list[str], wanted: Rows, out: str) -> None:
    plan(tars, out, precision)
    outcomes = embed(out, config(device, compile=compile))
    assert {outcome.state for outcome in outcomes} == {"committed"}, outcomes
    check(read(out), wanted, 1e-5 if precision == "fp32" else 5e-4)


def test_two_workers_on_one_gpu_commit_everything_once(device: str, tars: list[str], wanted: Rows, out: str) -> None:
    plan(tars, out)
    where = "cuda:0" if device.startswith("cuda") else device
    assert run_workers(out, 2, config(where, threads=2), StorageConfig()) == 0
    check(read(out), wanted, 1e-5)


def test_slabs_are_pinned_and_are_encoded_as_other_arrays(device: str) -> None:
    import torch

    encoder = encoders.load(encoders.resolve("demo"), device)
    slabs = Slabs(8, device)
    for seed in range(4):  # each time in the same memory
        pictures = [encoder.preprocess(corpus.jpeg(8 * seed + number, 90), 10**6) for number in range(seed + 4)]
        slab = slabs.take()
        places = [slab.add(pixels) for pixels in pictures]
        pixels = slab.pixels(len(pictures))
        assert torch.from_numpy(pixels).is_pinned() == device.startswith("cuda")
        found = encoder.encode_images(pixels)
        slabs.give(slab)
        np.testing.assert_allclose(found[places], encoder.encode_images(np.stack(pictures)), atol=1e-5)


class Lost:
    """An encoder whose GPU is lost at the third batch: what no later call in the process survives."""

    def __init__(self, encoder: encoders.Model, device: str) -> None:
        self.dim, self.has_text, self.preprocess = encoder.dim, encoder.has_text, encoder.preprocess
        self.encode_texts, self.encoder, self.device, self.calls = encoder.encode_texts, encoder, device, 0

    def encode_images(self, batch: Any) -> Any:
        import torch

        self.calls += 1
        if self.calls >= 3 and self.device == "cpu":
            raise RuntimeError("CUDA error: unspecified launch failure")
        if self.calls == 3:
            torch.arange(3, device=self.device)[torch.tensor([9], device=self.device)]  # an assertion of the kernel's
        return self.encoder.encode_images(batch)


def lose(out: str, device: str) -> list[Outcome]:
    """What a worker makes of it, in a process of its own."""
    encoder = encoders.load(load_plan(Store(out)).encoder, device)
    return embed(out, config(device), encoder=Lost(encoder, device))


def test_a_lost_gpu_fails_partitions_and_another_worker_finishes_them(
    device: str, tars: list[str], wanted: Rows, out: str
) -> None:
    plan(tars, out)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        outcomes = process.submit(lose, out, device).result(120)
    ended = [outcome.state for outcome in outcomes]
    assert ended[-3:] == ["failed"] * 3 and set(ended[:-3]) <= {"committed"} and len(ended) <= 4, outcomes
    assert all("CUDA error" in outcome.error for outcome in outcomes[-3:]), outcomes
    assert "gives up" in outcomes[-1].error
    store = Store(out)
    done = {outcome.partition for outcome in outcomes if outcome.state == "committed"}
    assert committed(store) == done
    assert status(store).failed == [outcome.partition for outcome in outcomes[-3:]]
    assert len(os.listdir(f"{out}/img_emb")) == len(done), "half a partition is among the files"
    rest = embed(out, config(device))
    assert {outcome.state for outcome in rest} == {"committed"} and len(rest) == PARTITIONS - len(done)
    check(read(out), wanted, 1e-5)
