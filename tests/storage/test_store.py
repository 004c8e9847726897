"""Stores on a local disk and in memory: files appear whole or not at all."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_batch.storage.paths import split_url
from clip_batch.storage.store import Store, read_url
from tests.corpus import unprivileged
from tests.servers.flaky import Flaky


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}-{os.getpid()}")


def test_create_is_exclusive(store: Store) -> None:
    assert store.create("a/b.json", b"first")
    assert not store.create("a/b.json", b"second")
    assert store.read("a/b.json") == b"first"


def test_one_of_many_racing_creators_wins(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda number: store.create("commit.json", str(number).encode()), range(64)))
    assert sum(won) == 1
    assert store.read("commit.json") == str(won.index(True)).encode()
    assert store.list("") == ["commit.json"]


def test_a_writer_that_raises_publishes_nothing(store: Store) -> None:
    with pytest.raises(RuntimeError), store.writer("out.npy") as file:  # noqa: PT012
        file.write(b"half")
        raise RuntimeError
    assert not store.exists("out.npy")
    assert store.list("") == []


def test_replace_list_size_digest_fetch_remove(store: Store) -> None:
    store.replace("x", b"old")
    store.replace("x", b"0123456789")
    assert store.list("") == ["x"]
    assert store.size("x") == 10
    assert store.digest("x") == "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"
    with store.fetch("x") as path:
        assert Path(path).read_bytes() == b"0123456789"
    with store.open("x") as file:
        file.seek(3)
        assert file.read(2) == b"34"
    store.remove("x")
    store.remove("x")
    assert not store.exists("x")
    assert store.list("nowhere") == []


def test_several_callers_may_rename_a_file_and_again(store: Store) -> None:
    store.replace("from/a[1]", b"new")
    store.replace("to/b", b"old")
    store.rename("from/a[1]", "to/b")
    store.rename("from/a[1]", "to/b")
    assert store.read("to/b") == b"new"
    assert not store.exists("from/a[1]")
    store.replace("from/a[1]", b"new")
    store.rename("from/a[1]", "far/away/c")
    assert store.read("far/away/c") == b"new"
    with pytest.raises(FileNotFoundError):
        store.rename("from/a[1]", "nowhere")


def test_of_two_renames_at_once_one_may_be_slower(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.replace("from", b"bytes")
    owner, name = (os, "replace") if store.local else (type(store._fs), "cp_file")
    real = getattr(owner, name)

    def slow(*arguments: object) -> None:
        monkeypatch.setattr(owner, name, real)
        store.rename("from", "to")
        real(*arguments)

    monkeypatch.setattr(owner, name, slow)
    store.rename("from", "to")
    assert store.read("to") == b"bytes"
    assert not store.exists("from")


def test_a_rename_that_fails_loses_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.replace("from", b"new")
    store.replace("to", b"old")
    owner, name = (os, "replace") if store.local else (type(store._fs), "cp_file")

    def fail(*_: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(PermissionError):
        store.rename("from", "to")
    assert (store.read("from"), store.read("to")) == (b"new", b"old")


def test_remove_folder(store: Store) -> None:
    store.replace("x/y/z", b"1")
    store.replace("xy", b"2")
    store.remove_folder("x")
    store.remove_folder("x")
    assert store.list("") == ["xy"]


def test_a_remote_name_has_no_local_path(tmp_path: Path) -> None:
    assert Store(str(tmp_path)).path("a") == f"{tmp_path}/a"
    with pytest.raises(TypeError, match="memory://x/a has no local path"):
        Store("memory://x").path("a")


@given(st.binary(max_size=64), st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70))))
def test_a_remote_file_reads_as_a_local_one(data: bytes, reads: list[tuple[int, int]]) -> None:
    store = Store("memory://ranged")
    store.replace("x", data)
    with store.open("x") as file:
        for start, length in reads:
            assert file.seek(start) == start
            assert file.read(length) == data[start : start + length]
        file.seek(0)
        assert file.read() == data


def test_the_folder_of_what_lies_directly_under_the_root_is_the_root() -> None:
    assert split_url("/x.txt") == ("/", "x.txt")
    with pytest.raises(FileNotFoundError):
        read_url("/no-such-file.txt")
    assert "tmp" in Store("/").list("")


def test_all_files_below_a_folder_with_their_bytes(tmp_path: Path) -> None:
    Flaky.reset()
    for store in (Store(tmp_path), Store("flaky://home/files")):
        assert store.files("a") == {}
        for name in ("a/b/c", "a/.d.tmp-1", "a/é e", "ab"):
            store.replace(name, b"12345")
        assert store.files("a") == {".d.tmp-1": 5, "b/c": 5, "é e": 5}
        assert list(store.files("")) == ["a/.d.tmp-1", "a/b/c", "a/é e", "ab"]
    Flaky.reset()


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / "old").write_bytes(b"1")
    (tmp_path / "locked").chmod(0o500)
    code = f"""
from clip_batch.storage.store import Store
store = Store({str(tmp_path / "locked")!r})
for act in (
    lambda: store.create("a.json", b"1"),
    lambda: store.replace("deep/a.json", b"1"),
    lambda: store.rename("old", "new"),
    lambda: store.remove("old"),
):
    try:
        act()
    except PermissionError as error:
        print(error)
"""
    done = unprivileged(["-c", code])
    (tmp_path / "locked").chmod(0o700)
    remedy = f"get the right to write in {tmp_path}/locked, or name another folder"
    names = ("a.json", "deep/a.json", "new", "old")
    assert done.stdout.splitlines() == [
        f"{tmp_path}/locked/{name} may not be written (Permission denied): {remedy}" for name in names
    ], done.stderr
    assert [path.name for path in (tmp_path / "locked").iterdir()] == ["old"]
