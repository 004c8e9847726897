"""The errors that clip-batch raises on purpose. Each message is one line that says what, where, and what to do.

    error                       when                                                             exit code
    ClipBatchError              the base of all others
    |-- ConfigError             a flag, a key or a variable is wrong                             2
    |-- InputError              an input is missing, unreadable, or not as it was planned        1
    |-- PlanError               there is no plan, or it does not fit the request                 2
    |-- EncoderError            a model cannot be loaded, or is not the planned one              2
    |-- DecodeError             an image cannot be used                                          1
    |-- PartitionFailed         more of a partition is bad than a policy allows                  1
    |-- IncompleteError         the request needs partitions that are not committed              1
    |-- ConflictError           another command has changed meanwhile what this one began from   1
    |-- CorruptError            stored bytes are not the bytes that were committed               1
    |-- StorageUnavailable      a store does not answer for now; it is an OSError too            1
    |-- DatabaseError           a database cannot be reached, or holds something else            1
    |-- ServiceError            a search service refuses a request of `Client`                   1
    |   `-- ServiceUnavailable  it cannot be reached, or has no time now                         1
    `-- Preempted               a signal asked the worker to stop; run the same command again    75

Files that are absent, exist already or may not be read raise Python's own FileNotFoundError, FileExistsError and
PermissionError, from remote stores too. ValueError and TypeError are mistakes of the calling program.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class ClipBatchError(Exception):
    """Base of every error that clip-batch raises on purpose."""

    exit_code = 1
    """The exit code of a command that ends with this error."""


class ConfigError(ClipBatchError):
    """A flag, a configuration key or an environment variable is wrong."""

    exit_code = 2


class InputError(ClipBatchError):
    """An input is missing, cannot be read, or changed since it was planned."""


class PlanError(ClipBatchError):
    """There is no plan at this output, or it does not fit the request."""

    exit_code = 2


class EncoderError(ClipBatchError):
    """A model cannot be loaded, or it is not the one that was planned."""

    exit_code = 2


class DecodeError(ClipBatchError):
    """An image cannot be used; `reason` is one of `clip_batch.types.SAMPLE_REASONS`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message

    def __reduce__(self) -> tuple[type[DecodeError], tuple[str, str]]:
        return type(self), (self.reason, self.message)


class PartitionFailed(ClipBatchError):
    """A policy says that too many samples, or a shard, of a partition are bad."""


class IncompleteError(ClipBatchError):
    """The request needs partitions that are not committed yet."""


class ConflictError(ClipBatchError):
    """Another command has changed meanwhile what this one began from: run it again."""


class CorruptError(ClipBatchError):
    """Stored bytes are not the bytes that were committed."""


class StorageUnavailable(ClipBatchError, OSError):
    """A store does not answer for now, which says nothing about the files that it holds."""


class DatabaseError(ClipBatchError):
    """A database cannot be reached, refuses a request, or does not hold what it should."""


class ServiceError(ClipBatchError):
    """A search service refuses a request of `Client`; `status` is the HTTP status, None without an answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ServiceUnavailable(ServiceError):
    """A search service cannot be reached, or has no time now: ask again later."""


class Preempted(ClipBatchError):
    """A signal asked the worker to stop; nothing is half done, so that the same command can be run again."""

    exit_code = 75

    def __init__(self) -> None:
        super().__init__("stopped by a signal; what is committed stays, run the same command again")

    def __reduce__(self) -> tuple[type[Preempted], tuple[()]]:
        return type(self), ()


def one_line(error: object, limit: int | None = None) -> str:
    """An error's message on one line, at most `limit` characters; an exception without a message gives its type's name.

    Example: `one_line(OSError("disk\\nfull"))` is "disk full".
    """
    text = " ".join(str(error).split())
    return (text or (type(error).__name__ if isinstance(error, BaseException) else ""))[:limit]


def some(names: Sequence[str], most: int = 5) -> str:
    """The first `most` names of a list as text, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
