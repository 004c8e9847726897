"""clip-batch: plan, embed, merge and search image-text data with CLIP, exactly once.

Importing this package loads nothing heavy: each public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from clip_batch import errors
from clip_batch.config import EmbedConfig, MergeConfig, PlanConfig, SearchConfig, ServeConfig, StorageConfig

if TYPE_CHECKING:
    from clip_batch.client import Client
    from clip_batch.embeddings.embed import embed
    from clip_batch.export.dataset import FilteredDataset
    from clip_batch.index.merge.merge import merge
    from clip_batch.plan.plan import make_plan
    from clip_batch.search.searcher import Searcher

__version__ = "0.1.0"

__all__ = [
    "Client",
    "EmbedConfig",
    "FilteredDataset",
    "MergeConfig",
    "PlanConfig",
    "SearchConfig",
    "Searcher",
    "ServeConfig",
    "StorageConfig",
    "embed",
    "errors",
    "make_plan",
    "merge",
]

_HOME = {
    "Client": "client",
    "FilteredDataset": "export.dataset",
    "Searcher": "search.searcher",
    "embed": "embeddings.embed",
    "make_plan": "plan.plan",
    "merge": "index.merge.merge",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'clip_batch' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(f"clip_batch.{_HOME[name]}"), name)
