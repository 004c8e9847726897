"""Plants repeated rows at known cosines in two OUTs, merges one and adds the other, with and without `--dedup`.

    python -m tests.bench.duplicates [--rows 100000] [--dim 64] [--dedup 0.9] [--record]

The last tenth of the first OUT repeats earlier rows of it; of the second OUT a sixth repeats rows of the first, and a
sixth rows of its own. The cosines are 0.92, 0.95, 0.97, 0.99 and 1, and the rows are in a random order, so that pairs
are in different lists, index shards and versions. The rows have hardly any clusters, and lists of 70 rows: real ones
are easier. Time and memory are those of `clip-batch merge`, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from clip_batch.config import MergeConfig
from clip_batch.config.options import to_flags
from clip_batch.index.manifest import load_manifest
from clip_batch.storage.store import Store
from tests.bench import process, result
from tests.fabricated import Vectors, clustered, make_out, unit

COSINES = (0.92, 0.95, 0.97, 0.99, 1.0)
LIMIT = 600
"""Seconds after which a merge is killed."""


class Pairs(NamedTuple):
    """Planted rows (n,), the rows (n,) of their OUT that they repeat (-1: one of the other OUT), their cosines (n,)."""

    rows: npt.NDArray[np.int64]
    others: npt.NDArray[np.int64]
    cosines: npt.NDArray[np.float64]


def copies(rows: Vectors, rng: np.random.Generator) -> Vectors:
    """A row at one of `COSINES` to each row, in turn."""
    noise = rng.standard_normal(rows.shape).astype(np.float32)
    aside = unit(noise - np.sum(noise * rows, axis=1, keepdims=True) * rows)
    cosines = np.resize(COSINES, len(rows))[:, None].astype(np.float32)
    return unit(cosines * rows + np.sqrt(1 - cosines**2) * aside)


def planted(rows: int, dim: int) -> tuple[list[Vectors], list[Pairs]]:
    """The vectors of two OUTs, and the pairs that were planted in each."""
    rng = np.random.default_rng(3)
    singles = clustered(rows, dim, rows // 50, spread=1.2)[0]
    first, second = singles[: rows * 63 // 100], singles[rows * 63 // 100 : rows * 83 // 100]
    within, across = copies(first[: rows * 7 // 100], rng), copies(first[-rows * 5 // 100 :], rng)
    own = copies(second[: rows * 5 // 100], rng)
    of_first = len(first) + np.arange(len(within))
    of_second = len(second) + np.arange(len(across) + len(own))
    partners = np.concatenate([np.full(len(across), -1), np.arange(len(own))])
    outs, pairs = [], []
    for vectors, repeats, others in (
        (np.concatenate([first, within]), of_first, np.arange(len(within))),
        (np.concatenate([second, across, own]), of_second, partners),
    ):
        order = rng.permutation(len(vectors))
        place = np.append(np.argsort(order), -1)
        outs.append(vectors[order])
        pairs.append(Pairs(place[repeats], place[others], np.resize(COSINES, len(repeats))))
    return outs, pairs


def merge(out: str, index: str, config: MergeConfig, home: Path) -> dict[str, Any]:
    """Run `clip-batch merge`."""
    log = home / "merge.log"
    command = [sys.executable, "-m", "clip_batch", "merge", "--output", out, "--index", index, *to_flags(config)]
    ran = process.run(command, log, LIMIT)
    print(log.read_text(), file=sys.stderr)
    assert ran["exit"] == 0
    return ran


def found(index: str, pairs: Pairs) -> dict[float, float]:
    """The share of the planted pairs, by cosine, of which a row was left out."""
    name = load_manifest(Store(index)).duplicates["file"]
    table = pq.read_table(f"{index}/{name}", columns=["row"]).to_pydict()
    gone = table["row"]
    left_out = np.isin(pairs.rows, gone) | ((pairs.others >= 0) & np.isin(pairs.others, gone))
    return {cosine: round(float(left_out[pairs.cosines == cosine].mean()), 4) for cosine in COSINES}


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dedup", type=float, default=0.9)
    parser.add_argument("--index-key", default="IVF1024,PQ32x4fs")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        outs, pairs = planted(options.rows, options.dim)
        for name, vectors in zip(("base", "added"), outs, strict=True):
            make_out(home / name, vectors, vectors, [len(vectors)])
        plain = MergeConfig(
            modalities=["image"], index_key=options.index_key, rerank=10, shard_rows=options.rows // 5, seed=1
        )
        for dedup in (0.0, options.dedup):
            index = str(home / f"index-{dedup}")
            for name, planted_pairs in zip(("base", "added"), pairs, strict=True):
                ran = merge(str(home / name), index, replace(plain, dedup=dedup, add=name == "added"), home)
                if dedup:
                    ran["planted"] = found(index, planted_pairs)
                    ran["measured"] = load_manifest(Store(index)).duplicates
                figures[f"{name}{'_dedup' if dedup else ''}"] = ran
    print(json.dumps(figures), file=sys.stderr)
    result.report("duplicates", "index", options, _rows(options, figures), figures)


def _rows(options: argparse.Namespace, figures: dict[str, Any]) -> list[result.Row]:
    rows = []
    for name, what in (("base", f"of {options.rows * 7 // 10:,}"), ("added", f"--add of {options.rows * 3 // 10:,}")):
        plain, ran = figures[name], figures[f"{name}_dedup"]
        what = f"merge {what} x {options.dim} rows, --dedup {options.dedup}"
        least = min(ran["planted"].values())
        rows += [
            result.Row(f"{name}_found", f"{what}: least share found of pairs planted at a cosine", "share", least),
            result.Row(
                f"{name}_seconds",
                what,
                "s",
                ran["seconds"],
                plain["seconds"],
                "without --dedup",
                round(plain["seconds"] / ran["seconds"], 2),
            ),
            result.Row(f"{name}_memory", what, "MB", ran["peak_anonymous_mb"], plain["peak_anonymous_mb"], "without"),
        ]
    return rows


if __name__ == "__main__":
    main()
