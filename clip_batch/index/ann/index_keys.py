"""Index keys: the strings of faiss's index factory, such as `IVF4096_HNSW32,SQ8`."""

from __future__ import annotations

import math
import re
import warnings

from clip_batch.errors import ConfigError
from clip_batch.index.ann.libfaiss import load

FEWEST_LISTS = 4


def choose_key(rows: int, dim: int, max_memory: int, flat_rows: int) -> str:
    """The index key for `rows` vectors: "Flat" up to `flat_rows` rows, autofaiss's choice for more.

    `max_memory` is in bytes and for the index when served. ConfigError: nothing fits, or autofaiss is not installed.
    """
    if rows <= flat_rows:
        return "Flat"
    import logging

    load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from autofaiss.external.optimize import get_optimal_index_keys_v2
        except ImportError as error:
            raise ConfigError(
                f"--index-key auto for {rows:,} rows is autofaiss's choice, and autofaiss is not installed, as "
                "clip-batch[merge] brings it up to Python 3.12 alone: give --index-key; clip-batch sweep recommends one"
            ) from error
    logging.getLogger("autofaiss").setLevel(logging.ERROR)
    keys = get_optimal_index_keys_v2(rows, dim, f"{max_memory}B", should_be_memory_mappable=True)
    if not keys:
        raise ConfigError(f"no index of {rows:,} vectors of {dim} fits in {max_memory:,} bytes: raise --max-memory")
    return str(keys[0])


def lists(index_key: str) -> int:
    """The number of inverted lists of an index key; 0 where it has none."""
    match = re.search(r"IVF(\d+)([kM]?)", index_key)
    return int(match[1]) * {"": 1, "k": 2**10, "M": 2**20}[match[2]] if match else 0


def list_count(rows: int) -> int:
    """The number of inverted lists for `rows` rows: the power of two nearest to 4 sqrt(rows), faiss's lowest advice."""
    return int(2 ** round(math.log2(max(FEWEST_LISTS, 4 * math.sqrt(rows)))))


def default_keys(rows: int, dim: int, memory: int) -> list[str]:
    """One index key of each kind that may fit in `memory` bytes; {} stands for the number of lists."""
    ivf = "IVF{}_HNSW32"
    keys = ["Flat", f"{ivf},Flat", f"{ivf},SQ8"]
    if dim % 8 == 0:
        keys += [f"OPQ{dim // 8}_{dim},{ivf},PQ{dim // 8}x8", f"{ivf},PQ{dim // 4}x4fs"]
    keys += [f"RR{dim},{ivf},RaBitQfs", f"RR{dim},{ivf},RaBitQfs4", "HNSW32"]
    try:
        return [choose_key(rows, dim, memory, 0), *keys]
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
