"""The extras of this package, `pip install 'clip-batch[EXTRA]'`, by the libraries that they install."""

from __future__ import annotations

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


def remedy(module: str | None) -> str | None:
    """The command that installs the missing `module` (a dotted name); None if no extra does."""
    name = (module or "").partition(".")[0]
    return f"pip install 'clip-batch[{EXTRAS[name]}]'" if name in EXTRAS else None
