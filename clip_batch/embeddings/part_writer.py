"""The files that one attempt at a partition writes, and the commit that makes them count.

File names carry the attempt's id, so that no two attempts write the same file. `PartWriter.commit` then creates
`commits/<partition>.json` only if it is absent. An attempt that finds another's commit there removes its own files.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

from clip_batch.embeddings.commits import read_commit
from clip_batch.embeddings.metadata import metadata_schema
from clip_batch.errors import one_line
from clip_batch.plan import paths
from clip_batch.storage.names import name_text
from clip_batch.storage.npy import half_header
from clip_batch.storage.store import Store, stream_digest
from clip_batch.types import Commit, Failure, Plan, StoredFile

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    from clip_batch.embeddings.renewal import Renewal

_ROW_GROUP = 10_000
"""Rows of a Parquet row group."""


class PartWriter:
    """Streams one attempt's rows to its files; nothing is visible before `commit`.

    Use it as a context manager: leaving the block without `commit` discards everything.
    """

    def __init__(self, store: Store, plan: Plan, partition: int, dim: int, compression: str = "zstd") -> None:
        self.store, self.plan, self.partition, self.dim = store, plan, partition, dim
        self.attempt = secrets.token_hex(4)
        self.rows = 0
        self.failed: Counter[str] = Counter()
        self.warnings: Counter[str] = Counter()
        self.passed_over: Counter[str] = Counter()
        self._messages: dict[str, str] = {}
        self.shards = {
            name_text(piece.shard.url): {"seen": 0, "embedded": 0, "failed": 0}
            for piece in plan.partitions[partition].slices
        }
        self._compression = compression
        self._started = time.time()
        self._stack = contextlib.ExitStack()
        self._spools: dict[str, IO[bytes]] = {}
        self._parquet: dict[str, Any] = {}
        self._pending: dict[str, list[dict[str, Any]]] = {paths.METADATA: [], paths.FAILURES: []}
        self._published: list[str] = []

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close_parquet()
        if self._spools:
            self._stack.__exit__(_Discarded, _Discarded(), None)
        for name in self._published:
            self.store.remove(name)

    def add(
        self,
        rows: Sequence[dict[str, Any]],
        images: npt.NDArray[np.float32] | None,
        texts: npt.NDArray[np.float32] | None,
    ) -> None:
        """Append n rows: metadata dicts, and image and text vectors (n, dim) of unit norm.

        `images` is None in every call where images are not embedded, and `texts` where captions are not; the part then
        has no such file.
        """
        import numpy as np

        for kind, vectors in (("image", images), ("text", texts)):
            if vectors is not None:
                spool = self._spool(paths.VECTORS[kind])
                spool.write(np.ascontiguousarray(vectors, dtype=np.float16).tobytes())
        self.rows += len(rows)
        for row in rows:
            self.shards[row["shard"]]["seen"] += 1
            self.shards[row["shard"]]["embedded"] += 1
        self._append(paths.METADATA, rows)

    def fail(self, failure: Failure) -> None:
        """Record one sample, or one stretch of a shard, that is not embedded."""
        self.failed[failure.reason] += 1
        self._messages.setdefault(failure.reason, failure.message)
        if failure.key is not None:
            self.shards[failure.shard]["seen"] += 1
            self.shards[failure.shard]["failed"] += 1
        self._append(paths.FAILURES, [asdict(failure)])

    def commit(self, encoder: str, renewal: Renewal | None = None) -> Commit | None:
        """Publish the files, then the commit; None if another attempt has committed, and then our files are removed.

        With `renewal` the commit takes the place of the one that it names, if any, of which a copy stays in `renewed/`.
        `encoder` is the encoder's fingerprint. Once the commit has been sent, the files are kept unless another
        attempt's commit is read back: a request whose answer was lost may have succeeded.
        """
        for folder in list(self._pending):
            self._flush(folder)
        files = self._publish()
        commit = Commit(
            partition=self.partition,
            attempt=self.attempt,
            rows=self.rows,
            dim=self.dim,
            encoder=encoder,
            plan=self.plan.generation(self.partition).digest,
            files=files,
            shards=self.shards,
            failed=dict(self.failed),
            warnings=dict(self.warnings),
            started=self._started,
            finished=time.time(),
            worker=socket.gethostname(),
            passed_over=dict(self.passed_over),
            empty=self._empty(),
            inputs=renewal.inputs if renewal else {},
            replaces=renewal.attempt if renewal else "",
        )
        fields = {name: value for name, value in asdict(commit).items() if value or name not in ("inputs", "replaces")}
        text = json.dumps(fields, indent=1, sort_keys=True)
        name = self.plan.name(self.partition)
        published, self._published = self._published, []
        if renewal and renewal.attempt:
            if created := self._retire(name, renewal.attempt):
                self.store.replace(paths.commit(name), text.encode())
        else:
            if renewal:  # names the partition as one whose commit says what input it has
                self.store.create(paths.renewed(name, self.attempt), b"{}")
            created = self.store.create(paths.commit(name), text.encode())
        if created or read_commit(self.store, name).attempt == self.attempt:
            return commit
        self._published = published
        return None

    def _retire(self, name: str, attempt: str) -> bool:
        """Keep a copy of the commit that is about to be replaced; False where another attempt has replaced it."""
        data = self.store.read(paths.commit(name))
        if json.loads(data)["attempt"] != attempt:
            return False
        self.store.create(paths.renewed(name, attempt), data)
        return True

    def _empty(self) -> str:
        """Why there are failures and no row: the most frequent reason, with the first message; "" otherwise."""
        if self.rows or not self.failed:
            return ""
        [(reason, count)] = self.failed.most_common(1)
        total = self.failed.total()
        return f"none of {total:,} embedded; {reason} {count:,}, such as: {one_line(self._messages[reason], 500)}"

    def hint(self) -> str:
        """How to plan so that images whose names hide them are embedded, if they are most samples; "" otherwise."""
        count = self.failed["dotted_name"]
        if 2 * count <= self.rows + self.failed.total():
            return ""
        return f"{count:,} images are not embedded because of their names: {self._messages['dotted_name']}"

    def _publish(self) -> dict[str, StoredFile]:
        """Move the spools to their names; the size and sha256 of each file."""
        self._close_parquet()
        files: dict[str, StoredFile] = {}
        for folder, spool in self._spools.items():
            if folder in paths.VECTORS.values():
                spool.seek(0)
                spool.write(half_header(self.rows, self.dim))
            spool.flush()
            spool.seek(0)
            digest = stream_digest(spool)
            files[self._name(folder)] = {"bytes": spool.tell(), "sha256": digest}
        self._published = list(files)
        self._spools = {}
        self._stack.close()
        return files

    def _name(self, folder: str) -> str:
        return paths.data_file(folder, self.plan.name(self.partition), self.attempt)

    def _spool(self, folder: str) -> IO[bytes]:
        """The temporary file of a folder's file; of a matrix it begins with a header that `_publish` replaces."""
        if folder not in self._spools:
            self._spools[folder] = self._stack.enter_context(self.store.writer(self._name(folder)))
            if folder in paths.VECTORS.values():
                self._spools[folder].write(half_header(0, self.dim))
        return self._spools[folder]

    def _append(self, folder: str, rows: Sequence[dict[str, Any]]) -> None:
        self._pending[folder].extend(rows)
        if len(self._pending[folder]) >= _ROW_GROUP:
            self._flush(folder)

    def _flush(self, folder: str) -> None:
        """Write the pending rows of a Parquet file as a row group."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows, self._pending[folder] = self._pending[folder], []
        if not rows:
            return
        schema = metadata_schema(self.plan.fields) if folder == paths.METADATA else _failures_schema()
        if folder not in self._parquet:
            self._parquet[folder] = pq.ParquetWriter(self._spool(folder), schema, compression=self._compression)
        self._parquet[folder].write_table(pa.Table.from_pylist(rows, schema=schema))

    def _close_parquet(self) -> None:
        for writer in self._parquet.values():
            writer.close()
        self._parquet = {}


class _Discarded(Exception):
    """Tells the spools' context managers to publish nothing."""


def _failures_schema() -> pa.Schema:
    import pyarrow as pa

    text = pa.string()
    return pa.schema([("key", text), ("shard", text), ("offset", pa.int64()), ("reason", text), ("message", text)])
