"""Filesystems opened with their options, and conditional writes."""

from __future__ import annotations

import errno

import pytest

from clip_batch.errors import InputError
from clip_batch.storage.filesystem import filesystem, protocol_options, put_if_absent
from clip_batch.storage.store import Store


def test_a_missing_protocol_is_one_line() -> None:
    with pytest.raises(InputError, match="cannot open nonsense://x"):
        Store("nonsense://x")


def test_options_of_another_protocol_are_left_out() -> None:
    fs, _ = filesystem("memory://x", {"block": 1, "s3": {"key": "secret"}, "memory": {"block": 2}, "dir": "name"})
    assert fs.storage_options == {"use_listings_cache": False, "block": 2, "dir": "name"}


def test_options_go_to_their_protocol_by_any_of_its_names() -> None:
    options = {"timeout": 5, "gs": {"token": "anon"}, "s3a": {"key": "k", "timeout": 7}, "hdfs": {"dfs.replication": 1}}
    assert protocol_options("gcs", options) == protocol_options("gs", options) == {"timeout": 5, "token": "anon"}
    assert protocol_options("s3", options) == {"timeout": 7, "key": "k"}
    assert protocol_options("https", options) == {"timeout": 5}


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
