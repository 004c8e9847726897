"""What a request can be refused for, and how that is answered."""

from __future__ import annotations

from clip_batch.errors import ClipBatchError


class Refused(ClipBatchError):
    """A request that is answered with `status`; `field` names what is wrong in it, where something is."""

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.field = status, field


class Busy(Refused):
    """More waits than may: ask again in `after` seconds."""

    def __init__(self, message: str, status: int = 503, after: int = 1) -> None:
        super().__init__(status, f"{message}: ask again in {after} s")
        self.after = after
