"""Processes that tests start: found by a variable of their environment, and killed however the test run ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests import ROOT


def mine(*variables: str) -> set[int]:
    """Ids of the other processes whose environment has all of these NAME=VALUE."""
    wanted = {variable.encode() for variable in variables}
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if entry.name.isdigit() and wanted <= set((entry / "environ").read_bytes().split(b"\0")):
                found.add(int(entry.name))
    return found - {os.getpid()}


def kill_all(*variables: str) -> None:
    """kill -9 all processes that `mine` lists, and those that they start meanwhile; all are stopped first."""
    while pids := mine(*variables):
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        time.sleep(0.05)


@contextlib.contextmanager
def kept(variable: str) -> Iterator[None]:
    """Kill all processes with this NAME=VALUE when the block or this process ends, which a keeper notices by a pipe."""
    watch = [sys.executable, "-m", "tests.servers.processes", variable]
    keeper = subprocess.Popen(watch, cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        kill_all(variable)
        keeper.communicate()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below the ephemeral ones, which any connection could take meanwhile.

    Each process looks from a place of its own, so that two test runs do not meet, and goes on from there.
    """
    ports: list[int] = []
    while len(ports) < count:
        _next[0] += 1
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", _next[0])) != 0:
                ports.append(_next[0])
    return ports


_next = [12_000 + 16 * os.getpid() % 20_000]

if __name__ == "__main__":
    sys.stdin.read()
    kill_all(sys.argv[1])
