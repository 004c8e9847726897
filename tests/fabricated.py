"""An OUT made of given vectors, through the real plan and commits, for tests of what reads one."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clip_batch.embeddings.part_writer import PartWriter
from clip_batch.plan import stored
from clip_batch.plan.pack import PartitionTarget
from clip_batch.storage.store import Store
from clip_batch.types import EncoderSpec, Partition, Plan, Shard, Slice

Vectors = npt.NDArray[np.float32]
Place = Path | str | Store
ENCODER = EncoderSpec("fake:8", "", "0" * 64)


def unit(vectors: npt.NDArray[np.floating]) -> Vectors:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def clustered(rows: int, dim: int, clusters: int, seed: int = 0, spread: float = 0.6) -> tuple[Vectors, Vectors]:
    """Image vectors in clusters, and a text vector near each: float32 (rows, dim), unit norm."""
    rng = np.random.default_rng(seed)
    centers = unit(rng.standard_normal((clusters, dim)))
    noise = rng.standard_normal((2, rows, dim)).astype(np.float32) * spread / dim**0.5
    images = unit(centers[rng.integers(clusters, size=rows)] + noise[0])
    return images, unit(images + noise[1])


def towers(rows: int, dim: int, seed: int = 0) -> tuple[Vectors, Vectors]:
    """Image vectors, and text vectors of which half the dimensions mean other things than in the images."""
    images, texts = clustered(rows, dim, 200, seed, spread=0.5)
    turned = texts.copy()
    turned[:, : dim // 2] = texts[:, : dim // 2][:, ::-1]
    return images, unit(turned + np.float32(0.2))


def store_of(out: Place) -> Store:
    return out if isinstance(out, Store) else Store(str(out))


def bucket(out: Place) -> str:
    """Where the tars of an OUT are said to be: every OUT has its own."""
    return f"s3://bucket-{zlib.crc32(store_of(out).url.encode()):08x}"


def make_plan(out: Place, partitions: int) -> Plan:
    shards = [Shard(f"{bucket(out)}/{number:05d}.tar", 1, None, None) for number in range(partitions)]
    draft = Plan(tuple(Partition(i, (Slice(shard),)) for i, shard in enumerate(shards)), ENCODER, fields={"n": "int64"})
    plan = replace(draft, digest=stored.plan_digest(draft))
    stored.write_plan(store_of(out), plan, shards, PartitionTarget("partitions", partitions), {})
    return plan


def commit(
    out: Place,
    plan: Plan,
    partition: int,
    images: Vectors,
    texts: Vectors,
    encoder: str = ENCODER.fingerprint,
    captions: Sequence[str] | None = None,
) -> None:
    """Commit rows with the keys <partition>-<row>; a zero text row has no caption, others are made up if not given."""
    captions = captions or [f"caption {partition}-{row}" for row in range(len(images))]
    shard = plan.partitions[partition].slices[0].shard.url
    rows = [
        {
            "key": f"{partition}-{row}",
            "shard": shard,
            "offset": 512 * row,
            "length": 10,
            "caption": captions[row] if texts[row].any() else None,
            "n": row,
        }
        for row in range(len(images))
    ]
    with PartWriter(store_of(out), plan, partition, images.shape[1]) as writer:
        if rows:
            writer.add(rows, images, texts)
        assert writer.commit(encoder)


def make_out(out: Place, images: Vectors, texts: Vectors, sizes: Sequence[int], skip: Sequence[int] = ()) -> Plan:
    """An OUT with a partition of each size; those in `skip` are not committed."""
    plan = make_plan(out, len(sizes))
    ends = np.cumsum([0, *sizes])
    for partition, (start, stop) in enumerate(pairwise(ends)):
        if partition not in skip:
            commit(out, plan, partition, images[start:stop], texts[start:stop])
    return plan
