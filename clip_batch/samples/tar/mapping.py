"""A local tar in memory: mapped where it is, or decompressed to a temporary file first if it is compressed."""

from __future__ import annotations

import bz2
import contextlib
import errno
import lzma
import mmap
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from clip_batch.errors import ClipBatchError, InputError
from clip_batch.samples.prefetch import Prefetcher
from clip_batch.storage.paths import is_local
from clip_batch.types import Slice

FIRST_BYTES = 10
"""First bytes of a file by which `compression` tells what it is."""

_FIRST_BYTES = {
    "gzip": rb"\x1f\x8b",
    "bzip2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",  # tar's first bytes are a name, which could begin with BZh too
    "xz": rb"\xfd7zXZ\0",
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
}

LARGEST, MOST_TIMES = 4 * 2**30, 100
"""Content of up to this many bytes, or this many times the file's size, is decompressed; bombs are far larger."""

_READ, _WRITE = 16 * 2**10, 2**20  # bytes that are read, and at most decompressed, at a time
_MEMORY = 2**29  # bytes of xz's dictionary


class Mapped(NamedTuple):
    """A tar's bytes in memory.

    - `data`: its bytes; of a compressed file those of its content, as far as they can be decompressed.
    - `compression`: the name of the compression; "" if it is not compressed.
    - `problem`: what is wrong with the compressed file; "" if nothing is.
    """

    data: memoryview
    compression: str = ""
    problem: str = ""


def compression(first_bytes: bytes) -> str:
    """The compression of a file by its first bytes; "" if it has none that is known.

    >>> compression(b"\\x1f\\x8b\\x08"), compression(b"cat.jpg")
    ('gzip', '')
    """
    return next((name for name, pattern in _FIRST_BYTES.items() if re.match(pattern, first_bytes)), "")


def map_tar(file: IO[bytes], compressed: bool = True) -> Mapped:
    """Map a file into memory; without `compressed`, as it is. OSError: the disk is full."""
    kind = compression(file.read(FIRST_BYTES)) if compressed else ""
    if kind:
        file.seek(0)
        with tempfile.TemporaryFile(prefix="clip-batch-") as content:
            problem = _decompress(file, content, kind)
            content.flush()
            return Mapped(map_tar(content, compressed=False).data, kind, problem)
    if os.fstat(file.fileno()).st_size == 0:  # an empty file cannot be mapped
        return Mapped(memoryview(b""))
    return Mapped(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))


def _decompress(source: IO[bytes], target: IO[bytes], kind: str) -> str:
    """Decompress a file, as far as possible; returns what is wrong with it, or ""."""
    size = os.fstat(source.fileno()).st_size
    limit = max(LARGEST, MOST_TIMES * size)
    pieces = _DECOMPRESSORS[kind](source)
    done = 0
    while True:
        try:
            piece = next(pieces, None)
        except EOFError:
            return f"the {kind} stream is cut off; copy or download it again"
        except (zlib.error, lzma.LZMAError, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno:  # the file cannot be read
                raise
            return f"a broken {kind} stream ({error}); write the tar again"
        if piece is None:
            return ""
        try:
            target.write(piece[: limit - done])
        except OSError as error:
            if error.errno == errno.ENOSPC:
                where = tempfile.gettempdir()
                raise OSError(error.errno, f"{where} has no room for the content of a tar: set TMPDIR") from None
            raise
        done += len(piece)
        if done > limit:
            return f"its content is over {limit:,} bytes, and its size is {size:,}; decompress it if that is right"


def _gzip(source: IO[bytes]) -> Iterator[bytes]:
    """The content of all gzip streams of a file; of a broken one, that before the error."""
    engine = zlib.decompressobj(31)
    while chunk := source.read(_READ):
        while chunk:
            if engine.eof:
                chunk = chunk.lstrip(b"\0")  # padding
                engine = zlib.decompressobj(31) if chunk else engine
                continue
            before = engine.copy()
            try:
                content = engine.decompress(chunk)
            except zlib.error as error:
                # Byte by byte, so that the bytes before the error are kept.
                with contextlib.suppress(zlib.error):
                    for at in range(len(chunk)):
                        yield before.decompress(chunk[at : at + 1])
                raise error from None
            yield content
            chunk = engine.unused_data
    if not engine.eof:
        raise EOFError


def _streams(make: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor], source: IO[bytes]) -> Iterator[bytes]:
    """The content of all streams of a file."""
    engine, chunk = make(), b""
    while chunk := chunk or source.read(_READ):
        if engine.eof:
            chunk = chunk.lstrip(b"\0")  # padding
            engine = make() if chunk else engine
            continue
        yield engine.decompress(chunk, _WRITE)
        while not engine.eof and not engine.needs_input:
            yield engine.decompress(b"", _WRITE)
        chunk = engine.unused_data if engine.eof else b""
    if not engine.eof:
        raise EOFError


def _bzip2(source: IO[bytes]) -> Iterator[bytes]:
    return _streams(bz2.BZ2Decompressor, source)


def _xz(source: IO[bytes]) -> Iterator[bytes]:
    return _streams(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _MEMORY), source)


def _zstd(source: IO[bytes]) -> Iterator[bytes]:
    import pyarrow as pa

    with open(os.dup(source.fileno()), "rb") as file:  # pyarrow closes it
        file.seek(0)
        stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")
        while content := stream.read(_READ):
            yield content


_DECOMPRESSORS = {"gzip": _gzip, "bzip2": _bzip2, "xz": _xz, "zstd": _zstd}


def map_slice(
    piece: Slice, options: dict[str, Any] | None, files: Prefetcher | None, compressed: bool
) -> tuple[Mapped, int]:
    """A slice of any file as `map_tar` gives it, and the byte of the file at which the mapped bytes start.

    InputError: the file cannot be read. OSError: its remote store or this machine's disk is to blame.
    """
    url = piece.shard.url
    try:
        with (
            Prefetcher(options=options) as alone,
            (files or alone).take(piece) as (path, base),
            open(path, "rb") as opened,
        ):
            return map_tar(opened, compressed), base
    except ClipBatchError:
        raise
    except Exception as error:  # each remote store has exceptions of its own
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if full or (isinstance(error, OSError) and not is_local(url) and not isinstance(error, FileNotFoundError)):
            raise
        raise InputError(f"cannot read {url}: {error}; check that it exists and can be read") from None
