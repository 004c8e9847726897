"""SPECs to shards: braces, globs, lists, folders, side-cars, schema."""

from __future__ import annotations

import io
import itertools
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_batch.errors import ConfigError, InputError
from clip_batch.plan.counts import count_folder, count_tars
from clip_batch.plan.schema import infer_fields, sample_fields
from clip_batch.plan.specs import expand_braces, expand_inputs, unpiped
from clip_batch.types import EncoderSpec, Plan, Shard

ENCODER = EncoderSpec("fake:8", "", "0" * 64)

# A pattern as a tree, and beside it what it means, by plain rules: a literal is itself, an
# alternation is the union of its branches, a range its numbers, a sequence the product of its parts.
Pattern = tuple[str, list[str]]


def _range(bounds: tuple[int, int, int]) -> Pattern:
    first, count, width = bounds
    numbers = [str(number).zfill(width) for number in range(first, first + count)]
    return f"{{{str(first).zfill(width)}..{str(first + count - 1).zfill(width)}}}", numbers


def _alternation(branches: list[Pattern]) -> Pattern:
    return "{" + ",".join(text for text, _ in branches) + "}", [name for _, names in branches for name in names]


def _sequence(parts: list[Pattern]) -> Pattern:
    return "".join(text for text, _ in parts), ["".join(names) for names in itertools.product(*(n for _, n in parts))]


literals = st.text("ab/.-", max_size=3).map(lambda text: (text, [text]))
# Numbers below 1000 in at least 4 digits, or none padded: so that the bounds alone say the width.
ranges = st.tuples(st.integers(0, 900), st.integers(1, 4), st.sampled_from([0, 4, 5])).map(_range)
patterns = st.recursive(
    st.one_of(literals, ranges),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(_alternation), st.lists(inner, max_size=3).map(_sequence)
    ),
    max_leaves=8,
)


@given(patterns)
def test_braces_equal_the_product_of_their_parts(pattern: Pattern) -> None:
    text, names = pattern
    assert expand_braces(text) == names


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{1..010}", [f"{n:03d}" for n in range(1, 11)]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..8..4}", ["0", "4", "8"]),
        ("a{b}c", ["a{b}c"]),
        ("a{b{1,2}}", ["a{b1}", "a{b2}"]),
        ("{a,{b,c}", ["{a,b", "{a,c"]),
        ("{}", ["{}"]),
        ("x}{", ["x}{"]),
        ("{a,}", ["a", ""]),
    ],
)
def test_braces_as_bash_has_them(pattern: str, names: list[str]) -> None:
    assert expand_braces(pattern) == names


def test_a_range_that_cannot_be_meant_is_refused() -> None:
    with pytest.raises(InputError, match="mend the range"):
        expand_braces("{0..99999999999}")


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
        shards = expand_inputs([f"memory:/{folder}/{spec}"])
        assert [shard.url for shard in shards] == [f"memory:/{folder}/{name}" for name in expected]
    else:
        shards = expand_inputs([f"{folder}/{spec}"])
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
    (before,) = expand_inputs([f"{folder}/00.tar"])
    os.utime(folder / "00.tar", ns=(1, 1))
    (after,) = expand_inputs([f"{folder}/00.tar"])
    assert (before.size, before.etag) != (after.size, after.etag) == (1, "1")


def test_a_name_with_glob_characters_that_exists_is_itself(tmp_path: Path) -> None:
    (tmp_path / "a[1].tar").touch()
    assert names(expand_inputs([f"{tmp_path}/a[1].tar"]), tmp_path) == ["a[1].tar"]


@pytest.mark.parametrize("at", ["@{}/inputs.csv", "{}/inputs.txt", "@{}/inputs.list"])
def test_lists(folder: Path, at: str) -> None:
    spec = at.format(folder)
    Path(spec.removeprefix("@")).write_text(f"# the second first\n\n {folder}/01.tar \n{folder}/sub/*.gz\n")
    assert names(expand_inputs([spec, f"{folder}/00.tar"]), folder) == ["01.tar", "sub/02.tar.gz", "00.tar"]


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
        (["{}/none"], "none; mend"),
        (["{}/empty"], "empty holds no tar"),
        (["{}/00.tar", "{}/*.tar"], "more than once: .*00.tar;"),
        (["pipe:cat x"], "pipe:cat x is not run: no other command has a size"),
        (["pipe:aws s3 cp --region eu-1 s3://b/x.tar -"], "belongs in --storage-options"),
        (["pipe:aws s3 cp s3://b/x.tar y.tar"], "of aws only"),
        (["pipe:aws s3 cp s3://b/x.tar - | gunzip"], "of aws only"),
        (["pipe:hdfs dfs -cat /a.tar"], "with one URL"),
        (["pipe:hadoop fs -cat hdfs://a/1.tar hdfs://a/2.tar"], "with one URL"),
        (["pipe:aws s3 cp 's3://b/x.tar -"], "No closing quotation; name files"),
        (["@{}/none.txt"], "none.txt cannot be read"),
        (["{}/empty.list"], "names no input"),
        (["nosuchscheme://x/y.tar"], "nosuchscheme"),
        (["memory://none/{{0..1}}.tar"], "2 of 2 inputs missing: memory://none/0.tar"),
    ],
)
def test_what_matches_nothing_is_refused_by_name(folder: Path, specs: list[str], says: str) -> None:
    (folder / "empty").mkdir()
    (folder / "empty.list").write_text("# nothing\n")
    with pytest.raises(InputError, match=says) as caught:
        expand_inputs([spec.format(folder) for spec in specs])
    assert "\n" not in str(caught.value)


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
    for name in ("b.jpg", "a.png", "a.txt"):
        (folder / "sub" / name).touch()
    (found,) = expand_inputs([f"{folder}/su*"], "files")
    assert (names([found], folder), found.size, found.samples) == (["sub"], None, None)
    counted = count_folder(found, ["jpg", "png"], ["txt"], {})
    assert counted.samples == 2
    (folder / "sub" / "b.jpg").rename(folder / "sub" / "c.jpg")
    assert count_folder(found, ["jpg", "png"], ["txt"], {}).etag != counted.etag
    with pytest.raises(InputError, match="is a file"):
        expand_inputs([f"{folder}/00.tar"], "files")
    with pytest.raises(InputError, match="no sample"):
        count_folder(found, ["gif"], ["caption"], {})


def test_counts_come_from_side_cars_else_from_a_scan(tmp_path: Path) -> None:
    (tmp_path / "a_stats.json").write_text('{"count": 9, "successes": 7}')
    (tmp_path / "a.parquet").write_bytes(b"not looked at")
    statuses = pa.table({"status": ["success", "failed_to_download", "success"], "key": ["0", "1", "2"]})
    pq.write_table(statuses, tmp_path / "b.parquet")
    pq.write_table(statuses.drop(["status"]), tmp_path / "c.parquet")
    (tmp_path / "d_stats.json").write_text("no JSON")
    (tmp_path / "e.parquet").write_text("no Parquet")
    tars = [Shard(f"{tmp_path}/{name}") for name in ("a.tar", "b.tar.gz", "c.tgz", "d.tar", "e.tar", "f.tar")]
    assert [tar.samples for tar in count_tars(tars, {}, lambda tar: None)] == [7, 2, 3, None, None, None]
    assert [tar.samples for tar in count_tars(tars, {}, lambda tar: 5)] == [7, 2, 3, 5, 5, 5]


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
    fields = sample_fields([*shards, Shard(f"{tmp_path}/none.tar", 1)], Plan((), ENCODER), {})
    assert fields == {"all": "double", "f0": "int64", "f2": "int64"}
