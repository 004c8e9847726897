"""Google Cloud Storage through gcsfs, with what stores need and it lacks: an end to waiting, and refusals as such."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from typing import Any

from fsspec import AbstractFileSystem
from gcsfs.core import GCSFileSystem, UnclosableBytesIO
from gcsfs.retry import retry_request

from clip_batch.storage import direct

_TRIES = 3
"""Of one request: with none but `ask`'s, one lost part would send all of a large file again; gcsfs's six take long."""

_TIMEOUT = 120.0
"""Seconds of one request, of at most 50 MB; gcsfs's own is none, so that it waits for a dead connection for ever."""

logging.getLogger("gcsfs").addHandler(logging.NullHandler())  # `ask` tells of errors; unheard, it prints their stacks

_tried = retry_request(retries=_TRIES)(inspect.unwrap(GCSFileSystem._request))


def open_gcs(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    """The filesystem of a gs:// or gcs:// URL, and the path within it: bucket and name, in which any character may be.

    `options` are gcsfs's; ValueError where they are wrong.
    """
    try:
        return Gcs(**{"requests_timeout": _TIMEOUT, **options}), Gcs._strip_protocol(url)
    except KeyError as error:
        raise ValueError(f"the token is no service account's key, and has no {error}") from None


class Gcs(GCSFileSystem):  # type: ignore[misc]
    """gcsfs's plain client; its other one first asks over gRPC whether a bucket is zonal, which is another protocol."""

    mv = AbstractFileSystem.mv  # its own takes a name with brackets for a pattern

    def chunks(self, path: str, start: int, stop: int) -> Iterator[memoryview]:
        """See `clip_batch.storage.direct.chunks`."""
        if not (self.session_kwargs or self.requester_pays):  # proxies and certificates of one's own, whom to bill
            headers: dict[str, str] = {}
            self.credentials.apply(headers)
            yield from direct.chunks(self, path, self.url(path), headers, start, stop)

    async def _request(self, *request: Any, **how: Any) -> Any:
        if isinstance(how.get("data"), bytes):  # which would be sent in one go, while all others wait
            how["data"] = UnclosableBytesIO(how["data"])
        try:
            return await _tried(self, *request, **how)
        except OSError as error:
            if str(error).startswith("Forbidden"):  # all that tells a 403 from trouble that passes
                raise PermissionError(str(error)) from None
            raise
