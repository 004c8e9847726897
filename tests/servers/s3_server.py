"""An S3 server (moto) for the tests, behind a proxy that injects faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from tests.servers.processes import free_ports
from tests.servers.proxy import Proxied, proxied, request, wait_for

SECRET = "topsecretvalue"
BUCKET = "bucket"


def _error(code: str, message: str) -> str:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"


class S3(Proxied):
    """The server behind its proxy, and the options of its clients."""

    bucket = f"s3://{BUCKET}"
    answers: ClassVar[dict[str, tuple[int, str]]] = {
        "slow down": (503, _error("SlowDown", "Please reduce your request rate.")),
        "internal": (500, _error("InternalError", "We encountered an internal error. Please try again.")),
        "expired": (403, _error("ExpiredToken", f"The provided token has expired: {SECRET}")),
        "unknown header": (501, _error("NotImplemented", "A header you provided is not implemented")),
    }

    @property
    def options(self) -> dict[str, Any]:
        return {"endpoint_url": self.endpoint, "key": "key", "secret": SECRET}

    @property
    def env(self) -> dict[str, str]:
        """The environment of a command line that uses the server."""
        return {**os.environ, "CLIP_BATCH_STORAGE_OPTIONS": json.dumps(self.options), "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    """A server with a bucket, which runs for the whole session."""
    [port] = free_ports(1)
    # The server ends with its standard input, so that it does not outlive a test run that is killed.
    script = (
        "import sys, threading, os; from moto.server import ThreadedMotoServer as Server; "
        f"Server('127.0.0.1', {port}, verbose=False).start(); sys.stdin.read(); os._exit(0)"
    )
    command = [sys.executable, "-c", script]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        wait_for(port, lambda: server.poll() is None)
        with proxied(S3(), port) as proxy:
            request(port, "PUT", f"/{BUCKET}", {"Authorization": _anyone()}, b"")
            yield proxy
    finally:
        server.kill()
        server.communicate()


@pytest.fixture
def s3(s3_server: S3) -> Iterator[S3]:
    """The server, without faults or requests of earlier tests."""
    with s3_server.clean() as clean:
        yield clean


def _anyone() -> str:
    return "AWS4-HMAC-SHA256 Credential=key/20200101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
