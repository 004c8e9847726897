from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_batch.errors import InputError
from clip_batch.storage import retry
from clip_batch.storage.filesystem import filesystem, own_options, put_if_absent
from clip_batch.storage.retry import Unavailable, ask, redact
from clip_batch.storage.store import Store
from clip_batch.types import format_numbers, parse_numbers


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


def test_rename_may_be_done_by_several_and_again(store: Store) -> None:
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


def test_one_of_two_movers_may_be_slower(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_missing_protocol_is_one_line() -> None:
    with pytest.raises(InputError, match="cannot open nonsense://x"):
        Store("nonsense://x")


def test_a_remote_name_has_no_local_path(tmp_path: Path) -> None:
    assert Store(str(tmp_path)).path("a") == f"{tmp_path}/a"
    with pytest.raises(TypeError, match="memory://x/a has no local path"):
        Store("memory://x").path("a")


def test_options_of_another_protocol_are_left_out() -> None:
    fs, _ = filesystem("memory://x", {"block": 1, "s3": {"key": "secret"}, "memory": {"block": 2}, "dir": "name"})
    assert fs.storage_options == {"use_listings_cache": False, "block": 2, "dir": "name"}


@given(st.text(min_size=4), st.sampled_from(["secret", "token", "aws_session_token", "password", "key"]), st.booleans())
def test_no_error_shows_a_secret(secret: str, name: str, deep: bool) -> None:
    options = {"client_kwargs": {name: secret}} if deep else {name: secret}

    def fail() -> None:
        raise PermissionError(f"<{secret}>")

    with pytest.raises(PermissionError) as caught:
        ask(fail, "reading s3://x", options)
    if secret not in "reading s3://x: refused: <...>; renew the credentials (environment or --storage-options) or get":
        assert secret not in str(caught.value).partition("; renew")[0].replace("...", "")
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_no_error_shows_credentials_of_a_url() -> None:
    url = "https://user:pass@host/x.tar?X-Amz-Signature=abc&X-Amz-Credential=def&partNumber=1"
    assert redact(url) == "https://...@host/x.tar?X-Amz-Signature=...&X-Amz-Credential=...&partNumber=1"


def test_no_error_shows_a_key_of_several_lines() -> None:
    options = {"gs": {"token": {"private_key": "BEGIN\na b\nEND\n"}}}
    assert redact("bad key: BEGIN a b END, ours", options) == "bad key: ..., ours"


@pytest.mark.parametrize(
    ("error", "calls", "kind"),
    [
        (FileNotFoundError("x"), 1, FileNotFoundError),
        (FileExistsError("x"), 1, FileExistsError),
        (PermissionError("x"), 1, PermissionError),
        (TypeError("x"), 1, InputError),
        (ConnectionResetError("x"), retry.TRIES, Unavailable),
        (RuntimeError("RPCError(x\n\tat java.base/java.lang.Thread.run(Thread.java:840))"), retry.TRIES, Unavailable),
        (OSError(errno.EBUSY, "SlowDown"), retry.TRIES, Unavailable),
        (OSError(errno.ENOSPC, "No space left"), 1, Unavailable),
        (RuntimeError("RPCError(org.apache.hadoop.security.AccessControlException)"), retry.TRIES, PermissionError),
    ],
)
def test_what_is_tried_again(
    error: Exception, calls: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.0)
    called = []

    def fail() -> None:
        called.append(1)
        raise error

    with pytest.raises(kind, match=r"^reading s3://x: ") as caught:
        ask(fail, "reading s3://x")
    assert len(called) == calls
    assert "\n" not in str(caught.value) and "java" not in str(caught.value) and "Errno" not in str(caught.value)


class Server:
    """An object store whose answers to a conditional write are given."""

    protocol = ("s3", "s3a")

    def __init__(self, answer: Exception | None) -> None:
        self.answer, self.written = answer, b""

    def pipe_file(self, path: str, data: bytes, mode: str = "overwrite") -> None:
        if mode == "create" and self.answer:
            raise self.answer
        self.written = data


class Answer(Exception):
    def __init__(self, status: int, code: str = "") -> None:
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


def caused(cause: Exception) -> OSError:
    error = OSError(errno.EINVAL, "At least one of the pre-conditions you specified did not hold")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "answer", [FileExistsError(), Answer(412), caused(Answer(412)), Answer(400, "PreconditionFailed")]
)
def test_each_way_to_refuse_is_understood(answer: Exception) -> None:
    server = Server(answer)
    assert not put_if_absent(server, "x", b"1")
    assert server.written == b""


def test_a_server_without_conditions_writes() -> None:
    server = Server(OSError(errno.ENOSYS, "NotImplemented"))
    assert put_if_absent(server, "x", b"1")
    assert server.written == b"1"
    with pytest.raises(OSError, match="down"):
        put_if_absent(Server(OSError(errno.EBUSY, "down")), "x", b"1")


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


@given(st.sets(st.integers(0, 10_000)))
def test_numbers_round_trip(numbers: set[int]) -> None:
    text = format_numbers(numbers)
    assert not numbers or parse_numbers(text) == sorted(numbers)


def test_options_go_to_their_protocol_by_any_of_its_names() -> None:
    options = {"timeout": 5, "gs": {"token": "anon"}, "s3a": {"key": "k", "timeout": 7}, "hdfs": {"dfs.replication": 1}}
    assert own_options("gcs", options) == own_options("gs", options) == {"timeout": 5, "token": "anon"}
    assert own_options("s3", options) == {"timeout": 7, "key": "k"}
    assert own_options("https", options) == {"timeout": 5}
