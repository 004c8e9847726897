"""Folders and globs: links, hidden files, and what cannot be listed, on disks and on stores of every kind."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from clip_batch.errors import InputError
from clip_batch.storage import retry, tree
from clip_batch.storage.tree import list_glob, list_tree
from tests.corpus import unprivileged

FILES = ["a.tar", "b.jpg", "one/c.tar", "one/deep/d.tar", "one/deep/e.jpg", "two/f.tar", "x[1]/g.tar"]
HIDDEN = [".h.tar", "one/.i.tar", ".git/j.tar", "one/.k/l.tar", "one/.k/m.tar"]


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def below(found: tree.Tree, folder: object) -> list[str]:
    return [entry.url.removeprefix(f"{folder}/") for entry in found.entries]


class ByFolder(MemoryFileSystem):
    """A store that lists folder by folder, as HDFS and SFTP do, and may not list some."""

    protocol = "byfolder"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    refused: ClassVar[set[str]] = set()
    find = AbstractFileSystem.find

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("byfolder://", "memory://")))

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        if path.rstrip("/") in self.refused:
            raise PermissionError(f"{path}: not yours")
        return super().ls(path, detail=detail, **options)


@pytest.fixture(params=["memory", "byfolder"])
def remote(request: pytest.FixtureRequest) -> Any:
    fsspec.register_implementation("byfolder", ByFolder, clobber=True)
    fs = fsspec.filesystem(request.param)
    for name in FILES + HIDDEN:
        fs.pipe(f"/root/{name}", b"x")
    yield f"{request.param}://root"
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    ByFolder.refused.clear()


def test_a_folder_has_all_visible_files_below_it(tmp_path: Path, remote: str) -> None:
    fill(tmp_path, FILES + HIDDEN)
    for folder in (str(tmp_path), remote):
        found = list_tree(folder)
        assert below(found, folder) == FILES
        assert (found.passed_over, found.unreadable) == ({"hidden": 4}, {})
    with pytest.raises(InputError, match=r"no folder .*/none: check the path"):
        list_tree(f"{tmp_path}/none")


PATTERNS = [
    "*",
    "*.tar",
    "**/*.tar",
    "one/**",
    "**/deep/*",
    "*/*/d.tar",
    "o*/[cd].tar",
    "?ne/c.tar",
    "no*/x",
    "none/*/x",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_glob_matches_what_a_shell_would_match(tmp_path: Path, remote: str, pattern: str) -> None:
    fill(tmp_path, FILES + HIDDEN)
    expected = sorted(glob.glob(pattern, root_dir=tmp_path, recursive=True))
    expected = [name for name in expected if name.rstrip("/") != "one" or pattern != "one/**"]
    for folder in (str(tmp_path), remote):
        found = list_glob(f"{folder}/{pattern}")
        names = [name for name in below(found, folder) if name != "one" or pattern != "one/**"]
        assert (names, found.unreadable) == (expected, {})


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    fill(tmp_path / "disk", ["shards/a.tar", "b.tar"])
    fill(tmp_path / "data", ["one/c.tar"])
    for name, target in {
        "two": "../disk/shards",
        "b.tar": "../disk/b.tar",
        "one/up": "..",
        "one/self": ".",
        "gone.tar": "nowhere",
        "loop": "loop",
    }.items():
        (tmp_path / "data" / name).symlink_to(target)
    os.mkfifo(tmp_path / "data" / "pipe.tar")
    data = f"{tmp_path}/data"
    found = list_tree(data)
    assert below(found, data) == ["b.tar", "one/c.tar", "two/a.tar"]
    assert found.passed_over == {"link": 4, "special file": 1}
    everywhere = list_glob(f"{data}/**/*.tar")
    assert everywhere.entries == found.entries
    assert everywhere.passed_over == {"link": 3, "special file": 1}, "two circles, one broken .tar"


def test_a_folder_that_may_not_be_listed_is_named(tmp_path: Path, remote: str) -> None:
    fill(tmp_path, FILES)
    (tmp_path / "one").chmod(0)
    code = """if True:
        import sys
        from clip_batch.storage.tree import list_glob, list_tree
        for found in (list_tree(sys.argv[1]), *(list_glob(sys.argv[1] + end) for end in ("/**/*.tar", "/*/c.tar"))):
            print(len(found.entries), found.unreadable)
    """
    lines = unprivileged(["-c", code, str(tmp_path)]).stdout.splitlines()
    (tmp_path / "one").chmod(0o700)
    unreadable = {f"{tmp_path}/one": "Permission denied"}
    assert lines == [f"4 {unreadable}", f"3 {unreadable}", f"0 {unreadable}"]
    if remote.startswith("byfolder"):
        ByFolder.refused.add("/root/one")
        for found in (list_tree(remote), list_glob(f"{remote}/**/*.tar"), list_glob(f"{remote}/*/*.tar")):
            assert list(found.unreadable) == [f"{remote}/one"] and "not yours" in found.unreadable[f"{remote}/one"]


def test_a_store_that_does_not_answer_is_no_folder_that_may_not_be_listed(
    remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, *_: Any, **__: Any) -> Any:
        raise OSError("503 slow down")

    monkeypatch.setattr(retry, "TRIES", 1)
    monkeypatch.setattr(MemoryFileSystem, "ls", fail)
    monkeypatch.setattr(MemoryFileSystem, "find", fail)
    with pytest.raises(InputError, match=r"cannot be listed: .*503 slow down"):
        list_tree(remote)
