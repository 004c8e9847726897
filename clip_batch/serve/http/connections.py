"""Connections that take long: those that send no request, send one slowly, or do not read what they asked for.

uvicorn closes a connection only after an answer. Here each one must send the header of a request within a time, must
read what it is sent, and gives way when there are too many.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

if TYPE_CHECKING:
    from clip_batch.config import ServeConfig

STALLED = 30.0
"""Seconds in which a client must read some of what waits to be sent to it."""

_Base: Any = AutoHTTPProtocol


def protocol(config: ServeConfig) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol of HTTP/1.1 with the bounds that the options set."""
    waiting: dict[Connection, None] = {}  # in the order in which they began to wait for a request

    class Connection(_Base):  # type: ignore[misc]
        """A connection that is closed if it takes too long, or if it waits while too many others do."""

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._since, self._unsent = self.loop.time(), 0
            self._timer: asyncio.TimerHandle | None = None
            if len(self.connections) > config.max_connections:
                oldest = next(iter(waiting), self)
                waiting.pop(oldest, None)
                oldest.transport.abort()
            waiting[self] = None
            self._look()

        def connection_lost(self, exc: Exception | None) -> None:
            waiting.pop(self, None)
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._note()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._note()

        def _note(self) -> None:
            """Note whether this connection waits for the header of a request, and since when."""
            if self.cycle is not None and not self.cycle.response_complete:
                waiting.pop(self, None)
            elif self not in waiting and not self.transport.is_closing():
                waiting[self] = None
                self._since = self.loop.time()

        def _look(self) -> None:
            """Close the connection if it has waited, or has not been read, for too long; otherwise look again later."""
            now, unsent = self.loop.time(), self.transport.get_write_buffer_size()
            if unsent and unsent != self._unsent:
                self._since, self._unsent = now, unsent
            if (unsent and now - self._since >= STALLED) or (
                not unsent and self in waiting and now - self._since >= config.header_timeout
            ):
                self.transport.abort()
                return
            self._timer = self.loop.call_later(min(1.0, config.header_timeout / 4), self._look)

    return Connection
