"""The embedded data of the demo: the table of images and captions, and the tars made of it."""

from __future__ import annotations

import io
import json
import os
import tarfile
from importlib.resources import files
from typing import TYPE_CHECKING

from clip_batch.demo.captions import caption

if TYPE_CHECKING:
    import pyarrow as pa


def table_path() -> str:
    """The path of the embedded table of images and captions, a Parquet file."""
    return str(files(__package__) / "emoji.parquet")


def load() -> pa.Table:
    """The embedded table, one row for each of 1,911 emoji.

    Columns: key (hyphenated code points), image (JPEG bytes, 64 x 64 pixels on white), name_en,
    name_zh, keywords_en, keywords_zh, short_names, category, and held_out (the short names, as
    words, that are not among the texts of the model's training). Names and keywords are
    from Unicode CLDR; the rest is from emoji-data, with Noto's artwork.
    """
    import pyarrow.parquet as pq

    return pq.read_table(table_path())


def write_tars(folder: str, shards: int = 8) -> list[str]:
    """Write the table to `folder` as webdataset tars of consecutive rows; returns their paths.

    A sample has three members: `<key>.jpg`, the bytes in the table; `<key>.txt`, the
    caption in English and Chinese; `<key>.json`, with key, name_en, name_zh and category. Equal
    tables and numbers of shards give equal bytes.
    """
    if shards < 1:
        raise ValueError(f"shards must be at least 1, not {shards}")
    os.makedirs(folder, exist_ok=True)
    rows = load().select(["key", "image", "name_en", "name_zh", "category"]).to_pylist()
    paths = []
    for shard in range(shards):
        path = os.path.join(folder, f"{shard:05d}.tar")
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in rows[len(rows) * shard // shards : len(rows) * (shard + 1) // shards]:
                image = row.pop("image")
                text = caption(row["name_en"], row["name_zh"]).encode()
                record = json.dumps(row, ensure_ascii=False).encode()
                for suffix, content in (("jpg", image), ("txt", text), ("json", record)):
                    member = tarfile.TarInfo(f"{row['key']}.{suffix}")
                    member.size = len(content)
                    member.mode = 0o644
                    tar.addfile(member, io.BytesIO(content))
        paths.append(path)
    return paths
