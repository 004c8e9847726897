"""Measures the metadata of one index shard: writing it in index order, and taking rows from it, by layout.

    python -m tests.bench.metadata [--rows 10000000] [--rounds 9] [--batch-rows 65536 262144 1048576] [--folder DIR]
        [--record]

`near` is 200 runs of 5,000 rows of the index, as neighbouring lists hold them. The layout `arrival` is the same file
before rows are sorted by list; `plain` is the default one without dictionaries. Takes are the best of the rounds, each
of which has all layouts: milliseconds by the clock, and of all cores (which other work on the machine hardly changes).
Cold takes run after the kernel was asked to drop the file. The limit is what copying as many bytes into fresh memory
costs one core.
"""

from __future__ import annotations

import functools
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clip_batch.index import metadata, metadata_writer
from tests.bench import result

PART = 100_000
LISTS = 4096
RUNS = (200, 5000)
PAGE = 4096

Rows = npt.NDArray[np.int64]


def strings(rng: np.random.Generator, lengths: Rows, letters: npt.NDArray[np.uint8]) -> pa.Array:
    """Strings of these lengths, cut from `letters` at random."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    start = int(rng.integers(len(letters) - offsets[-1]))
    text = pa.py_buffer(letters[start : start + offsets[-1]].tobytes())
    return pa.StringArray.from_buffers(len(lengths), pa.py_buffer(offsets), text)


def parts(rows: int) -> Iterator[pa.Table]:
    """Parts as embed writes them, some 150 bytes a row: ten tars each; every row has its own URL and caption."""
    rng = np.random.default_rng(0)
    letters = rng.integers(97, 123, 200 * PART, dtype=np.uint8)
    for start in range(0, rows, PART):
        count = min(PART, rows - start)
        numbers = np.arange(count, dtype=np.int32)
        tars = pa.array([f"s3://a-bucket/laion/{10 * start // PART + i:06d}.tar" for i in range(10)])
        yield pa.table(
            {
                "url": strings(rng, rng.integers(40, 80, count), letters),
                "caption": strings(rng, rng.integers(10, 90, count), letters),
                "shard": tars.take(pa.array(numbers // (PART // 10))),
                "partition": np.full(count, start // PART, dtype=np.int32),
                "row": numbers,
            }
        )


def pages(opened: metadata.MetadataFile, rows: Rows) -> npt.NDArray[np.int64]:
    """The distinct 4 KiB pages, by address, that a take of these rows must read (dictionaries left out)."""
    starts = np.cumsum([0, *map(len, opened.batches)])
    found = []
    for first, batch in zip(starts, opened.batches, strict=False):
        inside = rows[(rows >= first) & (rows < first + len(batch))] - first
        for column in batch.columns:
            _, fixed, *data = column.buffers()
            if data:  # one string is shorter than a page: its first and last byte tell
                offsets = np.frombuffer(fixed, dtype=np.int32)
                found += [fixed.address + 4 * inside, fixed.address + 4 * inside + 4]
                found += [data[0].address + offsets[inside], data[0].address + offsets[inside + 1] - 1]
            else:
                found.append(fixed.address + inside * (column.type.bit_width // 8))
    return np.unique(np.concatenate([np.unique(addresses // PAGE) for addresses in found]))


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and CPU seconds of all cores."""
    started, busy = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - started, time.process_time() - busy


def drop(path: str) -> None:
    """Ask the kernel to drop a file's pages; nobody may have it mapped."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_gb_s(fresh: bool, size: int = 2**27) -> tuple[float, float]:
    """GB that one core copies a second (clock, CPU) to memory in use or, `fresh`, to memory that was just mapped."""
    source, used, rounds = np.ones(size, dtype=np.uint8), np.ones(size, dtype=np.uint8), []
    for _ in range(8):
        with mmap.mmap(-1, size) as mapped:
            target = np.frombuffer(mapped, dtype=np.uint8) if fresh else used
            rounds.append(seconds(functools.partial(np.copyto, target, source)))
            del target
    took, busy = (min(times) for times in zip(*rounds, strict=True))
    return round(size / took / 1e9, 2), round(size / busy / 1e9, 2)


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch-rows", type=int, nargs="+", default=[65_536, 262_144, 1_048_576])
    parser.add_argument("--folder", help="for the files, some 1.5 GB each (default: a temporary folder)")
    options = parser.parse_args()
    rng = np.random.default_rng(1)
    order = np.argsort(rng.integers(LISTS, size=options.rows, dtype=np.uint16), kind="stable")
    runs = min(RUNS[1], options.rows)
    near = np.concatenate([np.arange(runs) + start for start in rng.integers(options.rows - runs + 1, size=RUNS[0])])
    wanted = {
        "near_1m": near,
        "near_1m_shuffled": rng.permutation(near),
        "random_1m": rng.integers(options.rows, size=1_000_000),
        "random_1k": rng.integers(options.rows, size=1000),
        "random_10": rng.integers(options.rows, size=10),
    }
    default = metadata_writer.BATCH_ROWS
    layouts = {str(size): (size, metadata_writer.DICTIONARY_VALUES, order) for size in options.batch_rows}
    layouts["plain"] = (default, 0, order)
    layouts["arrival"] = (default, metadata_writer.DICTIONARY_VALUES, np.arange(options.rows))
    before = {what: order[rows] for what, rows in wanted.items()}
    asked = {name: before if name == "arrival" else wanted for name in layouts}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        report = {name: layout(f"{folder}/{name}.arrow", *how, asked[name]) for name, how in layouts.items()}
        opened = {name: metadata.MetadataFile(f"{folder}/{name}.arrow") for name in layouts}
        for _ in range(options.rounds):
            for name, file in opened.items():
                for what, rows in asked[name].items():
                    took, busy = seconds(functools.partial(file.take, rows))
                    for unit, value in (("ms", took), ("cpu_ms", busy)):
                        key, value = f"{what}_{unit}", round(1000 * value, 2)
                        report[name][key] = min(value, report[name].get(key, value))
        limit = opened[str(options.batch_rows[0])].take(near).nbytes
    fresh = copy_gb_s(True)
    limit_ms = round(limit / fresh[0] / 1e6, 1)
    best = (
        report[str(metadata_writer.BATCH_ROWS)]
        if str(metadata_writer.BATCH_ROWS) in report
        else next(iter(report.values()))
    )
    rows = [
        result.Row(
            "near_1m",
            f"`take` of 1,000,000 rows of neighbouring lists from {options.rows:,}, warm",
            "ms",
            best["near_1m_ms"],
            limit_ms,
            "copying as many bytes into fresh memory",
            round(limit_ms / best["near_1m_ms"], 2),
        )
    ]
    for key, what in (("random_1k", "1,000 random rows"), ("random_10", "10 random rows")):
        rows.append(result.Row(key, f"the same, {what}", "ms", best[f"{key}_ms"]))
    for key, what in (("near_1m", "1,000,000 rows of neighbouring lists"), ("random_1k", "1,000 random rows")):
        rows.append(result.Row(f"{key}_cold", f"{what}, cold", "ms", best[f"{key}_cold_ms"]))
    figures = {
        "cores": len(os.sched_getaffinity(0)),
        "copy_gb_s": copy_gb_s(False),
        "copy_to_fresh_memory_gb_s": fresh,
        "near_1m_bytes": limit,
        "near_1m_limit_ms": [round(limit / rate / 1e6, 1) for rate in fresh],
        "layouts": report,
    }
    result.report("metadata", "index", options, rows, figures)


def layout(path: str, batch_rows: int, values: int, order: Rows, wanted: dict[str, Rows]) -> dict[str, float]:
    """Write one file; returns its size, the cold takes, and the pages that they touch."""
    metadata_writer.BATCH_ROWS, metadata_writer.DICTIONARY_VALUES = batch_rows, values
    took, busy = seconds(lambda: metadata_writer.write_ordered(parts(len(order)), order, path))
    found: dict[str, float] = {"bytes": os.path.getsize(path), "write_s": round(took, 1), "write_cpu_s": round(busy, 1)}
    for what in ("near_1m", "random_1k", "random_10"):
        cold = []
        for _ in range(3):
            drop(path)
            opened = metadata.MetadataFile(path)
            cold.append(seconds(functools.partial(opened.take, wanted[what]))[0])
            found[f"{what}_pages"] = len(pages(opened, wanted[what]))
            del opened
        found[f"{what}_cold_ms"] = round(1000 * min(cold), 1)
    return found


if __name__ == "__main__":
    main()
