"""Google Cloud Storage through gcsfs, with timeouts and with refusals as PermissionError, which gcsfs lacks."""

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
"""Tries of one request. Without them a lost part would restart a large upload; gcsfs's six would take long."""

_TIMEOUT = 120.0
"""Seconds of one request, of at most 50 MB. gcsfs has no timeout, and would wait for a dead connection for ever."""

logging.getLogger("gcsfs").addHandler(logging.NullHandler())  # else it prints stack traces; `call_store` reports errors

_tried = retry_request(retries=_TRIES)(inspect.unwrap(GCSFileSystem._request))


def open_gcs(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    """The filesystem of a gs:// or gcs:// URL, and the path within it: bucket and name, of any characters.

    `options` are gcsfs's; ValueError where one is wrong.
    """
    try:
        return Gcs(**{"requests_timeout": _TIMEOUT, **options}), Gcs._strip_protocol(url)
    except KeyError as error:
        raise ValueError(f"the token is not the key of a service account: it has no {error}") from None


class Gcs(GCSFileSystem):  # type: ignore[misc]
    """gcsfs's plain client. Its newer one first asks over gRPC whether a bucket is zonal, which is another protocol."""

    mv = AbstractFileSystem.mv  # gcsfs takes a name with brackets for a pattern

    def chunks(self, path: str, start: int, stop: int) -> Iterator[memoryview]:
        """The bytes [start, stop) of an object; see `clip_batch.storage.direct.chunks`."""
        if not (self.session_kwargs or self.requester_pays):  # proxies, certificates, or a project to bill
            headers: dict[str, str] = {}
            self.credentials.apply(headers)
            yield from direct.chunks(self, path, self.url(path), headers, start, stop)

    async def _request(self, *request: Any, **how: Any) -> Any:
        if isinstance(how.get("data"), bytes):  # gcsfs would send bytes in one go, and block all other requests
            how["data"] = UnclosableBytesIO(how["data"])
        try:
            return await _tried(self, *request, **how)
        except OSError as error:
            if str(error).startswith("Forbidden"):  # gcsfs has no other mark of a 403
                raise PermissionError(str(error)) from None
            raise
