"""Calibration: each verdict and recommendation by encoders of a known speed, and by given figures."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from clip_batch.cli import main
from clip_batch.config import EmbedConfig, PlanConfig
from clip_batch.embeddings import calibrate as stage
from clip_batch.embeddings.advice import Measured, advise, planned_samples
from clip_batch.embeddings.calibrate import Calibration, calibrate
from clip_batch.embeddings.calibration_report import describe
from clip_batch.errors import DecodeError, EncoderError, InputError, PlanError
from clip_batch.plan.plan import make_plan
from clip_batch.types import EncoderSpec, Partition, Plan, Shard, Slice
from tests import corpus

GPU = EmbedConfig(device="cuda", threads=2)
"""What the calibration believes; the encoders here need none."""

CPU = EmbedConfig(device="cpu", threads=2)


class Stub:
    """An encoder that takes so many seconds an image to prepare, a batch and an image of it to encode."""

    dim = 4
    has_text = True

    def __init__(self, prepare: float = 0, batch: float = 0, image: float = 0, fits: int = 10_000) -> None:
        self.prepare, self.batch, self.image, self.fits = prepare, batch, image, fits
        self.trouble = "CUDA out of memory. Tried to allocate 2 GiB"
        self.captions = 0

    def preprocess(self, data: bytes | memoryview, max_pixels: int) -> Any:
        time.sleep(self.prepare)
        if not data:
            raise DecodeError("undecodable_image", "empty")
        return np.zeros((3, 2, 2), np.uint8)

    def encode_images(self, batch: Any) -> Any:
        if len(batch) > self.fits:
            raise RuntimeError(self.trouble)
        time.sleep(self.batch + self.image * len(batch))
        return np.full((len(batch), self.dim), 0.5, np.float32)

    def encode_texts(self, texts: Sequence[str]) -> Any:
        self.captions += len(texts)
        return np.full((len(texts), self.dim), 0.5, np.float32)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "PASS_SECONDS", 0.0)


@pytest.fixture
def planned(tmp_path: Path, out: str) -> str:
    """Four tars of 16 samples, a partition each."""
    tars = [corpus.good_tar(str(tmp_path / f"{number}.tar"), 16, seed=number) for number in range(4)]
    return plan(tars, out, partition_count=4)


def plan(tars: Sequence[str], out: str, **options: Any) -> str:
    make_plan(list(tars), out, PlanConfig(**{"model": "fake:8", **options}))
    return out


def slow_reading(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    read = stage.read_slice

    def slowly(*arguments: Any) -> Iterator[Any]:
        for item in read(*arguments):
            time.sleep(seconds)
            yield item

    monkeypatch.setattr(stage, "read_slice", slowly)


def test_model_bound(planned: str) -> None:
    encoder = Stub(image=0.005)
    found = calibrate(planned, GPU, encoder=encoder)
    assert found.advice.bound == "model"
    assert found.advice.rate == max(rate for _, rate in found.measured.ladder) <= 200
    assert found.advice.batch_size == 64
    assert encoder.captions


def test_decode_bound(planned: str) -> None:
    found = calibrate(planned, GPU, encoder=Stub(prepare=0.02, batch=0.05))
    assert found.advice.bound == "decode"
    assert found.advice.rate == found.measured.decode_all <= 100
    assert found.measured.decode_one <= 50
    assert found.measured.side == 32
    assert found.advice.cpus_per_gpu and found.advice.cpus_per_gpu > 20


def test_read_bound(planned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_reading(monkeypatch, 0.02)
    found = calibrate(planned, CPU, encoder=Stub())
    assert found.advice.bound == "read"
    assert found.advice.rate == found.measured.read <= 50


def test_on_a_cpu_decoding_and_the_model_share_the_cores(planned: str) -> None:
    found = calibrate(planned, CPU, encoder=Stub(prepare=0.02, image=0.02))
    measured, advice = found.measured, found.advice
    assert advice.bound == "model"  # two threads decode
    assert advice.rate == pytest.approx(1 / (1 / measured.decode_all + 1 / max(rate for _, rate in measured.ladder)))
    assert (advice.threads, advice.cpus_per_gpu) == (2, None)


def test_batches_grow_while_it_helps(planned: str) -> None:
    found = calibrate(planned, GPU, encoder=Stub(batch=0.1))
    assert [size for size, _ in found.measured.ladder] == [64, 128, 256, 512, 1024]
    assert found.advice.batch_size == 1024


def test_batches_grow_while_they_fit(planned: str) -> None:
    found = calibrate(planned, GPU, encoder=Stub(batch=0.1, fits=300))
    assert [size for size, _ in found.measured.ladder] == [64, 128, 256]
    assert found.advice.batch_size == 256


def test_no_batch_is_tried_that_takes_too_long(planned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "SECONDS", 0.0)
    found = calibrate(planned, GPU, encoder=Stub(batch=0.01))
    assert [size for size, _ in found.measured.ladder] == [64]
    assert found.measured.samples == 16  # nor is a second slice read


@pytest.mark.parametrize(("fits", "trouble"), [(10, "CUDA out of memory"), (100, "device-side\nassert")])
def test_a_model_that_fails_is_one_line(planned: str, fits: int, trouble: str) -> None:
    encoder = Stub(batch=0.01, fits=fits)
    encoder.trouble = trouble
    with pytest.raises(EncoderError, match=r"the model fails on \d+ images at once: [^\n]*; try"):
        calibrate(planned, GPU, encoder=encoder)


def test_a_sample_of_every_kind_of_input(planned: str, tmp_path: Path) -> None:
    found = calibrate(planned, CPU, encoder=Stub())
    measured = found.measured
    assert (measured.samples, measured.bad_share, measured.broken_slices) == (64, 0, 0)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.tar")) / 64
    assert measured.sample_bytes == pytest.approx(size, rel=0.3)  # a tar's end is padded
    zipped = corpus.write_tar(str(tmp_path / "z.tar.gz"), corpus.good_files(20), mode="w:gz")
    assert calibrate(plan([zipped], f"{tmp_path}/zipped"), CPU, encoder=Stub()).measured.samples == 20
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in corpus.good_files(30):
        (folder / name).write_bytes(data)
    out = plan([str(folder)], f"{tmp_path}/files", format="files")
    found = calibrate(out, CPU, encoder=Stub())
    assert (found.measured.samples, found.advice.planned_samples) == (30, 30)
    assert "--partition-samples" in describe(found)


def test_a_remote_slice_is_cut_short_and_nothing_counts_as_broken(
    tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = corpus.good_tar(str(tmp_path / "0.tar"), 200)
    url = f"memory://calibrate/{tmp_path.name}.tar"
    with fsspec.open(url, "wb") as file:
        file.write(Path(local).read_bytes())
    plan([url], out, partition_bytes="1GB")
    for size in range(20_000, 24_000, 500):
        monkeypatch.setattr(stage, "SLICE_BYTES", size)
        found = calibrate(out, CPU, encoder=Stub())
        assert 2 <= found.measured.samples < 20
        assert found.measured.bad_share == 0
        assert found.advice.planned_samples == pytest.approx(200, rel=0.2)


def test_bad_images_are_counted(tmp_path: Path, out: str) -> None:
    files = [(name, b"" if i % 2 and name.endswith("jpg") else data) for i in range(10) for name, data in sample(i)]
    files += [("alone.txt", b"no image"), ("lonely.txt", b"no image")]
    plan([corpus.write_tar(str(tmp_path / "0.tar"), files)], out)
    found = calibrate(out, CPU, encoder=Stub())
    assert found.measured.samples == 10
    assert found.measured.bad_share == pytest.approx(7 / 12)
    assert "58.3% bad" in describe(found)


def sample(number: int) -> corpus.Files:
    return [(f"{number}.jpg", corpus.jpeg(number)), (f"{number}.txt", b"a caption")]


def test_broken_tars(planned: str, tmp_path: Path) -> None:
    def damage(path: Path) -> None:
        """As a disk does: the file's size and time stay."""
        found = path.stat()
        path.write_bytes(b"x" * found.st_size)
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))

    damage(tmp_path / "2.tar")
    found = calibrate(planned, CPU, encoder=Stub())
    assert (found.measured.samples, found.measured.broken_slices) == (48, 1)
    assert "1 of the slices" in describe(found)
    for path in tmp_path.glob("*.tar"):
        damage(path)
    with pytest.raises(InputError, match=r"^no slice that was tried has a sample: [^\n]*\.tar: [^\n]*; mend"):
        calibrate(planned, CPU, encoder=Stub())
    Path(tmp_path, "1.tar").unlink()
    with pytest.raises(InputError, match=r"cannot read [^\n]*1\.tar"):
        calibrate(planned, CPU, encoder=Stub())


def test_no_image_can_be_decoded(tmp_path: Path, out: str) -> None:
    plan([corpus.write_tar(str(tmp_path / "0.tar"), [("a.jpg", b""), ("b.jpg", b"")])], out)
    with pytest.raises(InputError, match="none of 2 images can be decoded, such as a: empty"):
        calibrate(out, CPU, encoder=Stub())


def test_without_plan_or_weights(planned: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match="no plan"):
        calibrate(f"{tmp_path}/nowhere")
    monkeypatch.setattr("clip_batch.encoders.families.fake.weights_digest", lambda *_: "f" * 64)
    with pytest.raises(EncoderError, match="planned were"):
        calibrate(planned)


FIGURES = Measured(
    "cuda", 8, 512, 0.0, 0, 10_000.0, 50_000.0, 5e8, 1_000.0, 8_000.0, ((64, 900.0), (128, 2_000.0)), 5.0, 32.0
)


@pytest.mark.parametrize(
    ("change", "bound", "rate", "threads", "cpus"),
    [
        ({}, "model", 2_000, 2, 3),
        ({"decode_all": 1_500.0}, "decode", 1_500, 11, 12),  # 8 / 1,500 s an image, 2,000 images: 10.7 cores
        ({"read": 400.0}, "read", 400, 2, 3),
        ({"device": "cpu"}, "model", 1_600, 8, None),
        ({"device": "cpu", "decode_all": 1_000.0}, "decode", 2_000 / 3, 8, None),
        ({"device": "cpu", "read": 1_000.0}, "read", 1_000, 8, None),
    ],
)
def test_what_follows_of_figures(
    change: dict[str, Any], bound: str, rate: float, threads: int, cpus: int | None
) -> None:
    found = advise(replace(FIGURES, **change), 1e9, 1_000)
    assert (found.bound, found.rate) == (bound, pytest.approx(rate))
    assert (found.threads, found.cpus_per_gpu) == (threads, cpus)
    assert found.hours == pytest.approx(1e9 / rate / 3600)


@pytest.mark.parametrize(
    ("ladder", "batch"),
    [
        (((64, 100.0), (128, 104.0)), 64),
        (((64, 100.0), (128, 106.0), (256, 110.0)), 128),
        (((64, 100.0), (128, 90.0)), 64),
    ],
)
def test_the_smallest_batch_that_is_nearly_as_fast(ladder: tuple[tuple[int, float], ...], batch: int) -> None:
    assert advise(replace(FIGURES, ladder=ladder), 1e6, 10).batch_size == batch


@pytest.mark.parametrize(
    ("samples", "partitions", "workers", "seconds", "judged"),
    [
        (1e9, 1_000, 1, 600, "fine"),  # 500 s each of 139 hours
        (1e9, 100_000, 1, 600, "small"),
        (1e9, 100, 1, 600, "large"),
        (1e9, 1_000, 10, 500, "fine"),  # a hundredth of 50,000 s
        (1e9, 1_000, 1_000, 120, "large"),  # a share is 500 s: 500 s each is all of it
        (2e6, 10, 1, 120, "fine"),
        (20_000, 10, 1, 10, "fine"),  # of a plan of ten seconds any partitions will do
        (None, 10, 1, 600, "unknown"),
    ],
)
def test_partitions(samples: float | None, partitions: int, workers: int, seconds: float, judged: str) -> None:
    found = advise(FIGURES, samples, partitions, workers)
    assert (found.partition_seconds, found.planned_partitions) == (pytest.approx(seconds), judged)
    assert found.partition_samples == pytest.approx(2_000 * seconds, rel=0.05)
    assert found.partition_bytes == pytest.approx(2_000 * seconds * 10_000, rel=0.05)
    text = describe(Calibration("tar", "fast", FIGURES, found))
    assert ("too small" in text, "too large" in text) == (judged == "small", judged == "large")
    assert "--partition-bytes" in text and ("GPU-hours" in text) == (samples is not None)


@pytest.mark.parametrize(
    ("change", "preprocess", "told"),
    [
        ({"side": 2_048.0, "decode_all": 1_500.0}, "fast", True),
        ({"side": 2_048.0, "decode_all": 1_500.0}, "scaled", False),
        ({"side": 640.0, "decode_all": 1_500.0}, "fast", False),
        ({"side": 2_048.0}, "fast", False),  # the model binds
    ],
)
def test_scaled_is_for_large_jpegs_where_decoding_binds(change: dict[str, Any], preprocess: str, told: bool) -> None:
    figures = replace(FIGURES, **change)
    text = describe(Calibration("tar", preprocess, figures, advise(figures, 1e6, 10)))
    assert ("JPEGs of 2,048 pixels and more: planned with --preprocess scaled" in text) == told


def test_samples_of_a_plan() -> None:
    def count(*slices: Slice) -> float | None:
        return planned_samples(Plan((Partition(0, slices[:1]), Partition(1, slices[1:])), EncoderSpec("", "", "")), 10)

    tar = Shard("a.tar", 1_000)
    assert count(Slice(tar, 0, 400), Slice(tar, 400)) == 100
    assert count(Slice(tar, 0, None, 7), Slice(tar)) == 107
    assert count(Slice(tar), Slice(Shard("http://b.tar"))) == 200
    assert count(Slice(Shard("http://a.tar")), Slice(Shard("http://b.tar"))) is None


def test_slices_are_spread_and_the_same_each_time() -> None:
    slices = [Slice(Shard(f"{number}.tar", 10)) for number in range(80)]
    plan = Plan((Partition(0, tuple(slices[:30])), Partition(1, tuple(slices[30:]))), EncoderSpec("", "", ""))
    found = stage._spread(plan)
    assert [slices.index(piece) // 10 for piece in found] == list(range(8))
    assert stage._spread(plan) == found


def test_the_command(planned: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["doctor", "--output", planned, "--calibrate", "--device", "cpu", "--threads", "1"]
    assert main([*flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["measured"]["threads"] == 1
    assert found["advice"]["bound"] in ("read", "decode", "model")
    assert main([*flags, "--slots", "4"]) == 0
    assert "-bound" in capsys.readouterr().out
    assert main(["doctor", "--calibrate"]) == 2
    assert main(["doctor", "--calibrate", "--output", f"{planned}/nowhere"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2


def test_on_a_node(planned: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def here(_: Any, command: list[str]) -> list[str]:
        return ["env", "SLURM_JOB_ID=1", sys.executable, "-m", "clip_batch", *command]

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr("clip_batch.launch.slurm.on_node", here)
    assert main(["doctor", "--output", planned, "--calibrate", "--on-node", "--json", "--threads", "3"]) == 0
    assert json.loads(capfd.readouterr().out)["measured"]["threads"] == 3
    monkeypatch.setattr("clip_batch.launch.slurm.on_node", lambda *_: ["no-such-srun"])
    assert main(["doctor", "--output", planned, "--calibrate", "--on-node"]) == 2
    assert "srun must be on PATH" in capfd.readouterr().err


@pytest.mark.slow
def test_the_demo(tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from clip_batch.demo import data

    data.write_tars(str(tmp_path / "tars"))
    plan([str(tmp_path / "tars")], out, model="demo", partition_bytes="2MB")
    before = sorted(Path(out).rglob("*"))
    monkeypatch.setattr(stage, "SAMPLES", 64)
    found = calibrate(out, CPU)
    assert sorted(Path(out).rglob("*")) == before
    measured, advice = found.measured, found.advice
    assert (measured.samples, measured.bad_share, measured.ladder[0][0]) == (64, 0, 8)
    assert min(measured.read, measured.decode_one, measured.decode_all, measured.load_seconds, advice.rate) > 0
    assert advice.planned_samples == pytest.approx(1911, rel=0.05)
