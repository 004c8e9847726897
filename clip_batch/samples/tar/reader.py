"""Reading the samples of a tar slice, in the order of their first members.

An image is a view into the memory map of its tar; only captions and JSON are copied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from clip_batch.errors import InputError, one_line
from clip_batch.samples.prefetch import Prefetcher
from clip_batch.samples.tar.beside import captions_beside
from clip_batch.samples.tar.headers import member_runs
from clip_batch.samples.tar.mapping import Mapped, map_slice
from clip_batch.samples.tar.samples import WIDTH, NameRule, TarSamples, read_samples
from clip_batch.samples.texts import decode_json
from clip_batch.storage.names import name_text
from clip_batch.storage.text import as_text
from clip_batch.types import ERROR_FIELD, Failure, Item, PassedOver, Plan, Sample, Slice


def read_tar(
    piece: Slice, plan: Plan, options: dict[str, Any] | None = None, files: Prefetcher | None = None
) -> Iterator[Item]:
    """Read the samples of a tar's bytes [piece.start, piece.stop), then its damage; see `read_slice`.

    A compressed tar (recognised by its first bytes, whatever its name) is decompressed to a temporary file and read
    whole; its samples have no offset. Keys are grouped by the bytes of their names, and written as `name_text` does.
    """
    url = name_text(piece.shard.url)
    (data, compression, problem), base = _open(piece, options, files)
    compressed, end = bool(compression), len(data)
    inside = (0, None) if compressed or base else (piece.start, piece.stop)
    samples = read_samples(lambda: member_runs(data, *inside), NameRule.of(plan))
    beside = captions_beside(url, plan.caption_field, samples.keys, options) if plan.caption_field else {}

    def place(at: int) -> int | None:
        return None if compressed else base + at

    dotted = {samples.table[WIDTH * number]: found for number, found in samples.dotted.items()}
    flags = _flags_for_dots(samples, plan)
    wanted = "image" in plan.modalities
    for key, header, offset, size, caption, caption_size, fields, fields_size in samples.rows():
        has_image = offset > 0 and offset + size <= end
        if has_image or not wanted:
            yield Sample(
                key,
                url,
                place(offset) if has_image else None,
                None if compressed or not has_image else size,
                data[offset : offset + size] if wanted else None,
                data[caption : caption + caption_size].tobytes() if 0 < caption <= end - caption_size else None,
                data[fields : fields + fields_size].tobytes() if 0 < fields <= end - fields_size else None,
                beside.get(key),
            )
        elif offset > 0:
            message = f"{max(0, end - offset)} of the image's {size} bytes are there; copy or download the tar again"
            yield Failure(key, url, place(header), "truncated_member", message)
        elif offset < 0:
            target = name_text(samples.links[size].target)
            message = f"its image is a link to {target!r}, which is no file of the tar; write it with tar --dereference"
            yield Failure(key, url, place(header), "broken_link", message)
        elif header in dotted:
            for one in dotted[header]:
                ending = name_text(one.ending)
                message = f"the first dot ends its key, and {ending!r} is no image extension: plan with {flags}"
                yield Failure(name_text(one.name.rpartition(".")[0]), url, place(one.header), "dotted_name", message)
        else:
            record = data[fields : fields + fields_size].tobytes() if 0 < fields <= end - fields_size else None
            yield Failure(key, url, place(header), "missing_image", _why_missing(record))
    if problem:
        reason = "bad_gzip" if compression == "gzip" else "bad_compression"
        yield Failure(None, url, None, reason, f"{problem}; what could be decompressed was read")
    for damage in samples.damage:
        yield Failure(None, url, None if compressed else base + damage.offset, damage.reason, damage.message)
    if end == 0 and not problem:
        yield Failure(None, url, None, "empty_file", "the file is empty; copy or download it again")
    elif piece.whole and not (samples.keys or samples.damage or problem):
        yield Failure(None, url, None, "empty_shard", "a tar without a single sample; look at what wrote it")
    if passed_over := samples.passed_over(wanted):
        yield PassedOver(url, {name_text(kind): count for kind, count in passed_over.items()})


def _why_missing(record: bytes | None) -> str:
    """Why a sample has no image, with what its JSON side-car says, where whoever wrote the tar knew more."""
    said = as_text(decode_json(record)[0].get(ERROR_FIELD))
    return one_line("no member with an image extension" + (f" ({said})" if said else ""), 500)


def _flags_for_dots(samples: TarSamples, plan: Plan) -> str:
    """The flags of `plan` by which samples that have only images with a dotted name, such as "1.50.png", have an image.

    A few extensions that many samples share, such as "input.jpg", are extensions; otherwise the dots belong to keys.
    """
    images = samples.images
    endings = Counter(one.ending for number, found in samples.dotted.items() if not images[number] for one in found)
    if len(endings) > 3 or endings.total() == len(endings) or any(ending[0].isdigit() for ending in endings):
        return "--key-ends last-dot"
    flags = ""
    for part, others in enumerate((plan.image_extensions, plan.caption_extensions)):
        plain = [name for name in others if any(name in parts[part] for parts, _ in samples.parts)]
        dotted = endings if part == 0 else samples.dotted_captions
        names = " ".join([*(name_text(name) for name, _ in dotted.most_common(3)), *plain])
        flags += f" --{('image', 'caption')[part]}-extensions {names}" if dotted else ""
    return flags.strip()


def _open(piece: Slice, options: dict[str, Any] | None, files: Prefetcher | None) -> tuple[Mapped, int]:
    """The tar in memory, and the byte of the tar at which the mapped bytes start."""
    mapped, base = map_slice(piece, options, files, compressed=piece.start == 0)
    size = base + len(mapped.data)
    if piece.stop is not None and not mapped.compression and size < piece.stop:
        raise InputError(f"{piece.shard.url} was planned up to byte {piece.stop} and has {size}; plan again")
    return mapped, base
