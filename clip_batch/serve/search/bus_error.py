"""Says which file ended the process: one that was cut while it was memory-mapped, whose lost pages were then read.

The system sends SIGBUS to the thread that reads, which Python's own handlers never get to see. The handler here is
called at once, whichever library reads; it names the file and lets the signal end the process.
"""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Any

_SIGINFO = 4
"""SA_SIGINFO of Linux."""

_ADDRESS = 16
"""The place of si_addr in siginfo_t on 64-bit Linux."""

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Action(ctypes.Structure):
    """struct sigaction of glibc and musl."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * (1024 // (8 * ctypes.sizeof(ctypes.c_ulong)))),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def file_at(address: int, maps: str = "/proc/self/maps") -> str:
    """Return the path of the file that is mapped at an address of this process, "" if there is none."""
    with open(maps) as lines:
        for line in lines:
            span, *_, rest = line.split(maxsplit=5)
            start, _, stop = span.partition("-")
            if int(start, 16) <= address < int(stop, 16):
                return rest.strip()
    return ""


def name_lost_files() -> None:
    """From now on, write which file it was before the process ends by SIGBUS. Call it in the main thread."""

    def handle(number: int, info: int, _: int) -> None:
        try:
            address = ctypes.c_void_p.from_address(info + _ADDRESS).value or 0
            path = file_at(address) or "a mapped file"
            text = (
                f"clip-batch: {path} became shorter while it was in use: restore it, or merge again, and start again\n"
            )
            os.write(2, text.encode(errors="replace"))
        finally:
            libc.signal(number, None)  # the default: the read is tried again, and ends the process

    libc = ctypes.CDLL(None, use_errno=True)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    _KEPT.append(_Handler(handle))
    action = _Action(handler=ctypes.cast(_KEPT[-1], ctypes.c_void_p), flags=_SIGINFO)
    libc.sigaction(int(signal.SIGBUS), ctypes.byref(action), None)


_KEPT: list[Any] = []
"""Handlers, which must live as long as the process."""
