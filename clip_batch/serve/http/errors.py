"""Exceptions that refuse a request; `responses.refusal` turns them into an HTTP response."""

from __future__ import annotations

from clip_batch.errors import ClipBatchError


class Refused(ClipBatchError):
    """The request is answered with HTTP status `status`. `field` names the part of it that is wrong, if any."""

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.field = status, field


class Busy(Refused):
    """The service has too much to do. The client may try again in `after` seconds."""

    def __init__(self, message: str, status: int = 503, after: int = 1) -> None:
        super().__init__(status, f"{message}: ask again in {after} s")
        self.after = after


class KnownProblem(Busy):
    """The service cannot do this until somebody mends it: `problem` says what is wrong. It tries again by itself."""

    def __init__(self, problem: str, after: int) -> None:
        super().__init__(problem, after=after)
        self.problem = problem
