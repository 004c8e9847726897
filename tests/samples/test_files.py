"""Folders of images: their listing, the samples of a slice, and folders that changed since they were planned."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_batch.errors import InputError, StorageUnavailable
from clip_batch.plan.counts import count_folder
from clip_batch.samples import files, read_slice
from clip_batch.samples.files import list_samples, pair_files
from clip_batch.storage.store import Store
from clip_batch.storage.tree import list_tree
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
    assert list_samples(folder, IMAGES, CAPTIONS).samples == EXPECTED


def test_a_remote_folder_reads_alike(folder: str) -> None:
    url = "memory://clip-batch-tests/folder"
    for name in NAMES + HIDDEN:
        with fsspec.open(f"{url}/{name}", "wb") as file:
            file.write(name.encode())
    assert list_samples(url, IMAGES, CAPTIONS).samples == EXPECTED
    assert [item.key for item in read(url)] == [item.key for item in read(folder)]


def test_samples_carry_the_bytes_and_the_folder(folder: str) -> None:
    found = read(folder)
    assert found[2] == Sample("b", folder, None, None, b"b.jpg", b"b.txt", b"b.json")
    assert corpus.failures(found) == [("lone", "missing_image")]


def test_slices_join_to_the_whole(folder: str) -> None:
    whole = read(folder)
    for cut in range(1, 4):
        assert read(folder, 0, cut, samples=4) + read(folder, cut, None, samples=4) == whole


def test_images_of_one_stem_are_samples_of_their_own(tmp_path: Path) -> None:
    for name in (
        "a/cat.jpg",
        "a/cat.JPG",
        "a/cat.png",
        "a/cat.txt",
        "a/cat.JPG.txt",
        "dog.jpg",
        "dog.jpg.json",
        "c.PNG",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    samples = [item for item in read(str(tmp_path)) if isinstance(item, Sample)]
    assert [(sample.key, sample.image, sample.caption, sample.json) for sample in samples] == [
        ("a/cat.JPG", b"a/cat.JPG", b"a/cat.JPG.txt", None),
        ("a/cat.jpg", b"a/cat.jpg", b"a/cat.txt", None),
        ("a/cat.png", b"a/cat.png", b"a/cat.txt", None),
        ("c", b"c.PNG", None, None),
        ("dog", b"dog.jpg", None, b"dog.jpg.json"),
    ]


def test_a_stem_that_is_the_name_of_another_image_is_no_key() -> None:
    samples, _ = pair_files(["x.jpg", "x.jpg.png", "x.jpg.txt"], IMAGES, CAPTIONS)
    assert [key for key, _ in samples] == ["x", "x.jpg.png"]


def test_of_several_captions_the_first_listed_extension_is_used() -> None:
    samples, unused = pair_files(["a.cap", "a.jpg", "a.txt"], IMAGES, ("txt", "cap"))
    assert (samples, unused) == ([("a", {"jpg": "a.jpg", "txt": "a.txt"})], ["a.cap"])


def test_side_cars_of_img2dataset_are_no_samples() -> None:
    names = ["00000.parquet", "00000/000000001.jpg", "00000_stats.json", "my_stats.jpg", "my_stats.json", "lone.json"]
    samples, unused = pair_files(sorted(names), IMAGES, CAPTIONS)
    assert [key for key, _ in samples] == ["00000/000000001", "lone", "my_stats"]
    assert unused == ["00000.parquet", "00000_stats.json"]


def test_dotted_names_keep_each_image(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"22.{number:02d}.png").write_bytes(b"image")
        (tmp_path / f"22.{number:02d}.txt").write_text(f"caption {number}")
    found = [(item.key, item.caption) for item in read(str(tmp_path)) if isinstance(item, Sample)]
    assert found == [(f"22.{number:02d}", f"caption {number}".encode()) for number in range(20)]


BASES = st.text("ab.é\udce9", min_size=1, max_size=4).filter(lambda text: not text.startswith("."))
NAME_SETS = st.sets(
    st.builds(
        lambda folder, base, extension: f"{folder}{base}{extension}",
        st.sampled_from(["", "a/", "a.jpg/"]),
        BASES,
        st.sampled_from(["", ".jpg", ".JPG", ".png", ".txt", ".TXT", ".json", ".jpg.txt", "_stats.json", ".bmp"]),
    ),
    max_size=12,
)


@given(NAME_SETS)
def test_every_file_is_accounted_for_and_every_image_is_one_sample(names: set[str]) -> None:
    samples, unused = pair_files(sorted(names), IMAGES, CAPTIONS)
    keys = [key for key, _ in samples]
    assert len(set(keys)) == len(keys) and keys == sorted(keys)
    used = {name for _, files in samples for name in files.values()}
    assert used | set(unused) == names and not used & set(unused)
    images = [name for _, files in samples for extension, name in files.items() if extension in IMAGES]
    assert sorted(images) == sorted(name for name in names if name.lower().endswith((".jpg", ".png")))


def test_a_changed_folder_is_refused(folder: str) -> None:
    with pytest.raises(InputError, match="plan again"):
        read(folder, samples=5)
    with pytest.raises(InputError):
        read(folder + "/none")


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that are walked, in order."""
    walks: list[str] = []
    monkeypatch.setattr(files, "list_tree", lambda url, *rest: walks.append(url) or list_tree(url, *rest))
    return walks


def planned(folder: str) -> Shard:
    return count_folder(Shard(folder), list_samples(folder, IMAGES, CAPTIONS), IMAGES)


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


def test_a_file_that_goes_while_its_folder_is_read_is_a_failure(folder: str) -> None:
    shard = planned(folder)
    assert read_planned(shard, 0, 1) == ["a/IMG.2021.05"]
    Path(folder, "b.txt").unlink()
    Path(folder, "new.jpg").touch()
    plan = replace(corpus.plan_of("files"), image_extensions=IMAGES, caption_extensions=CAPTIONS)
    [failure] = read_slice(Slice(shard, 2, 3), plan)
    assert isinstance(failure, Failure) and (failure.key, failure.reason) == ("b", "unreadable_file")
    told = "b.txt cannot be read (No such file or directory): mend it, and run clip-batch repair --retry-failed"
    assert failure.message == f"{told} unreadable_file"


def test_a_folder_that_goes_while_it_is_read_fails_the_partition(folder: str) -> None:
    shard = planned(folder)
    read_planned(shard, 0, 1)
    Path(folder).rename(f"{folder}.gone")
    with pytest.raises(FileNotFoundError):
        read_planned(shard, 1, 2)


@pytest.mark.parametrize(
    ("error", "fails"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (OSError(errno.EIO, "Input/output error"), False),
        (OSError(errno.EMFILE, "Too many open files"), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
    ],
)
def test_what_an_error_of_the_disk_fails(
    folder: str, error: OSError, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_bytes = Store.read

    def read_or_fail(store: Store, name: str) -> bytes:
        if name == "a/c.png":
            raise error
        return read_bytes(store, name)

    monkeypatch.setattr(Store, "read", read_or_fail)
    if fails:
        with pytest.raises(OSError, match=error.strerror):
            read(folder)
    else:
        assert corpus.failures(read(folder)) == [("a/c", "unreadable_file"), ("lone", "missing_image")]


def test_a_store_that_does_not_answer_or_refuses_fails_the_partition(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "memory://clip-batch-tests/answers"
    for name in NAMES:
        with fsspec.open(f"{url}/{name}", "wb") as file:
            file.write(name.encode())
    for error in (StorageUnavailable("reading: 503"), PermissionError("reading: refused")):
        monkeypatch.setattr(Store, "read", lambda store, name, error=error: raise_(error))
        with pytest.raises(type(error)):
            read(url)
    monkeypatch.setattr(Store, "read", lambda store, name: raise_(FileNotFoundError(f"reading {name}: no such file")))
    assert {reason for _, reason in corpus.failures(read(url))} == {"unreadable_file", "missing_image"}


def raise_(error: Exception) -> bytes:
    raise error
