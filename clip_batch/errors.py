"""The exception tree. Each message is one line: what, where, and how to mend it.

ClipBatchError
|-- ConfigError      a flag, key or variable is wrong                         exit 2
|-- InputError       an input that was planned is missing or changed          exit 1
|-- PlanError        there is no plan, or it does not fit what is asked       exit 2
|-- EncoderError     a model cannot be loaded or is not the planned one       exit 2
|-- PartitionFailed  a policy says that too much of a partition is bad        exit 1
|-- IncompleteError  what is asked needs partitions that are not committed    exit 1
|-- CorruptError     stored bytes are not the bytes that were committed       exit 1
|-- DatabaseError    a database cannot be reached, or holds something else  exit 1
|-- ServiceError     a search service refuses a request of our client         exit 1
|   `-- ServiceUnavailable  it cannot be reached, or has no time now          exit 1
`-- Preempted        a signal asked the worker to stop; run it again          exit 75
"""

from __future__ import annotations


class ClipBatchError(Exception):
    """Base of every error that clip-batch raises on purpose."""

    exit_code = 1


class ConfigError(ClipBatchError):
    """A flag, a configuration key or an environment variable is wrong."""

    exit_code = 2


class InputError(ClipBatchError):
    """An input is missing, cannot be read, or changed since it was planned."""


class PlanError(ClipBatchError):
    """There is no plan at this output, or it does not fit what is asked."""

    exit_code = 2


class EncoderError(ClipBatchError):
    """A model cannot be loaded, or it is not the one that was planned."""

    exit_code = 2


class PartitionFailed(ClipBatchError):
    """A policy says that too many samples, or a shard, of a partition are bad."""


class IncompleteError(ClipBatchError):
    """What is asked needs partitions that are not committed yet."""


class CorruptError(ClipBatchError):
    """Stored bytes are not the bytes that were committed."""


class DatabaseError(ClipBatchError):
    """A database cannot be reached, refuses what is asked, or does not hold what it should."""


class ServiceError(ClipBatchError):
    """A search service refuses a request of `Client`; `status` is HTTP's, None where there was no answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ServiceUnavailable(ServiceError):
    """A search service cannot be reached, or has no time now: ask again later."""


class Preempted(ClipBatchError):
    """A signal asked the worker to stop; nothing is half done, run it again."""

    exit_code = 75

    def __init__(self) -> None:
        super().__init__("stopped by a signal; what is committed stays, run the same command again")


def one_line(error: object, limit: int | None = None) -> str:
    """An error's message on one line, at most `limit` characters; an exception without a message gives its type's name.

    Example: `one_line(OSError("disk\\nfull"))` is "disk full".
    """
    text = " ".join(str(error).split())
    return (text or (type(error).__name__ if isinstance(error, BaseException) else ""))[:limit]
