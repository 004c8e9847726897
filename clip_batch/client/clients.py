"""`Client`, and `AsyncClient` with the same methods as coroutines.

What is sent and how a response is read lies in `requests`; these classes send, and wait, each in its own way.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Self, Unpack

import httpx2

from clip_batch.client import requests
from clip_batch.client.hits import ServiceHits
from clip_batch.client.requests import Image, SearchArguments, ServiceRequest, T
from clip_batch.errors import ConfigError, ServiceError, ServiceUnavailable, one_line

if TYPE_CHECKING:
    from clip_batch.client.requests import Vectors

RETRIED = frozenset({429, 502, 503, 504})
"""HTTP statuses of requests that may succeed later (RFC 6585, RFC 9110)."""

_POLL = 0.2
"""Seconds between two looks whether a service is ready."""

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
        _check_options(token, timeout, retries)
        self.url = str(parsed.copy_with(userinfo=b"")).rstrip("/")  # without a password, because messages contain it
        self.retries = retries
        self._options: dict[str, Any] = {
            "base_url": str(parsed).rstrip("/") + "/",
            "timeout": float(timeout),
            "headers": {"authorization": f"Bearer {token}".encode()} if token else {},
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def _closed(self) -> ConfigError:
        return ConfigError(f"{self!r} is closed: open another one")

    def _read(self, request: ServiceRequest[T], response: httpx2.Response) -> T:
        try:
            return request.read(response.content if request.raw else response.json())
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            what = one_line(f"{type(error).__name__}: {error}", 500)
            raise ServiceError(f"{self.url}/{request.path} responds as no clip-batch service does ({what})") from error

    def _ready(self, response: httpx2.Response) -> httpx2.Response:
        """The response of a service that is ready. ServiceUnavailable: not yet. ServiceError: it is another service."""
        if response.is_success:
            return response
        if response.status_code in RETRIED:
            raise ServiceUnavailable(_problems(response), response.status_code)
        raise ServiceError(f"{self.url} answers {response.status_code}: {_detail(response)}", response.status_code)

    def _not_ready(self, error: Exception, timeout: float) -> ServiceUnavailable:
        why = one_line(error, 500)
        return ServiceUnavailable(f"{self.url} is not ready after {timeout:g} s: {why}", getattr(error, "status", None))

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
        if last or _is_known(result):
            raise ServiceUnavailable(message, result.status_code)
        return retry_after(result.headers.get("retry-after")) or back_off(attempt)


class Client(_Connection):
    """A client of the service at `url`; it is thread-safe.

    Its methods raise ServiceError if the service refuses the request, and ServiceUnavailable if it does not answer or
    has no time now.

    `timeout` is in seconds without a byte. Requests that lose their connection, or are answered "not now" (429, 502,
    503, 504), are repeated up to `retries` times, after the time that Retry-After says or an exponential back-off.
    Where the service says that somebody must mend it (its weights are missing), ServiceUnavailable is raised at once.
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

    def wait(self, timeout: float = 60.0) -> Self:
        """Wait until the service runs and every index is open with its encoder; the client itself.

        ServiceUnavailable says what is missing after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            if self._http.is_closed:
                raise self._closed()
            try:
                self._read(requests.READY, self._ready(self._http.get(requests.READY.path)))
                return self
            except (httpx2.HTTPError, ServiceUnavailable) as error:
                if time.monotonic() >= deadline:
                    raise self._not_ready(error, timeout) from None
            time.sleep(_POLL)

    def search(self, text: str | None = None, /, **query: Unpack[SearchArguments]) -> ServiceHits:
        """The hits of one query, best first: `client.search("a red bicycle", k=5)`.

        They carry what the service says of the search; `hits[0].image()` is an original image file.
        """
        return self._bound(self._send(requests.search(requests.with_text(text, query))))

    def search_many(
        self, queries: Iterable[str | SearchArguments], /, concurrency: int = 8, **common: Unpack[SearchArguments]
    ) -> Iterator[ServiceHits]:
        """The hits of each query (a str is a text), in order, with at most `concurrency` requests in progress."""
        waiting: deque[Future[ServiceHits]] = deque()
        with ThreadPoolExecutor(concurrency) as pool:
            try:
                for query in queries:
                    waiting.append(pool.submit(self._send, requests.search(requests.with_common(query, common))))
                    if len(waiting) > concurrency:
                        yield self._bound(waiting.popleft().result())
                while waiting:
                    yield self._bound(waiting.popleft().result())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def embed_text(self, texts: str | Sequence[str], index: str | None = None) -> Vectors:
        """The vectors of texts, float32 (n, d) of unit norm, by the encoder of `index`."""
        return requests.stack([self._send(part) for part in requests.embed("texts", texts, index)])

    def embed_image(self, images: Image | Sequence[Image], index: str | None = None) -> Vectors:
        """The vectors of images, float32 (n, d) of unit norm, by the encoder of `index`."""
        return requests.stack([self._send(part) for part in requests.embed("images", images, index)])

    def image(self, index: str, id: int, version: str | None = None) -> bytes:
        """The original image file of a row. ServiceError: `version` is not the live one, or there is no such image."""
        return self._send(requests.image(index, id, version))

    def _bound(self, hits: ServiceHits) -> ServiceHits:
        """The hits, each with its image of the version that was searched."""
        for hit in hits:
            hit.bound(lambda hit: self.image(hits.index_name, hit.id, hits.version))
        return hits

    def metadata(self, index: str, ids: Sequence[int]) -> list[dict[str, Any]]:
        """The metadata of rows, in the order of `ids`."""
        return self._send(requests.metadata(index, ids))

    def indices(self) -> list[dict[str, Any]]:
        """The indices that the service serves, each with its name, rows, modalities and columns."""
        return self._send(requests.INDICES)

    def _send(self, request: ServiceRequest[T]) -> T:
        attempt = 0
        while True:
            if self._http.is_closed:
                raise self._closed()
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

    async def wait(self, timeout: float = 60.0) -> Self:
        """As `Client.wait`."""
        deadline = time.monotonic() + timeout
        while True:
            if self._http.is_closed:
                raise self._closed()
            try:
                self._read(requests.READY, self._ready(await self._http.get(requests.READY.path)))
                return self
            except (httpx2.HTTPError, ServiceUnavailable) as error:
                if time.monotonic() >= deadline:
                    raise self._not_ready(error, timeout) from None
            await asyncio.sleep(_POLL)

    async def search(self, text: str | None = None, /, **query: Unpack[SearchArguments]) -> ServiceHits:
        """As `Client.search`; an image is had by `await client.image(hits.index_name, hit.id, hits.version)`."""
        return await self._send(requests.search(requests.with_text(text, query)))

    async def search_many(
        self, queries: Iterable[str | SearchArguments], /, concurrency: int = 8, **common: Unpack[SearchArguments]
    ) -> AsyncIterator[ServiceHits]:
        """As `Client.search_many`, for `async for`."""
        waiting: deque[asyncio.Task[ServiceHits]] = deque()
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

    async def image(self, index: str, id: int, version: str | None = None) -> bytes:
        """As `Client.image`."""
        return await self._send(requests.image(index, id, version))

    async def metadata(self, index: str, ids: Sequence[int]) -> list[dict[str, Any]]:
        """As `Client.metadata`."""
        return await self._send(requests.metadata(index, ids))

    async def indices(self) -> list[dict[str, Any]]:
        """As `Client.indices`."""
        return await self._send(requests.INDICES)

    async def _send(self, request: ServiceRequest[T]) -> T:
        attempt = 0
        while True:
            if self._http.is_closed:
                raise self._closed()
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


def _check_options(token: Any, timeout: Any, retries: Any) -> None:
    """ConfigError: an option of a client is of the wrong type or size."""
    if token is not None and not isinstance(token, str):
        raise ConfigError(f"token is a {type(token).__name__}: it must be a text")
    if token is not None and not (token + "a").isprintable():
        raise ConfigError("token has control characters, such as a line break: leave them out")
    if isinstance(timeout, bool) or not isinstance(timeout, Real) or not 0 < float(timeout) < math.inf:
        raise ConfigError(f"timeout is {timeout!r}: it must be a number of seconds over 0")
    if isinstance(retries, bool) or not isinstance(retries, Integral) or int(retries) < 0:
        raise ConfigError(f"retries is {retries!r}: it must be a whole number, 0 or more")


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


def _problems(response: httpx2.Response) -> str:
    """What /readyz says is missing, on one line."""
    try:
        problems = response.json()["problems"]
        return one_line("; ".join(f"{name}: {problem}" for name, problem in problems.items()), 500) or "not ready"
    except (ValueError, TypeError, KeyError, AttributeError):
        return _detail(response)


def _is_known(response: httpx2.Response) -> bool:
    """Whether the service says that it waits for somebody to mend it, and not only that it is busy."""
    try:
        return bool(response.json().get("error"))
    except (ValueError, AttributeError):
        return False


def _detail(response: httpx2.Response) -> str:
    """What the service says is wrong, on one line; it may list each wrong field with its place."""
    try:
        detail = response.json()["detail"]
        if isinstance(detail, list):
            detail = "; ".join(f"{'.'.join(map(str, item['loc'][1:]))}: {item['msg']}" for item in detail)
    except (ValueError, TypeError, KeyError):
        detail = response.text or response.reason_phrase
    return one_line(str(detail), 500)
