"""The C library's allocator, which keeps what a program has freed."""

from __future__ import annotations

import contextlib
import ctypes


def give_back() -> None:
    """Give freed memory back to the system, where the C library can (glibc): it keeps much of what large steps took."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
