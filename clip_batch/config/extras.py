"""The extras of this package, `pip install 'clip-batch[EXTRA]'`, by the libraries that they install."""

from __future__ import annotations

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


def require(*extras: str) -> None:
    """Refuse to begin what would end for want of an extra. ConfigError: it names all of `extras` that are missing."""
    from importlib.util import find_spec

    first = {extra: library for library, extra in reversed(EXTRAS.items())}
    if missing := [extra for extra in extras if find_spec(first[extra]) is None]:
        needed = " and ".join(first[extra] for extra in missing)
        raise ConfigError(f"it needs {needed}, which is not installed: pip install 'clip-batch[{','.join(missing)}]'")


def remedy(module: str | None) -> str | None:
    """The command that installs the missing `module` (a dotted name); None if no extra does."""
    name = (module or "").partition(".")[0]
    return f"pip install 'clip-batch[{EXTRAS[name]}]'" if name in EXTRAS else None
