"""Index keys: the strings of faiss's index factory, such as `IVF4096_HNSW32,SQ8`."""

from __future__ import annotations

import logging
import math
import re
import warnings
from typing import NamedTuple

from clip_batch.errors import ConfigError
from clip_batch.index.ann import footprint
from clip_batch.index.ann.libfaiss import load

FEWEST_LISTS = 4

MOST_FLAT_LISTS = 8192
"""Lists up to which a query is compared with every centroid (0.3 ms for 512 dimensions); of more, by their graph."""

TRIED = 3
"""Index keys that are tried on the data at most."""


class Choice(NamedTuple):
    """An index key, and how many times k candidates are re-ranked (0: none; None: as the data wants)."""

    key: str
    rerank: int | None


def choices(
    rows: int, dim: int, memory: int, rerank: int | None = None, growing: bool = False, mapped: bool = False
) -> list[Choice]:
    """What may serve `rows` vectors of `dim` in `memory` bytes, the best first; `TRIED` at most.

    With re-ranking from disk codes may be small: 4-bit product quantization of two, four, eight dimensions at once, or
    where rows are to be added later (`growing`), RaBitQ's bits, which need no codebook. With `rerank` 0 codes must find
    the rows by themselves: float16, 8 bits, 4-bit product quantization. An index that is `mapped` from disk has 8 bits,
    for faiss keeps no 4-bit codes there. ConfigError: nothing fits.
    """
    ivf = f"IVF{list_count(rows)}"
    if list_count(rows) > MOST_FLAT_LISTS:
        ivf += "_HNSW32"
    product = [f"{ivf},PQ{dim // width}x4fs" for width in (2, 4, 8, 16) if dim % (2 * width) == 0]
    bits = [f"RR{dim},{ivf},RaBitQfs"]
    if rerank == 0:
        keys = [f"{ivf},SQfp16", f"{ivf},SQ8", *product[:1]]
    else:
        keys = bits if growing else [*product[:1], *bits, *product[1:]]
    if mapped:
        return [Choice(f"{ivf},SQ8", rerank)]
    fitting = [key for key in keys if footprint.served_bytes(key, rows, dim) <= memory]
    if not fitting:
        least = min(footprint.served_bytes(key, rows, dim) for key in keys)
        raise ConfigError(
            f"no index of {rows:,} vectors of {dim} fits in {memory:,} bytes: "
            f"raise --index-memory ({least:,} bytes for each modality are the least)"
        )
    return [Choice(key, rerank) for key in fitting[:TRIED]]


def autofaiss_key(rows: int, dim: int, memory: int) -> str:
    """autofaiss's choice for an index of at most `memory` bytes. ConfigError: nothing fits, or it is not installed."""
    load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from autofaiss.external.optimize import get_optimal_index_keys_v2
        except ImportError as error:
            raise ConfigError(
                "--index-key autofaiss: autofaiss is not installed: pip install 'clip-batch[autofaiss]' in an "
                "environment of its own, as it brings numpy 1 (docs/containers.md says how it runs on numpy 2), "
                "or leave --index-key auto"
            ) from error
    logging.getLogger("autofaiss").setLevel(logging.ERROR)
    keys = get_optimal_index_keys_v2(rows, dim, f"{memory}B", should_be_memory_mappable=True)
    if not keys:
        raise ConfigError(f"autofaiss knows no index of {rows:,} vectors of {dim} for {memory:,} bytes")
    return str(keys[0])


def lists(index_key: str) -> int:
    """The number of inverted lists of an index key; 0 where it has none."""
    match = re.search(r"IVF(\d+)([kM]?)", index_key)
    return int(match[1]) * {"": 1, "k": 2**10, "M": 2**20}[match[2]] if match else 0


def codewords(index_key: str) -> int:
    """The codewords of each part of a product quantizer of an index key; 0 for a key without one.

    >>> codewords("IVF128,PQ24x8"), codewords("OPQ48_96,PQ48x4fs"), codewords("IVF128,SQ8")
    (256, 16, 0)
    """
    match = re.search(r"PQ\d+(?:x(\d+))?", index_key.replace("OPQ", ""))
    return int(2 ** int(match[1] or 8)) if match else 0


def least_rows(index_key: str) -> int:
    """The fewest rows that lists and codewords can be made of; 0 for a key without any."""
    return max(lists(index_key), codewords(index_key))


def list_count(rows: int) -> int:
    """The number of inverted lists for `rows` rows: the power of two nearest to sqrt(rows), or rows / 1000 if larger.

    Measured: with twice as many a query compares as much with centroids as it saves in rows (see docs/experiments.md).
    """
    return int(2 ** round(math.log2(max(FEWEST_LISTS, math.sqrt(rows), rows / 1000))))


def default_keys(rows: int, dim: int, memory: int) -> list[str]:
    """One index key of each kind that may fit in `memory` bytes, for `sweep`; {} stands for the number of lists."""
    keys = ["Flat", "IVF{},Flat", "IVF{},SQ8"]
    if dim % 8 == 0:
        keys += ["IVF{},PQ" + f"{dim // 2}x4fs", f"OPQ{dim // 8}_{dim}," + "IVF{}" + f",PQ{dim // 8}x8"]
    keys += [f"RR{dim}," + "IVF{},RaBitQfs", f"RR{dim}," + "IVF{},RaBitQfs4", "HNSW32"]
    try:
        return [autofaiss_key(rows, dim, memory), *keys]
    except ConfigError:  # autofaiss knows none that fits, or is not there
        return keys


def scaled(index_key: str, share: float) -> str:
    """The index key for a share of the rows: with that share of the lists, so that a list is as long.

    >>> scaled("IVF4096,Flat", 0.25)
    'IVF1024,Flat'
    """
    whole = lists(index_key)
    count = min(whole, max(FEWEST_LISTS, round(whole * min(share, 1))))
    return re.sub(r"IVF\d+[kM]?", f"IVF{count}", index_key)


def is_lossy(index_key: str) -> bool:
    """Whether an index of this key stores less than the vectors themselves."""
    return not re.search(r"(Flat|HNSW\d+)$", index_key)
