"""Joins the indices of many shards into one that is searched from disk: faiss's on-disk inverted lists.

PATH is a plain faiss file with the centroids and a table of the lists. PATH.ivfdata beside it holds the lists, each
with the rows of all shards: codes, then ids. Readers derive both names from PATH, so the folder may be moved.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import IO

from clip_batch.errors import ConfigError, CorruptError
from clip_batch.index.ann.libfaiss import Index, load

SUFFIX = ".ivfdata"

ALIGN = 8
"""Lists are padded to a multiple of this many rows, so that ids and the next list begin at multiples of 8 bytes."""

BUFFER = 4 << 20
"""Bytes written at a time."""


def join(template_path: str, shards: Sequence[tuple[str, int]], path: str) -> None:
    """Write the index of all rows of some IVF index files of one template: `path` and `path`.ivfdata.

    `shards` are (path, offset): a row's id is its id in the shard plus the offset. Lists are copied one by one from
    memory-mapped files into the new one, in order: memory does not grow with the number of rows. ConfigError: the index
    has no inverted lists, packed (fast-scan) ones, or vectors beside them (`RFlat`). CorruptError: a shard is not of
    the template.
    """
    faiss = load()
    joined = faiss.read_index(template_path)
    ivf = _ivf_of(joined, template_path)
    opened = [faiss.read_index(shard, faiss.IO_FLAG_MMAP_IFC) for shard, _ in shards]
    sources = []
    for (shard, _), index in zip(shards, opened, strict=True):
        shard_ivf = _ivf_of(index, shard)
        if (shard_ivf.nlist, shard_ivf.code_size) != (ivf.nlist, ivf.code_size):
            raise CorruptError(f"{shard} is not of the template {template_path}: merge again")
        sources.append(shard_ivf.invlists)
    offsets = [offset for _, offset in shards]
    sizes = [sum(source.list_size(number) for source in sources) for number in range(ivf.nlist)]
    table, end = faiss.OnDiskOneListVector(), 0
    for size in sizes:
        entry = faiss.OnDiskOneList()
        entry.size, entry.capacity, entry.offset = size, _padded(size), end
        table.push_back(entry)
        end += entry.capacity * (ivf.code_size + 8)
    with open(path + SUFFIX, "wb", buffering=BUFFER) as file:
        if end:
            os.posix_fallocate(file.fileno(), 0, end)  # fails now if the disk is full, and avoids fragments
        for number, size in enumerate(sizes):
            _copy_list(file, sources, offsets, number, ivf.code_size, _padded(size) - size)
    lists = faiss.OnDiskInvertedLists(ivf.nlist, ivf.code_size, os.path.basename(path) + SUFFIX)
    lists.lists, lists.totsize = table, end
    ivf.replace_invlists(lists, False)
    joined.ntotal = ivf.ntotal = sum(sizes)
    faiss.write_index(joined, path)


def _padded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _ivf_of(index: Index, path: str) -> Index:
    """The IVF index inside, whose lists can be copied row by row. ConfigError: there is none."""
    faiss = load()
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None:
        raise ConfigError(f"{path} has no inverted lists to join on disk: choose an IVF key, or --layout shards")
    within = faiss.downcast_index(index)
    if isinstance(within, faiss.IndexPreTransform):
        within = faiss.downcast_index(within.index)
    if not isinstance(within, faiss.IndexIVF):
        kind = type(within).__name__
        raise ConfigError(f"{path} is of kind {kind}, which cannot be joined on disk: use --rerank, or --layout shards")
    if isinstance(within, faiss.IndexIVFFastScan):
        raise ConfigError(f"{path} has fast-scan lists, which faiss cannot keep on disk: use --layout shards")
    return within


def _copy_list(
    file: IO[bytes], sources: Sequence[Index], offsets: Sequence[int], number: int, width: int, free: int
) -> None:
    """Append a list: the codes of all sources, then their ids, each followed by padding for `free` rows."""
    view = load().rev_swig_ptr
    filled = [(source, offset) for source, offset in zip(sources, offsets, strict=True) if source.list_size(number)]
    for source, _ in filled:
        file.write(view(source.get_codes(number), source.list_size(number) * width))
    file.write(bytes(free * width))
    for source, offset in filled:
        file.write(view(source.get_ids(number), source.list_size(number)) + offset)
    file.write(bytes(free * 8))


def is_joined(path: str) -> bool:
    """Whether an index file has its lists in a file beside it."""
    return os.path.exists(path + SUFFIX)


def open_joined(path: str) -> Index:
    """Open an index that `join` wrote, its lists memory-mapped, read only. CorruptError: the two files do not match."""
    faiss = load()
    index = faiss.read_index(path, faiss.IO_FLAG_SKIP_IVF_DATA | faiss.IO_FLAG_READ_ONLY)
    ivf = faiss.try_extract_index_ivf(index)
    lists = faiss.downcast_InvertedLists(ivf.invlists) if ivf is not None else None
    if not isinstance(lists, faiss.OnDiskInvertedLists) or lists.totsize != os.path.getsize(path + SUFFIX):
        raise CorruptError(f"{path}{SUFFIX} does not belong to {path}: delete both and merge again")
    lists.filename = path + SUFFIX  # faiss's IO_FLAG_ONDISK_SAME_DIR does this too, but prints a line
    lists.prefetch_nthread = 0  # by default each search starts 32 threads: 0.6 ms instead of 0.05 ms on cached pages
    if lists.totsize:
        lists.do_mmap()
    return index
