"""Conditions on metadata columns, which a search, a filter and a training stream take alike."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST = 2**16
"""Entries of any list in a request; what a search takes of them is bounded by the service's options."""


class RequestModel(BaseModel):
    """Base: no unknown fields, no strings for numbers, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Filter(RequestModel):
    """A condition on a metadata column: exactly one of `equals`, `in`, `contains`, or a range of `min` and `max`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_by_name=True)

    column: str = Field(max_length=1000)
    equals: bool | int | float | str | None = None
    among: list[bool | int | float | str] | None = Field(None, alias="in", max_length=MOST)
    contains: str | None = Field(None, max_length=10_000, description="part of a text, upper or lower case")
    min: int | float | str | None = Field(None, description="this or more")
    max: int | float | str | None = Field(None, description="this or less")

    @model_validator(mode="after")
    def _one(self) -> Filter:
        ranged = self.min is not None or self.max is not None
        if sum([self.equals is not None, self.among is not None, self.contains is not None, ranged]) != 1:
            raise ValueError("give exactly one of equals, in, contains, and min with max")
        return self

    def holds(self, value: Any) -> bool:
        """Whether a row's value meets it; null and values of another kind do not."""
        if value is None:
            return False
        if self.equals is not None:
            return _same(value, self.equals)
        if self.among is not None:
            return any(_same(value, wanted) for wanted in self.among)
        if self.contains is not None:
            return isinstance(value, str) and self.contains.casefold() in value.casefold()
        return (self.min is None or _ordered(self.min, value)) and (self.max is None or _ordered(value, self.max))


def _same(value: Any, wanted: Any) -> bool:
    return _kind(value) == _kind(wanted) and bool(value == wanted)


def _ordered(low: Any, high: Any) -> bool:
    return _kind(low) == _kind(high) and bool(low <= high)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    return "number" if isinstance(value, int | float) else type(value).__name__
