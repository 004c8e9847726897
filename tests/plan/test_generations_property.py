"""Whatever is added, planned, embedded and killed in whatever order, each sample is embedded once."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_batch.config import EmbedConfig, PlanConfig
from clip_batch.embeddings import slots
from clip_batch.embeddings.embed import embed
from clip_batch.embeddings.part_writer import PartWriter
from clip_batch.embeddings.repair import gc
from clip_batch.embeddings.slots import Slot
from clip_batch.embeddings.status import status
from clip_batch.embeddings.verify import verify_output
from clip_batch.errors import PlanError
from clip_batch.plan.plan import load_plan, make_plan
from clip_batch.storage.store import Store
from tests import corpus
from tests.embeddings.test_tar_edges import table

CPU = EmbedConfig(device="cpu", progress=False, share=False, threads=1)

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 3), st.booleans()),
        st.tuples(st.just("plan"), st.booleans()),
        st.tuples(st.just("work"), st.integers(0, 2), st.integers(1, 3), st.integers(0, 3)),
        st.tuples(st.just("gc")),
    ),
    max_size=10,
)
"""Inputs are added, before or after the others; planned, extending or not; slots run, and die before a commit; gc."""


class _Killed(BaseException):
    """Ends a worker without a word."""


class _Life:
    """An input that grows, and an OUT that follows."""

    def __init__(self, home: str, kind: str) -> None:
        self.home, self.kind, self.out = Path(home, "in"), kind, f"{home}/out"
        self.home.mkdir()
        self.count = 0
        self.add(2, True)

    def add(self, count: int, after: bool) -> None:
        for _ in range(count):
            self.count += 1
            name = f"{'b' if after else 'a'}{self.count:02d}"
            if self.kind == "tar":
                corpus.good_tar(f"{self.home}/{name}.tar", 2, seed=self.count)
            else:
                (self.home / f"{name}.jpg").write_bytes(corpus.jpeg(self.count))

    def plan(self, extend: bool) -> None:
        config = PlanConfig(model="fake:8", partition_samples=2, try_model=False, extend=extend)
        with contextlib.suppress(PlanError) if not extend else contextlib.nullcontext():
            make_plan(self.home, self.out, config)

    def work(self, slot: int, count: int, lives: int) -> None:
        """Run a slot, which dies before its commit number `lives`."""
        commit, left = PartWriter.commit, [lives]

        def dying(writer: PartWriter, *arguments: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise _Killed
            return commit(writer, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PartWriter, "commit", dying)
            with contextlib.suppress(_Killed):
                embed(self.out, CPU, slots.partitions(Store(self.out), Slot(slot % count, count)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "files"])
@settings(max_examples=25)
@given(steps=STEPS)
def test_each_sample_is_embedded_once(kind: str, steps: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as home:
        life = _Life(home, kind)
        life.plan(extend=False)
        store = Store(life.out)
        for step, *arguments in steps:
            before = load_plan(store)
            if step == "gc":
                gc(store)
            else:
                getattr(life, step)(*arguments)
            after = load_plan(store)
            if after.generations:
                assert after.partitions[: len(before.partitions)] == before.partitions
        life.plan(extend=True)
        state = status(store)
        embed(life.out, CPU, state.missing)
        samples = life.count * (2 if kind == "tar" else 1)
        identities = Counter((row["shard"], row["key"]) for row in table(life.out, "metadata"))
        assert identities.total() == len(identities) == samples
        assert verify_output(store, deep=True).problems == {} and status(store).missing == []
