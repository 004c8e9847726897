"""The `filters` of /v1/search: what a client may send as JSON, and the condition that each means."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from clip_batch.errors import ConfigError
from clip_batch.search.conditions import Compare, Condition, Contains, In, all_of

MOST = 2**16
"""Entries of any list in a request but `in`. The service's options bound more closely what a search takes."""

MOST_VALUES = 200_000
"""Values of all `in` of a request."""


def _checked_values(values: list[Any]) -> list[Any]:
    """The values of `in`, checked by the set of their types: pydantic's union of types takes five times as long."""
    if not set(map(type, values)) <= {str, int, bool}:
        for number, value in enumerate(values):
            if not isinstance(value, bool | int | float | str) or (
                isinstance(value, float) and not math.isfinite(value)
            ):
                raise ValueError(f"value {number} is no text, no finite number, and neither true nor false")
    return values


_VALUE = {"anyOf": [{"type": kind} for kind in ("boolean", "integer", "number", "string")]}
Values = Annotated[
    list[Any],
    AfterValidator(_checked_values),
    WithJsonSchema({"type": "array", "items": _VALUE, "maxItems": MOST_VALUES}),
]


class RequestModel(BaseModel):
    """Base of requests: unknown fields, strings in place of numbers, and NaN are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Filter(RequestModel):
    """A condition on a metadata column: exactly one of `equals`, `in`, `contains`, or a range of `min` and `max`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_by_name=True)

    column: str = Field(max_length=1000)
    equals: bool | int | float | str | None = None
    among: Annotated[Values, Field(max_length=MOST_VALUES)] | None = Field(None, alias="in")
    contains: str | None = Field(None, max_length=10_000, description="part of a text, upper or lower case")
    min: int | float | str | None = Field(None, description="this or more")
    max: int | float | str | None = Field(None, description="this or less")

    @model_validator(mode="after")
    def _one(self) -> Filter:
        ranged = self.min is not None or self.max is not None
        if sum([self.equals is not None, self.among is not None, self.contains is not None, ranged]) != 1:
            raise ValueError("give exactly one of equals, in, contains, and min with max")
        return self

    def condition(self) -> Condition:
        """The condition that this filter means."""
        if self.equals is not None:
            return Compare(self.column, "=", self.equals)
        if self.among is not None:
            return In(self.column, tuple(self.among))
        if self.contains is not None:
            return Contains(self.column, self.contains)
        low = None if self.min is None else Compare(self.column, ">=", self.min)
        high = None if self.max is None else Compare(self.column, "<=", self.max)
        condition = all_of([low, high])
        assert condition is not None
        return condition


def parse_filter(given: Filter | Mapping[str, object]) -> Filter:
    """A filter as /v1/search takes it in JSON. ConfigError: it is not one."""
    if isinstance(given, Filter):
        return given
    try:
        return Filter.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ConfigError(f"filter {reprlib.repr(given)}: {f'{field}: ' if field else ''}{first['msg']}") from None
