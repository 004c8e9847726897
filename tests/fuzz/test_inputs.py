"""Generated folders and tars: each picture is one row, one failure, or passed over, and is named.

Names are bytes, as Unix has them; files are linked, repeated, nested and joined. What is expected is counted by the
standard library alone.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_batch.config import EmbedConfig, PlanConfig
from clip_batch.embeddings.commits import read_commits
from clip_batch.embeddings.embed import embed
from clip_batch.embeddings.verify import verify_output
from clip_batch.errors import InputError
from clip_batch.plan.plan import make_plan
from clip_batch.storage.names import text_name
from clip_batch.storage.store import Store
from tests import corpus

pytestmark = pytest.mark.slow

PICTURES = set(PlanConfig().image_extensions)
OTHERS = {"txt", "json"}
GOOD, BAD = corpus.jpeg(1), corpus.jpeg(1)[:40]

folders = st.sampled_from([b"", b"a/", b"b.c/", b"caf\xe9/", b"a/b.c/", b"\xe7\xba\xa2/", b".hidden/"])
stems = st.sampled_from(
    [b"cat", b"22.00", b"22.01", b"caf\xe9", b"caf\xe8", b"\xe7\xba\xa2", b".x", b"a b", b"cat.jpg", b"x\\xe9"]
)
suffixes = st.sampled_from(
    [b".jpg", b".JPG", b".png", b".jpeg", b".gif", b".txt", b".json", b".jpg.txt", b".cls", b"", b"."]
)
paths = st.builds(lambda *parts: b"".join(parts), folders, stems, suffixes)
files = st.lists(st.tuples(paths, st.sampled_from([GOOD, GOOD, BAD, b""])), min_size=1, max_size=12)
links = st.lists(st.tuples(paths, paths | folders), max_size=3)


@dataclass
class Account:
    """What a plan and its commits say became of the input."""

    rows: list[bytes] = field(default_factory=list)
    failures: list[tuple[bytes | None, str]] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

    @property
    def pictures(self) -> list[bytes]:
        """The keys of rows and of failures of pictures."""
        return self.rows + [key for key, reason in self.failures if key is not None and reason != "missing_image"]


def account(spec: str, format: str, out: str) -> Account:
    """Plan, embed and verify an input; what became of it."""
    plan = make_plan(spec, out, PlanConfig(model="fake:8", format=format, partition_samples=3))  # type: ignore[arg-type]
    outcomes = embed(out, EmbedConfig(device="cpu"))
    assert {outcome.state for outcome in outcomes} == {"committed"}
    store, result = Store(out), Account(passed_over=Counter(plan.passed_over))
    report = verify_output(store, deep=True)
    assert report.ok, report.problems
    for commit in read_commits(store).values():
        result.passed_over.update(commit.passed_over)
        if name := commit.file("metadata"):
            result.rows += map(original, pq.read_table(store.path(name))["key"].to_pylist())
        if name := commit.file("failures"):
            for row in pq.read_table(store.path(name)).to_pylist():
                result.failures.append((None if row["key"] is None else original(row["key"]), row["reason"]))
    assert Counter(report.passed_over) == result.passed_over
    assert (report.rows, report.failed) == (len(result.rows), len(result.failures))
    return result


def original(key: str) -> bytes:
    """The bytes of the name that a key stands for."""
    return os.fsencode(text_name(key))


def extension(name: bytes) -> str:
    base = name.rpartition(b"/")[2]
    return os.fsdecode(base.rpartition(b".")[2].lower()) if b"." in base else ""


def hidden(name: bytes) -> bool:
    return any(part.startswith(b".") for part in name.split(b"/"))


def visited(top: bytes, below: bytes = b"", above: tuple[bytes, ...] = ()) -> Iterator[bytes]:
    """Every file of a folder, through links too; of hidden folders and of links to a folder above only their names."""
    place = os.path.join(top, below)
    above = (*above, os.path.realpath(place))
    for entry in os.scandir(place):
        closed = hidden(entry.name) or os.path.realpath(entry.path) in above
        if os.path.isdir(entry.path) and not closed:
            yield from visited(top, below + entry.name + b"/", above)
        else:
            yield below + entry.name


@settings(max_examples=60, deadline=None)
@given(files, links)
def test_each_picture_of_a_folder_is_named_once(
    files: list[tuple[bytes, bytes]], links: list[tuple[bytes, bytes]]
) -> None:
    with tempfile.TemporaryDirectory() as place:
        top = os.fsencode(place) + b"/pics/"
        write(top, files, links)
        seen = list(visited(top))
        present = [name for name in seen if os.path.isfile(top + name)]
        pictures = [name for name in present if not hidden(name) and extension(name) in PICTURES]
        if not any(not hidden(name) and extension(name) in PICTURES | OTHERS for name in present):
            with pytest.raises(InputError, match="holds no sample"):
                account(place + "/pics", "files", place + "/out")
            return
        result = account(place + "/pics", "files", place + "/out")
        named = result.pictures
        assert len(named) == len(set(named)) == len(pictures)
        for name in pictures:
            assert name in named or name.rpartition(b".")[0] in named
        rows_good = sum((Path(os.fsdecode(top + name)).read_bytes() == GOOD) for name in pictures)
        assert len(result.rows) == rows_good
        samples = [name for name in present if not hidden(name) and extension(name) in PICTURES | OTHERS]
        assert result.passed_over.total() == len(seen) - len(samples)


def write(top: bytes, files: list[tuple[bytes, bytes]], links: list[tuple[bytes, bytes]]) -> None:
    """Write the files and links of a folder; one that cannot be, because its name is taken, is left out."""
    os.makedirs(top)
    for name, content in files:
        try:
            os.makedirs(os.path.dirname(top + name), exist_ok=True)
            with open(top + name, "xb") as file:
                file.write(content)
        except OSError:
            continue
    for name, target in links:
        try:
            os.makedirs(os.path.dirname(top + name), exist_ok=True)
            os.symlink(top + target, top + name)
        except OSError:
            continue


@dataclass(frozen=True)
class Link:
    """A hard or a soft link of a tar."""

    target: bytes
    soft: bool


COMPRESSIONS = [bytes, gzip.compress, bz2.compress, lzma.compress]
link_names = st.builds(
    lambda *parts: b"".join(parts),
    folders,
    st.sampled_from([b"cat", b"a b", b"22.00"]),
    st.sampled_from([b".jpg", b".png"]),
)
contents = st.sampled_from([GOOD, GOOD, BAD, b""])
members = st.tuples(paths, contents) | st.tuples(link_names, st.builds(Link, paths, st.booleans()))
archives = st.lists(st.lists(members, max_size=10), min_size=1, max_size=2)


def archive(members: list[tuple[bytes, bytes | Link]], format: int) -> bytes:
    """A tar of these members, as the standard library writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(os.fsdecode(name))
            if isinstance(content, Link):
                info.type = tarfile.SYMTYPE if content.soft else tarfile.LNKTYPE
                info.linkname = os.fsdecode(content.target)
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@settings(max_examples=100, deadline=None)
@given(
    archives,
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.sampled_from(COMPRESSIONS),
)
def test_each_picture_of_a_tar_is_counted_once(
    archives: list[list[tuple[bytes, bytes | Link]]], format: int, compress: Callable[[bytes], bytes]
) -> None:
    with tempfile.TemporaryDirectory() as place:
        data = b"".join(archive(members, format) for members in archives)
        path = Path(place, "a.tar")
        path.write_bytes(compress(data))
        result = account(str(path), "tar", place + "/out")
        names = [name for members in archives for name, _ in members]
        pictures = [name for name in names if not hidden(name.rpartition(b"/")[2]) and extension(name) in PICTURES]
        passed_over = sum(count for kind, count in result.passed_over.items() if kind in {*PICTURES, "link"})
        assert len(pictures) == len(result.pictures) + passed_over
        assert result.passed_over["hidden"] == len([name for name in names if hidden(name.rpartition(b"/")[2])])
        for (
            key
        ) in result.pictures:  # each is the key of a picture, by the first dot or, where that is no picture, the last
            assert any(key in (key_of(name), name.rpartition(b".")[0]) for name in pictures)


def key_of(name: bytes) -> bytes:
    folder, slash, base = name.rpartition(b"/")
    return folder + slash + base.partition(b".")[0]
