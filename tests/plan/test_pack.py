"""Packing shards into partitions."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_batch.errors import ConfigError
from clip_batch.plan.cuts import find_cuts, folder_cuts
from clip_batch.plan.pack import Cut, PartitionTarget, pack, places_to_cut
from clip_batch.types import Partition, Shard, Slice

GRAIN = 7
"""Bytes of a sample in these shards, which have no files."""


def cut(shard: Shard, places: Sequence[float]) -> list[Cut]:
    """Cuts at whole samples of `GRAIN` bytes."""
    last = (shard.size or 0) // GRAIN - 1
    numbers = sorted({min(max(round(place / GRAIN), 1), last) for place in places}) if last > 0 else []
    return [Cut(number * GRAIN, number) for number in numbers]


def pack_with_cuts(shards: Sequence[Shard], target: PartitionTarget) -> tuple[Partition, ...]:
    return pack(shards, target, find_cuts(shards, places_to_cut(shards, target), cut))


def shards_of(sizes: list[int]) -> list[Shard]:
    return [Shard(f"{number}.tar", size, None, size // GRAIN) for number, size in enumerate(sizes)]


def pieces(partitions: tuple[Partition, ...]) -> list[Slice]:
    return [piece for partition in partitions for piece in partition.slices]


def length(piece: Slice) -> int:
    return (piece.shard.size or 0 if piece.stop is None else piece.stop) - piece.start


sizes = st.lists(st.integers(0, 300), min_size=1, max_size=40)
targets = st.one_of(
    st.builds(lambda value: PartitionTarget("bytes", value), st.integers(1, 1000)),
    st.builds(lambda value: PartitionTarget("partitions", value), st.integers(1, 60)),
)


@given(sizes, targets, st.booleans())
def test_every_byte_is_in_one_slice_in_order(sizes: list[int], target: PartitionTarget, splits: bool) -> None:
    shards = shards_of(sizes)
    partitions = pack_with_cuts(shards, target) if splits else pack(shards, target)
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
    partitions = pack(shards_of(sizes), PartitionTarget("bytes", target))
    mean = sum(sizes) / len(partitions)
    assert len(partitions) == ceil(sum(sizes) / target)
    loads = [sum(map(length, partition.slices)) for partition in partitions]
    # A partition is off by less than one shard, and a shard is at most 5 % of the target.
    assert all(abs(load - mean) <= 100 for load in loads)
    if mean >= 1000:
        assert all(abs(load - mean) <= 0.1 * mean for load in loads)


@given(st.integers(10_000, 100_000), st.integers(1000, 5000))
def test_one_large_tar_feeds_many_partitions_evenly(size: int, target: int) -> None:
    partitions = pack_with_cuts(shards_of([size]), PartitionTarget("bytes", target))
    mean = size / len(partitions)
    assert len(partitions) == ceil(size / target)
    assert all(abs(sum(map(length, partition.slices)) - mean) <= 0.1 * mean for partition in partitions)


def test_packing_by_samples_takes_the_mean_for_an_unknown_count() -> None:
    shards = [Shard("a", 1, None, 10), Shard("b", 900, None, None), Shard("c", 1, None, 10)]
    assert [
        [piece.shard.url for piece in partition.slices] for partition in pack(shards, PartitionTarget("samples", 10))
    ] == [
        ["a"],
        ["b"],
        ["c"],
    ]


def test_shards_that_cannot_be_split_make_fewer_partitions() -> None:
    partitions = pack(shards_of([700, 7, 7]), PartitionTarget("partitions", 3))
    assert [[piece.shard.url for piece in partition.slices] for partition in partitions] == [
        ["0.tar"],
        ["1.tar", "2.tar"],
    ]


def test_a_count_does_not_cut_shards_that_are_nearly_equal() -> None:
    shards = shards_of([98, 105, 98, 105])
    assert places_to_cut(shards, PartitionTarget("partitions", 4)) == {}
    assert len(pack(shards, PartitionTarget("partitions", 4))) == 4
    assert set(places_to_cut(shards, PartitionTarget("partitions", 5))) == {0, 1, 2, 3}


@given(sizes, targets)
def test_only_shards_larger_than_a_partition_are_to_be_cut_and_inside(
    sizes: list[int], target: PartitionTarget
) -> None:
    shards = shards_of(sizes)
    for number, places in places_to_cut(shards, target).items():
        assert places == sorted(places) and all(0 <= place <= sizes[number] for place in places)
        assert sizes[number] > (target.value if target.unit == "bytes" else sum(sizes) / target.value)


@given(st.integers(0, 50), st.lists(st.floats(0, 50), max_size=10))
def test_a_folder_is_cut_before_any_sample_but_the_first(samples: int, places: list[float]) -> None:
    cuts = folder_cuts(Shard("folder", samples=samples), places)
    assert cuts == sorted(set(cuts)) and all(cut.at == cut.samples and 0 < cut.at < samples for cut in cuts)
    assert all(min(abs(cut.at - min(place, samples)) for cut in cuts) <= 1 for place in places if cuts)


def test_too_many_partitions_are_refused() -> None:
    with pytest.raises(ConfigError, match="raise the partition target"):
        pack(shards_of([10_000_000]), PartitionTarget("bytes", 1))


def test_a_target_reads_as_text() -> None:
    assert str(PartitionTarget("partitions", 2000)) == "2,000 partitions"
    assert str(PartitionTarget("bytes", 4_000_000_000)) == "4,000,000,000 bytes a partition"
