"""Reading the samples of a tar slice, in the order of their first members.

An image is a view into the memory map of its tar; only captions and JSON are copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from clip_batch.errors import ClipBatchError, InputError
from clip_batch.samples.prefetch import Prefetcher
from clip_batch.samples.tar.beside import captions_beside
from clip_batch.samples.tar.headers import member_runs
from clip_batch.samples.tar.mapping import map_tar
from clip_batch.samples.tar.samples import group_members
from clip_batch.storage.names import name_text
from clip_batch.storage.paths import is_local
from clip_batch.types import Failure, Item, Plan, Sample, Slice


def read_tar(
    piece: Slice, plan: Plan, options: dict[str, Any] | None = None, files: Prefetcher | None = None
) -> Iterator[Item]:
    """Read the samples of a tar's bytes [piece.start, piece.stop), then its damage; see `read_slice`.

    A gzipped tar (recognised by its first bytes, whatever its name) is decompressed to a temporary file and read
    whole; its samples have no offset. Keys are grouped by the bytes of their names, and written as `name_text` does.
    """
    url = name_text(piece.shard.url)
    data, base, problem = _open(piece, options, files)
    gzipped, end = problem is not None, len(data)
    inside = (0, None) if gzipped or base else (piece.start, piece.stop)
    samples = group_members(member_runs(data, *inside), plan.image_extensions, plan.caption_extensions, ("json",))
    beside = captions_beside(url, plan.caption_field, samples.keys, options) if plan.caption_field else {}
    for key, header, offset, size, caption, caption_size, fields, fields_size in samples.rows():
        key = name_text(key)
        if not offset:
            message = "no member with an image extension"
            if header in samples.dotted:
                message += (
                    f", but one with {name_text(samples.dotted[header])!r}: a key ends at the first dot; rename it"
                )
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
                beside.get(key),
            )
    if problem:
        yield Failure(None, url, None, "bad_gzip", f"{problem}; what could be decompressed was read")
    for damage in samples.damage:
        yield Failure(None, url, None if gzipped else base + damage.offset, damage.reason, damage.message)
    if end == 0 and not problem:
        yield Failure(None, url, None, "empty_file", "the file is empty; copy or download it again")
    elif piece.whole and not (samples.keys or samples.damage or problem):
        yield Failure(None, url, None, "empty_shard", "a tar without a single sample; look at what wrote it")


def _open(piece: Slice, options: dict[str, Any] | None, files: Prefetcher | None) -> tuple[memoryview, int, str | None]:
    """The mapped bytes of the tar, the byte of the tar at which they start, and the problem that `map_tar` returns."""
    url = piece.shard.url
    try:
        with (
            Prefetcher(options=options) as alone,
            (files or alone).take(piece) as (path, base),
            open(path, "rb") as file,
        ):
            data, problem = map_tar(file, gzipped=piece.start == 0)
        if piece.stop is not None and problem is None and base + len(data) < piece.stop:
            raise InputError(f"{url} was planned up to byte {piece.stop} and has {base + len(data)}; plan again")
        return data, base, problem
    except ClipBatchError:
        raise
    except Exception as error:  # each remote store has exceptions of its own
        if isinstance(error, OSError) and not is_local(url) and not isinstance(error, FileNotFoundError):
            raise
        raise InputError(f"cannot read {url}: {error}; check that it exists and can be read") from None
