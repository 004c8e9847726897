"""The requests of the worker service: the options of plan, embed and merge as JSON."""

from __future__ import annotations

import dataclasses
import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, create_model

from clip_batch.config import MergeConfig, PlanConfig
from clip_batch.config.fields import default, helps
from clip_batch.search.filters import RequestModel

Output = Annotated[str, Field(max_length=4096)]


class StageFields(RequestModel):
    """Fields of every request: the embeddings folder, and how long to wait for the result."""

    output: str = Field(max_length=4096, description="the embeddings folder OUT")
    wait: float | None = Field(
        None,
        ge=0,
        le=86_400,
        description="seconds to wait before the answer is 202 and the work goes on; null waits for its end",
    )


class EmbedWork(StageFields):
    """Embed one partition."""

    partition: int = Field(ge=0)


class MergeTask(StageFields):
    """Run one task of a merge: first train, then each shard in any order, then manifest. `all` runs all of them."""

    output: Output | Annotated[list[Output], Field(min_length=1, max_length=1000)] = Field(  # type: ignore[assignment]
        description="the embeddings folder OUT, or several that one encoder made"
    )
    index: str = Field(max_length=4096, description="the index folder INDEX")
    task: Literal["all", "train", "shard", "manifest"] = "all"
    shard: int | None = Field(None, ge=0, description="the number of the index shard, for task `shard`")


def _with_options(base: type[BaseModel], name: str, section: type) -> type[Any]:
    """Return a request model with the fields of an option section, their defaults and help."""
    hints = typing.get_type_hints(section)
    fields: dict[str, Any] = {
        option.name: (hints[option.name], Field(default(option), description=helps(section)[option.name]))
        for option in dataclasses.fields(section)
    }
    return create_model(name, __base__=base, __doc__=base.__doc__, **fields)


PlanWork = _with_options(StageFields, "PlanWork", PlanConfig)
MergeWork = _with_options(MergeTask, "MergeWork", MergeConfig)
MODELS: list[type[BaseModel]] = [PlanWork, EmbedWork, MergeWork]


def section_of(section: type, request: Any) -> Any:
    """Return the option section whose values a `PlanWork` or `MergeWork` has."""
    return section(**{option.name: getattr(request, option.name) for option in dataclasses.fields(section)})
