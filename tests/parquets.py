"""Writes Parquet files for tests, in the forms of Hugging Face's `datasets` and of img2dataset."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.corpus import jpeg

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def structs(images: Sequence[bytes | None]) -> pa.Array:
    """A column of images as `datasets` has it."""
    rows = [None if image is None else {"bytes": image, "path": f"{at}.jpg"} for at, image in enumerate(images)]
    return pa.array(rows, IMAGE)


def write(
    path: str, columns: dict[str, Any], rows: int = 10, features: dict[str, str] | None = None, **options: Any
) -> str:
    """A file of these columns with row groups of so many rows, and with `datasets`'s metadata if there are features."""
    table = pa.table(columns)
    if features:
        info = {"info": {"features": {name: {"_type": kind} for name, kind in features.items()}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, path, row_group_size=rows, **options)
    return path


def hugging_face(path: str, count: int, seed: int = 0, rows: int = 10, side: int = 32) -> str:
    """`count` rows with an image, a text and a label, as `Dataset.to_parquet` writes them."""
    numbers = range(seed, seed + count)
    columns = {
        "image": structs([jpeg(number, side) for number in numbers]),
        "text": [f"picture {number}" for number in numbers],
        "label": [number % 3 for number in numbers],
    }
    return write(path, columns, rows, {"image": "Image", "text": "Value", "label": "ClassLabel"})


def img2dataset(path: str, count: int, seed: int = 0, rows: int = 10) -> str:
    """`count` rows as img2dataset's `--output_format parquet` writes them."""
    numbers = range(seed, seed + count)
    columns = {
        "key": [f"{number:09d}" for number in numbers],
        "jpg": [jpeg(number) for number in numbers],
        "url": [f"http://example.com/{number}.jpg" for number in numbers],
        "caption": [f"picture {number}" for number in numbers],
        "status": ["success"] * count,
        "width": [32] * count,
    }
    return write(path, columns, rows)
