"""The schema of JSON side-cars."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from clip_batch.plan.schema import Look, caption_advice, infer_fields, look_at_samples
from clip_batch.types import EncoderSpec, Plan, Shard

ENCODER = EncoderSpec("fake:8", "", "0" * 64)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2], "int64"),
        ([1, 2.5, None], "double"),
        ([2**63], "json"),
        ([2**63, 0.5], "json"),
        ([-(2**63)], "int64"),
        ([True, False], "bool"),
        ([True, 1], "json"),
        (["a", 1], "json"),
        (["a", None], "string"),
        ([None], "string"),
        ([[1]], "json"),
        ([{"a": 1}], "json"),
    ],
)
def test_kinds(values: list[Any], kind: str) -> None:
    assert infer_fields({"x": value} for value in values) == {"x": kind}


def test_taken_names_are_left_out_and_the_rest_is_sorted() -> None:
    record = dict.fromkeys(["url", "key", "caption", "extra", "row", "partition", "b", "", "\ud800", "shard"], 1)
    assert list(infer_fields([record]).items()) == [("b", "int64"), ("url", "int64")]


def test_of_very_many_fields_the_commonest_are_kept() -> None:
    records = [{"common": 1, f"f{number:04d}": 1} for number in range(1000)]
    fields = infer_fields(records)
    assert len(fields) == 256 and "common" in fields


def test_the_schema_is_sampled_over_all_shards_and_bad_ones_are_passed_over(tmp_path: Path) -> None:
    shards = []
    for number in range(3):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for sample, text in enumerate((json.dumps({f"f{number}": 1, "all": number / 2}), "broken", "[1]")):
                for name, body in ((f"{sample}.jpg", b"x"), (f"{sample}.json", text.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(body)
                    tar.addfile(member, io.BytesIO(body))
        shards.append(Shard(f"{tmp_path}/{number}.tar", (tmp_path / f"{number}.tar").stat().st_size))
    (tmp_path / "1.tar").write_bytes(b"<html>")
    look = look_at_samples([*shards, Shard(f"{tmp_path}/none.tar", 1)], Plan((), ENCODER), {})
    assert infer_fields(look.records) == {"all": "double", "f0": "int64", "f2": "int64"}
    assert sorted(first.shard for first in look.firsts) == [shards[0].url, shards[2].url]
    assert {(first.key, first.image) for first in look.firsts} == {("0", b"x")}


def test_a_plan_without_captions_is_told_of_a_field_that_may_have_them() -> None:
    records: list[dict[str, Any]] = [
        {"url": "a", "text": None},
        {"url": "b", "text": ["", "a cat"], "n": 1},
        {"text": " "},
    ]
    assert "--caption-field text takes it" in str(caption_advice(Look(4, 0, 0, records), ""))
    assert caption_advice(Look(4, 1, 0, records), "") is None
    assert caption_advice(Look(4, 0, 0, [{"text": " "}, {"text": {"en": "a cat"}}]), "") is None
    assert caption_advice(Look(4, 4, 0, records), "text") is None
    assert caption_advice(Look(4, 4, 1, records), "txet") is None
    assert "'txet'; their fields with text are: url, text" in str(caption_advice(Look(4, 4, 0, records), "txet"))
    assert caption_advice(Look(0, 0, 0, []), "text") is None
