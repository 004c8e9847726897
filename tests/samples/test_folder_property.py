"""Generated folders, with names of any bytes, links and hidden files: every file is named as something."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from clip_batch.plan.counts import count_folder
from clip_batch.samples import read_slice
from clip_batch.samples.files import list_samples
from clip_batch.types import Failure, Sample, Shard, Slice
from tests import corpus

IMAGES, CAPTIONS = ("jpg", "png"), ("txt",)

FOLDERS = st.sampled_from([b"", b"a/", b"a/b/", b"d\xe9j\xe0/", b".hidden/", b"cat.jpg/"])
NAMES = st.builds(
    lambda base, end: base + end,
    st.sampled_from([b"cat", b"Cat", b"22.05", b"caf\xe9", b"caf\xe8", b".dot", b"x_stats", b"new\nline"]),
    st.sampled_from([b".jpg", b".JPG", b".png", b".txt", b".TXT", b".json", b".jpg.txt", b".bmp", b".TIF", b""]),
)
FILES = st.sets(st.tuples(FOLDERS, NAMES), max_size=14)
LINKS = st.dictionaries(
    st.sampled_from([b"l.jpg", b"l", b"a/l", b"a/b/l.txt"]),
    st.sampled_from([b"..", b".", b"a", b"gone", b"l", b"cat.jpg"]),
)


def make(root: bytes, files: set[tuple[bytes, bytes]], links: dict[bytes, bytes]) -> None:
    """Write files that have their own names as content, where no folder has that name."""
    for folder, _ in files:
        os.makedirs(root + b"/" + folder, exist_ok=True)
    for folder, name in files:
        if not os.path.isdir(path := root + b"/" + folder + name):
            with open(path, "wb") as file:
                file.write(folder + name)
    for name, target in links.items():
        if os.path.isdir(os.path.dirname(root + b"/" + name)) and not os.path.lexists(root + b"/" + name):
            os.symlink(target, root + b"/" + name)


def walk(folder: bytes, above: tuple[int, ...], counts: Counter[str], pictures: Counter[bytes]) -> None:
    """An account of a folder of its own: the bytes of each picture, and the number of other entries."""
    inode = os.stat(folder).st_ino
    if inode in above:
        counts["link"] += 1
        return
    for name in os.listdir(folder):
        path = folder + b"/" + name
        if name.startswith(b"."):
            counts["hidden"] += 1
        elif os.path.isdir(path):
            walk(path, (*above, inode), counts, pictures)
        elif not os.path.exists(path):
            counts["link"] += 1
        elif name.lower().endswith((b".jpg", b".png")):
            with open(path, "rb") as file:
                pictures[file.read()] += 1
        else:
            counts["other"] += 1


@settings(max_examples=60)
@given(FILES, LINKS)
def test_pictures_in_are_samples_and_the_rest_is_counted(
    files: set[tuple[bytes, bytes]], links: dict[bytes, Any]
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        temporary += "/in"  # a link may lead out of it, and no further
        os.mkdir(temporary)
        make(os.fsencode(temporary), files, links)
        counts, pictures = Counter[str](), Counter[bytes]()
        walk(os.fsencode(temporary), (), counts, pictures)
        listed = list_samples(temporary, IMAGES, CAPTIONS)
        assert {kind: listed.passed_over[kind] for kind in ("hidden", "link")} == {
            kind: counts[kind] for kind in ("hidden", "link")
        }
        if not listed.samples:
            assert not pictures
            return
        shard = count_folder(Shard(temporary), listed, IMAGES)
        items = list(read_slice(Slice(shard), corpus.plan_of("files", image_extensions=IMAGES)))
    samples = [item for item in items if isinstance(item, Sample)]
    failures = [item for item in items if isinstance(item, Failure)]
    assert Counter(bytes(sample.image or b"") for sample in samples) == pictures
    keys = [item.key for item in (*samples, *failures)]
    assert len(set(keys)) == len(keys)
    assert all(key is not None and key.encode() for key in keys), "keys are text"
    assert {failure.reason for failure in failures} <= {"missing_image"}
    beside = {name for _, names in listed.samples for extension, name in names.items() if extension not in IMAGES}
    unused = sum(count for kind, count in listed.passed_over.items() if kind not in ("hidden", "link"))
    assert len(beside) + unused == counts["other"]
