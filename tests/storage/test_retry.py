"""Retries, and what the errors of a store become."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_batch.errors import CorruptError, InputError, StorageUnavailable
from clip_batch.storage import retry
from clip_batch.storage.retry import (
    TRIES,
    call_store,
    corrupt_unless_unavailable,
    is_transient,
    redact,
    with_retries,
)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.001)


@pytest.mark.parametrize("error", [FileNotFoundError, FileExistsError, PermissionError, ValueError, InputError])
def test_a_permanent_error_is_raised_at_once(error: type[Exception]) -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        raise error("no")

    with pytest.raises(error):
        with_retries(call, "reading x")
    assert len(calls) == 1


def test_the_last_try_ends_with_an_error_of_one_line() -> None:
    pauses: list[float] = []

    def call() -> None:
        raise TimeoutError("the store\n  is asleep")

    with pytest.raises(OSError, match=rf"^reading x: the store is asleep \({TRIES} tries\); run again") as caught:
        with_retries(call, "reading x", pauses.append)
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert len(pauses) == TRIES - 1
    assert all(0.0005 * 2**number <= pause <= 0.001 * 2**number for number, pause in enumerate(pauses))


def test_an_http_status_says_whether_an_error_is_transient() -> None:
    def answer(status: int) -> Exception:
        error = Exception()
        error.status = status  # type: ignore[attr-defined]
        return error

    assert [status for status in (400, 403, 404, 408, 416, 429, 500, 503) if is_transient(answer(status))] == [
        408,
        429,
        500,
        503,
    ]
    assert not is_transient(OSError(errno.ENOSPC, "disk full"))
    assert not is_transient(KeyboardInterrupt())
    assert not is_transient(type("NoCredentialsError", (Exception,), {})())


@pytest.mark.parametrize(
    ("error", "calls", "kind"),
    [
        (FileNotFoundError("x"), 1, FileNotFoundError),
        (FileExistsError("x"), 1, FileExistsError),
        (PermissionError("x"), 1, PermissionError),
        (TypeError("x"), 1, InputError),
        (ConnectionResetError("x"), retry.TRIES, StorageUnavailable),
        (
            RuntimeError("RPCError(x\n\tat java.base/java.lang.Thread.run(Thread.java:840))"),
            retry.TRIES,
            StorageUnavailable,
        ),
        (OSError(errno.EBUSY, "SlowDown"), retry.TRIES, StorageUnavailable),
        (OSError(errno.ENOSPC, "No space left"), 1, StorageUnavailable),
        (RuntimeError("RPCError(org.apache.hadoop.security.AccessControlException)"), retry.TRIES, PermissionError),
    ],
)
def test_which_errors_are_retried(
    error: Exception, calls: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.0)
    called = []

    def fail() -> None:
        called.append(1)
        raise error

    with pytest.raises(kind, match=r"^reading s3://x: ") as caught:
        call_store(fail, "reading s3://x")
    assert len(called) == calls
    assert "\n" not in str(caught.value) and "java" not in str(caught.value) and "Errno" not in str(caught.value)


@given(st.text(min_size=4), st.sampled_from(["secret", "token", "aws_session_token", "password", "key"]), st.booleans())
def test_no_error_shows_a_secret(secret: str, name: str, deep: bool) -> None:
    options = {"client_kwargs": {name: secret}} if deep else {name: secret}

    def fail() -> None:
        raise PermissionError(f"<{secret}>")

    with pytest.raises(PermissionError) as caught:
        call_store(fail, "reading s3://x", options)
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
    "error", [OSError("bad\n  bytes"), FileNotFoundError("bad bytes"), KeyError("bad bytes"), ValueError("bad bytes")]
)
def test_a_file_that_cannot_be_read_is_corrupt(error: Exception) -> None:
    with (
        pytest.raises(CorruptError, match=r"^s3://x is not a readable y \('?bad bytes'?\): copy it again$"),
        corrupt_unless_unavailable("s3://x is not a readable y", "copy it again", ValueError, KeyError),
    ):
        raise error


@pytest.mark.parametrize(
    "error", [StorageUnavailable("busy"), PermissionError("no"), ValueError("bug"), CorruptError("x: y")]
)
def test_a_store_that_does_not_answer_is_not_corrupt(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, corrupt_unless_unavailable("s3://x is not readable", "copy it again"):
        raise error
    assert caught.value is error
