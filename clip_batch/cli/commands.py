"""The table of commands: `clip-batch COMMAND`."""

from __future__ import annotations

from clip_batch.cli import doctor, embed, export, merge, models, remove, run, search, serve, state, submit
from clip_batch.cli.parser import Command

COMMANDS: dict[str, Command] = {
    "run": run.run,
    "demo": serve.demo,
    "plan": embed.plan,
    "models": models.models,
    "prefetch": embed.prefetch,
    "embed": embed.embed,
    "worker": embed.worker,
    "submit slurm": submit.slurm,
    "submit spark": submit.spark,
    "status": state.status,
    "verify": state.verify,
    "repair": state.repair,
    "gc": state.gc,
    "merge": merge.merge,
    "sweep": merge.sweep,
    "versions": merge.versions,
    "remove": remove.remove,
    "export clip-retrieval": export.clip_retrieval,
    "export sql": export.sql,
    "export milvus": export.milvus,
    "export onnx": export.onnx,
    "search": search.search,
    "filter": search.filter,
    "serve": serve.serve,
    "serve-worker": serve.serve_worker,
    "end2end": run.end2end,
    "doctor": doctor.doctor,
}
"""Each command's function; its parameters say which options it has (see `cli.parser`)."""
