"""export: write an index or a model in the formats of other systems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from clip_batch.cli.arguments import IndexArguments, JsonArguments, Only, answer, say
from clip_batch.config import DatabaseConfig, PlanConfig, StorageConfig


@dataclass(frozen=True, kw_only=True)
class ClipRetrievalArguments(IndexArguments):
    """Which index becomes which folder."""

    to: str
    """The folder to write."""


def clip_retrieval(arguments: ClipRetrievalArguments, storage: StorageConfig) -> int:
    """Write an index folder that clip-retrieval's own service serves."""
    from clip_batch.export.clip_retrieval import export_clip_retrieval

    export_clip_retrieval(arguments.index_folder, arguments.to, storage, say)
    return 0


@dataclass(frozen=True, kw_only=True)
class DatabaseArguments(JsonArguments, IndexArguments):
    """Whether a database is filled or only compared."""

    verify: bool = False
    """Write nothing, only compare what the database holds with the index."""
    deep: bool = False
    """Compare every row, not a sample of them."""


def sql(arguments: DatabaseArguments, database: DatabaseConfig, storage: StorageConfig) -> int:
    """Fill an SQL table with the metadata, or continue to, and check it. With --verify, only check it."""
    from clip_batch.export.databases import fill

    return _checked(arguments, database, storage, fill.export_sql)


def milvus(arguments: DatabaseArguments, database: DatabaseConfig, storage: StorageConfig) -> int:
    """Fill a Milvus collection with the vectors, or continue to, and check it. With --verify, only check it."""
    from clip_batch.export.databases import fill

    return _checked(arguments, database, storage, fill.export_milvus)


def _checked(
    arguments: DatabaseArguments, database: DatabaseConfig, storage: StorageConfig, export: Callable[..., Any]
) -> int:
    from clip_batch.export.databases.fill import describe

    report = export(arguments.index_folder, database, storage, arguments.verify, arguments.deep, say)
    answer(arguments, {"ok": report.ok, **asdict(report)}, describe(report))
    return 0 if report.ok else 1


@dataclass(frozen=True, kw_only=True)
class OnnxArguments(JsonArguments):
    """Where the ONNX files go."""

    to: str
    """The folder to write."""


def onnx(
    arguments: OnnxArguments, plan: Annotated[PlanConfig, Only(("model", "pretrained"))], storage: StorageConfig
) -> int:
    """Write a model as ONNX files in a folder, which --model onnx:FOLDER takes."""
    from clip_batch.encoders.onnx_export import export_onnx

    export_onnx(plan.model, plan.pretrained, arguments.to)
    answer(arguments, {"folder": arguments.to}, f"written: take it as --model onnx:{arguments.to}")
    return 0
