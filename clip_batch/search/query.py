"""What is looked for, and how: one Query for Searcher, FilteredDataset, the shell and the service."""

from __future__ import annotations

import hashlib
import math
import os
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_batch.config.texts import query_text
from clip_batch.errors import ConfigError
from clip_batch.search.conditions import Condition
from clip_batch.search.where import Where, as_condition
from clip_batch.types import StrPath

K = 10
"""Hits of a query that does not say how many."""

DUPLICATE = 0.94
"""The cosine from which two rows are near duplicates, unless a query says otherwise; clip-retrieval's."""


class QueryError(ConfigError):
    """A query that an index, or the heads at hand, cannot answer; `field` is the field of the query that is wrong."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason

    def __reduce__(self) -> tuple[type[QueryError], tuple[str, str]]:
        return type(self), (self.field, self.reason)


def check_kind(kind: str | None) -> None:
    """ConfigError: a kind of query is none of those that there are."""
    _check("kind", kind, kind in (None, "image", "text"), "image or text, or None where it is not known")


@dataclass(frozen=True, eq=False, kw_only=True)
class QueryTerm:
    """One thing to look for: a text, an image (path, URL or bytes), a vector (d,), or the id of a row of the index.

    The weighted sum of the unit vectors of a query's terms is what searches; a negative `weight` leads away from a
    term. ConfigError: not exactly one of the four is given, or the weight is not finite.
    """

    text: str = ""
    image: StrPath | bytes = ""
    embedding: npt.ArrayLike | None = None
    id: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_subject(self.text, self.image, self.id)
        if bool(self.text) + bool(self.image) + (self.embedding is not None) + (self.id is not None) != 1:
            raise ConfigError("a query is one of text, image, embedding and id: give just one")
        _check_number("weight", self.weight, finite=True)

    def describe(self) -> dict[str, Any]:
        """The term for JSON; of an image's bytes and of a vector, the sha256."""
        if self.text:
            return {"text": self.text}
        if self.id is not None:
            return {"id": int(self.id)}
        if self.image and not isinstance(self.image, bytes):
            return {"image": os.fspath(self.image)}
        if not isinstance(self.image, bytes) or not self.image:
            return {"sha256": hashlib.sha256(np.asarray(self.embedding, dtype=np.float32).tobytes()).hexdigest()}
        return {"sha256": hashlib.sha256(self.image).hexdigest()}


@dataclass(frozen=True, eq=False, kw_only=True)
class Criteria:
    """Which rows a search takes, and in what order.

    - `k`: how many rows at most, the best first.
    - `threshold`: the least score of a row.
    - `modality`: "image" to search the images (of an index of captions alone these), "text" to search the captions.
    - `effort`: nprobe or efSearch; by default what merge tuned for `k` and `kind`.
    - `kind`: "image" or "text", which the query's vector is; by default what the query's terms say.
    - `where`: a condition on metadata (see `clip_batch.search.where`), or a list of filters as /v1/search takes them.
    - `unique`: take only the best of rows whose cosine with each other is `unique_threshold` or more.
    - `safe`, `nonviolent`: leave out rows that the safety head, or the violence head, refuses.
    - `aesthetic`: the weight of the aesthetic head in the order of the rows.

    ConfigError: `where` is not understood, or a number is out of range.
    """

    k: int | None = None
    threshold: float | None = None
    modality: str = "image"
    effort: int | None = None
    where: Where | None = None
    unique: bool = False
    unique_threshold: float = DUPLICATE
    safe: bool = False
    nonviolent: bool = False
    aesthetic: float | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        for field, count in (("k", self.k), ("effort", self.effort)):
            _check(field, count, count is None or (_is_whole(count) and count >= 1), "1 or more, a whole number")
        if self.threshold is not None:
            _check_number("threshold", self.threshold)
        if self.aesthetic is not None:
            _check_number("aesthetic", self.aesthetic, finite=True)
        _check_number("unique_threshold", self.unique_threshold)
        _check("unique_threshold", self.unique_threshold, 0 <= self.unique_threshold <= 1, "from 0 to 1")
        _check("modality", self.modality, isinstance(self.modality, str), "image or text")
        check_kind(self.kind)
        for field in ("unique", "safe", "nonviolent"):
            switch = getattr(self, field)
            _check(field, switch, isinstance(switch, bool | np.bool_), "True or False")
        if isinstance(self.where, str) and not self.where.strip():
            raise ConfigError("a query's where is empty: give a condition, or leave it out")
        _ = self.condition

    @cached_property
    def condition(self) -> Condition | None:
        """The condition that `where` means."""
        return as_condition(self.where)

    @property
    def judged(self) -> bool:
        """Whether rows are judged by their vectors: by heads, or as near duplicates."""
        return self.unique or self.safe or self.nonviolent or self.aesthetic is not None


@dataclass(frozen=True, eq=False, kw_only=True)
class Query(Criteria):
    """What to look for (one of `text`, `image`, `embedding` and `id`, or several `terms`), and which rows to take.

        Query(text="a dog", where='license = "cc0" and width > 512', unique=True)
        Query(terms=[QueryTerm(text="a dog"), QueryTerm(text="snow", weight=-0.5)], k=100)

    The other fields are those of `Criteria`. `weight` is the query's part of a FilteredDataset's mixture; a search
    does not look at it. ConfigError: nothing or too much to look for is given, or as `Criteria`.
    """

    text: str = ""
    image: StrPath | bytes = ""
    embedding: npt.ArrayLike | None = None
    id: int | None = None
    terms: Sequence[QueryTerm] = ()
    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_subject(self.text, self.image, self.id)
        listed = isinstance(self.terms, list | tuple) and all(isinstance(term, QueryTerm) for term in self.terms)
        _check("terms", self.terms, listed, "a list of QueryTerm")
        alone = bool(self.text) or bool(self.image) or self.embedding is not None or self.id is not None
        if self.terms and alone:
            raise ConfigError("a query has either terms, or one of text, image, embedding and id: leave out the others")
        self.all_terms()
        _check_number("weight", self.weight, finite=True)
        _check("weight", self.weight, self.weight > 0, "over 0")

    def all_terms(self) -> Sequence[QueryTerm]:
        """What is looked for, as one or more terms."""
        return self.terms or [QueryTerm(text=self.text, image=self.image, embedding=self.embedding, id=self.id)]

    def describe(self) -> dict[str, Any]:
        """The query for JSON. What was added to queries later is there only where it was given."""
        terms = [{**term.describe(), "weight": float(term.weight)} for term in self.terms]
        about: dict[str, Any] = {"terms": terms} if terms else self.all_terms()[0].describe()
        about["k"] = None if self.k is None else int(self.k)
        about["threshold"] = None if self.threshold is None else float(self.threshold)
        about |= {"weight": float(self.weight), "modality": self.modality}
        later = {
            "effort": self.effort,
            "where": None if self.condition is None else str(self.condition),
            "unique": float(self.unique_threshold) if self.unique else None,
            "safe": self.safe or None,
            "nonviolent": self.nonviolent or None,
            "aesthetic": None if self.aesthetic is None else float(self.aesthetic),
        }
        return about | {name: value for name, value in later.items() if value is not None}


def kind_of(terms: Iterable[tuple[bool, bool]]) -> str | None:
    """The kind of vectors that a query's terms have, each (is it a text, is it an image): None for a mixture."""
    kinds = {"text" if text else "image" if image else None for text, image in terms}
    return kinds.pop() if len(kinds) == 1 else None


def _check_subject(text: object, image: object, id: object) -> None:
    """ConfigError: what is looked for is of another type than its field's."""
    if not isinstance(text, str) or text:
        query_text(text, "a query's text")
    _check("image", image, isinstance(image, str | bytes | os.PathLike), "a path, a URL or the bytes of an image file")
    _check("id", id, id is None or _is_whole(id), "the whole number of a row")


def _check_number(field: str, value: float, finite: bool = False) -> None:
    """ConfigError: a field is no number, is NaN, or is infinite where it must not be."""
    _check(field, value, isinstance(value, Real) and not isinstance(value, bool), "a number")
    _check(field, value, not finite or math.isfinite(value), "finite")
    _check(field, value, not math.isnan(value), "a number")


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check(field: str, value: object, good: bool, rule: str) -> None:
    """ConfigError, which names the rule, unless a field of a query or of a term is good."""
    if not good:
        raise ConfigError(f"a query's {field} is {reprlib.repr(value)}: it must be {rule}")
