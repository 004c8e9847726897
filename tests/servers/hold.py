"""Workers that wait at a tar until the test lets them go on, so that no test depends on how fast they are.

It is as on a disk that does not answer: whoever opens the tar waits, other threads go on, and a signal that the worker
handles ends the wait.
"""

from __future__ import annotations

import os
from pathlib import Path

_SITECUSTOMIZE = '''\
"""Python imports this first: see tests/servers/hold.py."""
import os
import select
import signal
import sys

HOLD = os.path.join(os.path.dirname(__file__), "hold")
woken, wake = os.pipe()
os.set_blocking(wake, False)
signal.set_wakeup_fd(wake)  # Python writes to it when it handles a signal
opened = []


def held(name):
    try:
        with open(HOLD) as file:
            after, first = file.read().split(" ")
            return name >= first and len(opened) >= int(after)
    except FileNotFoundError:
        return False


def wait(name):
    while held(name) and not select.select([woken], [], [], 0.05)[0]:
        pass


def hook(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".tar"):
        wait(os.path.basename(arguments[0]))
        opened.append(arguments[0])


if "SLURM_STEP_ID" in os.environ:
    wait("")
sys.addaudithook(hook)
'''


class Hold:
    """Holds the Python processes that have `env` in their environment, until the end of its block at the latest.

    Its files lie in a folder of its own.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE)
        self._file = folder / "hold"
        path = filter(None, (str(folder), os.environ.get("PYTHONPATH")))
        self.env = {"PYTHONPATH": os.pathsep.join(path)}

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def at(self, name: str, after: int = 0) -> None:
        """From now on, whoever opens a tar of this name, or of a later one in alphabetical order, waits.

        A process that has not opened `after` tars yet opens so many first.
        With "", the processes of SLURM's steps wait before they do anything, and do not handle signals yet.
        """
        new = self._file.with_name("new")
        new.write_text(f"{after} {name}")
        new.replace(self._file)

    def release(self) -> None:
        """Let all go on."""
        self._file.unlink(missing_ok=True)
