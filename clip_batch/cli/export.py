"""export: an index or a model as other systems take it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from clip_batch.cli.arguments import Options, answer, say
from clip_batch.errors import ConfigError


def clip_retrieval(options: Options) -> int:
    """Write an index folder that clip-retrieval's own service serves."""
    from clip_batch.export.clip_retrieval import export_clip_retrieval

    if not options.target.to:
        raise ConfigError("export needs --to FOLDER")
    export_clip_retrieval(options.index, options.target.to, options.storage, say)
    return 0


def sql(options: Options) -> int:
    """Fill an SQL table with the metadata, or go on doing so; then check it. With --verify, only check."""
    from clip_batch.export.databases import fill

    return _checked(options, fill.export_sql)


def milvus(options: Options) -> int:
    """Fill a Milvus collection with the vectors, or go on doing so; then check it. With --verify, only check."""
    from clip_batch.export.databases import fill

    return _checked(options, fill.export_milvus)


def _checked(options: Options, export: Callable[..., Any]) -> int:
    from clip_batch.export.databases.fill import describe

    target = options.target
    found = export(options.index, options.database, options.storage, target.verify, target.deep, say)
    answer(options, {"ok": found.ok, **asdict(found)}, describe(found))
    return 0 if found.ok else 1


def onnx(options: Options) -> int:
    """Write a model as ONNX files in a folder, which --model onnx:FOLDER takes."""
    from clip_batch.encoders.onnx_export import export_onnx

    if not options.target.to:
        raise ConfigError("export needs --to FOLDER")
    export_onnx(options.plan.model, options.plan.pretrained, options.target.to)
    answer(options, {"folder": options.target.to}, f"written: take it as --model onnx:{options.target.to}")
    return 0
