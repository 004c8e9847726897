"""The tar reader: one rule for each thing that may be wrong, and equality with tarfile and webdataset."""

from __future__ import annotations

import bz2
import dataclasses
import gc
import gzip
import io
import json
import lzma
import os
import random
import subprocess
import tarfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_batch.errors import InputError
from clip_batch.samples import read_slice
from clip_batch.samples.tar import mapping
from clip_batch.samples.tar.cuts import cuts
from clip_batch.samples.tar.headers import Damage, Link, Member, member_runs, members
from clip_batch.samples.tar.links import find_targets
from clip_batch.samples.tar.samples import NameRule
from clip_batch.storage.names import text_name
from clip_batch.types import Failure, Sample, Shard, Slice
from tests import corpus

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def summary(items: list[Sample | Failure]) -> list[tuple[Any, ...]]:
    return [
        (i.key, i.offset, bytes(i.image or b""), i.caption, i.json)
        if isinstance(i, Sample)
        else (i.key, i.offset, i.reason)
        for i in items
    ]


def bodies(path: str, **options: Any) -> list[tuple[Any, ...]]:
    """(key, image, caption) of each sample, the reason in the image's place where it failed."""
    return [
        (item.key, bytes(item.image or b""), item.caption)
        if isinstance(item, Sample)
        else (item.key, item.reason, None)
        for item in corpus.read(path, **options)
    ]


@pytest.fixture
def tar(tmp_path: Path) -> str:
    return str(tmp_path / "a.tar")


# A path component of any length, so that long-name headers occur; few letters, so that keys repeat.
part = st.text("ab", min_size=1, max_size=2) | st.text("xyzé漢", min_size=30, max_size=99)
name = st.builds(
    lambda folders, stem, extension: "/".join([*folders, stem]) + extension,
    st.lists(part, max_size=2),
    part,
    st.sampled_from([".jpg", ".txt", ".json", ".JPG", ".cls", ".b.jpg", ".png", ""]),
)
kinds = st.sampled_from([*"fffffdl", "h0", "h1", "s0", "s1", "s5"])
entries = st.lists(st.tuples(name, st.integers(0, 1100), kinds), max_size=14)
"""Name, size and kind of members: file, directory, a link that leads nowhere, a hard or soft link to another's name."""


tars = st.lists(st.tuples(entries, st.sampled_from(sorted(FORMATS)), st.integers(2, 20)), min_size=1, max_size=3)
"""Tars to be joined, each with its members, its format, and the number of zero blocks that end it."""


def join(archives: list[tuple[list[tuple[str, int, str]], str, int]]) -> bytes:
    return b"".join(build(items, FORMATS[format], False) + bytes(512 * zeros) for items, format, zeros in archives)


def build(items: list[tuple[str, int, str]], format: int, ends: bool = True) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, pax_headers={"comment": "global"}) as archive:
        for number, (path, size, kind) in enumerate(items):
            info = tarfile.TarInfo(path)
            types = {"f": tarfile.REGTYPE, "d": tarfile.DIRTYPE, "h": tarfile.LNKTYPE}
            info.type = types.get(kind[0], tarfile.SYMTYPE)
            info.linkname = "elsewhere/" * 20 if kind == "l" and format != tarfile.USTAR_FORMAT else ""
            if kind[1:]:
                target = items[int(kind[1:]) % len(items)][0]
                info.linkname = target if kind[0] == "h" else os.path.relpath(target, os.path.dirname(path) or ".")
            info.size = size if kind == "f" else 0
            try:
                archive.addfile(info, io.BytesIO(bytes([number + 1]) * size))
            except ValueError:  # ustar cannot hold this name
                assert format == tarfile.USTAR_FORMAT
        end = archive.offset
    return buffer.getvalue() if ends else buffer.getvalue()[:end]


@settings(max_examples=150)
@given(entries, st.sampled_from(sorted(FORMATS)), st.booleans())
def test_members_are_those_of_tarfile(items: list[tuple[str, int, str]], format: str, ends: bool) -> None:
    data = build(items, FORMATS[format], ends)
    if not data or not items:  # tarfile refuses a file of no member and no end
        return
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = [Member(m.name, m.offset_data, m.size, m.offset) for m in archive if m.isreg()]
    found = [item for item in members(data) if isinstance(item, Member)]
    if expected and format == "pax":  # tarfile counts the global header to the first member
        assert found[0][:3] == expected.pop(0)[:3]  # type: ignore[index]
        del found[0]
    assert found == expected


def content_of(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    """What the standard library reads for a link; None if it leads nowhere."""
    try:
        file = archive.extractfile(member)
    except (KeyError, RecursionError):
        return None
    return file.read() if file else None


@settings(max_examples=50)
@given(entries, st.sampled_from(sorted(FORMATS)))
def test_links_lead_where_tarfile_finds(items: list[tuple[str, int, str]], format: str) -> None:
    data = build([item for item in items if item[2] != "d"], FORMATS[format])
    found = [item for item in members(data) if isinstance(item, Link)]
    if not found:  # tarfile refuses a file of no member
        return
    targets = find_targets(member_runs(data), found)
    ours = [data[t.offset : t.offset + t.size] if (t := targets.get(link.header)) else None for link in found]
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        links = [member for member in archive if member.issym() or member.islnk()]
        assert [link.name for link in found] == [member.name for member in links]
        assert ours == [content_of(archive, member) for member in links]


@settings(max_examples=80)
@given(tars, st.booleans())
def test_every_picture_is_a_row_a_failure_or_passed_over(
    tmp_path_factory: pytest.TempPathFactory,
    archives: list[tuple[list[tuple[str, int, str]], str, int]],
    last_dot: bool,
) -> None:
    path = str(tmp_path_factory.mktemp("sum") / "a.tar")
    Path(path).write_bytes(data := join(archives))
    options = {"key_ends": "last-dot"} if last_dot else {}
    for start, stop in pairwise([0, *(place for place, _ in cuts(path, NameRule(last_dot=last_dot))[1:-1]), len(data)]):
        found, passed = corpus.read(path, start, stop, **options), corpus.passed_over(path, start, stop, **options)
        names = [item.name for item in members(data, start, stop) if isinstance(item, (Member, Link))]
        pictures = sum(name.lower().endswith((".jpg", ".png")) for name in names)
        absent = sum(isinstance(item, Failure) and item.reason in ("missing_image", "empty_shard") for item in found)
        assert pictures == len(found) - absent + passed.get("jpg", 0) + passed.get("png", 0)
        reasons = {item.reason for item in found if isinstance(item, Failure)}
        assert not last_dot or "dotted_name" not in reasons


@settings(max_examples=100)
@given(tars)
def test_any_cut_gives_the_samples_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, archives: list[tuple[list[tuple[str, int, str]], str, int]]
) -> None:
    path = str(tmp_path_factory.mktemp("cut") / "a.tar")
    Path(path).write_bytes(join(archives))
    whole = [item for item in summary(corpus.read(path)) if item[-1] != "empty_shard"]
    places = cuts(path)
    assert places[0] == (0, 0)
    assert places[-1][1] == len(whole)
    assert places == sorted(places)
    for position, before in places:
        left = corpus.read(path, 0, position) if position else []
        assert len(summary(left)) == before
        assert summary(left) + [i for i in summary(corpus.read(path, position)) if i[-1] != "empty_shard"] == whole


def test_a_cut_is_wherever_no_sample_is_open(tar: str) -> None:
    files = [(f"{key}.{extension}", b"x") for key in "abc" for extension in ("jpg", "txt")]
    corpus.write_tar(tar, [*files[:4], ("a.json", b"{}"), *files[4:]])
    assert cuts(tar) == [(0, 0), (5 * 1024, 2), (7 * 1024, 3)]
    assert cuts(Path(tar).read_bytes()) == cuts(tar)


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_grouping_is_that_of_webdataset(tar: str, format: str) -> None:
    import webdataset

    names = [f"{folder}{i:03d}" for folder in ("", "./", "deep/er.x/", "deep/" * 30) for i in range(4)]
    extra = [("no_extension", b"-"), ("._000.jpg", b"-")]
    files = [(f"{n}.{e}", f"{n}{e}".encode()) for n in names for e in ("JPG", "txt", "cls", "seg.png")]
    corpus.write_tar(tar, [*files, *extra], FORMATS[format])
    with open(tar, "rb") as file:
        stream = webdataset.tariterators.tar_file_expander([{"url": "a", "stream": file}])
        groups = list(webdataset.tariterators.group_by_keys(stream))
    assert bodies(tar) == [(group["__key__"], group["jpg"], group["txt"]) for group in groups]
    assert len(groups) == 16


def test_offsets_locate_the_image_in_the_tar(tar: str) -> None:
    corpus.good_tar(tar, 5)
    raw = Path(tar).read_bytes()
    found = corpus.read(tar)
    assert [item.key for item in found] == corpus.tar_keys(tar)
    for number, item in enumerate(found):
        assert isinstance(item, Sample)
        assert item.offset is not None
        assert item.length is not None
        assert raw[item.offset : item.offset + item.length] == corpus.jpeg(number)


def test_views_outlive_the_reader(tar: str) -> None:
    corpus.good_tar(tar, 3)
    held = [item.image for item in corpus.samples(tar)]
    gc.collect()
    os.unlink(tar)
    assert [bytes(image or b"") for image in held] == [corpus.jpeg(number) for number in range(3)]


def test_members_need_not_be_adjacent(tar: str) -> None:
    corpus.write_tar(tar, [("a.jpg", b"A"), ("b.txt", b"tb"), ("a.txt", b"ta"), ("b.jpg", b"B")])
    assert bodies(tar) == [("a", b"A", b"ta"), ("b", b"B", b"tb")]


def test_duplicate_keys_are_all_kept(tar: str) -> None:
    corpus.write_tar(tar, [("a.jpg", b"1"), ("a.txt", b"t1"), ("b.jpg", b"2"), ("a.jpg", b"3"), ("a.txt", b"t3")])
    assert bodies(tar) == [("a", b"1", b"t1"), ("b", b"2", None), ("a", b"3", b"t3")]
    assert len({item.offset for item in corpus.read(tar)}) == 3


def test_dotted_keys_end_at_the_first_dot(tar: str) -> None:
    corpus.write_tar(tar, [("v1.0/a.b.jpg", b"1"), ("v1.0/c.jpg", b"2")])
    found = corpus.read(tar)
    assert [item.key for item in found] == ["v1.0/a.b", "v1.0/c"]
    assert isinstance(found[0], Failure)
    assert found[0].reason == "dotted_name"
    assert "'b.jpg'" in found[0].message
    assert bodies(tar, key_ends="last-dot") == [("v1.0/a.b", b"1", None), ("v1.0/c", b"2", None)]
    assert bodies(tar, image_extensions=("b.jpg", "jpg"))[0] == ("v1.0/a", b"1", None)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_missing_image_has_what_its_json_says(ending: str, tmp_path: Path) -> None:
    tar = f"{tmp_path}/a.tar{ending}"
    records = [b'{"error_message": "HTTP 404\\nnot found"}', b'{"error_message": null}', b"no JSON", b"5"]
    records += [json.dumps({"error_message": "x" * 1000}).encode(), b'{"error_message": 404}']
    members = [(f"{number}.json", record) for number, record in enumerate(records)]
    corpus.write_tar(f"{tmp_path}/plain.tar", [*members, ("z.txt", b"a caption")])
    data = Path(f"{tmp_path}/plain.tar").read_bytes()
    Path(tar).write_bytes(gzip.compress(data) if ending else data)
    found = [item.message for item in corpus.read(tar) if isinstance(item, Failure)]
    plain = "no member with an image extension"
    assert found[:4] == [f"{plain} (HTTP 404 not found)", plain, plain, plain]
    assert len(found[4]) == 500 and found[5:] == [f"{plain} (404)", plain]


def test_extensions_in_any_case_and_by_rank(tar: str) -> None:
    corpus.write_tar(tar, [("a.PNG", b"png"), ("a.Jpeg", b"jpeg"), ("a.TXT", b"t"), ("b.psd", b"psd")])
    assert bodies(tar) == [("a", b"jpeg", b"t"), ("b", "missing_image", None)]
    assert bodies(tar, image_extensions=("png", "jpeg", "PSD")) == [("a", b"png", b"t"), ("b", b"psd", None)]
    assert bodies(tar, caption_extensions=("cap", "txt"))[0][2] == b"t"


@pytest.mark.parametrize("format", ["ustar", "gnu", "pax"])
@pytest.mark.parametrize("stem", ["caf", "long/" * 30 + "caf"])
@pytest.mark.parametrize("count", [1, 20])  # 20: enough for a run of plain headers
def test_names_that_are_not_utf8_stay_apart(tar: str, format: str, stem: str, count: int) -> None:
    names = [f"{stem}{number}{end}" for number in range(count) for end in ("\udce9", "\udce8", "é", "")]
    files = [
        (f"{name}.{end}", f"{name}.{end}".encode(errors="surrogateescape")) for end in ("JPG", "txt") for name in names
    ]
    corpus.write_tar(tar, files, FORMATS[format])
    found = bodies(tar)
    assert [image.removesuffix(b".JPG") for _, image, _ in found] == [n.encode(errors="surrogateescape") for n in names]
    assert [caption.removesuffix(b".txt") for *_, caption in found] == [image[:-4] for _, image, _ in found]
    assert [text_name(key) for key, *_ in found] == names
    assert found[0][0] == f"{stem}0\\xe9"
    assert [before for _, before in cuts(tar)] == [0, 4 * count]


def test_failures_of_names_that_are_not_utf8_can_be_written(tar: str) -> None:
    corpus.write_tar(tar, [("a\udce9.txt", b"1"), ("b.\udce9.jpg", b"2")], tarfile.GNU_FORMAT)
    for item in corpus.read(tar):
        assert isinstance(item, Failure)
        assert f"{item.key} {item.message}".encode()


def test_hidden_and_macos_members_are_passed_over(tar: str) -> None:
    corpus.write_tar(tar, [("._a.jpg", b"0"), ("__MACOSX/a.jpg", b"0"), ("a.jpg", b"1"), ("README", b"0")])
    assert bodies(tar) == [("a", b"1", None)]


def link(name: str, target: str, soft: bool = True) -> bytes:
    """The header of a link."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE if soft else tarfile.LNKTYPE, target
    return info.tobuf(tarfile.GNU_FORMAT)


def file(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.GNU_FORMAT) + content.ljust(512, b"\0")


def test_links_are_followed(tar: str) -> None:
    blob, caption = file("blobs/ab12", b"picture"), file("./texts/one.txt", b"words")
    links = link("./x/a.jpg", "../blobs/ab12") + link("x/a.txt", "./texts/one.txt", soft=False)
    chain = (
        link("b.jpg", "later/c.jpg") + link("later/c.jpg", "x/a.jpg", soft=False) + link("later/" * 20 + "d.jpg", "e")
    )
    Path(tar).write_bytes(blob + caption + links + chain)
    found = bodies(tar)
    assert found[:2] == [("./texts/one", "missing_image", None), ("./x/a", b"picture", None)]
    assert found[2:5] == [("x/a", "missing_image", None), ("b", b"picture", None), ("later/c", b"picture", None)]
    assert found[5][1] == "broken_link"
    assert corpus.passed_over(tar) == {"no extension": 1}
    (first, *_) = corpus.samples(tar)
    assert (first.offset, first.length) == (512, 7)
    assert cuts(tar) == [(0, 0), (4096, 5), (5632, 6)]


def test_a_link_that_leads_nowhere_is_listed(tar: str) -> None:
    nowhere = link("a.jpg", "gone.jpg") + link("b.jpg", "/etc/passwd") + link("c.jpg", "d.jpg") + link("d.jpg", "c.jpg")
    others = file("e.jpg", b"1") + link("e.txt", "gone.txt") + link("folder", "pictures") + link("v1.0", "v2.0")
    hard = link("f.jpg", "g.jpg", soft=False) + file("g.jpg", b"2")  # a hard link names an earlier member
    Path(tar).write_bytes(nowhere + others + hard + link("g.png", "gone"))
    found = bodies(tar)
    assert found[:4] == [(key, "broken_link", None) for key in "abcd"]
    assert found[4:] == [("e", b"1", None), ("f", "broken_link", None), ("g", b"2", None)]
    assert corpus.passed_over(tar) == {"link": 3, "png": 1}
    failure = corpus.read(tar)[0]
    assert isinstance(failure, Failure)
    assert "'gone.jpg', which is no file of the tar" in failure.message
    for (start, _), (stop, _) in pairwise(cuts(tar)):
        assert summary(corpus.read(tar, start, stop)) == [
            item for item in summary(corpus.read(tar)) if start <= item[1] - 512 * (len(item) == 5) < stop
        ]


def test_circles_of_links_and_many_links_end_soon(tar: str) -> None:
    circles = b"".join(link(f"{number}.jpg", f"{(number + 1) % 1000}.jpg") for number in range(1000))
    copies = file("x.jpg", b"1") + b"".join(link("x.jpg", "x.jpg", soft=False) for _ in range(1000))
    Path(tar).write_bytes(circles + copies)
    started = time.monotonic()
    found = bodies(tar)
    assert [kind for _, kind, _ in found[:1000]] == ["broken_link"] * 1000
    assert [body for _, body, _ in found[1000:1040]] == [b"1"] * 40
    assert len(cuts(tar)) == 1002
    assert time.monotonic() - started < 10


def test_members_that_are_passed_over_are_counted(tar: str) -> None:
    names = ["a.jpg", "a.PNG", "a.txt", "a.cls", "a.seg.png", "b.psd", "b.npy", "c.txt", "d.5.jpg", "d.6.jpg", "d.txt"]
    hidden = ["._a.jpg", ".b", "__MACOSX/a.jpg", "README", "x.", "n\udce9.\udce9"]
    corpus.write_tar(tar, [(name, b"1") for name in names + hidden], tarfile.GNU_FORMAT)
    found = [(key, what) for key, what, _ in bodies(tar)]
    dotted = [("d.5", "dotted_name"), ("d.6", "dotted_name")]
    absent = [(key, "missing_image") for key in (r"b", "c")]
    assert found == [("a", b"1"), *absent, *dotted, (r"n\xe9", "missing_image")]
    counts = {"png": 2, "cls": 1, "npy": 1, "hidden": 3, "no extension": 2}
    assert corpus.passed_over(tar) == counts


@pytest.mark.parametrize(
    ("names", "flags"),
    [
        ([f"22.{number:02d}.png" for number in range(20)], "--key-ends last-dot"),
        (["photo.old.jpg"], "--key-ends last-dot"),
        (
            [f"{n}.{end}" for n in range(3) for end in ("input.jpg", "outputs.txt")],
            "{images} --caption-extensions outputs.txt",
        ),
        ([*(f"{n}.input.jpg" for n in range(3)), "x.png"], "{images} png"),
    ],
)
def test_dotted_names_are_told_with_the_flags_that_take_them(tar: str, names: list[str], flags: str) -> None:
    corpus.write_tar(tar, [(name, b"1") for name in names])
    pictures = [name for name in names if name.endswith((".png", ".jpg"))]
    found = corpus.read(tar)
    assert [item.key for item in found] == [name.rpartition(".")[0] for name in pictures]
    assert isinstance(found[0], Failure)
    assert found[0].message.endswith(f"plan with {flags.format(images='--image-extensions input.jpg')}")
    assert [before for _, before in cuts(tar)][-1] == len(found)


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_long_names(tar: str, format: str) -> None:
    key = "folder/" * 40 + "n" * 120
    corpus.write_tar(tar, [(f"{key}.jpg", b"1"), (f"{key}.txt", b"t"), ("b.jpg", b"2")], FORMATS[format])
    assert bodies(tar) == [(key, b"1", b"t"), ("b", b"2", None)]


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_sizes_beyond_eight_gibibytes(format: str) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = 9 * 2**30
    head = info.tobuf(FORMATS[format])
    member, damage = members(head)
    assert member == Member("a.jpg", len(head), info.size, 0)
    assert isinstance(damage, Damage)
    assert damage.reason == "truncated_tar"


def test_old_v7_headers(tar: str) -> None:
    corpus.write_tar(tar, [("a.jpg", b"1"), ("b.jpg", b"2")])
    data = bytearray(Path(tar).read_bytes())
    for at in (0, 1024):
        data[at + 156] = 0
        data[at + 257 : at + 512] = bytes(255)
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    assert [m.name for m in members(bytes(data)) if isinstance(m, Member)] == ["a.jpg", "b.jpg"]


def test_joined_tars_are_read_whole(tar: str, tmp_path: Path) -> None:
    first = Path(corpus.good_tar(str(tmp_path / "1.tar"), 3, seed=1)).read_bytes()
    second = Path(corpus.good_tar(str(tmp_path / "2.tar"), 3, seed=2)).read_bytes()
    Path(tar).write_bytes(first + second)
    assert len(list(corpus.samples(tar))) == 6
    assert not corpus.failures(corpus.read(tar))


@settings(max_examples=100)
@given(tars)
def test_joined_tars_have_the_samples_of_each(
    tmp_path_factory: pytest.TempPathFactory, archives: list[tuple[list[tuple[str, int, str]], str, int]]
) -> None:
    path, one = (str(tmp_path_factory.mktemp("join") / name) for name in ("a.tar", "b.tar"))
    Path(path).write_bytes(join(archives))
    expected, start = [], 0
    for archive in archives:
        Path(one).write_bytes(join([archive]))
        whole = [item for item in corpus.read(one) if not (isinstance(item, Failure) and item.reason == "empty_shard")]
        expected += summary([replace_offset(item, start) for item in whole])
        start += os.path.getsize(one)
    assert [item for item in summary(corpus.read(path)) if item[-1] != "empty_shard"] == expected


def replace_offset(item: Sample | Failure, start: int) -> Sample | Failure:
    assert item.offset is not None
    if isinstance(item, Sample):
        return item._replace(offset=start + item.offset)
    return dataclasses.replace(item, offset=start + item.offset)


def test_a_joined_tar_takes_no_caption_of_another(tar: str) -> None:
    first = build([("0.txt", 1, "f"), ("1.jpg", 2, "f"), ("1.txt", 3, "f")], 0)
    second = build([("0.jpg", 4, "f"), ("1.jpg", 5, "f"), ("1.txt", 6, "f")], 0)
    Path(tar).write_bytes(first + second)
    expected = [("0", "missing_image"), ("1", 2, 3), ("0", 4, None), ("1", 5, 6)]
    found = [(key, len(image), caption and len(caption)) for key, image, caption in bodies(tar)]
    assert [found[0][0], bodies(tar)[0][1]] == list(expected[0])
    assert found[1:] == expected[1:]
    at = len(first)
    assert (at, 2) in cuts(tar)
    assert cuts(tar) == cuts(first + second)


def test_what_tar_appends_belongs_to_the_same_tar(tar: str, tmp_path: Path) -> None:
    corpus.write_tar(tar, [("0.jpg", b"1")])
    (tmp_path / "0.txt").write_bytes(b"later")
    subprocess.run(["tar", "-C", tmp_path, "-rf", tar, "0.txt"], check=True)
    assert bodies(tar) == [("0", b"1", b"later")]


def test_a_lone_zero_block_ends_nothing(tar: str) -> None:
    first, second = build([("0.jpg", 9, "f")], 0, False), build([("0.txt", 1, "f")], 0)
    Path(tar).write_bytes(first + bytes(512) + second)
    assert [key for key, *_ in bodies(tar)] == ["0"]
    Path(tar).write_bytes(first + bytes(1024) + second)
    assert [key for key, *_ in bodies(tar)] == ["0", "0"]


def test_damage_that_hides_the_end_of_a_tar_ends_it(tar: str) -> None:
    first, second = build([("0.jpg", 9, "f"), ("1.jpg", 9, "f")], 0), build([("0.txt", 1, "f")], 0)
    broken = bytearray(first + second)
    broken[1024 + 130] ^= 1
    Path(tar).write_bytes(broken)
    assert [(item.key, getattr(item, "reason", None)) for item in corpus.read(tar)] == [
        ("0", None),
        ("0", "missing_image"),
        (None, "corrupt_header"),
    ]


@pytest.mark.parametrize("lost", [0, 512, 5000])
def test_missing_closing_blocks_are_fine(tar: str, lost: int) -> None:
    corpus.good_tar(tar, 4)
    end = cuts(tar)[-1][0]
    os.truncate(tar, min(end + lost, os.path.getsize(tar)))
    assert len(corpus.read(tar)) == 4
    assert not corpus.failures(corpus.read(tar))


# What is wrong with a whole file: one Failure without a key, and no sample.
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty_file"),
        (b"<html>not found</html>", "not_a_tar"),
        (b"<html>" + b"not found " * 400, "not_a_tar"),
        (corpus.jpeg(1, 128), "not_a_tar"),
        (bytes(10240), "empty_shard"),
        (build([("folder", 0, "d")], tarfile.USTAR_FORMAT), "empty_shard"),
        (build([("a.jpg", 9, "f")], tarfile.USTAR_FORMAT)[:400], "truncated_tar"),
    ],
)
def test_files_without_samples(tar: str, content: bytes, reason: str) -> None:
    Path(tar).write_bytes(content)
    (found,) = corpus.read(tar)
    assert isinstance(found, Failure)
    assert (found.key, found.shard, found.reason) == (None, tar, reason)
    assert "\n" not in found.message
    assert cuts(tar)[0] == (0, 0)


def test_an_html_page_shows_its_first_bytes(tar: str) -> None:
    Path(tar).write_bytes(b"<html>\xff not found")
    (found,) = corpus.read(tar)
    assert isinstance(found, Failure)
    assert "<html>\\xff" in found.message.replace("\\\\", "\\")


def test_a_cut_image_fails_its_sample(tar: str) -> None:
    corpus.good_tar(tar, 3)
    corpus.cut_file(tar, "000000002.jpg")
    found = corpus.read(tar)
    assert len(list(corpus.samples(tar))) == 2
    assert corpus.failures(found) == [("000000002", "truncated_member"), (None, "truncated_tar")]


def test_a_cut_caption_or_json_is_absent(tar: str) -> None:
    corpus.good_tar(tar, 3)
    corpus.cut_file(tar, "000000002.json", keep=3)
    assert corpus.failures(corpus.read(tar)) == [(None, "truncated_tar")]
    assert [item.json is None for item in corpus.samples(tar)] == [False, False, True]
    corpus.good_tar(tar, 3)
    corpus.cut_file(tar, "000000002.txt", keep=3)
    assert [item.caption is None for item in corpus.samples(tar)] == [False, False, True]


@settings(max_examples=60)
@given(st.integers(1, 11_000))
def test_cut_anywhere_no_whole_sample_is_lost(tmp_path_factory: pytest.TempPathFactory, size: int) -> None:
    path = corpus.write_tar(str(tmp_path_factory.mktemp("t") / "a.tar"), [(f"{i}.jpg", b"x" * 700) for i in range(7)])
    os.truncate(path, min(size, os.path.getsize(path)))
    found = corpus.read(path)
    assert len([item for item in found if isinstance(item, Sample)]) == min(7, (size + 324) // 1536)
    boundary = size % 1536 == 0 or size % 1536 >= 512 + 700 or size >= 7 * 1536
    assert bool(corpus.failures(found)) != boundary


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("number", [0, 2, 4])
def test_a_flipped_header_bit_costs_one_member(tar: str, format: str, number: int) -> None:
    corpus.write_tar(tar, corpus.good_files(5), FORMATS[format])
    broken = corpus.flip_header_bit(tar, f"{number:09d}.jpg")
    found = corpus.read(tar)
    assert len(list(corpus.samples(tar))) == 4
    assert corpus.failures(found) == [(f"{number:09d}", "missing_image"), (None, "corrupt_header")]
    (damage,) = [item for item in members(Path(tar).read_bytes()) if isinstance(item, Damage)]
    assert damage.offset == broken == found[-1].offset
    assert damage.length == 512 + (len(corpus.jpeg(number)) + 511) // 512 * 512


@settings(max_examples=150)
@given(st.binary(max_size=1000), st.integers(0, 5000), st.booleans())
def test_hostile_bytes_never_raise(noise: bytes, at: int, inside: bool) -> None:
    tar = bytearray(build([("a.jpg", 600, "f"), ("漢" * 80 + ".txt", 5, "f")], tarfile.PAX_FORMAT))
    data = bytes(tar[:at] + noise + tar[at + len(noise) :]) if inside else noise
    for item in members(data):
        assert item.offset <= len(data)
    assert cuts(data)[-1][0] <= len(data)


@pytest.mark.parametrize("records", [b"12 path=a.jpg", b"x", b"99 path=a\n", b"11 size=-1\n", b"9 nothing"])
def test_malformed_pax_headers_are_listed(tar: str, records: bytes) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    rest = build([("b.jpg", 5, "f")], tarfile.USTAR_FORMAT)
    Path(tar).write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0") + rest)
    assert corpus.failures(corpus.read(tar)) == [(None, "corrupt_header")]
    assert [item.key for item in corpus.samples(tar)] == ["b"]


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd,
}


@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize("file_name", ["a.tar.{}", "a.tar"])
def test_compressed_tars_are_read_whole_by_their_first_bytes(tmp_path: Path, file_name: str, kind: str) -> None:
    plain = corpus.good_tar(str(tmp_path / "plain.tar"), 6)
    path = tmp_path / file_name.format(kind)
    half = os.path.getsize(plain) // 2
    raw, padding = Path(plain).read_bytes(), b"" if kind == "zst" else bytes(100)
    path.write_bytes(COMPRESS[kind](raw[:half]) + COMPRESS[kind](raw[half:]) + padding)
    assert bodies(str(path)) == bodies(plain)
    assert all((item.offset, item.length) == (None, None) for item in corpus.samples(str(path)))
    assert cuts(str(path)) == [(0, 0), (os.path.getsize(path), 6)]


@pytest.mark.parametrize("kind", COMPRESS)
def test_broken_compression_gives_what_comes_before(tmp_path: Path, kind: str) -> None:
    files = [(f"{number}.jpg", random.Random(number).randbytes(30_000)) for number in range(60)]
    plain, path = corpus.write_tar(str(tmp_path / "plain.tar"), files), tmp_path / "a"
    good = COMPRESS[kind](Path(plain).read_bytes())
    reason = (None, "bad_gzip" if kind == "gz" else "bad_compression")
    for bad in (good[: len(good) * 3 // 4], good[: len(good) * 3 // 4] + b"\0" * 99 + good[len(good) * 3 // 4 :]):
        path.write_bytes(bad)
        assert reason in corpus.failures(corpus.read(str(path)))
        assert 8 < len(list(corpus.samples(str(path)))) < 60 + (kind == "zst")


@pytest.mark.parametrize("kind", COMPRESS)
def test_bombs_are_not_unpacked(tar: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus.write_tar(tar, [("a.jpg", b"1"), ("b.jpg", bytes(10 * 2**20))])
    packed = COMPRESS[kind](Path(tar).read_bytes())
    Path(tar).write_bytes(packed)
    assert len(list(corpus.samples(tar))) == 2
    monkeypatch.setattr(mapping, "LARGEST", 2**20)
    assert [item.key for item in corpus.samples(tar)] == ["a"]
    *_, failure = (item for item in corpus.read(tar) if isinstance(item, Failure) and "compress" in item.message)
    assert f"its content is over {max(2**20, 100 * len(packed)):,} bytes" in failure.message


def test_a_name_that_begins_like_bzip2_is_no_compression(tar: str) -> None:
    corpus.write_tar(tar, [("BZh9.jpg", b"1")])
    assert bodies(tar) == [("BZh9", b"1", None)]


def test_a_zstd_file_may_begin_with_a_skippable_frame(tar: str) -> None:
    corpus.good_tar(tar, 3)
    raw = Path(tar).read_bytes()
    Path(tar).write_bytes(b"\x50\x2a\x4d\x18\x04\0\0\0...." + zstd(raw))
    assert len(list(corpus.samples(tar))) == 3


def test_a_broken_gz_gives_what_comes_before(tmp_path: Path) -> None:
    path = Path(corpus.write_tar(str(tmp_path / "a.tar.gz"), corpus.good_files(40, side=64), mode="w:gz"))
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    found = corpus.read(str(path))
    assert (None, "bad_gzip") in corpus.failures(found)
    assert 15 < len(list(corpus.samples(str(path)))) < 25
    path.write_bytes(good[:-8] + b"\0" * 8)  # a wrong checksum: all is there, and yet it is said
    assert corpus.failures(corpus.read(str(path))) == [(None, "bad_gzip")]
    assert len(list(corpus.samples(str(path)))) == 40


def test_a_changed_or_missing_tar_is_refused(tar: str) -> None:
    corpus.good_tar(tar, 3)
    size = os.path.getsize(tar)
    assert len(list(read_slice(Slice(Shard(tar, size)), corpus.plan_of()))) == 3
    with pytest.raises(InputError, match=rf"planned with {size + 1} bytes and has {size} now: put that file back"):
        list(read_slice(Slice(Shard(tar, size + 1)), corpus.plan_of()))
    with pytest.raises(InputError, match="plan again"):
        corpus.read(tar, 0, size + 512)
    with pytest.raises(InputError, match="cannot read"):
        corpus.read(tar + ".away")


def test_remote_slices_keep_the_offsets_of_the_tar(tar: str) -> None:
    corpus.good_tar(tar, 9)
    url = "memory://clip-batch-tests/a.tar"
    with fsspec.open(url, "wb") as file:
        file.write(Path(tar).read_bytes())
    places = cuts(tar)
    for start, stop in [(0, None), (0, places[3][0]), (places[3][0], places[6][0]), (places[6][0], None)]:
        assert summary(corpus.read(url, start, stop)) == summary(corpus.read(tar, start, stop))
    with pytest.raises(InputError, match="cannot read"):
        corpus.read("memory://clip-batch-tests/none.tar")


def test_a_size_beyond_64_bits_is_damage(tar: str) -> None:
    corpus.write_tar(tar, [("a.jpg", b"x"), ("b.jpg", b"y"), ("c.jpg", b"z")])
    data = bytearray(Path(tar).read_bytes())
    with tarfile.open(tar) as archive:
        at = archive.getmember("b.jpg").offset
    data[at + 124 : at + 136] = b"\x80" + b"\xff" * 11
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    Path(tar).write_bytes(data)
    assert bodies(tar) == [("a", b"x", None), ("c", b"z", None), (None, "corrupt_header", None)]
