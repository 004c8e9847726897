"""SPECs to shards: globs, lists, folders, commands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fsspec
import pytest

from clip_batch.errors import ConfigError, InputError
from clip_batch.plan.specs import expand_inputs, unpiped
from clip_batch.types import Shard
from tests import corpus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four tars of 1 to 4 bytes in three folders, and what must not be taken for one."""
    for size, name in enumerate(["00.tar", "01.tar", "sub/02.tar.gz", "sub/deep/03.tgz"], 1):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    for name in ("00_stats.json", "00.parquet", "notes.md", ".04.tar"):
        (tmp_path / name).write_bytes(b"{}")
    return tmp_path


def names(shards: list[Shard], folder: Path) -> list[str]:
    return [os.path.relpath(shard.url, folder) for shard in shards]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("01.tar", ["01.tar"]),
        ("{01,00}.tar", ["01.tar", "00.tar"]),
        ("*.tar", ["00.tar", "01.tar"]),
        ("0[1-9].tar", ["01.tar"]),
        ("0?.tar", ["00.tar", "01.tar"]),
        ("0*", ["00.tar", "01.tar"]),
        ("**/*.t*gz", ["sub/02.tar.gz", "sub/deep/03.tgz"]),
        ("{sub/*.gz,*.tar}", ["sub/02.tar.gz", "00.tar", "01.tar"]),
        ("", ["00.tar", "01.tar", "sub/02.tar.gz", "sub/deep/03.tgz"]),
        ("sub", ["sub/02.tar.gz", "sub/deep/03.tgz"]),
    ],
)
@pytest.mark.parametrize("remote", [False, True])
def test_specs(folder: Path, spec: str, expected: list[str], remote: bool, memory: Any) -> None:
    if remote:
        memory.put(f"{folder}/", f"{folder}/", recursive=True)
        shards = expand_inputs([f"memory:/{folder}/{spec}"]).shards
        assert [shard.url for shard in shards] == [f"memory:/{folder}/{name}" for name in expected]
    else:
        shards = expand_inputs([f"{folder}/{spec}"]).shards
        assert names(shards, folder) == expected
    assert [shard.size for shard in shards] == [(folder / name).stat().st_size for name in expected]
    assert all(shard.etag for shard in shards)


@pytest.fixture
def memory() -> Any:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def test_the_etag_follows_the_modification_time(folder: Path) -> None:
    (before,) = expand_inputs([f"{folder}/00.tar"]).shards
    os.utime(folder / "00.tar", ns=(1, 1))
    (after,) = expand_inputs([f"{folder}/00.tar"]).shards
    assert (before.size, before.etag) != (after.size, after.etag) == (1, "1")


def test_a_name_with_glob_characters_that_exists_is_itself(tmp_path: Path) -> None:
    (tmp_path / "a[1].tar").touch()
    assert names(expand_inputs([f"{tmp_path}/a[1].tar"]).shards, tmp_path) == ["a[1].tar"]


@pytest.mark.parametrize("at", ["@{}/inputs.csv", "{}/inputs.txt", "@{}/inputs.list"])
def test_lists(folder: Path, at: str) -> None:
    spec = at.format(folder)
    Path(spec.removeprefix("@")).write_text(f"# the second first\n\n {folder}/01.tar \n{folder}/sub/*.gz\n")
    assert names(expand_inputs([spec, f"{folder}/00.tar"]).shards, folder) == ["01.tar", "sub/02.tar.gz", "00.tar"]


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_of_other_systems(folder: Path, coding: str, end: str) -> None:
    (folder / "猫.tar").write_bytes(b"x")
    text = end.join([f"{folder}/猫.tar", "", f"{folder}/01.tar"])
    (folder / "list.txt").write_bytes(text.encode(coding))
    assert names(expand_inputs([f"@{folder}/list.txt"]).shards, folder) == ["猫.tar", "01.tar"]


def test_a_list_may_hold_names_that_are_not_utf8(folder: Path) -> None:
    name = os.fsencode(folder) + b"/caf\xe9.tar"
    Path(os.fsdecode(name)).write_bytes(b"x")
    (folder / "list.txt").write_bytes(name + b"\n")
    assert [os.fsencode(shard.url) for shard in expand_inputs([f"@{folder}/list.txt"]).shards] == [name]


def test_missing_members_of_a_pattern_are_all_named(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        expand_inputs([f"{folder}/{{00..08}}.tar"])
    text = str(caught.value)
    assert "7 of 9 inputs missing" in text and "and 2 more" in text and "\n" not in text
    assert [f"{number:02d}.tar" in text for number in range(9)] == [False] * 2 + [True] * 5 + [False] * 2


@pytest.mark.parametrize(
    ("specs", "says"),
    [
        (["{}/none*.tar"], "none\\*.tar matches no file"),
        (["{}/{{sub,none}}/*.gz"], "none/\\*.gz matches no file"),
        (["{}/none"], "none; correct"),
        (["{}/empty"], "empty holds no pictures, tars or Parquet files"),
        (["@{}/none.txt"], "none.txt cannot be read"),
        (["{}/empty.list"], "names no input"),
        (["{}/half.list"], "half.list cannot be read: .*utf-16"),
        (["nosuchscheme://x/y.tar"], "nosuchscheme"),
        (["memory://none/{{0..1}}.tar"], "2 of 2 inputs missing: memory://none/0.tar"),
    ],
)
def test_what_matches_nothing_is_refused_by_name(folder: Path, specs: list[str], says: str) -> None:
    (folder / "empty").mkdir()
    (folder / "empty.list").write_text("# nothing\n")
    (folder / "half.list").write_bytes("a.tar".encode("utf-16") + b"!")
    with pytest.raises(InputError, match=says) as caught:
        expand_inputs([spec.format(folder) for spec in specs])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("specs", "says"),
    [
        (["{}/00.tar", "{}/*.tar"], "more than once: .*00.tar;"),
        (["pipe:cat x"], "pipe:cat x is not run: no other command has a size"),
        (["pipe:aws s3 cp --region eu-1 s3://b/x.tar -"], "belongs in --storage-options"),
        (["pipe:aws s3 cp s3://b/x.tar y.tar"], "of aws only"),
        (["pipe:aws s3 cp s3://b/x.tar - | gunzip"], "of aws only"),
        (["pipe:hdfs dfs -cat /a.tar"], "with one URL"),
        (["pipe:hadoop fs -cat hdfs://a/1.tar hdfs://a/2.tar"], "with one URL"),
        (["pipe:aws s3 cp 's3://b/x.tar -"], "No closing quotation; name files"),
    ],
)
def test_a_spec_that_cannot_be_meant_is_a_usage_error(folder: Path, specs: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        expand_inputs([spec.format(folder) for spec in specs])
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("spec", "url"),
    [
        ("pipe:aws s3 cp --quiet s3://b/{000..999}.tar -", "s3://b/{000..999}.tar"),
        ("pipe:aws s3 cp 's3://b/a b.tar' -", "s3://b/a b.tar"),
        ("pipe: aws s3 cp s3://b/x.tar - --only-show-errors", "s3://b/x.tar"),
        ("pipe:hdfs dfs -cat hdfs://node:9000/{a,b}.tar", "hdfs://node:9000/{a,b}.tar"),
        ("pipe:hadoop fs -cat hdfs://node/x.tar", "hdfs://node/x.tar"),
        ("s3://b/x.tar", "s3://b/x.tar"),
    ],
)
def test_commands_that_copy_a_url_stand_for_it(spec: str, url: str) -> None:
    assert unpiped(spec) == url


def test_no_spec_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="--input"):
        expand_inputs([])


def test_folders_of_files(folder: Path) -> None:
    (shard,) = expand_inputs([f"{folder}/su*"], "files").shards
    assert (names([shard], folder), shard.size, shard.samples) == (["sub"], None, None)
    with pytest.raises(ConfigError, match="is a file"):
        expand_inputs([f"{folder}/00.tar"], "files")


@pytest.mark.parametrize("name", ["{0..3}", "{a,b}", "a[1]", "b*c", "h#1"])
def test_what_exists_is_no_pattern(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    tar = corpus.good_tar(str(tmp_path / name / "0.tar"), 1)
    assert [shard.url for shard in expand_inputs([str(tmp_path / name)]).shards] == [tar]


def test_a_folder_in_another_one_is_named_twice(tmp_path: Path) -> None:
    for name in ("pics/a/b", "pics-2", "pics/c"):
        (tmp_path / name).mkdir(parents=True)
    apart = [f"{tmp_path}/{name}" for name in ("pics/a", "pics-2", "pics/c")]
    assert len(expand_inputs(apart, "files").shards) == 3
    with pytest.raises(ConfigError, match=r"named twice.*: \S+/pics/a, \S+/pics/c; name only those"):
        expand_inputs([*apart, f"{tmp_path}/pics"], "files")
