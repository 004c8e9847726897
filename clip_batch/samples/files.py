"""Folders of images with captions and JSON beside them: the same samples as a tar, one file each.

The key is the path below the folder without its last extension: file names in the wild carry dots,
so unlike in a tar the first dot does not end the key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from clip_batch.errors import InputError
from clip_batch.storage.store import Store
from clip_batch.types import Failure, Plan, Sample, Slice


def list_samples(
    url: str,
    image_extensions: Sequence[str],
    caption_extensions: Sequence[str],
    options: dict[str, Any] | None = None,
) -> list[tuple[str, dict[str, str]]]:
    """Each sample's key and its files' names by extension, sorted by key; hidden names are skipped.

    InputError if there is no such folder.
    """
    wanted = {*image_extensions, *caption_extensions, "json"}
    found: dict[str, dict[str, str]] = {}
    for name in Store(url, options).walk():
        stem, dot, extension = name.rpartition(".")
        if dot and extension.lower() in wanted and not any(part.startswith(".") for part in name.split("/")):
            found.setdefault(stem, {}).setdefault(extension.lower(), name)
    return sorted(found.items())


def read_files(piece: Slice, plan: Plan, options: dict[str, Any] | None = None) -> Iterator[Sample | Failure]:
    """The samples [start, stop) of a folder's sorted listing; see `clip_batch.samples.read_slice`."""
    url = piece.shard.url
    store = Store(url, options)
    samples = list_samples(url, plan.image_extensions, plan.caption_extensions, options)
    if piece.shard.samples is not None and len(samples) != piece.shard.samples:
        raise InputError(f"{url} has {len(samples)} samples, planned were {piece.shard.samples}: plan again")
    for key, names in samples[piece.start : piece.stop]:
        image = _first(names, plan.image_extensions)
        if image is None:
            yield Failure(
                key, url, None, "missing_image", f"no file of this key ends in {', '.join(plan.image_extensions)}"
            )
            continue
        caption = _first(names, plan.caption_extensions)
        read = [store.read(name) if name else None for name in (image, caption, names.get("json"))]
        yield Sample(key, url, None, None, *read)


def _first(names: dict[str, str], extensions: Sequence[str]) -> str | None:
    return next((names[extension] for extension in extensions if extension in names), None)
