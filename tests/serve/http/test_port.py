"""A port that is used is refused in one line, before any work."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from clip_batch.cli import main
from clip_batch.config import ServeConfig
from clip_batch.errors import ClipBatchError
from clip_batch.serve.http.port import check_port
from tests import corpus


@pytest.fixture
def used() -> Iterator[int]:
    """A port at which something listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_free_port_stays_free_and_an_unknown_host_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    check_port(ServeConfig(port=port))
    check_port(ServeConfig(port=port))
    with pytest.raises(ClipBatchError, match=r"at no\.such\.invalid:1234: .*--host"):
        check_port(ServeConfig(host="no.such.invalid"))


@pytest.mark.parametrize("command", ["run", "end2end", "demo", "serve", "serve-worker"])
def test_a_used_port_is_refused_before_any_work(
    used: int, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(corpus.jpeg(1))
    words = {
        "run": ["run", f"{tmp_path}/a", "--output", str(out), "--model", "fake:8"],
        "end2end": ["end2end", "--urls", f"{tmp_path}/list.txt", "--output", str(out)],
        "demo": ["demo", str(out)],
        "serve": ["serve", "--index", str(out)],
        "serve-worker": ["serve-worker", "--allow", str(tmp_path)],
    }[command]
    assert main([*words, "--port", str(used)]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"clip-batch {command}: nothing can be served at 127.0.0.1:{used}: Address already in")
    assert "another --port" in said.err and said.err.count("\n") == 1 and not said.out and not out.exists()
