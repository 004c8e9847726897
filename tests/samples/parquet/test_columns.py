"""Which columns a file has, by its schema."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from clip_batch.samples.parquet.columns import find_columns, image_columns, text_columns
from tests.parquets import IMAGE


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["jpg"], "jpg"),
        (["thumbnail"], "thumbnail"),
        (["mask", "image"], "image"),
        (["PNG", "mask"], "PNG"),
        (["jpg", "image"], "image"),
    ],
)
def test_the_column_of_images_by_name(names: list[str], expected: str) -> None:
    assert find_columns(pa.schema([(name, pa.binary()) for name in names])).image == expected


def test_a_struct_goes_before_bare_bytes() -> None:
    assert find_columns(pa.schema([("hash", pa.binary()), ("scan", IMAGE)])).image == "scan"


def test_why_there_is_no_column_of_images() -> None:
    assert "its columns are a, b" in find_columns(pa.schema([("a", pa.string()), ("b", pa.int64())])).problem
    assert "no column 'c'" in find_columns(pa.schema([("a", pa.binary())]), "c").problem
    assert find_columns(pa.schema([("a", pa.string())]), images=False).problem == ""


def test_captions_by_name() -> None:
    schema = pa.schema(
        [("url", pa.string()), ("text", pa.list_(pa.string())), ("caption", pa.string()), ("n", pa.int8())]
    )
    assert find_columns(schema).caption == "caption"
    assert find_columns(schema, caption_field="url").caption == "url"
    assert find_columns(schema, caption_field="other").caption is None
    assert find_columns(pa.schema([("caption", pa.int64()), ("text", pa.string())])).caption == "text"
    assert text_columns(schema) == ["url", "text", "caption"]


def test_what_datasets_says_of_its_columns() -> None:
    features = {
        "sounds": {"feature": {"_type": "Audio"}, "_type": "List"},
        "pages": [{"_type": "Image"}],
        "film": {"_type": "Video"},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    columns = {"sounds": pa.list_(IMAGE), "pages": pa.list_(IMAGE), "film": IMAGE, "other": pa.int64()}
    assert image_columns(pa.schema(columns, metadata)) == ["pages"]
    assert image_columns(pa.schema(columns, {"huggingface": "{"})) == ["sounds", "pages", "film"]
