"""`Client`, and `AsyncClient` with the same methods as coroutines.

What is sent and how a response is read lies in `requests`; these classes send, and wait, each in its own way.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Self, Unpack

import httpx2

from clip_batch.client import requests
from clip_batch.client.requests import Image, SearchArguments, ServiceRequest, T
from clip_batch.errors import ConfigError, ServiceError, ServiceUnavailable, one_line
from clip_batch.types import Hit

if TYPE_CHECKING:
    from clip_batch.client.requests import Vectors

RETRIED = frozenset({429, 502, 503, 504})
"""HTTP statuses of requests that may succeed later (RFC 6585, RFC 9110)."""

MAX_PAUSE = 60.0
"""The longest wait before a request is repeated, in seconds, whatever the service says."""


class _Connection:
    """What both clients share: the address of the service, and what to do after each response."""

    def __init__(self, url: str, token: str | None = None, timeout: float = 30.0, retries: int = 4) -> None:
        if not isinstance(url, str) or not url.startswith(("http://", "https://")):
            raise ConfigError(f"service URL {url!r} does not start with http:// or https://")
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise ConfigError(f"service URL {url!r}: {error}") from None
        self.url = str(parsed.copy_with(userinfo=b"")).rstrip("/")  # without a password, because messages contain it
        self.retries = retries
        self._options: dict[str, Any] = {
            "base_url": str(parsed).rstrip("/") + "/",
            "timeout": timeout,
            "headers": {"authorization": f"Bearer {token}"} if token else {},
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def _read(self, request: ServiceRequest[T], response: httpx2.Response) -> T:
        try:
            return request.read(response.content if request.raw else response.json())
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            what = one_line(f"{type(error).__name__}: {error}", 500)
            raise ServiceError(f"{self.url}/{request.path} responds as no clip-batch service does ({what})") from error

    def _check(self, attempt: int, result: httpx2.Response | httpx2.HTTPError) -> float | httpx2.Response:
        """The response if it is a success, or the seconds to wait before a retry; raises if neither makes sense."""
        last = attempt >= self.retries
        if isinstance(result, httpx2.HTTPError):
            # After a read timeout the service is still working on the request: a retry would only add load.
            if last or not isinstance(result, (httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.ConnectTimeout)):
                why = one_line(str(result) or type(result).__name__, 500)
                raise ServiceUnavailable(f"{self.url} does not answer: {why}") from result
            return back_off(attempt)
        if result.is_success:
            return result
        message = f"{self.url} answers {result.status_code}: {_detail(result)}"
        if result.status_code not in RETRIED:
            raise ServiceError(message, result.status_code)
        if last:
            raise ServiceUnavailable(message, result.status_code)
        return retry_after(result.headers.get("retry-after")) or back_off(attempt)


class Client(_Connection):
    """A client of the service at `url`; it is thread-safe.

    Its methods raise ServiceError if the service refuses the request, and ServiceUnavailable if it does not answer or
    has no time now.

    `timeout` is in seconds without a byte. Requests that lose their connection, or are answered "not now" (429, 502,
    503, 504), are repeated up to `retries` times, after the time that Retry-After says or an exponential back-off.
    `transport` carries the requests instead of the network, such as that of a `FakeService` in tests.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout: float = 30.0,
        retries: int = 4,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        super().__init__(url, token, timeout, retries)
        self._http = httpx2.Client(**self._options, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def search(self, **query: Unpack[SearchArguments]) -> list[Hit]:
        """The hits of one query, best first."""
        return self._send(requests.search(query))

    def search_many(
        self, queries: Iterable[str | SearchArguments], /, concurrency: int = 8, **common: Unpack[SearchArguments]
    ) -> Iterator[list[Hit]]:
        """The hits of each query (a str is a text), in order, with at most `concurrency` requests in progress."""
        waiting: deque[Future[list[Hit]]] = deque()
        with ThreadPoolExecutor(concurrency) as pool:
            try:
                for query in queries:
                    waiting.append(pool.submit(self._send, requests.search(requests.with_common(query, common))))
                    if len(waiting) > concurrency:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def embed_text(self, texts: str | Sequence[str], index: str | None = None) -> Vectors:
        """The vectors of texts, float32 (n, d) of unit norm, by the encoder of `index`."""
        return requests.stack([self._send(part) for part in requests.embed("texts", texts, index)])

    def embed_image(self, images: Image | Sequence[Image], index: str | None = None) -> Vectors:
        """The vectors of images, float32 (n, d) of unit norm, by the encoder of `index`."""
        return requests.stack([self._send(part) for part in requests.embed("images", images, index)])

    def image(self, index: str, id: int) -> bytes:
        """The original image file of a row."""
        return self._send(requests.image(index, id))

    def metadata(self, index: str, ids: Sequence[int]) -> list[dict[str, Any]]:
        """The metadata of rows, in the order of `ids`."""
        return self._send(requests.metadata(index, ids))

    def indices(self) -> list[dict[str, Any]]:
        """The indices that the service serves, each with its name, rows, modalities and columns."""
        return self._send(requests.INDICES)

    def _send(self, request: ServiceRequest[T]) -> T:
        attempt = 0
        while True:
            result: httpx2.Response | httpx2.HTTPError
            try:
                result = self._http.request(request.method, request.path, json=request.body)
            except httpx2.HTTPError as error:
                result = error
            verdict = self._check(attempt, result)
            if isinstance(verdict, httpx2.Response):
                return self._read(request, verdict)
            time.sleep(verdict)
            attempt += 1


class AsyncClient(_Connection):
    """As `Client`, with coroutines, for one event loop."""

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout: float = 30.0,
        retries: int = 4,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(url, token, timeout, retries)
        self._http = httpx2.AsyncClient(**self._options, transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def search(self, **query: Unpack[SearchArguments]) -> list[Hit]:
        """As `Client.search`."""
        return await self._send(requests.search(query))

    async def search_many(
        self, queries: Iterable[str | SearchArguments], /, concurrency: int = 8, **common: Unpack[SearchArguments]
    ) -> AsyncIterator[list[Hit]]:
        """As `Client.search_many`, for `async for`."""
        waiting: deque[asyncio.Task[list[Hit]]] = deque()
        try:
            for query in queries:
                if len(waiting) >= concurrency:
                    yield await waiting.popleft()
                waiting.append(asyncio.create_task(self._send(requests.search(requests.with_common(query, common)))))
            while waiting:
                yield await waiting.popleft()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def embed_text(self, texts: str | Sequence[str], index: str | None = None) -> Vectors:
        """As `Client.embed_text`."""
        return requests.stack([await self._send(part) for part in requests.embed("texts", texts, index)])

    async def embed_image(self, images: Image | Sequence[Image], index: str | None = None) -> Vectors:
        """As `Client.embed_image`."""
        return requests.stack([await self._send(part) for part in requests.embed("images", images, index)])

    async def image(self, index: str, id: int) -> bytes:
        """As `Client.image`."""
        return await self._send(requests.image(index, id))

    async def metadata(self, index: str, ids: Sequence[int]) -> list[dict[str, Any]]:
        """As `Client.metadata`."""
        return await self._send(requests.metadata(index, ids))

    async def indices(self) -> list[dict[str, Any]]:
        """As `Client.indices`."""
        return await self._send(requests.INDICES)

    async def _send(self, request: ServiceRequest[T]) -> T:
        attempt = 0
        while True:
            result: httpx2.Response | httpx2.HTTPError
            try:
                result = await self._http.request(request.method, request.path, json=request.body)
            except httpx2.HTTPError as error:
                result = error
            verdict = self._check(attempt, result)
            if isinstance(verdict, httpx2.Response):
                return self._read(request, verdict)
            await asyncio.sleep(verdict)
            attempt += 1


def back_off(attempt: int) -> float:
    """Seconds before a retry: a random part of 0.25 * 2**attempt, so that clients do not return all at once."""
    return random.uniform(0.5, 1.0) * min(0.25 * 2.0**attempt, MAX_PAUSE)


def retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header names (RFC 9110: a number or a date), None if it cannot be read."""
    if header is None:
        return None
    try:
        seconds = float(header) if header.strip().isdigit() else parsedate_to_datetime(header).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), MAX_PAUSE)


def _detail(response: httpx2.Response) -> str:
    """What the service says is wrong, on one line; it may list each wrong field with its place."""
    try:
        detail = response.json()["detail"]
        if isinstance(detail, list):
            detail = "; ".join(f"{'.'.join(map(str, item['loc'][1:]))}: {item['msg']}" for item in detail)
    except (ValueError, TypeError, KeyError):
        detail = response.text or response.reason_phrase
    return one_line(str(detail), 500)
