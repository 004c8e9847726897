"""The served indices, each in its live version. A new version replaces the old one without failing any request.

A request uses the version it started with until it ends; a replaced version is closed when no request uses it.
All bookkeeping is done on the event loop; opening, warming and closing a version happens in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Coroutine, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_batch.config import DatabaseConfig, SearchConfig, parse_bytes
from clip_batch.errors import ClipBatchError, ConfigError, CorruptError, EncoderError
from clip_batch.index import removals
from clip_batch.index.publications import current_version
from clip_batch.search.backend import Backend
from clip_batch.search.lineage import is_planned
from clip_batch.search.prefilter import Prefilter
from clip_batch.search.searcher import Searcher
from clip_batch.serve.http.errors import KnownProblem, Refused
from clip_batch.serve.http.hidden import without_paths
from clip_batch.serve.http.responses import LATER
from clip_batch.serve.search.encodings import Encoding, Encodings
from clip_batch.storage.paths import absolute
from clip_batch.storage.store import Store

if TYPE_CHECKING:
    from clip_batch.config import ServeConfig, StorageConfig
    from clip_batch.serve.search.metrics import Metrics

State = tuple[str | None, ...]
"""The content of CURRENT, and the digests of the removal lists."""

_NEVER = 60
"""Seconds after which clients may ask again where this service never looks for what was mended."""

log = logging.getLogger("clip_batch.serve")


class OpenVersion:
    """An opened version of an index, with the number of requests that use it."""

    def __init__(self, searcher: Backend, filter_cache: int) -> None:
        self.searcher, self.manifest = searcher, searcher.manifest
        self.columns = list(searcher.schema.names)
        self.modalities = list(self.manifest.key)
        self.encoder = self.manifest.encoder.fingerprint
        self.prefilter = Prefilter(searcher, filter_cache)
        self.users, self.retired = 0, False

    def planned(self, row: int) -> bool:
        """Whether a row's image may be read: see `clip_batch.search.lineage.is_planned`."""
        return is_planned(self.manifest, row)

    def warm(self) -> None:
        """Search once, so that the pages that the first request needs are in memory."""
        if self.manifest.rows:
            vector = np.full(self.manifest.dim, self.manifest.dim**-0.5, np.float32)
            for modality in self.modalities:
                ids = self.searcher.search_ids(vector, 10, modality)[1][0]
                self.searcher.metadata(ids[ids >= 0])


class _Index:
    """A named index: its version that is served, if any, and what is wrong with the one in INDEX, if anything."""

    def __init__(self, name: str, url: str) -> None:
        self.name, self.url = name, url
        self.version: OpenVersion | None = None
        self.state: State | None = None
        self.problem: str | None = None


class Indices:
    """Named indices. An index that cannot be opened is tried again, but the constructor raises ConfigErrors."""

    def __init__(
        self,
        urls: Mapping[str, str],
        config: ServeConfig,
        storage: StorageConfig,
        databases: DatabaseConfig,
        metrics: Metrics,
    ) -> None:
        if bool(databases.milvus) != bool(databases.sql):
            raise ConfigError("serve answers from databases with both --milvus and --sql, or from INDEX with neither")
        self._databases = databases
        self._config, self._storage, self._metrics = config, storage, metrics
        self._indices = {name: _Index(name, url) for name, url in urls.items()}
        self._encodings = Encodings(config, metrics)
        self._open: set[OpenVersion] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        for index in self._indices.values():
            try:
                state = self._state(index)
                self._install(index, self._opened(index), state)
            except ConfigError:
                raise
            except (ClipBatchError, OSError) as error:
                self._fail(index, error)

    @property
    def names(self) -> list[str]:
        """The names of the indices, as given; the first one answers requests that name none."""
        return list(self._indices)

    @contextlib.contextmanager
    def use(self, name: str | None, field: str = "index") -> Iterator[tuple[str, OpenVersion]]:
        """Yield an index's name and live version, which stays open within the block.

        Raises Refused: 404 if there is no such index, 503 if it is not open.
        """
        index = self._indices.get(name or self.names[0])
        if index is None:
            raise Refused(404, f"{field}: no index {name!r}; there is {', '.join(self.names)}", field)
        version = index.version
        if version is None:
            problem = self.shown(f"index {index.name} cannot be served: {index.problem}")
            raise KnownProblem(problem, self._again)
        version.users += 1
        try:
            yield index.name, version
        finally:
            version.users -= 1
            self._close_if_done(version)

    async def encoding(self, version: OpenVersion) -> Encoding:
        """Return the encoding of a version, for a request.

        Raises KnownProblem at once if its encoder could not be loaded, and Busy if that takes long.
        """
        try:
            return await self._encodings.get(version.searcher)
        except EncoderError as error:
            raise KnownProblem(self.shown(str(error)), self._again) from None

    @property
    def _again(self) -> int:
        """Seconds after which this service has tried again what failed."""
        return max(LATER, math.ceil(self._config.poll) or _NEVER)

    def shown(self, text: str) -> str:
        """Return what clients see of a text: without paths of this machine, unless the options show them."""
        if self._config.show_paths:
            return text
        return without_paths(
            text, [root for index in self._indices.values() for root in (index.url, absolute(index.url))]
        )

    def reads_text(self, version: OpenVersion) -> bool:
        """Whether the encoder of a version has a text side; true as long as it is not loaded."""
        return self._encodings.reads_text(version.encoder)

    def problems(self) -> dict[str, str]:
        """Return why each index that cannot be searched by text cannot; {} when all are ready."""
        problems = {}
        for index in self._indices.values():
            if index.version is None:
                problems[index.name] = index.problem or "not open"
            elif problem := self._encodings.problem(index.version.encoder):
                problems[index.name] = problem
        return problems

    def closed(self) -> list[str]:
        """Return the names of the indices of which no version is open."""
        return [index.name for index in self._indices.values() if index.version is None]

    def rows(self) -> dict[str, int]:
        """Return the number of rows of each open index."""
        return {i.name: i.version.manifest.rows for i in self._indices.values() if i.version is not None}

    def warnings(self) -> dict[str, str]:
        """Return why an older version is served instead of the one that CURRENT names, for each such index."""
        return {i.name: i.problem for i in self._indices.values() if i.version is not None and i.problem is not None}

    def start(self) -> None:
        """Load the encoders and start polling for new versions. Call it on the event loop."""
        self._spawn(self._run())

    async def _run(self) -> None:
        for index in self._indices.values():
            await self._prepare(index)
        while self._config.poll > 0:
            await asyncio.sleep(self._config.poll)
            for index in self._indices.values():
                await self.refresh(index.name)

    async def _prepare(self, index: _Index) -> None:
        if index.version is not None:
            with contextlib.suppress(ClipBatchError, OSError):  # /readyz reports it
                await self._encodings.load(index.version.searcher)

    async def refresh(self, name: str) -> None:
        """Serve the version that CURRENT names now, once it is open and warm and its encoder is loaded."""
        index = self._indices[name]
        await self._look_at_files(index)
        try:
            state = await asyncio.to_thread(self._state, index)
            self._encodings.forget_failed()
            if index.version is not None and state == index.state:
                index.problem = None
                await self._prepare(index)
                return
            version = await asyncio.to_thread(self._opened, index)
            try:
                await asyncio.to_thread(version.warm)
                if name not in self.problems():  # the old version answers texts, and so must its successor
                    await self._encodings.load(version.searcher)
            except BaseException:
                await asyncio.to_thread(version.searcher.close)
                raise
            self._install(index, version, state)
            await self._prepare(index)
        except (ClipBatchError, OSError) as error:
            self._fail(index, error)

    async def _look_at_files(self, index: _Index) -> None:
        """Serve a version no longer of which a file was cut: whoever reads what is lost ends the process."""
        version = index.version
        if version is None or not (path := await asyncio.to_thread(version.searcher.shortened)):
            return
        self._fail(index, CorruptError(f"{path} became shorter while it was in use: restore it, or merge again"))
        index.version = index.state = None
        self._metrics.rows.remove(index.name, version.manifest.version)
        version.retired = True
        self._close_if_done(version)

    def _state(self, index: _Index) -> State:
        """Return what a merge or a removal changes. It is read before the index is opened, to miss no change."""
        store = Store(index.url, self._storage.storage_options)
        return current_version(store), *removals.names(store)

    def _opened(self, index: _Index) -> OpenVersion:
        config = self._config
        search = SearchConfig(device=config.device, model=config.model, pretrained=config.pretrained)
        cache = parse_bytes(config.filter_cache)
        if not self._databases.milvus:
            return OpenVersion(Searcher(index.url, self._storage, config=search), cache)
        from clip_batch.export.databases.backend import DatabaseBackend

        return OpenVersion(DatabaseBackend(index.url, self._databases, self._storage, search), cache)

    def _install(self, index: _Index, version: OpenVersion, state: State) -> None:
        old, index.version, index.state, index.problem = index.version, version, state, None
        self._open.add(version)
        if old is not None:
            self._metrics.rows.remove(index.name, old.manifest.version)
            self._metrics.swaps.labels(index.name).inc()
            log.warning("index %s: version %s is served now", index.name, version.manifest.version)
            old.retired = True
            self._close_if_done(old)
        self._metrics.rows.labels(index.name, version.manifest.version).set(version.manifest.rows)

    def _fail(self, index: _Index, error: Exception) -> None:
        if index.problem != str(error):
            log.error("index %s: %s", index.name, error)
        index.problem = str(error)

    def _close_if_done(self, version: OpenVersion) -> None:
        if version.retired and not version.users and version in self._open:
            self._open.remove(version)
            self._spawn(asyncio.to_thread(version.searcher.close))
            self._encodings.keep(other.encoder for other in self._open)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the event loop holds only a weak reference
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Close all versions and encoders."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._encodings.keep(())
        for version in self._open:
            await asyncio.to_thread(version.searcher.close)
