"""Packing, the frozen plan and its refusals."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

from clip_batch.config import PlanConfig, StorageConfig
from clip_batch.errors import ConfigError, CorruptError, InputError, PlanError
from clip_batch.plan.pack import Cut, pack
from clip_batch.plan.plan import load_plan, make_plan
from clip_batch.storage.store import Store
from clip_batch.types import Partition, Plan, Shard, Slice

GRAIN = 7
"""Bytes of a sample in shards that are cut without files."""


def cut(shard: Shard, places: Sequence[float]) -> list[Cut]:
    """Cuts at whole samples of `GRAIN` bytes."""
    last = (shard.size or 0) // GRAIN - 1
    numbers = sorted({min(max(round(place / GRAIN), 1), last) for place in places}) if last > 0 else []
    return [(number * GRAIN, number) for number in numbers]


def shards_of(sizes: list[int]) -> list[Shard]:
    return [Shard(f"{number}.tar", size, None, size // GRAIN) for number, size in enumerate(sizes)]


def pieces(partitions: tuple[Partition, ...]) -> list[Slice]:
    return [piece for partition in partitions for piece in partition.slices]


def length(piece: Slice) -> int:
    return (piece.shard.size or 0 if piece.stop is None else piece.stop) - piece.start


sizes = st.lists(st.integers(0, 300), min_size=1, max_size=40)
targets = st.one_of(
    st.builds(lambda value: {"bytes": value}, st.integers(1, 1000)),
    st.builds(lambda value: {"partitions": value}, st.integers(1, 60)),
)


@given(sizes, targets, st.booleans())
def test_every_byte_is_in_one_slice_in_order(sizes: list[int], target: dict[str, int], splits: bool) -> None:
    shards = shards_of(sizes)
    partitions = pack(shards, target, cut) if splits else pack(shards, target)
    assert [partition.id for partition in partitions] == list(range(len(partitions)))
    assert all(partition.slices for partition in partitions)
    expected, number = 0, -1
    for piece in pieces(partitions):
        if piece.start == 0:
            number, expected = number + 1, 0
        assert (piece.shard, piece.start) == (shards[number], expected)
        expected = piece.stop or -1
        if piece.stop is None:
            assert piece.samples is not None
    assert number == len(shards) - 1 and expected == -1
    for shard in shards:
        assert sum(piece.samples or 0 for piece in pieces(partitions) if piece.shard is shard) == shard.samples
    if not splits:
        assert all(piece.whole for piece in pieces(partitions))


@given(st.lists(st.integers(50, 100), min_size=1, max_size=200), st.integers(2000, 5000))
def test_small_shards_balance_within_ten_percent(sizes: list[int], target: int) -> None:
    partitions = pack(shards_of(sizes), {"bytes": target})
    mean = sum(sizes) / len(partitions)
    assert len(partitions) == ceil(sum(sizes) / target)
    loads = [sum(map(length, partition.slices)) for partition in partitions]
    # A partition is off by less than one shard, and a shard is at most 5 % of the target.
    assert all(abs(load - mean) <= 100 for load in loads)
    if mean >= 1000:
        assert all(abs(load - mean) <= 0.1 * mean for load in loads)


@given(st.integers(10_000, 100_000), st.integers(1000, 5000))
def test_one_large_tar_feeds_many_partitions_evenly(size: int, target: int) -> None:
    partitions = pack(shards_of([size]), {"bytes": target}, cut)
    mean = size / len(partitions)
    assert len(partitions) == ceil(size / target)
    assert all(abs(sum(map(length, partition.slices)) - mean) <= 0.1 * mean for partition in partitions)


def test_packing_by_samples_takes_the_mean_for_an_unknown_count() -> None:
    shards = [Shard("a", 1, None, 10), Shard("b", 900, None, None), Shard("c", 1, None, 10)]
    assert [[piece.shard.url for piece in partition.slices] for partition in pack(shards, {"samples": 10})] == [
        ["a"],
        ["b"],
        ["c"],
    ]


def test_shards_that_cannot_be_split_make_fewer_partitions() -> None:
    partitions = pack(shards_of([700, 7, 7]), {"partitions": 3})
    assert [[piece.shard.url for piece in partition.slices] for partition in partitions] == [
        ["0.tar"],
        ["1.tar", "2.tar"],
    ]


def test_a_count_does_not_scan_shards_that_are_nearly_equal() -> None:
    def refuse(shard: Shard, places: Sequence[float]) -> list[Cut]:
        raise AssertionError(shard)

    assert len(pack(shards_of([98, 105, 98, 105]), {"partitions": 4}, refuse)) == 4


def test_too_many_partitions_are_refused() -> None:
    with pytest.raises(ConfigError, match="raise the partition target"):
        pack(shards_of([10_000_000]), {"bytes": 1})


def write_tar(path: Path, samples: int, image: int = 3000) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            members = (("jpg", b"\xff" * image), ("json", json.dumps({"width": number}).encode()))
            for extension, data in members:
                member = tarfile.TarInfo(f"{number:05d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for number in range(4):
        write_tar(tmp_path / "in" / f"{number}.tar", 5)
    return tmp_path / "in"


@pytest.fixture
def config(tars: Path) -> PlanConfig:
    return PlanConfig(input=[f"{tars}/*.tar"], model="fake:8", partition_count=2)


@pytest.mark.parametrize("remote", [False, True])
def test_a_plan_is_read_back_as_it_was_made(config: PlanConfig, tmp_path: Path, remote: bool) -> None:
    output = f"memory:/{tmp_path}/out" if remote else f"{tmp_path}/out"
    plan = make_plan(config, output)
    store = Store(output)
    assert load_plan(store) == plan
    assert [len(partition.slices) for partition in plan.partitions] == [2, 2]
    assert plan.fields == {"width": "int64"}
    head = store.read_json("_clip_batch/plan.json")
    sizes = [piece.shard.size or 0 for piece in pieces(plan.partitions)]
    assert (head["shards"], head["partitions"], head["bytes"]) == (4, 2, sum(sizes))
    assert head["encoder"]["fingerprint"] == plan.encoder.fingerprint
    assert head["target"] == {"partitions": 2} and head["digest"] == plan.digest
    assert yaml.safe_load(store.read("_clip_batch/config.yaml"))["plan"]["input"] == config.input


def test_storage_options_are_written_nowhere(config: PlanConfig, tmp_path: Path) -> None:
    make_plan(config, f"{tmp_path}/out", StorageConfig({"secret": "hunter2"}))
    written = list((tmp_path / "out" / "_clip_batch").iterdir())
    assert len(written) == 3 and not any(b"hunter2" in path.read_bytes() for path in written)


def test_planning_again_changes_nothing(config: PlanConfig, tmp_path: Path) -> None:
    said: list[str] = []
    first = make_plan(config, f"{tmp_path}/out")
    files = {path: path.read_bytes() for path in (tmp_path / "out" / "_clip_batch").iterdir()}
    assert make_plan(config, f"{tmp_path}/out", progress=said.append) == first
    assert said[-1] == "unchanged"
    assert {path: path.read_bytes() for path in (tmp_path / "out" / "_clip_batch").iterdir()} == files
    assert make_plan(config, f"{tmp_path}/other").digest == first.digest


def test_the_digest_covers_what_changes_the_result(config: PlanConfig, tmp_path: Path) -> None:
    other = [
        config,
        replace(config, model="fake:16"),
        replace(config, precision="bf16"),
        replace(config, partition_count=3),
        replace(config, input=[f"{config.input[0][:-5]}{{1,0,2,3}}.tar"]),
        replace(config, caption_extensions=["caption"]),
        replace(config, image_extensions=["png", "jpg"]),
    ]
    assert len({make_plan(each, f"{tmp_path}/{n}").digest for n, each in enumerate(other)}) == len(other)


def test_a_changed_input_is_refused_by_name(config: PlanConfig, tars: Path, tmp_path: Path) -> None:
    make_plan(config, f"{tmp_path}/out")
    (tars / "0.tar").unlink()
    write_tar(tars / "1.tar", 9)
    os.utime(tars / "2.tar", ns=(5, 5))
    write_tar(tars / "7.tar", 1)
    with pytest.raises(PlanError) as caught:
        make_plan(config, f"{tmp_path}/out")
    text = str(caught.value)
    assert f"1 inputs added: {tars}/7.tar" in text and f"1 inputs removed: {tars}/0.tar" in text
    assert "2 inputs changed" in text and f"{tars}/2.tar (rewritten)" in text
    assert f"{tars}/1.tar (" in text and f"-> {(tars / '1.tar').stat().st_size} bytes)" in text
    assert "--output" in text and "\n" not in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "fake:16"}, "model 'fake:8' -> 'fake:16'; weights"),
        ({"precision": "fp16"}, "precision 'fp32' -> 'fp16'"),
        ({"partition_count": 3}, r"partition target \{'partitions': 2\} -> \{'partitions': 3\}"),
        ({"partition_count": None}, r"-> \{'bytes': 4000000000\}"),
        ({"caption_extensions": ["cap"]}, r"caption_extensions \('txt',\) -> \('cap',\)"),
    ],
)
def test_a_changed_option_is_refused_by_name(
    config: PlanConfig, tmp_path: Path, change: dict[str, object], says: str
) -> None:
    make_plan(config, f"{tmp_path}/out")
    with pytest.raises(PlanError, match=says):
        make_plan(replace(config, **change), f"{tmp_path}/out")  # type: ignore[arg-type]


def test_another_order_is_refused(config: PlanConfig, tars: Path, tmp_path: Path) -> None:
    make_plan(config, f"{tmp_path}/out")
    with pytest.raises(PlanError, match="another order"):
        make_plan(replace(config, input=[f"{tars}/{{3..0}}.tar"]), f"{tmp_path}/out")


def test_no_plan_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=f"clip-batch plan --input ... --output {tmp_path}"):
        load_plan(Store(str(tmp_path)))


def test_damaged_files_are_refused(config: PlanConfig, tmp_path: Path) -> None:
    make_plan(config, f"{tmp_path}/out")
    home = tmp_path / "out" / "_clip_batch"
    slices = (home / "plan.parquet").read_bytes()
    (home / "plan.parquet").write_bytes(slices[:-1] + b"?")
    with pytest.raises(CorruptError, match=r"plan\.parquet"):
        load_plan(Store(f"{tmp_path}/out"))
    (home / "plan.parquet").unlink()
    with pytest.raises(CorruptError, match=r"plan\.parquet"):
        load_plan(Store(f"{tmp_path}/out"))
    (home / "plan.json").write_text("{")
    with pytest.raises(CorruptError, match=r"plan\.json"):
        load_plan(Store(f"{tmp_path}/out"))


def test_a_planner_that_died_before_plan_json_is_taken_up(config: PlanConfig, tmp_path: Path) -> None:
    plan = make_plan(config, f"{tmp_path}/out")
    home = tmp_path / "out" / "_clip_batch"
    (home / "plan.json").unlink()
    assert make_plan(config, f"{tmp_path}/out") == plan
    (home / "plan.json").unlink()
    with pytest.raises(PlanError, match="delete that file"):
        make_plan(replace(config, partition_count=3), f"{tmp_path}/out")


def test_a_large_tar_is_split_at_samples_and_its_counts_add_up(tars: Path, tmp_path: Path) -> None:
    write_tar(tars / "big.tar", 40)
    (tars / "big_stats.json").write_text('{"successes": 40}')
    size = (tars / "big.tar").stat().st_size
    config = PlanConfig(input=[f"{tars}/big.tar"], model="fake:8", partition_bytes=str(size // 4))
    plan = make_plan(config, f"{tmp_path}/out")
    slices = pieces(plan.partitions)
    assert len(plan.partitions) >= 4
    assert [piece.start for piece in slices] == [0, *(piece.stop for piece in slices[:-1])]
    with tarfile.open(tars / "big.tar") as tar:
        first_of_sample = {member.offset for member in tar if member.name.endswith(".jpg")}
    assert {piece.start for piece in slices} <= first_of_sample
    counts = [piece.samples or 0 for piece in slices]
    assert sum(counts) == 40 and max(counts) - min(counts) <= 3  # the last has the padding
    assert load_plan(Store(f"{tmp_path}/out")) == plan


def test_partitions_by_samples_without_side_cars_scan_the_headers(config: PlanConfig, tmp_path: Path) -> None:
    plan = make_plan(replace(config, partition_count=None, partition_samples=10), f"{tmp_path}/out")
    assert [len(partition.slices) for partition in plan.partitions] == [2, 2]
    assert [piece.samples for piece in pieces(plan.partitions)] == [5] * 4


def test_files_are_cut_by_samples(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(25):
        (tmp_path / "in" / f"{number:02d}.jpg").write_bytes(b"\xff")
    config = PlanConfig(input=[f"{tmp_path}/in"], format="files", model="fake:8", partition_samples=10)
    plan = make_plan(config, f"{tmp_path}/out")
    assert [(piece.start, piece.stop, piece.samples) for piece in pieces(plan.partitions)] == [
        (0, 8, 8),
        (8, 17, 9),
        (17, None, 8),
    ]
    assert load_plan(Store(f"{tmp_path}/out")) == plan
    assert len(make_plan(replace(config, partition_samples=None), f"{tmp_path}/whole").partitions) == 1
    (tmp_path / "in" / "25.jpg").write_bytes(b"\xff")
    with pytest.raises(PlanError, match=r"1 inputs changed: .*/in \(rewritten\)"):
        make_plan(config, f"{tmp_path}/out")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"partition_count": 0}, "give 1 or more"),
        ({"partition_samples": -1}, "give 1 or more"),
        ({"partition_count": 2, "partition_samples": 2}, "exclude each other"),
        ({"partition_bytes": "4 apples"}, "not understood"),
    ],
)
def test_wrong_targets(change: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        make_plan(PlanConfig(input=["x.tar"], model="fake:8", **change), str(tmp_path))  # type: ignore[arg-type]


def test_nothing_is_written_when_an_input_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing"):
        make_plan(PlanConfig(input=[f"{tmp_path}/none.tar"], model="fake:8"), f"{tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_a_frozen_plan_is_a_value(config: PlanConfig, tmp_path: Path) -> None:
    plan: Plan = make_plan(config, f"{tmp_path}/out")
    with pytest.raises(AttributeError):
        plan.partitions[0].id = 3  # type: ignore[misc]
