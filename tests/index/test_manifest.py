"""The manifest as JSON, and as a person sees it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clip_batch.errors import CorruptError
from clip_batch.index.kept import parse_record
from clip_batch.index.manifest import IndexShard, Manifest, MergedOutput, load_manifest
from clip_batch.storage.store import Store
from clip_batch.types import EncoderSpec

ENCODER = EncoderSpec("ViT-B-32", "openai", "0" * 64)
SHARDS = tuple(
    IndexShard(f"{number:04d}", 500, 500 * number, {f"image/{number:04d}.index": {"bytes": 10, "sha256": "ab"}})
    for number in range(100)
)
MANIFEST = Manifest(
    version="3f2a9c0d1e5b",
    created=1.5,
    dim=512,
    rows=50_000,
    encoder=ENCODER,
    plan="f" * 64,
    key={"image": "IVF512,SQ8", "text": "Flat"},
    effort={"image": 16, "text": None},
    recall={"image": {"text": {"1": 0.9, "10": 0.95, "100": 0.97, "queries": 1000.0}}},
    recall_target=0.95,
    missing=(3,),
    allow_partial=True,
    shards=SHARDS,
    sources=(MergedOutput("out", "f" * 64, "0123456789ab", 50_000, (3,)),),
    duplicates={"rows": 2, "threshold": 0.97, "file": "3f2a9c0d1e5b/template/ab12/duplicates.parquet"},
)


def test_the_repr_is_short() -> None:
    expected = "<Manifest 3f2a9c0d1e5b: 50,000 rows of 512 in 100 shards, image IVF512,SQ8, text Flat>"
    assert repr(MANIFEST) == expected


def test_json_keeps_everything() -> None:
    text = MANIFEST.to_json()
    assert Manifest.from_json(text) == MANIFEST
    data = json.loads(text)
    assert data["recall"]["image"]["text"] == {"1": 0.9, "10": 0.95, "100": 0.97, "queries": 1000.0}
    assert data["shards"][1]["files"] == {"image/0001.index": {"bytes": 10, "sha256": "ab"}}
    assert data["duplicates"] == {
        "rows": 2,
        "threshold": 0.97,
        "file": "3f2a9c0d1e5b/template/ab12/duplicates.parquet",
    }


def test_a_manifest_of_format_1_is_read() -> None:
    data = json.loads(MANIFEST.to_json())
    for name in ("sources", "rerank", "single", "base", "template", "drift", "duplicates"):
        del data[name]
    for shard in data["shards"]:
        del shard["version"], shard["source"]
    old = Manifest.from_json(json.dumps({**data, "format": 1}))
    assert old.shards == SHARDS
    assert (old.sources, old.rerank, old.base, old.duplicates) == ((), 0, "", {})
    with pytest.raises(ValueError, match="format 3"):
        Manifest.from_json(json.dumps({**data, "format": 3}))


def test_files_lie_in_the_version_that_built_them() -> None:
    older = IndexShard(
        "0100", 10, 50_000, {"metadata/0100.arrow": {"bytes": 5, "sha256": "cd"}}, version="0123456789ab"
    )
    manifest = Manifest(**{**vars(MANIFEST), "shards": (SHARDS[0], older)})
    assert list(manifest.files) == ["3f2a9c0d1e5b/image/0000.index", "0123456789ab/metadata/0100.arrow"]
    assert manifest.size == 15


HARMFUL = ("../a", "a/../../b", "/etc/passwd", "", ".", "a//b", "a/", "a\\b", "s3://a/b", "a\0b", ".hidden")


def test_names_that_lead_out_of_their_folder_are_refused() -> None:
    files = {"bytes": 1, "sha256": ""}
    for name in HARMFUL:
        for change in (
            {"version": name},
            {"base": name or "x"},
            {"template": name or "x"},
            {"shards": [{**json.loads(MANIFEST.to_json())["shards"][0], "name": name}]},
            {"shards": [{**json.loads(MANIFEST.to_json())["shards"][0], "version": name or "x"}]},
            {"shards": [{**json.loads(MANIFEST.to_json())["shards"][0], "files": {name: files}}]},
            {"single": {"image": {name: files}}},
            {"predicted": {"image": {"text": {"file": {name: files}}}}},
            {"duplicates": {"file": name}},
        ):
            text = json.dumps({**json.loads(MANIFEST.to_json()), **change})
            with pytest.raises((ValueError, TypeError)):
                Manifest.from_json(text)


def test_a_manifest_of_another_version_is_not_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.replace("0123456789ab/manifest.json", MANIFEST.to_json().encode())
    with pytest.raises(CorruptError, match=r"is not a manifest \(it is that of version 3f2a9c0d1e5b\)"):
        load_manifest(store, "0123456789ab")


def test_a_record_of_a_merge_task_names_files_of_its_folder_alone() -> None:
    good = {"attempt": "ab12", "files": {"image/0000.index": {"bytes": 1, "sha256": ""}}, "template": "3f/template/a"}
    assert parse_record(json.dumps(good).encode(), "no") == good
    for name in HARMFUL:
        for change in (
            {"attempt": name},
            {"files": {name: {}}},
            {"template": name or "/"},
            {"reference": name or ".."},
        ):
            with pytest.raises(CorruptError, match="no"):
                parse_record(json.dumps({**good, **change}).encode(), "no")
    for data in (b"", b"[]", b"{}", b'{"attempt": "a"}', b'{"attempt": "a", "files": []}'):
        with pytest.raises(CorruptError, match="no"):
            parse_record(data, "no")
