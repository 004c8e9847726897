"""--format files: folders of images."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from clip_batch.errors import InputError
from clip_batch.samples import read_slice
from clip_batch.samples.files import list_samples
from clip_batch.types import Failure, Sample, Shard, Slice
from tests import corpus

IMAGES, CAPTIONS = ("jpg", "png"), ("txt",)
NAMES = ["b.jpg", "b.txt", "b.json", "a/IMG.2021.05.JPG", "a/IMG.2021.05.txt", "a/c.png", "lone.txt", "z.md"]
HIDDEN = [".x.jpg", "a/.y.jpg", ".git/z.jpg"]
EXPECTED = [
    ("a/IMG.2021.05", {"jpg": "a/IMG.2021.05.JPG", "txt": "a/IMG.2021.05.txt"}),
    ("a/c", {"png": "a/c.png"}),
    ("b", {"jpg": "b.jpg", "json": "b.json", "txt": "b.txt"}),
    ("lone", {"txt": "lone.txt"}),
]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    for name in NAMES + HIDDEN:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())
    return str(tmp_path)


def read(url: str, start: int = 0, stop: int | None = None, samples: int | None = None) -> list[Sample | Failure]:
    return list(read_slice(Slice(Shard(url, samples=samples), start, stop), corpus.plan_of("files")))


def test_listing_is_sorted_and_keys_end_at_the_last_dot(folder: str) -> None:
    assert list_samples(folder, IMAGES, CAPTIONS) == EXPECTED


def test_a_remote_folder_reads_alike(folder: str) -> None:
    url = "memory://clip-batch-tests/folder"
    for name in NAMES + HIDDEN:
        with fsspec.open(f"{url}/{name}", "wb") as file:
            file.write(name.encode())
    assert list_samples(url, IMAGES, CAPTIONS) == EXPECTED
    assert [item.key for item in read(url)] == [item.key for item in read(folder)]


def test_samples_carry_the_bytes_and_the_folder(folder: str) -> None:
    found = read(folder)
    assert found[2] == Sample("b", folder, None, None, b"b.jpg", b"b.txt", b"b.json")
    assert corpus.failures(found) == [("lone", "missing_image")]


def test_slices_join_to_the_whole(folder: str) -> None:
    whole = read(folder)
    for cut in range(1, 4):
        assert read(folder, 0, cut, samples=4) + read(folder, cut, None, samples=4) == whole


def test_of_several_images_the_first_listed_extension_is_taken(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "b.PNG"):
        (tmp_path / name).write_bytes(name.encode())
    assert [item.image for item in read(str(tmp_path)) if isinstance(item, Sample)] == [b"a.jpg", b"b.PNG"]


def test_a_changed_folder_is_refused(folder: str) -> None:
    with pytest.raises(InputError, match="plan again"):
        read(folder, samples=5)
    with pytest.raises(InputError):
        read(folder + "/none")
