"""Calls to a remote store: repeated while the error may pass, and every error an OSError of one line.

All of storage/ goes through `call_store`, so that no two layers of retries multiply.
"""

from __future__ import annotations

import contextlib
import errno
import random
import re
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, TypeVar

from clip_batch.errors import ClipBatchError, CorruptError, InputError, StorageUnavailable, one_line

T = TypeVar("T")

Sleep = Callable[[float], object]
"""`time.sleep`, or a function that waits likewise and may raise to end the waiting."""

TRIES = 6
"""Calls before a transient error is raised."""

LONGEST = 240.0
"""Seconds after which no other call begins: hdfs-native alone waits for three minutes for a dead NameNode."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0
"""Seconds: pauses are drawn from the upper half of 0.5, 1, 2, 4, ..., at most 20."""


def call_store(call: Callable[[], T], what: str, options: dict[str, Any] | None = None, sleep: Sleep = time.sleep) -> T:
    """Return what an operation of a remote filesystem returns, after retries where it fails.

    `what` names the operation and the file ("reading s3://bucket/a.tar"). Errors of the store are raised as
    FileNotFoundError, FileExistsError, PermissionError or else StorageUnavailable, of one line that begins with `what`
    and shows no credentials; InputError where the URL or one of the `options` is wrong, which some filesystems only
    notice at the first request.
    """
    try:
        return with_retries(call, what, sleep)
    except StorageUnavailable as error:  # of a call within this one
        raise _as_os_error(error, what, options) from None
    except (ClipBatchError, AssertionError, AttributeError, LookupError, NotImplementedError):
        raise  # our own errors, and programming errors
    except (TypeError, ValueError) as error:
        message = redact(f"{what}: {message_of(error)}", options)
        raise InputError(f"{message}; check the URL and --storage-options") from None
    except Exception as error:
        raise _as_os_error(error, what, options) from None


def with_retries(call: Callable[[], T], what: str, sleep: Sleep = time.sleep) -> T:
    """Return what `call` returns, calling it up to TRIES times with growing random pauses in between.

    An error that is not transient is raised at once, unchanged. After the last call an OSError names `what` and
    quotes the store's error, which is its cause.
    """
    started = time.monotonic()
    for number in count(1):
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            if number == TRIES or time.monotonic() - started > LONGEST:
                message = f"{what}: {one_line(error)} ({number} tries); run again once the store answers"
                raise OSError(message) from error
        sleep(min(FIRST_PAUSE * 2 ** (number - 1), LONGEST_PAUSE) * random.uniform(0.5, 1))
    raise AssertionError  # count() does not end


def is_transient(error: BaseException) -> bool:
    """Whether an error may go away by itself.

    Stores raise errors of many types, so every error counts as transient except those known to stay: the types and
    numbers below, HTTP statuses 400 to 499 other than 408, 425 and 429, and errors about credentials.
    """
    if isinstance(error, StorageUnavailable):
        return error.errno not in _PERMANENT_NUMBERS
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and type(cause).__module__.startswith("aiohttp"):
        assert cause is not None  # fsspec reports every status but 200 as "not found"
        return is_transient(cause)
    if not isinstance(error, Exception) or isinstance(error, _PERMANENT) or "Credential" in type(error).__name__:
        return False
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in (408, 425, 429)
    return getattr(error, "errno", None) not in _PERMANENT_NUMBERS


_PERMANENT = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ClipBatchError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    NotImplementedError,
    ImportError,
    AssertionError,
    MemoryError,
)
"""Errors that a second call would only raise again."""

_PERMANENT_NUMBERS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENAMETOOLONG),  # this machine's disk
    *(errno.EINVAL, errno.ENOSYS),  # s3fs's numbers for wrong requests
}


@contextlib.contextmanager
def corrupt_unless_unavailable(what: str, remedy: str, *parse_errors: type[Exception]) -> Iterator[None]:
    """Raise CorruptError "{what} ({error}): {remedy}" where the block cannot read a file.

    Covers OSError and the `parse_errors` of the file's format. StorageUnavailable and PermissionError pass
    unchanged, as they say nothing about the file: `repair` would otherwise retire sound commits while a store is down.
    """
    unreadable: tuple[type[Exception], ...] = (OSError, *parse_errors)
    try:
        yield
    except (StorageUnavailable, PermissionError):
        raise
    except unreadable as error:
        raise CorruptError(f"{what} ({one_line(error, 200)}): {remedy}") from None


def message_of(error: BaseException) -> str:
    """An error's message on one line, without the stack traces of Java."""
    return one_line(re.sub(r"(\\n\\t|\s+)at [\w.$<>/]+\([^)]*\)", "", str(error))) or type(error).__name__


def error_codes(error: BaseException) -> Iterator[str]:
    """The codes that an error and its causes carry: the store's name for the error, and HTTP statuses."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            yield str(response.get("Error", {}).get("Code", ""))
            yield str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
        status = getattr(cause, "status", None) or getattr(cause, "code", None)  # aiohttp's `code` warns
        if isinstance(status, int):
            yield str(status)
        cause = cause.__cause__


def redact(text: str, options: dict[str, Any] | None = None) -> str:
    """A text without the secret values of `options`, and without the credentials in URLs."""
    for value in _secrets(options or {}):
        for form in (value, " ".join(value.split())):  # `one_line` may have joined a key's lines
            text = text.replace(form, "...")
    return _CREDENTIALS.sub(lambda match: f"{match[1]}=..." if match[1] else "...@", text)


_SECRET = re.compile(r"key|secret|token|password|credential|signature|sas", re.IGNORECASE)
"""Part of the name of an option whose value is secret."""

_CREDENTIALS = re.compile(
    r"(?i)((?:x-amz-|x-goog-)[a-z-]+|sig|signature|token|awsaccesskeyid)=[^&\s'\"]+|(?<=://)[^/\s@]+@"
)
"""Credentials in a URL: signed parameters, and what stands before the host."""


def _secrets(options: dict[str, Any], secret: bool = False) -> Iterator[str]:
    for name, value in options.items():
        hidden = secret or bool(_SECRET.search(name))
        if isinstance(value, dict):
            yield from _secrets(value, hidden)
        elif hidden and isinstance(value, str) and len(value) > 3:
            yield value


def _as_os_error(error: Exception, what: str, options: dict[str, Any] | None) -> OSError:
    message = re.sub(r"\[Errno \d+\] ", "", redact(message_of(error).removeprefix(f"{what}: "), options))
    what = redact(what)
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{what}: there is no such file")
    if isinstance(error, FileExistsError):
        return FileExistsError(f"{what}: the file exists already")
    if isinstance(error, PermissionError) or _is_refusal(error):
        remedy = "renew the credentials (environment or --storage-options) or get the right, then run it again"
        return PermissionError(f"{what}: refused: {message}; {remedy}")
    unavailable = StorageUnavailable(f"{what}: {message}")
    unavailable.errno = getattr(error, "errno", None)
    return unavailable


def _is_refusal(error: Exception) -> bool:
    names = " ".join([type(error).__name__, *error_codes(error)])
    return bool(re.search(r"Credential|Token|401|403", names)) or "AccessControlException" in str(error)  # HDFS
