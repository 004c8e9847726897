"""clip-batch: plan, embed, merge and search image-text data with CLIP, exactly once.

    from clip_batch import EmbedConfig, PlanConfig, Searcher, embed, make_plan, merge

    make_plan("tars/{000..127}.tar", "out", PlanConfig(model="ViT-B-32", pretrained="openai"))
    embed("out", EmbedConfig(batch_size=256))
    merge("out", "index")
    with Searcher("index") as searcher:
        hits = searcher.search(searcher.encode_text(["a red bicycle"]), k=5)[0]

Importing this package loads nothing heavy: a name that needs a large library is loaded when it is first used.
"""

import importlib as _importlib
import typing as _typing

from clip_batch import errors
from clip_batch.config import (
    DatabaseConfig,
    DownloadConfig,
    EmbedConfig,
    MergeConfig,
    PlanConfig,
    SearchConfig,
    ServeConfig,
    SlurmConfig,
    SparkConfig,
    StorageConfig,
    SubmitConfig,
    SweepConfig,
)
from clip_batch.errors import (
    ClipBatchError,
    ConfigError,
    ConflictError,
    CorruptError,
    DatabaseError,
    DecodeError,
    EncoderError,
    IncompleteError,
    InputError,
    PartitionFailed,
    PlanError,
    Preempted,
    ServiceError,
    ServiceUnavailable,
    StorageUnavailable,
)
from clip_batch.types import Hit, Plan

if _typing.TYPE_CHECKING:
    from clip_batch.api.index import filter, gc_index, index_status, removals, remove, sweep, undo_removal, versions
    from clip_batch.api.output import status, verify
    from clip_batch.api.table import embed_table
    from clip_batch.client import AsyncClient, Client, FakeService, ServiceHits
    from clip_batch.embeddings.embed import Outcome, embed
    from clip_batch.embeddings.encoder import Encoder
    from clip_batch.embeddings.status import OutputStatus
    from clip_batch.embeddings.verify import VerifyReport
    from clip_batch.export.arrow import RowDataset, read
    from clip_batch.export.dataset import FilteredDataset
    from clip_batch.export.filter import Filtered
    from clip_batch.index.gc import GcReport
    from clip_batch.index.manifest import Manifest
    from clip_batch.index.merge.merge import merge
    from clip_batch.index.merge.sweep import Sweep
    from clip_batch.index.removal_history import RemovalInfo, UndoReport
    from clip_batch.index.remove import RemovedRow, RemoveReport
    from clip_batch.index.status import IndexStatus
    from clip_batch.index.versions import VersionInfo
    from clip_batch.plan.plan import make_plan
    from clip_batch.search.query import Query, QueryTerm
    from clip_batch.search.results import SearchResult
    from clip_batch.search.searcher import Searcher
    from clip_batch.serve.search.app import make_app

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "Client",
    "ClipBatchError",
    "ConfigError",
    "ConflictError",
    "CorruptError",
    "DatabaseConfig",
    "DatabaseError",
    "DecodeError",
    "DownloadConfig",
    "EmbedConfig",
    "Encoder",
    "EncoderError",
    "FakeService",
    "Filtered",
    "FilteredDataset",
    "GcReport",
    "Hit",
    "IncompleteError",
    "IndexStatus",
    "InputError",
    "Manifest",
    "MergeConfig",
    "Outcome",
    "OutputStatus",
    "PartitionFailed",
    "Plan",
    "PlanConfig",
    "PlanError",
    "Preempted",
    "Query",
    "QueryTerm",
    "RemovalInfo",
    "RemoveReport",
    "RemovedRow",
    "RowDataset",
    "SearchConfig",
    "SearchResult",
    "Searcher",
    "ServeConfig",
    "ServiceError",
    "ServiceHits",
    "ServiceUnavailable",
    "SlurmConfig",
    "SparkConfig",
    "StorageConfig",
    "StorageUnavailable",
    "SubmitConfig",
    "Sweep",
    "SweepConfig",
    "UndoReport",
    "VerifyReport",
    "VersionInfo",
    "embed",
    "embed_table",
    "errors",
    "filter",
    "gc_index",
    "index_status",
    "make_app",
    "make_plan",
    "merge",
    "read",
    "removals",
    "remove",
    "status",
    "sweep",
    "undo_removal",
    "verify",
    "versions",
]

_HOMES = {
    "AsyncClient": "client",
    "Client": "client",
    "Encoder": "embeddings.encoder",
    "FakeService": "client",
    "Filtered": "export.filter",
    "FilteredDataset": "export.dataset",
    "ServiceHits": "client",
    "GcReport": "index.gc",
    "IndexStatus": "index.status",
    "Manifest": "index.manifest",
    "Outcome": "embeddings.embed",
    "OutputStatus": "embeddings.status",
    "Query": "search.query",
    "QueryTerm": "search.query",
    "RemovalInfo": "index.removal_history",
    "RemoveReport": "index.remove",
    "RemovedRow": "index.remove",
    "RowDataset": "export.arrow",
    "SearchResult": "search.results",
    "Searcher": "search.searcher",
    "Sweep": "index.merge.sweep",
    "UndoReport": "index.removal_history",
    "VerifyReport": "embeddings.verify",
    "VersionInfo": "index.versions",
    "embed": "embeddings.embed",
    "embed_table": "api.table",
    "filter": "api.index",
    "gc_index": "api.index",
    "index_status": "api.index",
    "make_app": "serve.search.app",
    "make_plan": "plan.plan",
    "merge": "index.merge.merge",
    "read": "export.arrow",
    "removals": "api.index",
    "remove": "api.index",
    "status": "api.output",
    "sweep": "api.index",
    "undo_removal": "api.index",
    "verify": "api.output",
    "versions": "api.index",
}
"""The modules of the names that are loaded when they are first used."""


def __getattr__(name: str) -> _typing.Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clip_batch' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(_importlib.import_module(f"clip_batch.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
