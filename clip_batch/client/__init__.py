"""The service from Python: `Client`, and `AsyncClient` with the same methods as coroutines.

    with Client("http://127.0.0.1:1234") as client:
        for hit in client.search(text="a red bicycle", k=20, deduplicate=True):
            print(hit.score, hit.metadata["caption"])

What is sent and what an answer means stands once, in functions; the classes only wait, each its own way.
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

from clip_batch.client import ask
from clip_batch.client.ask import Ask, Image, SearchArguments, T
from clip_batch.client.fake import FakeService
from clip_batch.errors import ConfigError, ServiceError, ServiceUnavailable, one_line
from clip_batch.types import Hit

if TYPE_CHECKING:
    from clip_batch.client.ask import Vectors

__all__ = ["AsyncClient", "Client", "FakeService"]

PASSING = frozenset({429, 502, 503, 504})
"""Statuses that say: not now (RFC 6585, RFC 9110)."""

MAX_PAUSE = 60.0
"""Seconds we wait at most before asking again, whatever the service says."""


class _Calls:
    """What both clients know: where the service is, and what to do after each answer."""

    def __init__(self, url: str, token: str | None = None, timeout: float = 30.0, retries: int = 4) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"service URL {url!r} does not start with http:// or https://")
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise ConfigError(f"service URL {url!r}: {error}") from None
        self.url = str(parsed.copy_with(userinfo=b"")).rstrip("/")  # messages carry it, so without a password
        self.retries = retries
        self._options: dict[str, Any] = {
            "base_url": str(parsed).rstrip("/") + "/",
            "timeout": timeout,
            "headers": {"authorization": f"Bearer {token}"} if token else {},
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def _read(self, request: Ask[T], answer: httpx2.Response) -> T:
        try:
            return request.read(answer.content if request.raw else answer.json())
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            what = one_line(f"{type(error).__name__}: {error}", 500)
            raise ServiceError(f"{self.url}/{request.path} answers what no clip-batch service does ({what})") from error

    def _judge(self, attempt: int, result: httpx2.Response | httpx2.HTTPError) -> float | httpx2.Response:
        """The answer if it is good, the seconds to wait if it is worth asking again; raises where neither."""
        last = attempt >= self.retries
        if isinstance(result, httpx2.HTTPError):
            # After a read timeout the service is still at it: asking again would only load it more.
            if last or not isinstance(result, (httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.ConnectTimeout)):
                why = one_line(str(result) or type(result).__name__, 500)
                raise ServiceUnavailable(f"{self.url} does not answer: {why}") from result
            return back_off(attempt)
        if result.is_success:
            return result
        message = f"{self.url} answers {result.status_code}: {_detail(result)}"
        if result.status_code not in PASSING:
            raise ServiceError(message, result.status_code)
        if last:
            raise ServiceUnavailable(message, result.status_code)
        return retry_after(result.headers.get("retry-after")) or back_off(attempt)


class Client(_Calls):
    """A service at `url`; thread-safe. ServiceError: it refuses; ServiceUnavailable: it does not answer, or is full.

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
        return self._ask(ask.search(query))

    def search_many(
        self, queries: Iterable[str | SearchArguments], /, concurrency: int = 8, **common: Unpack[SearchArguments]
    ) -> Iterator[list[Hit]]:
        """The hits of each query (a str is a text), in order; at most `concurrency` are asked at a time."""
        waiting: deque[Future[list[Hit]]] = deque()
        with ThreadPoolExecutor(concurrency) as pool:
            try:
                for query in queries:
                    waiting.append(pool.submit(self._ask, ask.search(ask.merge(query, common))))
                    if len(waiting) > concurrency:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def embed_text(self, texts: str | Sequence[str], index: str | None = None) -> Vectors:
        """Vectors float32 (n, d), unit norm, of texts; by the encoder of `index`."""
        return ask.stack([self._ask(part) for part in ask.embed("texts", texts, index)])

    def embed_image(self, images: Image | Sequence[Image], index: str | None = None) -> Vectors:
        """Vectors float32 (n, d), unit norm, of images."""
        return ask.stack([self._ask(part) for part in ask.embed("images", images, index)])

    def image(self, index: str, id: int) -> bytes:
        """A row's original image file."""
        return self._ask(ask.image(index, id))

    def metadata(self, index: str, ids: Sequence[int]) -> list[dict[str, Any]]:
        """The metadata of rows, in the order asked."""
        return self._ask(ask.metadata(index, ids))

    def indices(self) -> list[dict[str, Any]]:
        """What the service serves: of each index its name, rows, modalities and columns."""
        return self._ask(ask.INDICES)

    def _ask(self, request: Ask[T]) -> T:
        attempt = 0
        while True:
            result: httpx2.Response | httpx2.HTTPError
            try:
                result = self._http.request(request.method, request.path, json=request.body)
            except httpx2.HTTPError as error:
                result = error
            verdict = self._judge(attempt, result)
            if isinstance(verdict, httpx2.Response):
                return self._read(request, verdict)
            time.sleep(verdict)
            attempt += 1


class AsyncClient(_Calls):
    """`Client` with coroutines, for one event loop."""

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
        return await self._ask(ask.search(query))

    async def search_many(
        self, queries: Iterable[str | SearchArguments], /, concurrency: int = 8, **common: Unpack[SearchArguments]
    ) -> AsyncIterator[list[Hit]]:
        """As `Client.search_many`, for `async for`."""
        waiting: deque[asyncio.Task[list[Hit]]] = deque()
        try:
            for query in queries:
                if len(waiting) >= concurrency:
                    yield await waiting.popleft()
                waiting.append(asyncio.create_task(self._ask(ask.search(ask.merge(query, common)))))
            while waiting:
                yield await waiting.popleft()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def embed_text(self, texts: str | Sequence[str], index: str | None = None) -> Vectors:
        """As `Client.embed_text`."""
        return ask.stack([await self._ask(part) for part in ask.embed("texts", texts, index)])

    async def embed_image(self, images: Image | Sequence[Image], index: str | None = None) -> Vectors:
        """As `Client.embed_image`."""
        return ask.stack([await self._ask(part) for part in ask.embed("images", images, index)])

    async def image(self, index: str, id: int) -> bytes:
        """As `Client.image`."""
        return await self._ask(ask.image(index, id))

    async def metadata(self, index: str, ids: Sequence[int]) -> list[dict[str, Any]]:
        """As `Client.metadata`."""
        return await self._ask(ask.metadata(index, ids))

    async def indices(self) -> list[dict[str, Any]]:
        """As `Client.indices`."""
        return await self._ask(ask.INDICES)

    async def _ask(self, request: Ask[T]) -> T:
        attempt = 0
        while True:
            result: httpx2.Response | httpx2.HTTPError
            try:
                result = await self._http.request(request.method, request.path, json=request.body)
            except httpx2.HTTPError as error:
                result = error
            verdict = self._judge(attempt, result)
            if isinstance(verdict, httpx2.Response):
                return self._read(request, verdict)
            await asyncio.sleep(verdict)
            attempt += 1


def back_off(attempt: int) -> float:
    """Seconds before asking again: a random part of 0.25 * 2**attempt, so that clients do not come back together."""
    return random.uniform(0.5, 1.0) * min(0.25 * 2.0**attempt, MAX_PAUSE)


def retry_after(said: str | None) -> float | None:
    """Seconds that a Retry-After header asks for (RFC 9110: a number or a date), None where it says nothing of use."""
    if said is None:
        return None
    try:
        seconds = float(said) if said.strip().isdigit() else parsedate_to_datetime(said).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), MAX_PAUSE)


def _detail(answer: httpx2.Response) -> str:
    """What the service says is wrong, on one line; FastAPI lists each field with its place."""
    try:
        detail = answer.json()["detail"]
        if isinstance(detail, list):
            detail = "; ".join(f"{'.'.join(map(str, item['loc'][1:]))}: {item['msg']}" for item in detail)
    except (ValueError, TypeError, KeyError):
        detail = answer.text or answer.reason_phrase
    return one_line(str(detail), 500)
