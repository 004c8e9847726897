"""The table of commands: `clip-batch COMMAND`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from clip_batch.cli import doctor, embed, export, merge, search, serve, state, submit
from clip_batch.cli.arguments import Options
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
    SubmitConfig,
    SweepConfig,
)


@dataclass(frozen=True)
class Command:
    """A command's function, its sections' flags, and the fields of TargetConfig it takes.

    `fewer` names sections of which it has some flags alone, the others being those of a stage before.
    """

    run: Callable[[Options], int]
    fields: tuple[str, ...]
    sections: tuple[type, ...] = ()
    fewer: tuple[tuple[type, tuple[str, ...]], ...] = ()


MODEL = ("model", "pretrained", "preprocess", "precision")
"""Of a plan: what an encoder is."""

COMMANDS: dict[str, Command] = {
    "demo": Command(serve.demo, ("serve",), (ServeConfig,)),
    "plan": Command(embed.plan, ("output", "json"), (PlanConfig,)),
    "prefetch": Command(embed.prefetch, ("output", "json"), (), ((PlanConfig, MODEL),)),
    "embed": Command(embed.embed, ("output", "workers", "json"), (EmbedConfig, PlanConfig)),
    "worker": Command(embed.worker, ("output", "partitions", "slot", "slots", "submission", "json"), (EmbedConfig,)),
    "submit slurm": Command(submit.slurm, ("output", "index"), (SubmitConfig, SlurmConfig, EmbedConfig, MergeConfig)),
    "submit spark": Command(submit.spark, ("output", "index"), (SubmitConfig, SparkConfig, EmbedConfig, MergeConfig)),
    "status": Command(state.status, ("output", "json")),
    "verify": Command(state.verify, ("output", "index", "deep", "json")),
    "repair": Command(state.repair, ("output", "deep", "json"), (EmbedConfig,)),
    "gc": Command(state.gc, ("output", "everything", "json")),
    "merge": Command(merge.merge, ("output", "index", "task", "slot", "slots", "json"), (MergeConfig,)),
    "sweep": Command(merge.sweep, ("output", "json"), (SweepConfig, MergeConfig)),
    "versions": Command(merge.versions, ("index", "use", "drop", "json")),
    "remove": Command(merge.remove, ("index", "keys", "column", "json")),
    "export clip-retrieval": Command(export.clip_retrieval, ("index", "to")),
    "export sql": Command(export.sql, ("index", "verify", "deep", "json"), (DatabaseConfig,)),
    "export milvus": Command(export.milvus, ("index", "verify", "deep", "json"), (DatabaseConfig,)),
    "export onnx": Command(export.onnx, ("to", "json"), (), ((PlanConfig, ("model", "pretrained")),)),
    "search": Command(search.search, ("index", "text", "image", "embedding", "json"), (SearchConfig,)),
    "filter": Command(
        search.filter, ("index", "text", "image", "embedding", "output", "images", "json"), (SearchConfig,)
    ),
    "serve": Command(serve.serve, ("index",), (ServeConfig, DatabaseConfig)),
    "serve-worker": Command(
        serve.serve_worker, ("allow",), (EmbedConfig,), ((ServeConfig, ("host", "port", "token")),)
    ),
    "end2end": Command(
        serve.end2end,
        ("output", "workers", "serve", "json"),
        (DownloadConfig, PlanConfig, EmbedConfig, MergeConfig),
        ((ServeConfig, ("host", "port", "token")),),
    ),
    "doctor": Command(doctor.doctor, ("output", "on_node", "calibrate", "slots", "json"), (EmbedConfig, SlurmConfig)),
}
