"""A plugin of pytest that says at once why a test failed and what it printed: the run may be killed before its end."""

from __future__ import annotations

from typing import Any

import pytest

MOST = 300
"""Characters of a message, and of what a test printed."""

_terminals: list[Any] = []


@pytest.hookimpl(trylast=True)  # pytest's own, which makes the terminal, comes before
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal:  # there is none in the processes that run tests for another one
        _terminals.append(terminal)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    printed = " ".join(report.capstdout.split())[-MOST:]
    for terminal in _terminals:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = " ".join((crash.message if crash else report.longreprtext).split())[:MOST]
            terminal.write_line(f"\nfailed: {report.nodeid}: {message}; printed: {printed}")
        elif report.when == "call" and printed:
            terminal.write_line(f"\nprinted: {report.nodeid}: {printed}")
