"""Rows of Parquet files as samples: every row once, in order, whatever it holds and however the file is cut."""

from __future__ import annotations

import datetime
import decimal
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_batch.errors import InputError
from clip_batch.plan.cuts import parquet_cuts
from clip_batch.samples import read_slice
from clip_batch.samples.parquet.reader import read_image
from clip_batch.samples.texts import decode_texts
from clip_batch.types import Failure, PassedOver, Sample, Shard, Slice
from tests import corpus, parquets
from tests.corpus import jpeg


def read(path: str, piece: Slice | None = None, **options: Any) -> list[Sample | Failure | PassedOver]:
    return list(read_slice(piece or Slice(Shard(path)), corpus.plan_of("parquet", **options)))


def samples(path: str, **options: Any) -> list[Sample]:
    return [item for item in read(path, **options) if isinstance(item, Sample)]


def failures(path: str, **options: Any) -> list[Failure]:
    return [item for item in read(path, **options) if isinstance(item, Failure)]


def fields(sample: Sample) -> dict[str, Any]:
    return json.loads(sample.json or b"")  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [parquets.hugging_face, parquets.img2dataset])
def test_each_row_is_a_sample(tmp_path: Path, make: Any) -> None:
    found = samples(make(str(tmp_path / "a.parquet"), 25))
    assert [(one.key, one.offset, one.length) for one in found] == [(f"{row:09d}", row, None) for row in range(25)]
    assert [bytes(one.image or b"") for one in found] == [jpeg(row) for row in range(25)]
    assert [decode_texts(one).caption for one in found] == [f"picture {row}" for row in range(25)]
    assert [fields(one)["row_group"] for one in found] == [row // 10 for row in range(25)]
    assert fields(found[3]).keys() == (
        {"image.path", "label", "image_column", "row_group"}
        if make is parquets.hugging_face
        else {"url", "status", "width", "image_column", "row_group"}
    )


@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=6),
    st.lists(st.floats(0, 1), max_size=4),
    st.booleans(),
    st.sampled_from(["zstd", "none"]),
)
@settings(max_examples=40, deadline=None)
def test_slices_have_every_row_once_and_in_order(
    groups: list[int], places: list[float], by_samples: bool, compression: str
) -> None:
    """Whatever the row groups, empty ones among them, and wherever the planner wants to cut."""
    path = f"/dev/shm/clip-batch-test-{os.getpid()}.parquet"
    schema = pa.schema([("image", parquets.IMAGE), ("text", pa.string())])
    try:
        count = 0
        with pq.ParquetWriter(path, schema, compression=compression) as writer:
            for rows in groups:
                images = parquets.structs(
                    [b"\xff\xd8" + bytes([row % 256]) * (row % 5) for row in range(count, count + rows)]
                )
                texts = [f"{row}" for row in range(count, count + rows)]
                writer.write_table(pa.table({"image": images, "text": texts}, schema=schema))
                count += rows
        shard = Shard(path, os.path.getsize(path), None, count)
        ends = [place * (count if by_samples else shard.size or 0) for place in sorted(places)]
        cuts = sorted({cut for cut in parquet_cuts(shard, ends, by_samples, {}) if cut.at})
        starts, stops = [0, *(cut.at for cut in cuts)], [*(cut.at for cut in cuts), None]
        pieces = [Slice(shard, start, stop) for start, stop in zip(starts, stops, strict=True)]
        found = [[item for item in read(path, piece) if isinstance(item, Sample)] for piece in pieces]
        assert [one.caption for part in found for one in part] == [b"%d" % row for row in range(count)]
        assert [one.offset for part in found for one in part] == list(range(count))
        before = [0]
        for part in found:
            before.append(before[-1] + len(part))
        assert [cut.samples for cut in cuts] == before[1:-1]
    finally:
        os.remove(path)


BINARIES = {
    "binary": pa.binary(),
    "large": pa.large_binary(),
    "view": pa.binary_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.binary()),
}


FORMS = ("plain", "struct", "list", "list of structs")
COLUMNS = [(kind, form) for kind in BINARIES for form in FORMS if kind != "view" or form == "plain"]  # else not written


@pytest.mark.parametrize(("kind", "form"), COLUMNS)
def test_columns_of_images(tmp_path: Path, kind: str, form: str) -> None:
    images = [jpeg(row) for row in range(4)] + [None]
    values = pa.array(images, pa.binary())
    column = values.dictionary_encode() if kind == "dictionary" else values.cast(BINARIES[kind])
    if "struct" in form:
        column = pa.StructArray.from_arrays([column, pa.array(list("abcde"))], ["bytes", "path"])
    if "list" in form:
        column = pa.ListArray.from_arrays([0, 1, 2, 3, 4, 5], column)
    path = parquets.write(str(tmp_path / "a.parquet"), {"picture": column}, 2)
    items = read(path)
    assert [bytes(one.image or b"") for one in items if isinstance(one, Sample)] == images[:4]
    (failure,) = [one for one in items if isinstance(one, Failure)]
    assert (failure.key, failure.offset, failure.reason) == ("000000004", 4, "missing_image")


def test_of_several_images_the_first_is_embedded_and_the_others_are_counted(tmp_path: Path) -> None:
    rows = [[jpeg(0), jpeg(1), None], [], None, [None, jpeg(2)]]
    path = parquets.write(str(tmp_path / "a.parquet"), {"images": pa.array(rows, pa.list_(pa.binary()))})
    first, second, third, fourth, passed = read(path)
    assert isinstance(first, Sample) and first.image == jpeg(0)
    assert isinstance(fourth, Sample) and fourth.image == jpeg(2)
    assert isinstance(second, Failure) and isinstance(third, Failure)
    assert isinstance(passed, PassedOver) and passed.files == {"images": 1}


def test_which_column_has_the_images(tmp_path: Path) -> None:
    image, other = pa.array([jpeg(0)]), pa.array([jpeg(1)])
    path = parquets.write(str(tmp_path / "a.parquet"), {"mask": other, "image": image, "n": [1]})
    (sample, passed) = read(path)
    assert isinstance(sample, Sample) and sample.image == jpeg(0)
    assert passed == PassedOver(path, {"mask": 1})
    (sample, passed) = read(path, image_field="mask")
    assert isinstance(sample, Sample) and sample.image == jpeg(1)
    assert fields(sample)["image_column"] == "mask"
    (failure,) = failures(path, image_field="n")
    assert "has int64" in failure.message
    (failure,) = failures(parquets.write(str(tmp_path / "b.parquet"), {"before": other, "after": image}))
    assert failure.reason == "missing_image"
    assert "several columns with images' bytes (before, after): name one with --image-field" in failure.message
    structs = {"audio": parquets.structs([b"RIFF"]), "scan": parquets.structs([jpeg(0)])}
    path = parquets.write(str(tmp_path / "c.parquet"), structs, features={"audio": "Audio", "scan": "Image"})
    assert [one.image for one in samples(path)] == [jpeg(0)]


def test_a_column_twice(tmp_path: Path) -> None:
    table = pa.Table.from_arrays(
        [pa.array([jpeg(0)]), pa.array(["a"]), pa.array(["b"]), pa.array([1]), pa.array([2])],
        names=["jpg", "caption", "caption", "n", "n"],
    )
    path = str(tmp_path / "a.parquet")
    pq.write_table(table, path)
    (sample,) = samples(path)
    assert sample.image == jpeg(0)
    texts = decode_texts(sample)
    assert (texts.caption, texts.warnings) == ("a", ["repeated_field"])
    assert texts.fields["n"] == 2 and '"n": 1' in texts.fields["_raw"]


def test_values_of_all_types_reach_the_metadata(tmp_path: Path) -> None:
    time = datetime.datetime(2026, 1, 2, 3, 4, 5)
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\4\0\0\0"), pa.py_buffer(b"ca\xfft")])
    columns = {
        "jpg": [jpeg(0)],
        "nested": pa.array([{"a": [1, None], "when": time, "price": decimal.Decimal("1.5")}]),
        "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        "when": pa.array([1], pa.timestamp("ns")),
        "day": [datetime.date(2026, 1, 2)],
        "price": [decimal.Decimal("1.50")],
        "ratio": [float("nan")],
        "many": pa.array(["x"]).dictionary_encode(),
        "half": pa.array([0.5], pa.float16()) if hasattr(pa, "float16") else [0.5],
        "bad": bad,
        "big": pa.array([2**64 - 1], pa.uint64()),
        "nothing": pa.nulls(1),
    }
    (sample,) = samples(parquets.write(str(tmp_path / "a.parquet"), columns))
    values = decode_texts(sample).fields
    assert values["nested"] == {"a": [1, None], "when": str(time), "price": "1.5"}
    assert values["map"] == [["a", 1]]
    assert values["when"].startswith("1970-01-01 00:00:00.000000001")
    assert (values["day"], values["price"], values["ratio"], values["many"]) == ("2026-01-02", "1.50", None, "x")
    assert (values["bad"], values["big"], values["nothing"], values["half"]) == ("ca�t", 2**64 - 1, None, 0.5)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (["a", None, " "], ["a", None, None]),
        ([["", "b"], [], None], ["b", None, None]),
        ([7, None, 8], ["7", None, "8"]),
        ([{"en": "a"}, None, None], [None, None, None]),
        (pa.array(["a", "a", None]).dictionary_encode(), ["a", "a", None]),
        (pa.array(["a", "b", None], pa.large_string()), ["a", "b", None]),
    ],
)
def test_captions_of_every_type(tmp_path: Path, column: Any, expected: list[str | None]) -> None:
    path = parquets.write(str(tmp_path / "a.parquet"), {"jpg": [jpeg(0)] * 3, "alt": column})
    assert [decode_texts(one, "alt").caption for one in samples(path, caption_field="alt")] == expected


def test_images_that_are_none(tmp_path: Path) -> None:
    images = pa.array([None, {"bytes": None, "path": "/data/a.jpg"}, {"bytes": b"", "path": None}], parquets.IMAGE)
    null, path_only, empty = read(parquets.write(str(tmp_path / "a.parquet"), {"image": images}))
    assert isinstance(null, Failure) and (null.reason, null.message) == ("missing_image", "no image")
    assert isinstance(path_only, Failure) and "has the path '/data/a.jpg', but no bytes" in path_only.message
    assert isinstance(empty, Sample) and empty.image == b""  # decoding says what it is


def test_what_img2dataset_says_of_a_failed_download(tmp_path: Path) -> None:
    columns = {"jpg": [None, jpeg(0)], "error_message": ["HTTP Error 404: Not Found", None]}
    (failure,) = failures(parquets.write(str(tmp_path / "a.parquet"), columns))
    assert failure.message == "no image (HTTP Error 404: Not Found)"


def damaged(path: str) -> str:
    """Overwrite a page of the second of three row groups."""
    at = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"\xee" * 400)
    return path


def test_rows_of_a_damaged_row_group_are_listed_one_by_one(tmp_path: Path) -> None:
    path = damaged(parquets.hugging_face(str(tmp_path / "a.parquet"), 30))
    items = read(path)
    assert [item.offset for item in items if not isinstance(item, PassedOver)] == list(range(30))
    lost = [item for item in items if isinstance(item, Failure)]
    assert [(one.key, one.reason) for one in lost] == [(f"{row:09d}", "unreadable_row") for row in range(10, 20)]
    assert "row group 1 cannot be read" in lost[0].message


def test_mutated_files_raise_nothing(tmp_path: Path) -> None:
    """Every file is rows and failures, whatever bytes were changed; a footer that can be read accounts for each row."""
    whole = Path(parquets.img2dataset(str(tmp_path / "a.parquet"), 30)).read_bytes()
    random = Random(5)
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(random.randint(1, 6)):
            at = random.randrange(len(data) if random.random() < 0.4 else 2600)
            if random.random() < 0.8:
                data[-at - 1] ^= 1 << random.randrange(8)
            else:
                del data[at : at + random.randrange(1, 40)]
        (tmp_path / "a.parquet").write_bytes(data)
        items = [item for item in read(str(tmp_path / "a.parquet")) if not isinstance(item, PassedOver)]
        offsets = [item.offset for item in items]
        assert offsets == [None] or offsets == list(range(len(offsets)))


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    whole = Path(parquets.hugging_face(str(tmp_path / "a.parquet"), 30)).read_bytes()
    contents = {
        "empty_file": b"",
        "not_parquet": b"<html>404 not found</html>",
        "corrupt_parquet": whole[: len(whole) // 2],
    }
    for reason, content in contents.items():
        (tmp_path / "b.parquet").write_bytes(content)
        (failure,) = failures(str(tmp_path / "b.parquet"))
        assert (failure.key, failure.reason) == (None, reason)
    assert "breaks off at byte" in failure.message
    (tmp_path / "b.parquet").write_bytes(b"PARE" + whole[4:-4] + b"PARE")
    assert "encrypted" in failures(str(tmp_path / "b.parquet"))[0].message
    (tmp_path / "b.parquet").write_bytes(whole[:-60] + b"\xff" * 52 + whole[-8:])
    assert failures(str(tmp_path / "b.parquet"))[0].reason == "corrupt_parquet"
    empty = parquets.write(str(tmp_path / "c.parquet"), {"jpg": pa.array([], pa.binary())})
    assert [one.reason for one in failures(empty)] == ["empty_shard"]


def test_a_file_of_other_row_groups_than_planned_is_refused(tmp_path: Path) -> None:
    path = parquets.hugging_face(str(tmp_path / "a.parquet"), 30)
    shard = Shard(path, os.path.getsize(path))
    (cut,) = parquet_cuts(shard, [15], True, {})
    with pytest.raises(InputError, match="other row groups"):
        read(path, Slice(shard, cut.at + 1, cut.at + 2))
    parquets.hugging_face(path, 31)
    with pytest.raises(InputError, match="was planned with"):
        read(path, Slice(shard, cut.at, None))


def test_an_image_by_its_row(tmp_path: Path) -> None:
    path = parquets.img2dataset(str(tmp_path / "a.parquet"), 25)
    with open(path, "rb") as file:
        for row in (0, 9, 10, 24):
            assert read_image(file, row, "jpg") == jpeg(row)
            assert read_image(file, row, "jpg", f"{row:09d}") == jpeg(row)
        with pytest.raises(InputError, match="has the key '000000003', not 'other'"):
            read_image(file, 3, "jpg", "other")
        with pytest.raises(InputError, match="row 25"):
            read_image(file, 25, "jpg")


LARGE = """
import sys
from clip_batch.samples import read_slice
from clip_batch.types import Shard, Slice
from tests import corpus
def memory():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
count, most, before = 0, 0, memory()
for one in read_slice(Slice(Shard(sys.argv[1])), corpus.plan_of("parquet")):
    count, most = count + len(one.image), max(most, memory())
print(count, most - before)
"""


@pytest.mark.slow
def test_a_huge_row_group_is_not_in_memory(tmp_path: Path) -> None:
    path, size, count = str(tmp_path / "a.parquet"), 2**20, 320
    image = os.urandom(size)
    table = pa.table({"jpg": [image[row:] + image[:row] for row in range(count)]})
    pq.write_table(table, path, count, compression="none", use_dictionary=False, write_batch_size=4)
    assert pq.read_metadata(path).num_row_groups == 1
    done = subprocess.run([sys.executable, "-c", LARGE, path], capture_output=True, text=True, check=True)
    total, grown = map(int, done.stdout.split())
    assert total == count * size
    assert grown < 160 * 1024, f"{grown / 1024:.0f} MiB"
