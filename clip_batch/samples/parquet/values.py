"""Values of Parquet columns as Python and JSON have them, each row by itself, whatever the type."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from clip_batch.storage.arrow import undecoded
from clip_batch.storage.text import as_text, plain


def values_of(column: pa.Array) -> list[Any]:
    """The values of a column: numbers, bools and null as they are, strings, lists and objects; all else as text.

    Bytes that are not UTF-8 become U+FFFD in their row alone.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    if pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
        column = column.cast(pa.string())
    try:
        values: list[Any] = column.to_pylist()
        return values
    except Exception:  # a string that is not UTF-8, a date beyond Python's
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    """One value; if Python cannot have it, its text."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return plain(scalar.cast(undecoded(scalar.type)).as_py())
    except Exception:
        return as_text(str(pa.array([scalar], scalar.type)))


def bytes_of(scalar: pa.Scalar) -> memoryview:
    """The bytes of a binary value, without a copy; one of a dictionary too."""
    while isinstance(scalar, pa.DictionaryScalar | pa.ExtensionScalar):
        scalar = scalar.value
    return memoryview(scalar.as_buffer()).cast("B")
