"""Slices of remote tars, fetched ahead: the same samples, within a budget of disk, through faults."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_batch.config import EmbedConfig, PlanConfig
from clip_batch.embeddings.embed import embed
from clip_batch.embeddings.workers import WorkerRun
from clip_batch.errors import InputError, Preempted
from clip_batch.plan.plan import make_plan
from clip_batch.samples import read_slice
from clip_batch.samples.prefetch import Prefetcher
from clip_batch.samples.tar.cuts import cuts, cuts_by_headers
from clip_batch.samples.tar.headers import Damage, Member, members
from clip_batch.samples.tar.scan import read_headers, scan_tar
from clip_batch.storage import retry
from clip_batch.types import Sample, Shard, Slice
from tests import corpus
from tests.embeddings.test_embed import rows
from tests.samples.tar.test_reader import FORMATS, build, join
from tests.samples.tar.test_reader import tars as tars_to_join
from tests.servers.flaky import Flaky, put

PLAN = corpus.plan_of()


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where downloads lie; nothing is left there in the end."""
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.001)
    (tmp_path / "spool").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spool"))
    yield tmp_path / "spool"
    Flaky.reset()
    for _ in range(100):  # a piece that was on its way may yet arrive
        if not (left := list((tmp_path / "spool").iterdir())):
            break
        time.sleep(0.02)
    assert left == []


@pytest.fixture
def tars(tmp_path: Path) -> list[str]:
    return [corpus.good_tar(str(tmp_path / f"{number}.tar"), 20, seed=number) for number in range(5)]


def remote(tars: list[str]) -> list[Slice]:
    """The same tars in a remote store, each planned as it is there."""
    return [
        Slice(Shard(put(f"tars/{Path(tar).name}", Path(tar).read_bytes()), os.path.getsize(tar), "v1")) for tar in tars
    ]


def contents(piece: Slice, files: Prefetcher | None = None) -> list[Any]:
    items = read_slice(piece, PLAN, files=files)
    return [
        (item.key, item.offset, item.length, bytes(item.image or b""), item.caption, item.json)
        if isinstance(item, Sample)
        else item.reason
        for item in items
    ]


@pytest.mark.parametrize("budget", [0, 10**9])
def test_remote_slices_hold_what_local_ones_do(tars: list[str], budget: int) -> None:
    slices = remote(tars)
    halves = [half for piece, tar in zip(slices, tars, strict=True) for half in _halves(piece, tar)]
    with Prefetcher(halves, budget=budget) as files:
        found = [contents(piece, files) for piece in halves]
    assert [found[n] + found[n + 1] for n in range(0, 10, 2)] == [contents(Slice(Shard(tar))) for tar in tars]
    assert contents(slices[0]) == contents(Slice(Shard(tars[0]))), "and without anything ahead"


def _halves(piece: Slice, tar: str) -> list[Slice]:
    middle = cuts(tar)[7][0]
    return [Slice(piece.shard, 0, middle), Slice(piece.shard, middle, None)]


def test_no_more_than_the_budget_is_ahead(tars: list[str], temporary: Path) -> None:
    slices = remote(tars)
    size = slices[0].shard.size or 0
    asked: list[Slice] = []

    def following() -> Iterator[Slice]:
        for piece in slices:
            asked.append(piece)
            yield piece

    with Prefetcher(following(), budget=3 * size + 100) as files:
        for number, piece in enumerate(slices):
            with files.take(piece):
                assert len(list(temporary.iterdir())) == min(3, 5 - number)
                assert len(asked) == min(number + 4, 5)
            assert len(list(temporary.iterdir())) == min(2, 4 - number)


def test_slices_that_are_passed_over_are_given_up(tars: list[str]) -> None:
    slices = remote(tars)
    with Prefetcher(slices, budget=0) as files:
        for number in (1, 4, 0):  # 0 does not come again: it is fetched for itself
            assert contents(slices[number], files) == contents(Slice(Shard(tars[number])))
        with pytest.raises(InputError, match=r"cannot read .*flaky://tars/none\.tar"):
            contents(Slice(Shard("flaky://tars/none.tar", 10)), files)
        assert contents(slices[2], files) == contents(Slice(Shard(tars[2])))


@pytest.mark.parametrize("longer", [True, False])
def test_a_tar_that_changed_is_refused(tars: list[str], longer: bool) -> None:
    slices = remote(tars)
    data = Path(tars[1]).read_bytes()
    put("tars/1.tar", data + bytes(512) if longer else data[:-512] + b"\1" * 512)
    with Prefetcher(slices, budget=10**9) as files:
        contents(slices[0], files)
        with pytest.raises(InputError, match=r"1.tar was planned with .* now: put that file back, or"):
            contents(slices[1], files)
        assert len(contents(slices[2], files)) == 20


def test_a_tar_that_changes_while_it_is_read_is_refused(tars: list[str]) -> None:
    (piece,) = remote(tars[:1])

    def change(what: str, path: str, at: int) -> None:
        if what == "read":
            Flaky.before = None
            put("tars/0.tar", Path(tars[1]).read_bytes())

    Flaky.before = change
    with pytest.raises(InputError, match="was planned with etag v1 and has v2 now"):
        contents(piece)
    put("tars/0.tar", Path(tars[0]).read_bytes()[:1000])
    with pytest.raises(InputError, match=r"was planned with \d+ bytes and has 1000 now"):
        contents(piece)


def test_a_local_tar_of_the_same_size_that_was_written_since_is_refused(tmp_path: Path, out: str) -> None:
    path = corpus.good_tar(str(tmp_path / "a.tar"), 3, seed=1)
    make_plan(path, out, PlanConfig(model="fake:8"))
    size = os.path.getsize(path)
    corpus.good_tar(path, 3, seed=2)
    assert os.path.getsize(path) == size
    [outcome] = embed(out)
    assert outcome.state == "failed" and "was planned with etag" in outcome.error


def test_gzipped_and_local_tars_go_through(tars: list[str], tmp_path: Path) -> None:
    packed = corpus.write_tar(str(tmp_path / "a.tar.gz"), corpus.good_files(5), mode="w:gz")
    slices = [*remote([packed]), Slice(Shard(tars[0])), *remote([tars[1]])]
    with Prefetcher(slices, budget=0) as files:
        found = [contents(piece, files) for piece in slices]
    assert found == [contents(Slice(Shard(path))) for path in (packed, tars[0], tars[1])]


def _planned(tars: list[str], out: str) -> None:
    remote(tars)
    make_plan(["flaky://tars/*.tar"], out, PlanConfig(model="fake:8", partition_samples=20))


def test_partitions_read_ahead_equal_those_of_local_tars(tars: list[str], out: str, tmp_path: Path) -> None:
    _planned(tars, out)
    assert {one.state for one in embed(out, EmbedConfig(batch_size=8))} == {"committed"}
    make_plan(tars, str(tmp_path / "local"), PlanConfig(model="fake:8", partition_samples=20))
    embed(str(tmp_path / "local"), EmbedConfig(batch_size=8))
    assert rows(out) == rows(str(tmp_path / "local"))


def test_a_store_that_falters_is_no_failure(tars: list[str], out: str) -> None:
    _planned(tars, out)
    seen: set[tuple[str, str]] = set()

    def once(what: str, path: str, at: int) -> None:
        if (what, path) not in seen:
            seen.add((what, path))
            raise OSError(errno.EBUSY, "SlowDown")

    Flaky.before = once
    assert [one.rows for one in embed(out)] == [20] * 5


def test_an_error_of_one_tar_ends_its_own_partition_alone(tars: list[str], out: str) -> None:
    _planned(tars, out)

    def dead(what: str, path: str, at: int) -> None:
        if "2.tar" in path:
            raise OSError(errno.EBUSY, "SlowDown")

    Flaky.before = dead
    found = embed(out)
    assert [one.state for one in found] == ["committed", "committed", "failed", "committed", "committed"]
    assert found[2].again and "flaky://tars/2.tar: " in found[2].error and "SlowDown" in found[2].error
    Flaky.before = None
    assert [one.partition for one in embed(out)] == [2]


def test_what_another_committed_is_not_fetched(tars: list[str], out: str) -> None:
    _planned(tars, out)
    embed(out, partitions=[1, 3])
    Flaky.calls.clear()
    embed(out)
    read = {path for what, path, _, _ in Flaky.calls if what == "read" and path.endswith(".tar")}
    assert read == {f"/tars/{number}.tar" for number in (0, 2, 4)}


def test_a_stop_ends_a_download_that_hangs(tars: list[str], out: str) -> None:
    _planned(tars, out)
    run = WorkerRun()
    hanging = threading.Event()

    def hang(what: str, path: str, at: int) -> None:
        if what == "read" and "2.tar" in path:
            run.stop.set()
            hanging.wait(5)

    Flaky.before = hang
    started = time.monotonic()
    with pytest.raises(Preempted):
        embed(out, run=run)
    assert time.monotonic() - started < 3
    hanging.set()


@settings(max_examples=150)
@given(tars_to_join, st.sampled_from([512, 1024, 4096]), st.booleans(), st.data())
def test_headers_by_jumps_are_those_of_the_whole(
    archives: list[tuple[list[tuple[str, int, str]], str, int]], short: int, flip: bool, data: st.DataObject
) -> None:
    tar = bytearray(join(archives))
    if flip:
        tar[data.draw(st.integers(0, len(tar) - 1))] ^= 1
    read: list[int] = []

    def take(start: int, stop: int) -> bytes:
        read.append(stop - start)
        return bytes(tar[start:stop])

    found = [item for item in read_headers(take, len(tar), short, 4 * short, 1024) if isinstance(item, Member)]
    assert found == [item for item in members(bytes(tar)) if isinstance(item, Member)]
    assert sum(read) <= 3 * len(tar) + 4 * short
    if not any(isinstance(item, Damage) for item in members(bytes(tar))):
        assert cuts_by_headers(lambda: read_headers(take, len(tar), short, 4 * short), len(tar)) == cuts(bytes(tar))


def test_bytes_that_only_sum_up_like_a_header_are_none_behind_damage() -> None:
    """Moved by one byte, this broken header has the right checksum, but no magic."""
    tar = bytearray(build([("a.jpg", 0, "l"), ("b.jpg", 0, "f"), ("a.jpg", 0, "f")], FORMATS["ustar"]))
    tar[1] ^= 1
    names = [
        item.name
        for item in read_headers(lambda start, stop: bytes(tar[start:stop]), len(tar), 512, 2048, 1024)
        if isinstance(item, Member)
    ]
    assert names == [item.name for item in members(bytes(tar)) if isinstance(item, Member)] == ["b.jpg", "a.jpg"]


@pytest.mark.parametrize(
    ("image", "most_requests", "most_share"), [(15_000, 12, 1.1), (300_000, 60, 1.1), (3_000_000, 70, 0.1)]
)
def test_what_a_scan_costs(image: int, most_requests: int, most_share: float) -> None:
    """Small members are read in long blocks, large ones jumped over."""
    tar = build([(f"{n:05d}.{end}", size, "f") for n in range(60) for end, size in (("jpg", image), ("txt", 50))], 0)
    piece = Shard(put("tars/big.tar", tar), len(tar))
    Flaky.calls.clear()
    found, samples = scan_tar(piece)
    assert samples == 60 and len(found) == 61
    assert len(Flaky.calls) <= most_requests
    assert sum(min(end, len(tar)) - start for what, _, start, end in Flaky.calls if what == "read") < (
        most_share * len(tar)
    )
