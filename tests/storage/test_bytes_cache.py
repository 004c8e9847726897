"""The cache of small files on disk."""

from __future__ import annotations

import os
from pathlib import Path

from clip_batch.storage.bytes_cache import BytesCache


def kept(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_bytes_are_found_again_by_another_process(tmp_path: Path) -> None:
    BytesCache(str(tmp_path / "cache"), 1000).put("a key / of any kind", b"data")
    assert BytesCache(str(tmp_path / "cache"), 1000).get("a key / of any kind") == b"data"
    assert BytesCache(str(tmp_path / "cache"), 1000).get("another") is None


def test_it_stays_within_its_limit_and_keeps_what_is_used(tmp_path: Path) -> None:
    cache = BytesCache(str(tmp_path), 1000)
    for number in range(40):
        cache.put(f"{number}", bytes(100))
        for path in tmp_path.rglob("*"):  # file times are coarse: make the order certain
            os.utime(path, ns=(path.stat().st_mtime_ns - 10**9,) * 2)
        assert kept(tmp_path) <= 1000
        assert cache.get("0") is not None, "it was used all the time"
    assert cache.get("39") is not None
    assert cache.get("20") is None


def test_no_limit_to_fill_and_no_disk_to_write_keep_nothing(tmp_path: Path) -> None:
    BytesCache(str(tmp_path / "none"), 0).put("a", b"data")
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_bytes(b"")
    blocked = BytesCache(str(tmp_path / "file"), 1000)
    blocked.put("a", b"data")
    assert blocked.get("a") is None
