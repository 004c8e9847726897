"""A local tar in memory: mapped where it is, or decompressed to a temporary file first if it is gzipped."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import zlib
from typing import IO

GZIP_MAGIC = b"\x1f\x8b"


def map_tar(file: IO[bytes], gzipped: bool = True) -> tuple[memoryview, str | None]:
    """Map a file into memory: its bytes, and None.

    With `gzipped`, a file that begins as gzip gives the bytes of its content, as far as they can be decompressed,
    and what is wrong with it, or "".
    """
    if gzipped and file.read(2) == GZIP_MAGIC:
        file.seek(0)
        with tempfile.TemporaryFile(prefix="clip-batch-") as content:
            problem = _inflate(file, content)
            content.flush()
            return map_tar(content, gzipped=False)[0], problem
    if os.fstat(file.fileno()).st_size == 0:  # an empty file cannot be mapped
        return memoryview(b""), None
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), None


def _inflate(source: IO[bytes], target: IO[bytes]) -> str:
    """Decompress all gzip streams of a file, as far as possible; returns what is wrong with them, or ""."""
    engine = zlib.decompressobj(31)
    while chunk := source.read(16384):
        while chunk:
            if engine.eof:
                chunk = chunk.lstrip(b"\0")  # padding
                engine = zlib.decompressobj(31) if chunk else engine
                continue
            before = engine.copy()
            try:
                target.write(engine.decompress(chunk))
            except zlib.error as error:
                # Byte by byte, so that the bytes before the error are kept.
                with contextlib.suppress(zlib.error):
                    for at in range(len(chunk)):
                        target.write(before.decompress(chunk[at : at + 1]))
                return f"a broken gzip stream ({error}); write the tar again"
            chunk = engine.unused_data
    return "" if engine.eof else "the gzip stream is cut off; copy or download it again"
