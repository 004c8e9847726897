"""Whether a server may listen at a host and port: asked before any work, and before it says that it serves."""

from __future__ import annotations

import socket

from clip_batch.config import ServeConfig
from clip_batch.errors import ClipBatchError


def check_port(config: ServeConfig) -> None:
    """Listen at host and port for a moment. ClipBatchError: another process does, or this one may not."""
    host, port = config.host, config.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            listener.bind(address)
            listener.listen()
    except OSError as error:
        raise ClipBatchError(
            f"nothing can be served at {host}:{port}: {error.strerror or error}; give another --port, or --host"
        ) from None
