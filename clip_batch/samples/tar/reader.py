"""Webdataset tars: which members make a sample, what a slice holds, and where a tar may be cut.

An image is handed on as a view into the memory map of its tar; only captions and JSON are copied.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

from clip_batch.errors import ClipBatchError, InputError
from clip_batch.samples.prefetch import Prefetcher
from clip_batch.samples.tar.headers import Damage, Member, members, runs
from clip_batch.samples.tar.samples import Group, group
from clip_batch.storage.paths import is_local
from clip_batch.types import Failure, Plan, Sample, Slice

__all__ = ["Damage", "Member", "cuts", "cuts_among", "members", "read_tar"]

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "txt", "json")
GZIP_MAGIC = b"\x1f\x8b"


def read_tar(
    piece: Slice, plan: Plan, options: dict[str, Any] | None = None, files: Prefetcher | None = None
) -> Iterator[Sample | Failure]:
    """The samples of a tar's bytes [piece.start, piece.stop), then its damage; see `read_slice`.

    A gzipped tar (by its first bytes, whatever its name) is decompressed to a temporary file and read
    whole; its samples have no offset.
    """
    url = piece.shard.url
    data, base, trouble = _open(piece, options, files)
    gzipped, end = trouble is not None, len(data)
    inside = (0, None) if gzipped or base else (piece.start, piece.stop)
    found = group(runs(data, *inside), plan.image_extensions, plan.caption_extensions, ("json",))
    for key, header, offset, size, caption, caption_size, fields, fields_size in found.rows():
        if not offset:
            message = "no member with an image extension"
            if header in found.dotted:
                message += f", but one with {found.dotted[header]!r}: a key ends at the first dot; rename it"
            yield Failure(key, url, None if gzipped else base + header, "missing_image", message)
        elif offset + size > end:
            message = f"{max(0, end - offset)} of the image's {size} bytes are there; copy or download the tar again"
            yield Failure(key, url, None if gzipped else base + header, "truncated_member", message)
        else:
            yield Sample(
                key,
                url,
                None if gzipped else base + offset,
                None if gzipped else size,
                data[offset : offset + size],
                data[caption : caption + caption_size].tobytes() if caption and caption + caption_size <= end else None,
                data[fields : fields + fields_size].tobytes() if fields and fields + fields_size <= end else None,
            )
    if trouble:
        yield Failure(None, url, None, "bad_gzip", f"{trouble}; what could be decompressed was read")
    for item in found.damage:
        yield Failure(None, url, None if gzipped else base + item.offset, item.reason, item.message)
    if end == 0 and not trouble:
        yield Failure(None, url, None, "empty_file", "the file is empty; copy or download it again")
    elif piece.whole and not (found.keys or found.damage or trouble):
        yield Failure(None, url, None, "empty_shard", "a tar without a single sample; look at what wrote it")


def _open(piece: Slice, options: dict[str, Any] | None, files: Prefetcher | None) -> tuple[memoryview, int, str | None]:
    """A map of the tar; the byte of the tar at which it starts; of a gzipped one what is wrong with it, or ""."""
    url = piece.shard.url
    try:
        with (
            Prefetcher(options=options) as alone,
            (files or alone).take(piece) as (path, base),
            open(path, "rb") as file,
        ):
            data, trouble = _map(file, gzipped=piece.start == 0)
        if piece.stop is not None and trouble is None and base + len(data) < piece.stop:
            raise InputError(f"{url} was planned up to byte {piece.stop} and has {base + len(data)}; plan again")
        return data, base, trouble
    except ClipBatchError:
        raise
    except Exception as error:  # each remote store has exceptions of its own
        if isinstance(error, OSError) and not is_local(url) and not isinstance(error, FileNotFoundError):
            raise
        raise InputError(f"cannot read {url}: {error}; check that it exists and can be read") from None


def _map(file: IO[bytes], gzipped: bool = True) -> tuple[memoryview, str | None]:
    """The file's bytes, mapped; if it is gzipped, those of its content, and what is wrong with it, or ""."""
    if gzipped and file.read(2) == GZIP_MAGIC:
        file.seek(0)
        with tempfile.TemporaryFile(prefix="clip-batch-") as content:
            trouble = _inflate(file, content)
            content.flush()
            return _map(content, gzipped=False)[0], trouble
    if os.fstat(file.fileno()).st_size == 0:  # an empty file cannot be mapped
        return memoryview(b""), None
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), None


def _inflate(source: IO[bytes], target: IO[bytes]) -> str:
    """Decompress all gzip streams of a file, as far as they go; what is wrong with them, or ""."""
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
                # Whatever comes before the error, byte by byte.
                with contextlib.suppress(zlib.error):
                    for place in range(len(chunk)):
                        target.write(before.decompress(chunk[place : place + 1]))
                return f"a broken gzip stream ({error}); write the tar again"
            chunk = engine.unused_data
    return "" if engine.eof else "the gzip stream is cut off; copy or download it again"


def cuts(source: str | memoryview | mmap.mmap | bytes, extensions: Sequence[str] = EXTENSIONS) -> list[tuple[int, int]]:
    """Where a tar may be cut: (byte, samples before it), from (0, 0) to (where the last member ends, all samples).

    `source` is a local path or the tar's bytes. No key that occurs before a cut occurs after it, so
    that the slices between cuts hold whole samples. A gzipped tar cannot be cut: its first and last
    entries are all. `extensions` are those that make a repeated key a new sample.
    """
    if not isinstance(source, str):
        return _cuts(group(runs(source), extensions), len(source))
    with open(source, "rb") as file:
        data, trouble = _map(file)
        size = os.fstat(file.fileno()).st_size
    found = _cuts(group(runs(data), extensions), len(data))
    return found if trouble is None else [(0, 0), (size, found[-1][1])]


def cuts_among(
    items: Iterable[Member | Damage], size: int, extensions: Sequence[str] = EXTENSIONS
) -> list[tuple[int, int]]:
    """`cuts` of a tar of so many bytes by what its headers say."""
    return _cuts(group((item if isinstance(item, Damage) else (item,) for item in items), extensions), size)


def _cuts(found: Group, size: int) -> list[tuple[int, int]]:
    places = [(0, 0)]
    for number, (_, header, *_) in enumerate(found.rows()):
        if number:
            places.append((header, number))
        while places[-1][1] > found.torn.get(number, number):
            places.pop()
    return [*places, (min(found.end, size), len(found.keys))]
