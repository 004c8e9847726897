"""Folders of images: their listing, the samples of a slice, and folders that changed since they were planned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from clip_batch.errors import InputError
from clip_batch.plan.counts import count_folder
from clip_batch.samples import read_slice
from clip_batch.samples.files import list_samples
from clip_batch.storage.store import Store
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


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that are walked, in order."""
    walks: list[str] = []
    walk = Store.walk
    monkeypatch.setattr(Store, "walk", lambda store: walks.append(store.url) or walk(store))
    return walks


def planned(folder: str) -> Shard:
    return count_folder(Shard(folder), IMAGES, CAPTIONS, {})


def read_planned(shard: Shard, start: int = 0, stop: int | None = None) -> list[str | None]:
    """The keys of a slice of a planned folder."""
    plan = replace(corpus.plan_of("files"), image_extensions=IMAGES, caption_extensions=CAPTIONS)
    return [item.key for item in read_slice(Slice(shard, start, stop), plan)]


def test_a_planned_folder_is_walked_once_for_all_its_slices(folder: str, walks: list[str]) -> None:
    shard = planned(folder)
    walks.clear()
    keys = [read_planned(shard, start, start + 1) for start in range(4)]
    assert keys == [["a/IMG.2021.05"], ["a/c"], ["b"], ["lone"]]
    assert walks == [folder]


def test_a_folder_is_walked_again_for_another_plan_or_options(folder: str, walks: list[str]) -> None:
    shard = planned(folder)
    read_planned(shard)
    walks.clear()
    list(read_slice(Slice(shard), replace(corpus.plan_of("files"), image_extensions=IMAGES), {"anything": 1}))
    Path(folder, "new.jpg").touch()
    with pytest.raises(InputError, match="has 5 samples, planned were 4: plan again"):
        read_planned(shard)
    assert "new" in read_planned(planned(folder))
    assert len(walks) == 4


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda folder: (folder / "a/c.png").rename(folder / "a/d.png"), "has files of other names than were planned"),
        (lambda folder: (folder / "b.txt").unlink(), "has files of other names than were planned"),
        (lambda folder: (folder / "new.jpg").touch(), "has 5 samples, planned were 4"),
        (lambda folder: (folder / "lone.txt").unlink(), "has 3 samples, planned were 4"),
    ],
)
def test_a_folder_that_changed_since_it_was_planned_is_refused(
    folder: str, change: Callable[[Path], object], text: str
) -> None:
    shard = planned(folder)
    change(Path(folder))
    with pytest.raises(InputError, match=f"{text}.*: plan again"):
        read_planned(shard)


def test_a_file_that_goes_while_its_folder_is_read_is_named(folder: str) -> None:
    shard = planned(folder)
    assert read_planned(shard, 0, 1) == ["a/IMG.2021.05"]
    Path(folder, "b.txt").unlink()
    Path(folder, "new.jpg").touch()
    assert read_planned(shard, 1, 2) == ["a/c"]
    with pytest.raises(InputError, match=f"{folder} lost files of b since it was planned: plan again"):
        read_planned(shard, 2, 3)
