"""The names of files in INDEX, which other tools rely on."""

from __future__ import annotations

from clip_batch.index import paths
from clip_batch.index.paths import TemplatePaths, VersionPaths


def test_the_names_on_disk() -> None:
    version = VersionPaths("3f2a9c0d1e5b")
    template = version.template("ab12")
    assert [
        paths.CURRENT,
        paths.removal_list("0123456789abcdef"),
        version.manifest,
        version.index("image", "0000"),
        version.vectors("text", "0001"),
        version.metadata("0000"),
        version.truth("0000"),
        version.joined("image"),
        version.removed_ids("0123456789abcdef"),
        version.template_record,
        version.shard_record("0000"),
        version.attempt("0000", "ab12"),
        template.folder,
        template.queries,
        template.centroids,
        template.dropped,
        template.duplicates,
        template.index("text"),
    ] == [
        "CURRENT",
        "tombstones/0123456789abcdef.json",
        "3f2a9c0d1e5b/manifest.json",
        "3f2a9c0d1e5b/image/0000.index",
        "3f2a9c0d1e5b/text/0001.npy",
        "3f2a9c0d1e5b/metadata/0000.arrow",
        "3f2a9c0d1e5b/truth/0000.npz",
        "3f2a9c0d1e5b/image/all.index",
        "3f2a9c0d1e5b/tombstones/0123456789abcdef.npy",
        "3f2a9c0d1e5b/template/record.json",
        "3f2a9c0d1e5b/shards/0000.json",
        "3f2a9c0d1e5b/attempts/0000-ab12",
        "3f2a9c0d1e5b/template/ab12",
        "3f2a9c0d1e5b/template/ab12/queries.npz",
        "3f2a9c0d1e5b/template/ab12/centroids.npy",
        "3f2a9c0d1e5b/template/ab12/dropped.npy",
        "3f2a9c0d1e5b/template/ab12/duplicates.parquet",
        "3f2a9c0d1e5b/template/ab12/text.index",
    ]


def test_without_a_folder_names_are_relative() -> None:
    assert VersionPaths().metadata("0000") == "metadata/0000.arrow"
    assert TemplatePaths().queries == "queries.npz"
    assert VersionPaths("3f2a9c0d1e5b").file(VersionPaths().index("image", "0000")) == "3f2a9c0d1e5b/image/0000.index"


def test_other_names_are_told_apart() -> None:
    assert paths.parse_removal_list("0123456789abcdef.json") == "0123456789abcdef"
    others = (".0123456789abcdef.json", "0123456789abcde.json", "0123456789abcdef.json.part", "0123456789ABCDEF.json")
    assert not any(map(paths.parse_removal_list, others))
    assert paths.is_version("3f2a9c0d1e5b")
    assert not any(map(paths.is_version, ("CURRENT", "tombstones", "3f2a9c0d1e5", "3f2a9c0d1e5b0", "3F2A9C0D1E5B")))
