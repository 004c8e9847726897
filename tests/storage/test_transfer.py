"""Remote files and reads of byte ranges, against a store that fails when told to."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_batch.errors import InputError
from clip_batch.storage import retry
from clip_batch.storage.download import pieces
from clip_batch.storage.transfer import file_version, read_range, remote_file
from tests.servers.flaky import Flaky, put

DATA = random.Random(0).randbytes(100_000)


@pytest.fixture(autouse=True)
def _flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.001)
    yield
    Flaky.reset()


@settings(max_examples=50)
@given(st.integers(0, 3_000), st.integers(0, 3_000), st.integers(100, 2_000), st.integers())
def test_short_answers_and_errors_at_random_lose_no_byte(a: int, b: int, size: int, seed: int) -> None:
    chance = random.Random(seed)
    start, stop = sorted((a, b))
    remote = remote_file(put("a", DATA[:3_000]))
    Flaky.short = chance
    Flaky.before = lambda *_: (_ for _ in ()).throw(OSError(errno.EBUSY, "SlowDown")) if chance.random() < 0.1 else None
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(retry, "TRIES", 50)
            patch.setattr(retry, "FIRST_PAUSE", 0.0)
            found = b"".join(read_range(remote, *piece) for piece in pieces(start, stop, size))
        assert found == DATA[start:stop]
    finally:
        Flaky.reset()


def test_a_file_that_shrank_is_named(tmp_path: Path) -> None:
    remote = remote_file(put("a", DATA[:10_000]))
    with pytest.raises(InputError, match=r"flaky://a ends at byte 10000, not 100000 as before"):
        read_range(remote, 0, 100_000)


def test_versions_differ_when_a_file_is_written_again() -> None:
    remote = remote_file(put("a", b"1"))
    before = file_version(remote)
    put("a", b"2")
    assert before.size == file_version(remote).size == 1
    assert before.etag != file_version(remote).etag
