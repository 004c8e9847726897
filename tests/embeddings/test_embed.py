"""embed on real tars: commits, order, faults. The fake encoder keeps these fast; test_golden has the real one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_batch import encoders
from clip_batch.cli import main
from clip_batch.config import EmbedConfig, PlanConfig
from clip_batch.embeddings.commits import committed, read_commits
from clip_batch.embeddings.decoders import FIRST
from clip_batch.embeddings.embed import Outcome, embed
from clip_batch.embeddings.metadata import metadata_row, metadata_schema
from clip_batch.embeddings.repair import gc, repair
from clip_batch.embeddings.slots import Slot, partitions
from clip_batch.embeddings.status import status
from clip_batch.embeddings.verify import verify_output
from clip_batch.embeddings.workers import WorkerRun, read_records
from clip_batch.errors import EncoderError, PlanError, Preempted
from clip_batch.plan.plan import load_plan, make_plan
from clip_batch.plan.replace import replaced
from clip_batch.storage.store import Store
from clip_batch.types import Plan
from tests import corpus, parquets

SMALL = EmbedConfig(batch_size=16, threads=2)


@pytest.fixture
def tars(tmp_path: Path) -> list[str]:
    return [corpus.good_tar(str(tmp_path / f"{number:05d}.tar"), 40, seed=number) for number in range(6)]


def plan(tars: list[str], out: str, **options: object) -> Plan:
    options = {"partition_samples": 40, "model": "fake:16", **options}
    return make_plan(tars, out, PlanConfig(**options))  # type: ignore[arg-type]


def rows(out: str) -> list[tuple[str, bytes, bytes]]:
    """Every committed row, in partition order: key and both vectors."""
    store = Store(out)
    found = []
    for _, commit in sorted(read_commits(store).items()):
        if commit.rows:
            images, texts = (np.load(store.path(commit.file(name) or "")) for name in ("img_emb", "text_emb"))
            keys = pq.read_table(store.path(commit.file("metadata") or ""))["key"].to_pylist()
            assert len(keys) == len(images) == len(texts) == commit.rows
            found += zip(keys, map(bytes, images), map(bytes, texts), strict=True)
    return found


def test_rows_are_the_tars_in_order_whatever_the_threads(tars: list[str], tmp_path: Path) -> None:
    results = []
    configs = [
        SMALL,
        EmbedConfig(batch_size=16, threads=5),
        EmbedConfig(batch_size=16, threads=1),
        EmbedConfig(batch_size=7),
    ]
    for number, config in enumerate(configs):
        out = str(tmp_path / f"out{number}")
        plan(tars, out)
        assert [outcome.state for outcome in embed(out, config)] == ["committed"] * 6
        results.append(rows(out))
    assert len(results[0]) == 240
    assert [key for key, _, _ in results[0]] == [key for tar in tars for key in corpus.tar_keys(tar)]
    assert results[0] == results[1] == results[2]
    assert [key for key, _, _ in results[3]] == [key for key, _, _ in results[0]]
    vectors = [np.frombuffer(b"".join(image for _, image, _ in found), np.float16) for found in results]
    assert np.allclose(vectors[0], vectors[3], atol=1e-3), "another batch size changes rounding alone"
    assert verify_output(Store(out), deep=True).problems == {}


def test_a_gpu_has_its_next_batch_while_it_works_on_one(tars: list[str], tmp_path: Path) -> None:
    class Uneven:
        """Every other batch takes long, so that the next one ends before it, if it has begun."""

        def __init__(self, encoder: Any) -> None:
            self.dim, self.has_text, self.preprocess = encoder.dim, True, encoder.preprocess
            self.encode_texts, self.encoder = encoder.encode_texts, encoder
            self.calls, self.at_once, self.most, self.lock = 0, 0, 0, threading.Lock()

        def encode_images(self, batch: Any) -> Any:
            with self.lock:
                self.calls += 1
                self.at_once += 1
                self.most, late = max(self.most, self.at_once), self.calls % 2
            time.sleep(0.02 * late)
            with self.lock:
                self.at_once -= 1
            return self.encoder.encode_images(batch)

    found = []
    for device, most in (("cpu", 1), ("cuda", 2)):
        out = str(tmp_path / device)
        encoder = Uneven(encoders.load(plan(tars, out).encoder))
        embed(out, replace(SMALL, device=device, batch_size=4), encoder=encoder)  # type: ignore[arg-type]
        assert encoder.most == most
        found.append(rows(out))
    assert found[0] == found[1] and len(found[0]) == 240


@pytest.mark.parametrize(("seconds", "most"), [(0.1, FIRST + 1), (0.0, 8)])
def test_only_as_many_threads_decode_as_feed_the_encoder(
    tars: list[str], tmp_path: Path, seconds: float, most: int
) -> None:
    lock, at_once, seen = threading.Lock(), 0, 0
    encoder: Any = encoders.load(plan(tars, str(tmp_path / "out")).encoder)
    preprocess, encode = encoder.preprocess, encoder.encode_images

    def decode(data: Any, max_pixels: int) -> Any:
        nonlocal at_once, seen
        with lock:
            at_once += 1
            seen = max(seen, at_once)
        time.sleep(0.004)
        with lock:
            at_once -= 1
        return preprocess(data, max_pixels)

    def slow(batch: Any) -> Any:
        time.sleep(seconds)
        return encode(batch)

    encoder.preprocess, encoder.encode_images = decode, slow
    embed(str(tmp_path / "out"), EmbedConfig(batch_size=16, threads=8, device="cuda"), encoder=encoder)
    assert FIRST <= seen <= most
    assert seen > FIRST or seconds, "the encoder waited, and no more threads decoded"


class Delays:
    """An encoder like a GPU's, whose calls and whose decoding take time of random length.

    It asks that nobody writes to a batch while it is read, and notes where batches lie in memory.
    """

    def __init__(self, encoder: Any, seed: int) -> None:
        self.dim, self.has_text, self.encoder, self.random = encoder.dim, True, encoder, random.Random(seed)
        self.slabs, self.calls, self.at_once, self.most, self.lock = set[int](), 0, 0, 0, threading.Lock()

    def preprocess(self, data: Any, max_pixels: int) -> Any:
        time.sleep(self.random.choice([0, 0, 0, 0.003]))
        return self.encoder.preprocess(data, max_pixels)

    def encode_images(self, batch: Any) -> Any:
        with self.lock:
            self.slabs.add(batch.ctypes.data)
            self.calls += 1
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        before = batch.copy()
        time.sleep(self.random.random() * 0.01)
        assert np.array_equal(batch, before), "a slab is overwritten while it is read"
        with self.lock:
            self.at_once -= 1
        return self.encoder.encode_images(batch)

    def encode_texts(self, texts: Any) -> Any:
        time.sleep(self.random.random() * 0.002)
        return self.encoder.encode_texts(texts)


@pytest.mark.parametrize("seed", range(3))
def test_slabs_are_reused_and_never_while_they_are_read(seed: int, tmp_path: Path) -> None:
    broken = [number % 7 == 3 or 16 <= number < 24 for number in range(40)]  # some of each batch, and all of some
    tars = [corpus.good_tar(str(tmp_path / f"{number}.tar"), 40, number, broken=broken) for number in range(6)]
    found = []
    for device in ("cpu", "cuda"):
        out = str(tmp_path / device)
        encoder = encoders.load(plan(tars, out).encoder)
        delays = Delays(encoder, seed)
        asked: Any = encoder if device == "cpu" else delays
        embed(out, EmbedConfig(batch_size=4, threads=3, device=device), encoder=asked)
        found.append(rows(out))
    assert found[0] == found[1] and len(found[0]) == 6 * broken.count(False)
    assert delays.most == 2 and delays.calls == 6 * 8
    assert len(delays.slabs) <= 8, "not reused: three batches are ahead, two are encoded, one is read, one is finished"


def test_vectors_are_unit_and_zero_without_a_caption(tmp_path: Path, out: str) -> None:
    tar = corpus.good_tar(str(tmp_path / "a.tar"), 20, seed=1, captions=[i % 2 == 0 for i in range(20)])
    plan([tar], out)
    embed(out, SMALL)
    commit = read_commits(Store(out))[0]
    norms = [
        np.linalg.norm(np.load(f"{out}/{commit.file(name)}").astype(np.float32), axis=1)
        for name in ("img_emb", "text_emb")
    ]
    assert np.allclose(norms[0], 1, atol=1e-3)
    assert np.allclose(norms[1], [1, 0] * 10, atol=1e-3)
    captions = pq.read_table(f"{out}/{commit.file('metadata')}")["caption"].to_pylist()
    assert [caption is None for caption in captions] == [False, True] * 10
    assert commit.warnings["missing_caption"] == 10


def test_running_again_does_nothing(tars: list[str], out: str) -> None:
    plan(tars, out)
    embed(out, SMALL)
    before = rows(out)
    assert embed(out, SMALL) == []
    assert rows(out) == before


@settings(max_examples=8)
@given(first=st.integers(1, 4), second=st.integers(1, 7), cut=st.integers(0, 3))
def test_slots_may_change_between_launches(
    first: int, second: int, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("slots")
    tars = [corpus.good_tar(str(home / f"{number}.tar"), 9, seed=number) for number in range(5)]
    out = str(home / "out")
    plan(tars, out, partition_samples=5)
    for slot in range(min(cut, first)):
        embed(out, SMALL, partitions(Store(out), Slot(slot, first)))
    for slot in range(second):
        embed(out, SMALL, partitions(Store(out), Slot(slot, second)))
    assert sorted(key for key, _, _ in rows(out)) == sorted(key for tar in tars for key in corpus.tar_keys(tar))


def test_slots_are_checked(tars: list[str], out: str) -> None:
    plan(tars, out)
    with pytest.raises(PlanError, match="slot 3 of 3"):
        partitions(Store(out), Slot(3, 3))
    with pytest.raises(PlanError, match="partition 6 does not exist"):
        embed(out, SMALL, [6])


def test_racing_attempts_commit_once(tars: list[str], out: str) -> None:
    plan(tars[:2], out)
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda _: embed(out, SMALL), range(4)))
    states = [outcome.state for run in runs for outcome in run]
    assert states.count("committed") == 2
    assert set(states) <= {"committed", "lost"}
    assert len(rows(out)) == 80
    store = Store(out)
    assert [len(store.list(name)) for name in ("img_emb", "text_emb", "metadata")] == [2, 2, 2]


def kill_after_a_commit(out: str, pause: float) -> bool:
    """Start a worker, kill -9 it `pause` seconds after its first new commit; whether it was still running."""
    command = [sys.executable, "-m", "clip_batch", "worker", "--output", out, "--slot", "0", "--slots", "1"]
    process = subprocess.Popen([*command, "--batch-size", "4"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = committed(Store(out))
    while committed(Store(out)) == before and process.poll() is None:
        time.sleep(0.002)
    time.sleep(pause)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("format", ["tar", "parquet"])
def test_kill_and_resume_is_the_undisturbed_run(tmp_path: Path, format: str) -> None:
    if format == "tar":
        tars = [corpus.good_tar(str(tmp_path / f"{number}.tar"), 400, seed=number, side=96) for number in range(4)]
    else:
        tars = [parquets.hugging_face(str(tmp_path / f"{n}.parquet"), 400, 400 * n, rows=20, side=96) for n in range(4)]
    calm, rough = str(tmp_path / "calm"), str(tmp_path / "rough")
    plan(tars, calm, partition_samples=100)
    embed(calm, EmbedConfig(batch_size=4))
    frozen = plan(tars, rough, partition_samples=100)
    kills = 0
    for number in range(8):
        kills += kill_after_a_commit(rough, 0.01 * number)
        report = verify_output(Store(rough), deep=True)
        assert set(report.problems.values()) <= {"not committed"}
        if report.ok:
            break
    assert kills >= 2
    for slot in range(3):
        embed(rough, EmbedConfig(batch_size=4), partitions(Store(rough), Slot(slot, 3)))
    assert rows(rough) == rows(calm)
    gc(Store(rough))
    assert verify_output(Store(rough), deep=True).ok
    assert len(os.listdir(f"{rough}/img_emb")) == len(frozen.partitions)


@pytest.mark.slow
def test_sigterm_exits_75_and_leaves_no_half(tmp_path: Path, out: str) -> None:
    tars = [corpus.good_tar(str(tmp_path / f"{number}.tar"), 2000, seed=number, side=128) for number in range(2)]
    plan(tars, out, partition_samples=2000)
    command = [
        sys.executable,
        "-m",
        "clip_batch",
        "worker",
        "--output",
        out,
        "--slot",
        "0",
        "--slots",
        "1",
        "--batch-size",
        "2",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not os.path.isdir(f"{out}/img_emb") and process.poll() is None:
        time.sleep(0.02)
    process.terminate()
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 75, errors
    assert "stopped by a signal" in errors
    assert os.listdir(f"{out}/img_emb") == []


def test_stop_keeps_what_is_committed(tars: list[str], out: str) -> None:
    plan(tars, out)
    run = WorkerRun()
    store = Store(out)

    def watch() -> None:
        while not committed(store):
            time.sleep(0.001)
        run.stop.set()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        embed(out, EmbedConfig(batch_size=1), run=run)
    except Preempted:
        assert committed(store)
    watcher.join()
    embed(out, SMALL)
    assert len(rows(out)) == 240


def test_a_vanished_tar_fails_its_partition_alone(tars: list[str], out: str) -> None:
    plan(tars, out)
    os.rename(tars[2], tars[2] + ".away")
    states = {outcome.partition: outcome for outcome in embed(out, SMALL)}
    assert [states[number].state for number in range(6)] == ["committed"] * 2 + ["failed"] + ["committed"] * 3
    found = status(Store(out))
    assert found.failed == found.missing == [2]
    assert "00002.tar" in found.errors["2"]
    assert found.relaunch == f"clip-batch worker --output {out} --partitions 2"
    os.rename(tars[2] + ".away", tars[2])
    embed(out, SMALL)
    assert status(Store(out)).missing == []
    assert len(rows(out)) == 240


def test_a_changed_tar_is_refused(tars: list[str], out: str) -> None:
    plan(tars, out)
    corpus.good_tar(tars[0], 55, seed=99)
    first = embed(out, SMALL, [0])[0]
    assert first.state == "failed"
    assert "00000.tar" in first.error


def test_policies_fail_a_partition(tmp_path: Path, out: str) -> None:
    tar = corpus.good_tar(str(tmp_path / "bad.tar"), 10, seed=1, broken=[True] * 6 + [False] * 4)
    html = tmp_path / "page.tar"
    html.write_text("<html>" + "x" * 2000)
    frozen = plan([tar, str(html)], out, partition_samples=None, partition_count=2)
    assert len(frozen.partitions) == 2
    strict = EmbedConfig(batch_size=4, max_bad_share=0.5, broken_shard="fail")
    assert [outcome.state for outcome in embed(out, strict)] == ["failed", "failed"]
    outcomes = embed(out, EmbedConfig(batch_size=4, max_bad_share=0.9))
    assert [(outcome.state, outcome.error) for outcome in outcomes] == [("committed", "")] * 2
    found = status(Store(out))
    assert found.failures == {"undecodable_image": 6, "not_a_tar": 1}
    assert found.rows == 4
    assert verify_output(Store(out), deep=True).ok


def test_schema_drift_loses_nothing(tmp_path: Path, out: str) -> None:
    first = corpus.good_tar(
        str(tmp_path / "a.tar"), 4, seed=1, json_fields={"width": 3, "url": "http://a", "key": "mine"}
    )
    plan([first], out)
    names = list(load_plan(Store(out)).fields)
    assert names == ["url", "width"]
    values = {"width": "wide", "url": None, "new": [1, {"deep": "x"}], "caption": "other", "big": 2**70}
    row = metadata_row(next(corpus.samples(first)), "a caption", values, load_plan(Store(out)).fields)
    assert row["url"] is None
    assert "width" not in row
    assert json.loads(row["extra"]) == {"width": "wide", "new": [1, {"deep": "x"}], "caption": "other", "big": 2**70}
    pa.Table.from_pylist([row], schema=metadata_schema(load_plan(Store(out)).fields))


def test_wrong_weights_are_refused(tars: list[str], out: str) -> None:
    frozen = plan(tars, out)
    path = Path(out) / "_clip_batch/plan.json"
    text = path.read_text().replace(frozen.encoder.weights, "0" * 64)
    found = json.loads(text)
    found["encoder"].pop("fingerprint", None)
    path.write_text(json.dumps(found))
    with pytest.raises((EncoderError, PlanError, Exception), match=r"weights|digest|sha256|fingerprint|plan"):
        embed(out, SMALL)


def test_damage_is_found_and_repaired(tars: list[str], out: str) -> None:
    plan(tars, out)
    embed(out, SMALL)
    before = rows(out)
    store = Store(out)
    commits = read_commits(store)
    os.truncate(store.path(commits[1].file("img_emb") or ""), 300)
    flip = Path(store.path(commits[2].file("text_emb") or ""))
    data = bytearray(flip.read_bytes())
    data[-1] ^= 1
    flip.write_bytes(data)
    store.remove(commits[4].file("metadata") or "")
    quick = verify_output(store)
    assert set(quick.problems) == {"0001", "0004"}
    deep = verify_output(store, deep=True)
    assert set(deep.problems) == {"0001", "0002", "0004"}
    assert "sha256" in deep.problems["0002"]
    assert repair(store, deep.problems) == ([1, 2, 4], {})
    embed(out, SMALL)
    gc(store)
    assert verify_output(store, deep=True).ok
    assert rows(out) == before


def test_gc_refuses_a_folder_without_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gc", "--output", str(tmp_path / "mistyped")]) == 2
    assert f"no plan at {tmp_path / 'mistyped'}: clip-batch plan" in capsys.readouterr().err


def test_gc_keeps_what_may_be_at_work(tars: list[str], out: str) -> None:
    plan(tars, out)
    embed(out, SMALL, [0])
    folder = Path(out) / "img_emb"
    (folder / "img_emb_0000-deadbeef.npy").write_bytes(b"lost")
    (folder / ".img_emb_0000-deadbeef.npy.tmp-12345678").write_bytes(b"killed")
    (folder / "img_emb_0003-cafecafe.npy").write_bytes(b"at work")
    (folder / "notes.txt").write_text("mine")
    assert len(gc(Store(out))) == 2
    assert sorted(path.name for path in folder.iterdir())[-2:] == ["img_emb_0003-cafecafe.npy", "notes.txt"]
    assert gc(Store(out), everything=True) == ["img_emb/img_emb_0003-cafecafe.npy"]
    assert len(rows(out)) == 40


def test_a_full_disk_fails_the_partition_and_publishes_nothing(tars: list[str], out: str) -> None:
    plan(tars, out, model="fake:256")
    worker = f"{sys.executable} -m clip_batch worker --output {out} --slot 0 --slots 1"
    limited = subprocess.run(["bash", "-c", f"ulimit -f 16; {worker}"], capture_output=True, text=True)  # 16 KiB a file
    assert limited.returncode == 1, limited.stderr
    assert "partition 2 failed: OSError" in limited.stderr
    assert "gives up" in limited.stderr
    assert os.listdir(f"{out}/img_emb") == []
    assert committed(Store(out)) == set()
    assert status(Store(out)).failed == [0, 1, 2]
    assert {outcome.state for outcome in embed(out, SMALL)} == {"committed"}
    assert len(rows(out)) == 240


class Lost:
    """An encoder whose GPU is lost after so many batches, as torch tells it."""

    def __init__(self, encoder: encoders.Model, batches: int) -> None:
        self.dim, self.preprocess, self.encode_texts = encoder.dim, encoder.preprocess, encoder.encode_texts
        self.has_text, self.encoder, self.left = encoder.has_text, encoder, batches

    def encode_images(self, batch: Any) -> Any:
        if not self.left:
            raise RuntimeError("CUDA error: unspecified launch failure")
        self.left -= 1
        return self.encoder.encode_images(batch)


def test_a_lost_gpu_fails_its_partitions_and_another_worker_finishes_them(tars: list[str], tmp_path: Path) -> None:
    undisturbed, out = str(tmp_path / "undisturbed"), str(tmp_path / "out")
    encoder = encoders.load(plan(tars, undisturbed).encoder)
    embed(undisturbed, SMALL, encoder=encoder)
    plan(tars, out)
    outcomes = embed(out, SMALL, encoder=Lost(encoder, 3 + 2))  # in the second partition's last batch
    assert [outcome.state for outcome in outcomes] == ["committed"] + ["failed"] * 3
    assert all("RuntimeError: CUDA error: unspecified launch failure" in outcome.error for outcome in outcomes[1:])
    assert "this worker gives up" in outcomes[-1].error
    assert committed(Store(out)) == {0} and len(os.listdir(f"{out}/img_emb")) == 1
    found = status(Store(out))
    assert (found.failed, found.missing) == ([1, 2, 3], [1, 2, 3, 4, 5])
    assert "unspecified launch failure" in found.errors["1"]
    assert [outcome.state for outcome in embed(out, SMALL, encoder=encoder)] == ["committed"] * 5
    assert rows(out) == rows(undisturbed)
    assert verify_output(Store(out), deep=True).ok


def test_folders_of_files_are_embedded_like_tars(tmp_path: Path, out: str) -> None:
    folder = tmp_path / "pictures"
    for name, content in corpus.good_files(30, seed=3):
        path = folder / f"sub{int(name[:9]) % 3}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "lonely.txt").write_text("no image")
    frozen = plan([str(folder)], out, format="files", partition_samples=8)
    assert len(frozen.partitions) == 4
    assert {outcome.state for outcome in embed(out, SMALL)} == {"committed"}
    keys = [key for key, _, _ in rows(out)]
    assert len(keys) == 30
    assert keys == sorted(keys)
    assert status(Store(out)).failures == {"missing_image": 1}
    assert verify_output(Store(out), deep=True).ok


def test_the_zoo_of_bad_input_is_embedded_or_listed(tmp_path: Path, out: str) -> None:
    """Everything docs/formats.md has a rule for, in one plan: no crash, nothing nowhere."""

    def tar(name: str, files: list[tuple[str, bytes]], **options: str) -> str:
        return corpus.write_tar(str(tmp_path / name), files, **options)

    odd, bad = corpus.odd_images(), corpus.bad_images()
    picture = corpus.jpeg(1)
    captions: dict[str, bytes] = {
        "none": b" \n",
        "latin": b"caf\xe9",
        "nul": b"a\0b",
        "long": b"x" * 10_000,
        "json": b"fine",
    }
    texts = [
        (f"{name}.{end}", body) for name, text in captions.items() for end, body in (("jpg", picture), ("txt", text))
    ]
    cut = corpus.good_tar(str(tmp_path / "cut.tar"), 5, seed=1)
    corpus.cut_file(cut, "001000003.jpg")
    flipped = corpus.good_tar(str(tmp_path / "flipped.tar"), 5, seed=2)
    corpus.flip_header_bit(flipped, "002000002.jpg")
    html, empty = tmp_path / "page.tar", tmp_path / "empty.tar"
    html.write_text("<html>" + "404 " * 500)
    empty.write_bytes(b"")
    inputs = [
        tar("odd.tar", [(f"{i:02d}.{name.rpartition('.')[2]}", body) for i, (name, body) in enumerate(odd.items())]),
        tar(
            "bad.tar", [(f"{i:02d}.{name.rpartition('.')[2]}", body) for i, (name, (body, _)) in enumerate(bad.items())]
        ),
        tar("texts.tar", [*texts, ("json.json", b'{"broken": ')]),
        tar("apart.tar", [("a.jpg", picture), ("b.JPG", picture), ("a.txt", b"late"), ("a.jpg", picture)]),
        tar("packed.tar.gz", corpus.good_files(3, seed=4), mode="w:gz"),
        tar("nothing.tar", []),
        cut,
        flipped,
        str(html),
        str(empty),
    ]
    plan(inputs, out, partition_samples=None, partition_bytes="20KB")
    assert {outcome.state for outcome in embed(out, EmbedConfig(batch_size=4))} == {"committed"}
    found = status(Store(out))
    expected = {"not_a_tar": 1, "empty_file": 1, "empty_shard": 1, "truncated_tar": 1, "truncated_member": 1}
    expected |= {"corrupt_header": 1, "missing_image": 1}
    for _, reason in bad.values():
        expected[reason] = expected.get(reason, 0) + 1
    assert found.failures == expected
    assert found.rows == len(odd) + len(captions) + 3 + 3 + 3 + 4
    assert found.warnings["bad_utf8"] == found.warnings["bad_json"] == 1
    report = verify_output(Store(out), deep=True)
    assert report.problems == {}
    commits = read_commits(Store(out)).values()
    table = pa.concat_tables(pq.read_table(f"{out}/{commit.file('metadata')}") for commit in commits if commit.rows)
    rowed = {(row["shard"].rpartition("/")[2], row["key"], row["offset"]): row for row in table.to_pylist()}
    assert len(rowed) == found.rows
    by_key = {row["key"]: row for row in rowed.values() if row["shard"].endswith("texts.tar")}
    assert by_key["none"]["caption"] is None
    assert by_key["latin"]["caption"] == "caf\ufffd"
    assert by_key["nul"]["caption"] == "a\0b"
    assert len(by_key["long"]["caption"]) == 10_000
    assert json.loads(by_key["json"]["extra"]) == {"_raw": '{"broken": '}
    listed = [
        row
        for commit in commits
        if (name := commit.file("_clip_batch/failures"))
        for row in pq.read_table(f"{out}/{name}").to_pylist()
    ]
    assert len(listed) == sum(expected.values())
    assert all(row["message"] and row["shard"] for row in listed)


class Held:
    """An encoder that encodes when it is let."""

    def __init__(self, encoder: encoders.Model, go: threading.Event) -> None:
        self.dim, self.preprocess, self.encode_texts = encoder.dim, encoder.preprocess, encoder.encode_texts
        self.has_text, self.encoder, self.go = encoder.has_text, encoder, go

    def encode_images(self, batch: Any) -> Any:
        assert self.go.wait(60)
        return self.encoder.encode_images(batch)


@pytest.mark.parametrize("share", [True, False])
def test_a_worker_that_is_done_helps_a_slow_one(share: bool, tmp_path: Path) -> None:
    tars = [corpus.good_tar(f"{tmp_path}/{number}.tar", 9, seed=number) for number in range(3)]
    out, config, go = f"{tmp_path}/out", replace(SMALL, share=share), threading.Event()
    frozen = plan(tars, out, partition_samples=1)
    store = Store(out)
    encoder = encoders.load(frozen.encoder)

    def work(run: WorkerRun, encoder: encoders.Model) -> list[Outcome]:
        return embed(out, config, partitions(store, Slot(*run.slot)), run=run, encoder=encoder)

    with ThreadPoolExecutor(1) as pool:
        held = WorkerRun(slot=Slot(0, 3))
        slow = pool.submit(work, held, Held(encoder, go))
        at: set[int] = set()
        while not at or at != held.running or at != set(read_records(store)[0].running):
            at = set(held.running)
            time.sleep(0.5)
            held.write_now.set()
        fast = {outcome.partition: outcome.state for outcome in work(WorkerRun(slot=Slot(1, 3)), encoder)}
        go.set()
        late = {outcome.partition: outcome.state for outcome in slow.result()}
    first, second, third = (set(partitions(store, Slot(slot, 3))) for slot in range(3))
    assert second <= set(fast) and set(fast.values()) == set(late.values()) == {"committed"}
    assert not third & committed(store), "a slot that nobody has begun is left alone"
    assert set(fast) - second == (first - at if share else set())
    assert not set(fast) & set(late)
    assert set(fast) | set(late) == first | second == committed(store)


def test_a_partition_without_a_row_is_committed_and_told(
    tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus.good_tar(str(tmp_path / "0.tar"), 10)
    corpus.good_tar(str(tmp_path / "1.tar"), 8, seed=1, broken=[True] * 8)
    plan([f"{tmp_path}/*.tar"], out, partition_samples=10)
    why = "none of 8 embedded; undecodable_image 8, such as: "

    assert main(["embed", "--output", out, "--device", "cpu"]) == 1
    told = capsys.readouterr()
    assert f"partition 1 is committed without a row: {why}" in told.err
    assert "--allow-empty" in told.err
    assert "partition 0 is" not in told.err
    assert "2 partitions done, 10 samples embedded, 8 listed as failed" in told.out
    assert sorted(committed(Store(out))) == [0, 1]

    assert status(Store(out)).empty["1"].startswith(why)
    assert main(["status", "--output", out]) == 0
    assert f"partition 1: {why}" in capsys.readouterr().out
    assert main(["verify", "--output", out, "--deep"]) == 0
    told = capsys.readouterr()
    assert f"0001: {why}" in told.err
    assert "2 of 2 sound (deep), 10 rows, 8 listed as failed, 1 partition without a row" in told.out
    assert main(["merge", "--output", out, "--index", f"{tmp_path}/index"]) == 0
    assert f"partition 1: {why}" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 2])
def test_partitions_without_a_row_are_accepted_on_request(
    tmp_path: Path, out: str, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "0.tar").write_bytes(b"404: not found")
    plan([f"{tmp_path}/0.tar"], out, partition_samples=10)
    command = ["embed", "--output", out, "--device", "cpu", "--workers", str(workers)]
    assert main(command) == 1
    assert "without a row: none of 1 embedded; not_a_tar 1, such as: " in capfd.readouterr().err
    Store(out).remove("_clip_batch/commits/0000.json")
    assert main([*command, "--allow-empty"]) == 0
    assert "without a row" in capfd.readouterr().err
    assert main(["merge", "--output", out, "--index", f"{tmp_path}/index"]) == 1
    assert "no embedded row (partition 0: none of 1 embedded; not_a_tar" in capfd.readouterr().err


def captions_of(out: str) -> dict[str, tuple[str | None, bool]]:
    """The caption of each key, and whether its text vector is of unit norm."""
    found = {}
    store = Store(out)
    for commit in read_commits(store).values():
        texts = np.load(store.path(commit.file("text_emb") or ""))
        table = pq.read_table(store.path(commit.file("metadata") or ""))
        for row, vector in zip(table.to_pylist(), texts, strict=True):
            found[row["key"]] = row["caption"], bool(np.any(vector))
    return found


def test_captions_of_a_json_field_and_of_parquet_beside_the_tar(tmp_path: Path, out: str) -> None:
    records = {"a": '{"text": "in JSON"}', "b": '{"text": ["", "first", "second"]}', "c": '{"text": NaN}', "d": "{}"}
    files = [item for key, text in records.items() for item in ((f"{key}.jpg", corpus.jpeg()), (f"{key}.json", text))]
    members = [(name, data if isinstance(data, bytes) else data.encode()) for name, data in files]
    members += [("e.jpg", corpus.jpeg()), ("e.txt", "in the file".encode("utf-16")), ("f.jpg", corpus.jpeg())]
    corpus.write_tar(f"{tmp_path}/x.tar", members)
    beside = {"key": ["a", "c", "gone", "d"], "text": [b"not this", b"caf\xe9", b"x", None]}
    pq.write_table(pa.table(beside), f"{tmp_path}/x.parquet")
    expected = {"a": "in JSON", "b": "first", "c": "caf\ufffd", "d": None, "e": "in the file", "f": None}

    plan([f"{tmp_path}/x.tar"], out, caption_field="text")
    assert [outcome.state for outcome in embed(out, SMALL)] == ["committed"]
    assert captions_of(out) == {key: (text, text is not None) for key, text in expected.items()}
    [commit] = read_commits(Store(out)).values()
    assert commit.warnings == {"missing_caption": 2}

    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    plan([f"{tmp_path}/x.tar"], f"{out}2", caption_field="text")
    [outcome] = embed(f"{out}2", SMALL)
    assert outcome.state == "failed" and "captions cannot be read from" in outcome.error

    (tmp_path / "x.parquet").unlink()
    plan([f"{tmp_path}/x.tar"], f"{out}3", caption_field="text")
    embed(f"{out}3", SMALL)
    assert captions_of(f"{out}3")["c"] == (None, False)
    plan([f"{tmp_path}/x.tar"], f"{out}4")
    embed(f"{out}4", SMALL)
    assert [key for key, (text, _) in captions_of(f"{out}4").items() if text] == ["e"]


def test_a_worker_whose_plan_was_replaced_stops_and_commits_nothing(tars: list[str], out: str) -> None:
    planned = plan(tars, out)
    encoder = encoders.load(planned.encoder)
    encode = encoder.encode_images

    def encode_late(batch: Any) -> Any:
        store = Store(out)
        if load_plan(store).digest == planned.digest:
            with replaced(store, planned.digest):
                pass
            plan(tars, out, model="fake:8")
        return encode(batch)

    encoder.encode_images = encode_late  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clip_batch.plan.replace.worker_records", lambda store: [])
        with pytest.raises(PlanError, match="was replaced while this worker ran: start it again"):
            embed(out, SMALL, encoder=encoder)
    assert committed(Store(out)) == set()
    assert [outcome.state for outcome in embed(out, SMALL)] == ["committed"] * 6
    assert verify_output(Store(out), deep=True).problems == {}
