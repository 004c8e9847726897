"""Webdataset tars: which members make a sample, what a slice holds, and where a tar may be cut.

An image is handed on as a view into the memory map of its tar; only captions and JSON are copied.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple

from clip_batch.errors import ClipBatchError, InputError
from clip_batch.read.ahead import Ahead
from clip_batch.read.headers import BLOCK, Damage, Member, members
from clip_batch.store import is_local
from clip_batch.types import Failure, Plan, Sample, Slice

__all__ = ["Damage", "Found", "Member", "cuts", "group", "members", "read_tar"]

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "txt", "json")
GZIP_MAGIC = b"\x1f\x8b"


class Found(NamedTuple):
    """A sample: its key, its first member's header, and (offset, size) of each part it has."""

    key: str
    header: int
    image: tuple[int, int] | None
    caption: tuple[int, int] | None
    json: tuple[int, int] | None
    dotted: str | None


def _numbered(
    items: Iterable[Member | Damage], bits: dict[str, int], damage: list[Damage]
) -> Iterator[tuple[Member, str, str, int, int]]:
    """Each member that belongs to a sample: (member, key, extension, sample's number, key's last number).

    The key is the path up to the first dot of the base name, and the extension the rest,
    lower-cased: webdataset's rule. A member joins the latest sample of its key, wherever it lies,
    unless that sample has its extension already. Names without a dot, hidden ones and what macOS
    adds (`._x`, `__MACOSX`) belong to none. The last number is -1 for a new key. Damage goes to `damage`.
    """
    numbers: dict[str, int] = {}
    seen: list[int] = []  # bits of the extensions that each sample has
    for item in items:
        if isinstance(item, Damage):
            damage.append(item)
            continue
        folder, slash, base = item.name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not stem or not extension or "__MACOSX" in folder:
            continue
        key = folder + slash + stem
        bit = bits.get(extension)
        if bit is None:
            extension = extension.lower()
            bit = bits.get(extension, 0)
        last = number = numbers.get(key, -1)
        if number < 0 or seen[number] & bit:
            numbers[key] = number = len(seen)
            seen.append(bit)
        else:
            seen[number] |= bit
        yield item, key, extension, number, last


def _bits(extensions: Iterable[str]) -> dict[str, int]:
    return {extension.lower(): 1 << place for place, extension in enumerate(extensions)}


def group(
    items: Iterable[Member | Damage], images: Sequence[str], captions: Sequence[str], damage: list[Damage]
) -> Iterator[Found]:
    """The samples among members, in the order of their first members; Damage is appended to `damage`.

    Of several images (or captions) of a sample the first listed extension is taken. All headers are
    read before the first sample is yielded, as members of a sample may lie anywhere: about 300 bytes
    of memory a sample.
    """
    bits = _bits((*images, *captions, "json"))
    # extension -> (column in `table`, rank); a sample's row: header, then (rank + 1, offset, size) of each part
    places = {extension.lower(): (1, rank + 1) for rank, extension in reversed(list(enumerate(images)))}
    places |= {extension.lower(): (4, rank + 1) for rank, extension in reversed(list(enumerate(captions)))}
    places["json"] = (7, 1)
    keys: list[str] = []
    table = array("q")
    dotted: dict[int, str] = {}
    for member, key, extension, number, _ in _numbered(items, bits, damage):
        if number == len(keys):
            keys.append(key)
            table.extend((member.header, 0, 0, 0, 0, 0, 0, 0, 0, 0))
        if extension in places:
            column, rank = places[extension]
            at = number * 10 + column
            if table[at] == 0 or rank < table[at]:
                table[at], table[at + 1], table[at + 2] = rank, member.offset, member.size
        elif extension.rpartition(".")[2] in places:
            dotted[number] = extension
    for number, key in enumerate(keys):
        header, a, image, image_size, b, text, text_size, c, fields, fields_size = table[number * 10 : number * 10 + 10]
        yield Found(
            key,
            header,
            (image, image_size) if a else None,
            (text, text_size) if b else None,
            (fields, fields_size) if c else None,
            dotted.get(number),
        )


def read_tar(
    piece: Slice, plan: Plan, options: dict[str, Any] | None = None, files: Ahead | None = None
) -> Iterator[Sample | Failure]:
    """The samples of a tar's bytes [piece.start, piece.stop), then its damage; see `read_slice`.

    A gzipped tar (by its first bytes, whatever its name) is decompressed to a temporary file and read
    whole; its samples have no offset.
    """
    url = piece.shard.url
    data, base, trouble = _open(piece, options, files)
    gzipped, end = trouble is not None, len(data)
    inside = (0, None) if gzipped or base else (piece.start, piece.stop)
    damage: list[Damage] = []
    found = None
    for found in group(members(data, *inside), plan.image_extensions, plan.caption_extensions, damage):
        header = None if gzipped else base + found.header
        if found.image is None:
            message = "no member with an image extension"
            if found.dotted:
                message += f", but one with {found.dotted!r}: a key ends at the first dot; rename it"
            yield Failure(found.key, url, header, "missing_image", message)
            continue
        offset, size = found.image
        if offset + size > end:
            message = f"{max(0, end - offset)} of the image's {size} bytes are there; copy or download the tar again"
            yield Failure(found.key, url, header, "truncated_member", message)
            continue
        caption, fields = (
            bytes(data[part[0] : part[0] + part[1]]) if part and sum(part) <= end else None
            for part in (found.caption, found.json)
        )
        place, length = (None, None) if gzipped else (base + offset, size)
        yield Sample(found.key, url, place, length, data[offset : offset + size], caption, fields)
    if trouble:
        yield Failure(None, url, None, "bad_gzip", f"{trouble}; what could be decompressed was read")
    for item in damage:
        yield Failure(None, url, None if gzipped else base + item.offset, item.reason, item.message)
    if end == 0 and not trouble:
        yield Failure(None, url, None, "empty_file", "the file is empty; copy or download it again")
    elif piece.whole and not (found or damage or trouble):
        yield Failure(None, url, None, "empty_shard", "a tar without a single sample; look at what wrote it")


def _open(piece: Slice, options: dict[str, Any] | None, files: Ahead | None) -> tuple[memoryview, int, str | None]:
    """A map of the tar; the byte of the tar at which it starts; of a gzipped one what is wrong with it, or ""."""
    url = piece.shard.url
    try:
        with Ahead(options=options) as alone, (files or alone).take(piece) as (path, base), open(path, "rb") as file:
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
        return cuts_among(members(source), len(source), extensions)
    with open(source, "rb") as file:
        data, trouble = _map(file)
        size = os.fstat(file.fileno()).st_size
    found = cuts_among(members(data), len(data), extensions)
    return found if trouble is None else [(0, 0), (size, found[-1][1])]


def cuts_among(
    items: Iterable[Member | Damage], size: int, extensions: Sequence[str] = EXTENSIONS
) -> list[tuple[int, int]]:
    """`cuts` of a tar of so many bytes by what its headers say."""
    found = [(0, 0)]
    total = end = 0
    damage: list[Damage] = []

    def watched() -> Iterator[Member | Damage]:
        nonlocal end
        for item in items:
            end = item.offset + (-(-item.size // BLOCK) * BLOCK if isinstance(item, Member) else item.length)
            yield item

    for member, _, _, number, last in _numbered(watched(), _bits(extensions), damage):
        if number == total:
            total += 1
        if last >= 0:
            # The cuts after that key's earlier sample would tear it apart.
            while found[-1][1] > last:
                found.pop()
        elif number:
            found.append((member.header, number))
    return [*found, (min(end, size), total)]
