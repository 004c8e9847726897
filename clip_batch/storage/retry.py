"""Trying again: what goes away by itself (a busy store, a reset connection, a timeout) is retried, nothing else."""

from __future__ import annotations

import contextlib
import errno
import random
import re
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, TypeVar

from clip_batch.errors import ClipBatchError, CorruptError, InputError, one_line

T = TypeVar("T")

TRIES = 6
"""Calls in all, before an error that may pass counts as one that does not."""

LONGEST = 240.0
"""Seconds after which no other try begins: hdfs-native alone waits for three minutes for a dead NameNode."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0
"""Seconds: a pause is drawn from between half of 0.5, 1, 2, 4, ... and all of it, 20 at the most."""

_FINAL = (
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
"""What a second call would only say again."""

_FINAL_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EINVAL, errno.ENOSYS, errno.ENAMETOOLONG}
"""Of this machine's disk, and s3fs's numbers for requests that are wrong in themselves."""


def transient(error: BaseException) -> bool:
    """True for what may go away: each store has errors of its own, so all but what is known to stay.

    HTTP errors carry their status: 408, 425, 429 and 5xx pass, the others stay. So do errors about
    credentials, whatever they derive from.
    """
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and type(cause).__module__.startswith("aiohttp"):
        assert cause is not None  # fsspec takes any answer but 200 for "not found"
        return transient(cause)
    if not isinstance(error, Exception) or isinstance(error, _FINAL) or "Credential" in type(error).__name__:
        return False
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in (408, 425, 429)
    return getattr(error, "errno", None) not in _FINAL_NUMBERS


def retried(call: Callable[[], T], what: str, wait: Callable[[float], object] = time.sleep) -> T:
    """What `call` returns, called up to TRIES times with growing random pauses between.

    An error that stays is raised as it is, at once. After the last try an OSError says `what`
    ("reading s3://bucket/a.tar") and what the store said, caused by the store's own error. `wait`
    takes the seconds of a pause, and may raise to end the waiting.
    """
    started = time.monotonic()
    for number in count(1):
        try:
            return call()
        except Exception as error:
            if not transient(error):
                raise
            if number == TRIES or time.monotonic() - started > LONGEST:
                said = one_line(error)
                raise OSError(f"{what}: {said} ({number} tries); run again once the store answers") from error
        wait(min(FIRST_PAUSE * 2 ** (number - 1), LONGEST_PAUSE) * random.uniform(0.5, 1))
    raise AssertionError  # count() does not end


_SECRET = re.compile(r"key|secret|token|password|credential|signature|sas", re.IGNORECASE)


_IN_URLS = re.compile(
    r"(?i)((?:x-amz-|x-goog-)[a-z-]+|sig|signature|token|awsaccesskeyid)=[^&\s'\"]+|(?<=://)[^/\s@]+@"
)


class Unavailable(OSError):
    """A store does not answer for now. That says nothing about the files it holds."""


@contextlib.contextmanager
def corrupt_unless_unavailable(what: str, remedy: str, *parse_errors: type[Exception]) -> Iterator[None]:
    """Raise CorruptError "{what} ({error}): {remedy}" where the block cannot read a file.

    Covers OSError and the `parse_errors` of the file's format. Unavailable and PermissionError pass unchanged, as
    they say nothing about the file: `repair` would otherwise retire sound commits while a store is down.
    """
    unreadable: tuple[type[Exception], ...] = (OSError, *parse_errors)
    try:
        yield
    except (Unavailable, PermissionError):
        raise
    except unreadable as error:
        raise CorruptError(f"{what} ({one_line(error, 200)}): {remedy}") from None


def ask(
    call: Callable[[], T],
    what: str,
    options: dict[str, Any] | None = None,
    wait: Callable[[float], object] = time.sleep,
) -> T:
    """What an operation of a remote filesystem gives, tried again while its trouble may pass.

    Every error of the store comes out as an OSError (FileNotFoundError, FileExistsError, PermissionError
    where it is one, else Unavailable) of one line that says `what` was done where, without credentials.
    InputError where the URL or an option is wrong, which some find out at the first request only.
    """
    try:
        return retried(call, what, wait)
    except (ClipBatchError, AssertionError, AttributeError, LookupError, NotImplementedError):  # no word of a store's
        raise
    except (TypeError, ValueError) as error:
        said = redact(f"{what}: {first_line(error)}", options)
        raise InputError(f"{said}; mend the URL or --storage-options") from None
    except Exception as error:
        raise _told(error, what, options) from None


def _told(error: Exception, what: str, options: dict[str, Any] | None) -> OSError:
    said = re.sub(r"\[Errno \d+\] ", "", redact(first_line(error).removeprefix(f"{what}: "), options))
    what = redact(what)
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{what}: there is no such file")
    if isinstance(error, FileExistsError):
        return FileExistsError(f"{what}: it is there already")
    if isinstance(error, PermissionError) or _about_credentials(error):
        mend = "renew the credentials (environment or --storage-options) or get the right, then run it again"
        return PermissionError(f"{what}: refused: {said}; {mend}")
    told = Unavailable(f"{what}: {said}")
    told.errno = getattr(error, "errno", None)
    return told


def _about_credentials(error: Exception) -> bool:
    names = " ".join([type(error).__name__, *codes(error)])
    return bool(re.search(r"Credential|Token|401|403", names)) or "AccessControlException" in str(error)  # HDFS's word


def codes(error: BaseException) -> Iterator[str]:
    """What an error and its causes carry as codes: the store's word for it, the HTTP status, both or none."""
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


def first_line(error: BaseException) -> str:
    """What an error says, without Java's stack."""
    return one_line(re.sub(r"(\\n\\t|\s+)at [\w.$<>/]+\([^)]*\)", "", str(error))) or type(error).__name__


def redact(text: str, options: dict[str, Any] | None = None) -> str:
    """A text without the secret values of options, and without credentials within URLs."""
    for value in _secrets(options or {}):
        for form in (value, " ".join(value.split())):  # a key of several lines, in what became one
            text = text.replace(form, "...")
    return _IN_URLS.sub(lambda found: f"{found[1]}=..." if found[1] else "...@", text)


def _secrets(options: dict[str, Any], secret: bool = False) -> Iterator[str]:
    for name, value in options.items():
        hidden = secret or bool(_SECRET.search(name))
        if isinstance(value, dict):
            yield from _secrets(value, hidden)
        elif hidden and isinstance(value, str) and len(value) > 3:
            yield value
