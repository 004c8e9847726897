"""Samples are counted before shards are read."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_batch.errors import InputError
from clip_batch.plan.counts import count_folder, count_samples, count_tars
from clip_batch.samples.files import list_samples
from clip_batch.types import Shard
from tests import corpus


def test_counts_come_from_side_cars_else_from_a_scan(tmp_path: Path) -> None:
    (tmp_path / "a_stats.json").write_text('{"count": 9, "successes": 7}')
    (tmp_path / "a.parquet").write_bytes(b"not looked at")
    statuses = pa.table({"status": ["success", "failed_to_download", "success"], "key": ["0", "1", "2"]})
    pq.write_table(statuses, tmp_path / "b.parquet")
    pq.write_table(statuses.drop(["status"]), tmp_path / "c.parquet")
    (tmp_path / "d_stats.json").write_text("no JSON")
    (tmp_path / "e.parquet").write_text("no Parquet")
    tars = [Shard(f"{tmp_path}/{name}") for name in ("a.tar", "b.tar.gz", "c.tgz", "d.tar", "e.tar", "f.tar")]
    assert [tar.samples for tar in count_tars(tars, {}, lambda tar: None)] == [7, 2, 3, None, None, None]
    assert [tar.samples for tar in count_tars(tars, {}, lambda tar: 5)] == [7, 2, 3, 5, 5, 5]


def test_the_version_of_a_folder_follows_its_names(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.png", "a.txt"):
        (tmp_path / name).touch()
    folder = Shard(str(tmp_path))
    counted = count_folder(folder, list_samples(folder.url, ["jpg", "png"], ["txt"]), ["jpg", "png"])
    assert counted.samples == 2
    (tmp_path / "b.jpg").rename(tmp_path / "c.jpg")
    assert count_folder(folder, list_samples(folder.url, ["jpg", "png"], ["txt"]), ["jpg"]).etag != counted.etag
    remedy = "no sample with extensions gif, but 1 jpg, 1 png, 1 txt: add --image-extensions gif jpg png"
    with pytest.raises(InputError, match=remedy):
        count_folder(folder, list_samples(folder.url, ["gif"], ["caption"]), ["gif"])


def test_counts_that_are_not_needed_are_read_only_where_that_is_cheap(tmp_path: Path) -> None:
    (tmp_path / "a_stats.json").write_text('{"successes": 7}')
    tars = [Shard(f"{tmp_path}/a.tar"), Shard(f"{tmp_path}/b.tar")]
    assert [tar.samples for tar in count_samples(tars, False, corpus.plan_of(), {})] == [7, None]
    remote = [*tars, Shard("s3://nowhere/c.tar")]
    assert count_samples(remote, False, corpus.plan_of(), {}) == remote
