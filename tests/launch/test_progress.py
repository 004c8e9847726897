"""Progress reads at once what costs nothing, and seldom what lists a remote store."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from clip_batch.launch import progress
from clip_batch.launch.progress import Counts, line, poll_seconds, show_progress
from clip_batch.storage.store import Store


def test_a_line_of_figures() -> None:
    figures = "1 of 4 partitions done, 1,000 samples embedded, 2 failed, 100.0 a second"
    assert line(Counts(4, 1, 1000, 2), 10) == f"{figures}, about 30 seconds left"
    assert line(Counts(4, 1, 1000, 2), 100).endswith("a second, about 5 minutes left")
    assert line(Counts(4, 4, 1000, 2), 10).endswith(" a second")
    assert line(Counts(4, 0, 0, 0), 0).endswith("0 failed, 0.0 a second")


def test_a_remote_store_is_listed_seldom(tmp_path: Path) -> None:
    assert poll_seconds(Store(str(tmp_path))) == progress.BAR_SECONDS <= 0.5
    assert 5 <= poll_seconds(Store("memory://out")) <= 10


@pytest.mark.parametrize("terminal", [True, False])
def test_reads_every_poll_and_once_at_the_end(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    reads: list[float] = []

    def read() -> Counts:
        reads.append(time.monotonic())
        return Counts(2, 1, 10, 0)

    with show_progress(read, poll=0.05):
        give_up = time.monotonic() + 60
        while len(reads) < 3 and time.monotonic() < give_up:  # rich may take longer to load than a few polls
            time.sleep(0.01)
    assert len(reads) >= 4
    assert "1 of 2 partitions done, 10 samples" in capsys.readouterr().err
    reads.clear()
    started = time.monotonic()
    with show_progress(read, poll=60):
        time.sleep(0.3)
    assert len(reads) == 1, "only the last state"
    assert time.monotonic() - started < 30
