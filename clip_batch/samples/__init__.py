"""Reading samples: webdataset tars, or folders of files, as the plan says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from clip_batch.types import Failure, Plan, Sample, Slice

if TYPE_CHECKING:
    from clip_batch.samples.prefetch import Prefetcher


def read_slice(
    piece: Slice, plan: Plan, options: dict[str, Any] | None = None, files: Prefetcher | None = None
) -> Iterator[Sample | Failure]:
    """Every sample of a slice, in the order of its first member, and what of its shard is broken.

    `files` reads ahead; without it a remote tar is fetched when its first sample is asked for.

    A sample whose image cannot be had is a Failure; a Failure whose key is None speaks of the shard.
    InputError: the shard is missing or not what was planned. OSError: the store does not answer.
    """
    if plan.format == "files":
        from clip_batch.samples.files import read_files

        return read_files(piece, plan, options)
    from clip_batch.samples.tar.reader import read_tar

    return read_tar(piece, plan, options, files)
