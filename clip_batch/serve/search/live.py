"""The indices that are served, each in its live version; a new version takes the place of the old one unnoticed.

A request holds the version it began with until it ends; a version that was replaced is closed when nobody
holds it. All bookkeeping is on the event loop; opening, warming and closing are in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_batch.config import DatabaseConfig, SearchConfig
from clip_batch.errors import ClipBatchError, ConfigError, EncoderError
from clip_batch.index import removals
from clip_batch.index.manifest import current_version
from clip_batch.search.backend import Backend
from clip_batch.search.lineage import is_planned
from clip_batch.search.prefilter import Prefilter
from clip_batch.search.searcher import Searcher
from clip_batch.serve.http.errors import Refused
from clip_batch.serve.search.batching import Encoding
from clip_batch.storage.store import Store

if TYPE_CHECKING:
    from clip_batch.config import ServeConfig, StorageConfig
    from clip_batch.serve.http.metrics import Metrics

State = tuple[str | None, ...]
"""CURRENT, and the digests of the removal lists."""

log = logging.getLogger("clip_batch.serve")


class OpenVersion:
    """One opened version of an index, and how many requests hold it. `encoder` is what those of one encoder share."""

    def __init__(self, searcher: Backend) -> None:
        self.searcher, self.manifest = searcher, searcher.manifest
        self.columns = list(searcher.schema.names)
        self.modalities = list(self.manifest.key)
        self.encoder = self.manifest.encoder.fingerprint
        self.prefilter = Prefilter(searcher)
        self.users, self.retired = 0, False

    def planned(self, row: int) -> bool:
        """Whether a row's image may be read: see `clip_batch.search.lineage.is_planned`."""
        return is_planned(self.manifest, row)

    def warm(self) -> None:
        """Touch what the first request would touch."""
        if self.manifest.rows:
            vector = np.full(self.manifest.dim, self.manifest.dim**-0.5, np.float32)
            for modality in self.modalities:
                ids = self.searcher.search_ids(vector, 10, modality)[1][0]
                self.searcher.metadata(ids[ids >= 0])


class _Index:
    def __init__(self, name: str, url: str) -> None:
        self.name, self.url = name, url
        self.version: OpenVersion | None = None
        self.state: State | None = None
        self.problem: str | None = None


class Indices:
    """Named indices. Errors of the constructor: ConfigError, where there is no index; others are retried."""

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
        self._encodings: dict[str, asyncio.Task[Encoding]] = {}
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
        """In the order they were given; the first is what a request means that names none."""
        return list(self._indices)

    @contextlib.contextmanager
    def use(self, name: str | None, field: str = "index") -> Iterator[tuple[str, OpenVersion]]:
        """An index's name and live version, which stays open within the block. Refused: 404 unknown, 503 not open."""
        index = self._indices.get(name or self.names[0])
        if index is None:
            raise Refused(404, f"{field}: no index {name!r}; there is {', '.join(self.names)}", field)
        version = index.version
        if version is None:
            raise Refused(503, f"index {index.name} cannot be served: {index.problem}")
        version.users += 1
        try:
            yield index.name, version
        finally:
            version.users -= 1
            self._close_if_done(version)

    async def encoding(self, version: OpenVersion) -> Encoding:
        """The encoder that made a version; EncoderError if it is not here or not the one."""
        key = version.encoder
        if key not in self._encodings:
            self._encodings[key] = asyncio.create_task(asyncio.to_thread(self._load, version.searcher))
        return await asyncio.shield(self._encodings[key])

    def _load(self, searcher: Backend) -> Encoding:
        encoder, manifest = searcher.encoder, searcher.manifest
        if encoder.dim != manifest.dim:
            raise EncoderError(f"the encoder has {encoder.dim} dimensions, index {manifest.version} {manifest.dim}")
        if encoder.has_text:
            encoder.encode_texts(["warm up"])
        return Encoding(encoder, self._config, self._metrics)

    def reads_text(self, version: OpenVersion) -> bool:
        """Whether the encoder of a version has a text side; true until it is loaded."""
        task = self._encodings.get(version.encoder)
        loaded = task is not None and task.done() and task.exception() is None
        return task.result().encoder.has_text if task is not None and loaded else True

    def problems(self) -> dict[str, str]:
        """Why each index that cannot be searched by text cannot; {} when all is ready."""
        found = {}
        for index in self._indices.values():
            if index.version is None:
                found[index.name] = index.problem or "not open"
                continue
            task = self._encodings.get(index.version.encoder)
            if task is None or not task.done():
                found[index.name] = "its encoder is being loaded"
            elif error := task.exception():
                found[index.name] = str(error)
        return found

    def closed(self) -> list[str]:
        """Names of indices of which no version is open."""
        return [index.name for index in self._indices.values() if index.version is None]

    def rows(self) -> dict[str, int]:
        """Rows of each open index."""
        return {i.name: i.version.manifest.rows for i in self._indices.values() if i.version is not None}

    def warnings(self) -> dict[str, str]:
        """Why the version that CURRENT names does not serve yet, where an older one does."""
        return {i.name: i.problem for i in self._indices.values() if i.version is not None and i.problem is not None}

    def start(self) -> None:
        """Load the encoders, and begin to look for new versions. On the event loop."""
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
            with contextlib.suppress(ClipBatchError, OSError):  # readyz tells of it
                await self.encoding(index.version)

    async def refresh(self, name: str) -> None:
        """Let what lies at an index now serve, once it is open, warm and has its encoder."""
        index = self._indices[name]
        try:
            state = await asyncio.to_thread(self._state, index)
            self._forget_failed()
            if index.version is not None and state == index.state:
                index.problem = None
                await self._prepare(index)
                return
            version = await asyncio.to_thread(self._opened, index)
            try:
                await asyncio.to_thread(version.warm)
                if name not in self.problems():  # the old one serves until the new one can do all it does
                    await self.encoding(version)
            except BaseException:
                await asyncio.to_thread(version.searcher.close)
                raise
            self._install(index, version, state)
            await self._prepare(index)
        except (ClipBatchError, OSError) as error:
            self._fail(index, error)

    def _state(self, index: _Index) -> State:
        """What changes when the index must be opened anew, by a merge or a `remove`; read before it is opened."""
        store = Store(index.url, self._storage.storage_options)
        return current_version(store), *removals.names(store)

    def _opened(self, index: _Index) -> OpenVersion:
        config = self._config
        search = SearchConfig(device=config.device, model=config.model, pretrained=config.pretrained)
        if not self._databases.milvus:
            return OpenVersion(Searcher(index.url, self._storage, config=search))
        from clip_batch.export.databases.backend import DatabaseBackend

        return OpenVersion(DatabaseBackend(index.url, self._databases, self._storage, search))

    def _install(self, index: _Index, version: OpenVersion, state: State) -> None:
        old, index.version, index.state, index.problem = index.version, version, state, None
        self._open.add(version)
        if old is not None:
            self._metrics.rows.remove(index.name, old.manifest.version)
            self._metrics.swaps.labels(index.name).inc()
            log.warning("index %s: version %s serves now", index.name, version.manifest.version)
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
            used = {other.encoder for other in self._open}
            for key in set(self._encodings) - used:
                task = self._encodings.pop(key)
                if task.done() and not task.exception():
                    task.result().close()

    def _forget_failed(self) -> None:
        """So that an encoder that was not there is looked for again."""
        for key, task in list(self._encodings.items()):
            if task.done() and task.exception():
                del self._encodings[key]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Close all, at the end of the service."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for encoding in self._encodings.values():
            if encoding.done() and not encoding.exception():
                encoding.result().close()
        for version in self._open:
            await asyncio.to_thread(version.searcher.close)
