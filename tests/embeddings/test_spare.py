"""Whom a worker that is done helps: one look at all records serves many, and a wrong hint costs work alone."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from clip_batch.config import EmbedConfig, PlanConfig
from clip_batch.embeddings.embed import embed
from clip_batch.embeddings.slots import Slot, partitions
from clip_batch.embeddings.spare import MANY, Snapshot, spare
from clip_batch.embeddings.workers import BEAT, WorkerRecord, WorkerRun
from clip_batch.plan import paths
from clip_batch.plan.plan import make_plan
from clip_batch.plan.state import SILENT, commit_names
from clip_batch.storage.store import Store
from tests import fabricated
from tests.corpus import good_tar


class Counting(Store):
    """Counts what is asked of it."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.asked = Counter[str]()

    def read(self, name: str) -> bytes:
        self.asked["read"] += 1
        return super().read(name)

    def list(self, folder: str) -> list[str]:
        self.asked["list"] += 1
        return super().list(folder)

    def writer(self, name: str) -> Iterator[object]:  # type: ignore[override]
        self.asked["write"] += 1
        return super().writer(name)  # type: ignore[return-value]


def at_work(out: Path, slots: int, each: int) -> Counting:
    """An OUT of slots of so many partitions, with a worker at the first of each."""
    fabricated.make_plan(out, slots * each)
    store = Counting(str(out))
    for slot in range(slots):
        one = WorkerRecord("", "", 0, 0, time.time(), False, 0, [slot], {}, Slot(slot, slots))
        store.replace(f"{paths.WORKERS}/{slot}.json", json.dumps(vars(one)).encode())
    store.asked.clear()
    return store


def left_at(store: Store, ago: float) -> None:
    """Make the look that was left older."""
    look = Snapshot(**store.read_json(paths.LOOK))
    store.replace(paths.LOOK, json.dumps(look._replace(seen=look.seen - ago)._asdict()).encode())


def test_one_look_serves_many(tmp_path: Path) -> None:
    slots = MANY + 8
    store = at_work(tmp_path, slots, 10)
    taken = [spare(store, set(), 10**6)]
    assert store.asked["read"] > slots and store.asked["list"] == 4
    store.asked.clear()
    taken += [spare(store, set(), 10**6) for _ in range(49)]
    assert store.asked == {"read": 49, "write": 49}
    assert None not in taken and len(set(taken)) == 50, "each strikes out what it takes"
    assert not set(taken) & set(range(slots)), "nor what a worker is at"


@pytest.mark.parametrize(("ago", "writes"), [(BEAT, 2), (SILENT, 1)])
def test_an_old_look_is_renewed_by_one(tmp_path: Path, ago: float, writes: int) -> None:
    slots = MANY + 8
    store = at_work(tmp_path, slots, 10)
    first = spare(store, set(), 10**6)
    left_at(store, ago)
    store.asked.clear()
    seen = time.time()
    assert spare(store, {first} if first else set(), 10**6) not in (None, first)
    assert store.asked["read"] > slots and store.asked["write"] == writes
    assert abs(store.read_json(paths.LOOK)["seen"] - seen) < BEAT
    store.asked.clear()
    spare(store, set(), 10**6)
    assert store.asked == {"read": 1, "write": 1}


def test_few_look_for_themselves(tmp_path: Path) -> None:
    store = at_work(tmp_path, MANY, 10)
    for _ in range(2):
        assert spare(store, set(), 10**6) is not None
        assert store.asked["read"] > MANY and not store.exists(paths.LOOK)
        store.asked.clear()


@pytest.mark.parametrize("left", [b"", b'{"then": 1}', b"[]"])
def test_what_is_no_look_is_none(left: bytes, tmp_path: Path) -> None:
    store = at_work(tmp_path, 2, 10)
    store.replace(paths.LOOK, left)
    assert spare(store, set(), 10**6) is not None


def test_a_wrong_look_costs_work_alone(tmp_path: Path) -> None:
    """One that names what is committed, and what other slots have not begun."""
    tars = [good_tar(f"{tmp_path}/{number}.tar", 3, seed=number) for number in range(4)]
    out, config = f"{tmp_path}/out", EmbedConfig(batch_size=4, progress=False, device="cpu")
    count = len(make_plan(tars, out, PlanConfig(model="fake:8", partition_samples=1)).partitions)
    store, slot = Store(out), Slot(1, count)
    embed(out, config, range(0, count, 2))
    before = {name: store.read(f"{paths.COMMITS}/{name}.json") for name in commit_names(store)}
    store.replace(paths.LOOK, json.dumps(Snapshot(time.time(), [[*range(count)]])._asdict()).encode())
    found = embed(out, config, partitions(store, slot), run=WorkerRun(slot=slot))
    assert {outcome.state for outcome in found} == {"committed"}
    assert {1} < {outcome.partition for outcome in found} <= set(range(1, count, 2))
    assert {name: store.read(f"{paths.COMMITS}/{name}.json") for name in before} == before
