"""The extras of this package, `pip install 'clip-batch[EXTRA]'`, by the libraries that they install."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from clip_batch.errors import ConfigError

EXTRAS = {
    "torch": "embed",
    "torchvision": "embed",
    "open_clip": "embed",
    "transformers": "embed",
    "tokenizers": "embed",
    "timm": "embed",
    "safetensors": "embed",
    "huggingface_hub": "embed",
    "simplejpeg": "embed",
    "faiss": "merge",
    "autofaiss": "autofaiss",
    "fastapi": "serve",
    "uvicorn": "serve",
    "starlette": "serve",
    "prometheus_client": "serve",
    "submitit": "slurm",
    "pyspark": "spark",
    "py4j": "spark",
    "s3fs": "s3",
    "botocore": "s3",
    "gcsfs": "gcs",
    "hdfs_native": "hdfs",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "openvino": "openvino",
    "pymilvus": "milvus",
    "milvus_lite": "milvus",
    "grpc": "milvus",
    "sqlalchemy": "sql",
    "pymysql": "sql",
    "psycopg": "sql",
}
"""Import name of a library -> the extra that installs it."""


NEEDS = {
    "run": ("embed", "merge", "serve"),
    "demo": ("embed", "merge", "serve"),
    "end2end": ("embed", "merge", "serve"),
    "prefetch": ("embed",),
    "embed": ("embed",),
    "worker": ("embed",),
    "repair": ("embed",),
    "merge": ("merge",),
    "sweep": ("merge",),
    "search": ("embed", "merge"),
    "filter": ("embed", "merge"),
    "serve": ("embed", "merge", "serve"),
    "serve-worker": ("embed", "merge", "serve"),
    "submit slurm": ("slurm",),
    "submit spark": ("spark",),
    "export clip-retrieval": ("merge",),
    "export sql": ("sql",),
    "export milvus": ("merge", "milvus"),
    "export onnx": ("embed", "onnx"),
}
"""The extras that a command needs, as a rule, before it ends; it loads their libraries, which takes seconds."""


def require(*extras: str) -> None:
    """Refuse to begin what would end for want of an extra. ConfigError: it names all of `extras` that are missing."""
    if missing := _missing(extras):
        needed = " and ".join(_FIRST[extra] for extra in missing)
        raise ConfigError(f"it needs {needed}, which is not installed: pip install 'clip-batch[{','.join(missing)}]'")


def remedy(module: str | None, command: str = "") -> str | None:
    """The command that installs the missing `module` (a dotted name) and all else that `command` lacks.

    None if no extra has the module.

    >>> remedy("torch._inductor")
    "pip install 'clip-batch[embed]'"
    """
    name = (module or "").partition(".")[0]
    if name not in EXTRAS:
        return None
    extras = dict.fromkeys([*_missing(NEEDS.get(command, ())), EXTRAS[name]])
    return f"pip install 'clip-batch[{','.join(extras)}]'"


_FIRST = {extra: library for library, extra in reversed(EXTRAS.items())}
"""The first library of each extra, which tells whether the extra is installed."""


def _missing(extras: Iterable[str]) -> list[str]:
    return [extra for extra in extras if importlib.util.find_spec(_FIRST[extra]) is None]
