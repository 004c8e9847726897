"""The parts of `tests/bench/gpu.py`, each a module with `run(part)`, and how a part notes what it measures.

This module needs no library, so that the script itself cannot fail for want of one.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

BUDGETS = {
    "device": 15.0,
    "files": 180.0,
    "tests": 90.0,
    "peer": 45.0,
    "decode": 30.0,
    "model": 70.0,
    "fp8": 45.0,
    "calibrate": 40.0,
    "index": 10.0,
}
"""Seconds of each part, the part that says most first."""


@dataclass(frozen=True)
class Options:
    """What a part is asked to do, in `seconds`; `home` is a folder that the parts share."""

    part: str
    home: str
    device: str
    model: list[str]
    precision: str
    quick: bool
    seconds: float

    @property
    def results(self) -> str:
        """The file that the part writes."""
        return f"{self.home}/{self.part}.json"

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")


@dataclass
class Tried:
    """What one part measured: rows of `result.Row`, other figures, and notes on what it could not do."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    @classmethod
    def load(cls, path: str) -> Tried:
        """What a part wrote; nothing if it did not come so far."""
        try:
            with open(path) as file:
                return cls(**json.load(file))
        except OSError:
            return cls()


class Part:
    """A part at work. Whatever it adds is written at once, so that it is kept if the part is killed."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.found = Tried()
        self.ends = time.monotonic() + options.seconds - 2  # what is left for starting and ending the process

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.ends - time.monotonic()

    def row(
        self, key: str, what: str, unit: str, ours: float | None, peer: float | None = None, peer_name: str = ""
    ) -> None:
        """Add a line of the table; with a peer's figure also the ratio of ours to it."""
        ratio = round(ours / peer, 3) if ours is not None and peer else None
        ours, peer = rounded(ours), rounded(peer)
        row = {"key": f"{self.options.part}_{key}", "what": what, "unit": unit, "ours": ours, "peer": peer}
        self.found.rows.append({**row, "peer_name": peer_name, "ratio": ratio})
        print(what, ours, unit, peer, peer_name, flush=True)
        self.save()

    def figure(self, name: str, value: Any) -> None:
        """Add a figure that only the JSON has."""
        self.found.figures[name] = value
        print(name, value, flush=True)
        self.save()

    def note(self, text: str) -> None:
        """Say what was not measured, and why."""
        self.found.notes.append(text)
        print(text, flush=True)
        self.save()

    def attempt(self, what: str, seconds: float, work: Callable[..., None], *arguments: Any) -> None:
        """Do some work that takes about so many seconds, if they are left; its errors are noted, and do not spread."""
        if self.left < seconds and not self.options.quick:
            self.note(f"{what}: left out, because only {self.left:.0f} s were left")
            return
        started = time.monotonic()
        try:
            work(*arguments)
        except Skipped as error:
            self.note(f"{what}: {error}")
        except Exception as error:
            traceback.print_exc()
            self.note(f"{what}: {type(error).__name__}: {' '.join(str(error).split())}")
        print(f"[{what}: {time.monotonic() - started:.1f} s]", flush=True)

    def save(self) -> None:
        """Write everything found so far."""
        with open(f"{self.options.results}.new", "w") as file:
            json.dump(asdict(self.found), file, default=str)
        os.replace(f"{self.options.results}.new", self.options.results)


class Skipped(Exception):
    """Something is not measured here."""


def rounded(value: float | None) -> float | None:
    """Four digits of a number."""
    return None if value is None else float(f"{value:.4g}")
