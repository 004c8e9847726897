"""Samples of webdataset tars, Parquet files and folders of files: reading, fetching ahead and decoding them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from clip_batch.storage.names import name_text
from clip_batch.types import UNREADABLE, Failure, Item, Plan, Slice

if TYPE_CHECKING:
    from clip_batch.samples.prefetch import Prefetcher


def read_slice(
    piece: Slice, plan: Plan, options: dict[str, Any] | None = None, files: Prefetcher | None = None
) -> Iterator[Item]:
    """Read every sample of a slice, in the order of their first members, and what is broken in its shard.

    At most one PassedOver, the last, counts the files that are part of neither.

    A sample without a readable image is a Failure, unless the plan embeds captions alone; a Failure whose key is None
    concerns the shard. `files` fetches remote files ahead; without it a remote file is fetched when its first sample is
    requested.

    InputError: the shard is missing or not what was planned. OSError: the store does not answer.
    """
    if piece.shard.etag == UNREADABLE:
        message = "the folder could not be listed when the plan was made: mend its permissions, and plan it"
        return iter([Failure(None, name_text(piece.shard.url), None, "unreadable_folder", message)])
    if plan.format == "files":
        from clip_batch.samples.files import read_files

        return read_files(piece, plan, options)
    if plan.format == "parquet":
        from clip_batch.samples.parquet.reader import read_parquet

        return read_parquet(piece, plan, options, files)
    from clip_batch.samples.tar.reader import read_tar

    return read_tar(piece, plan, options, files)
