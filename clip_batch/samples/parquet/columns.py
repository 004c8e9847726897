"""Which columns of a Parquet file have the image, the caption and the key of each row, by its schema alone.

Files of one plan may differ in their schemas, so each file is looked at by itself. A column of images is binary, as
img2dataset writes it, or a struct with a binary field `bytes`, as Hugging Face's `datasets` writes it, or has lists of
one of these.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from clip_batch.types import CAPTION_FIELDS, IMAGE_EXTENSIONS

KEY = "key"
"""The column of keys, if there is one; otherwise the number of the row in its file is its key."""

BYTES, PATH = "bytes", "path"
"""The fields of Hugging Face's struct of an image."""

_IMAGES = ("image", "img", "picture", "photo", *IMAGE_EXTENSIONS, "image_bytes")
"""Names of columns, in lower case, that are surely meant to have images."""

_NAMES = (*_IMAGES, "bytes", "content", "data")
"""Names of columns of images, in lower case. Of several such columns, the one that is named first here is used."""


class Columns(NamedTuple):
    """The columns of a file; None where it has none.

    - `image`: has the images.
    - `caption`: has the captions, as strings or as lists of them.
    - `passed_over`: other columns with binary values, which no metadata column could hold.
    - `problem`: why no column of images was chosen; "" if one was, or if none is needed.
    """

    image: str | None
    caption: str | None
    passed_over: tuple[str, ...] = ()
    problem: str = ""


def find_columns(schema: pa.Schema, image_field: str = "", caption_field: str = "", images: bool = True) -> Columns:
    """The columns of a file with this schema.

    `image_field` and `caption_field` are the columns that the plan names; "" chooses by type and name. `images` is
    whether images are embedded at all; without them every column of images is passed over.
    """
    binary = [field.name for field in schema if _has_binary(field.type)]
    image, problem = _image(schema, image_field) if images else (None, "")
    caption = _caption(schema, caption_field)
    return Columns(image, caption, tuple(name for name in dict.fromkeys(binary) if name != image), problem)


def image_columns(schema: pa.Schema) -> list[str]:
    """The columns that may have images, in the order of the schema, each name once."""
    types = _feature_types(schema)
    found = [field.name for field in schema if is_image(field.type) and types.get(field.name, "Image") == "Image"]
    return list(dict.fromkeys(found))


def named_images(schema: pa.Schema) -> str | None:
    """A column of strings that is named as one of images, where no column has images; None if there is none."""
    texts = [] if image_columns(schema) else text_columns(schema)
    return next((column for name in _IMAGES for column in texts if column.lower() == name), None)


def text_columns(schema: pa.Schema) -> list[str]:
    """The columns of strings, or of lists of strings, in the order of the schema, each name once."""
    return list(dict.fromkeys(field.name for field in schema if _is_text(field.type)))


def is_image(kind: pa.DataType) -> bool:
    """Whether values of a type may be images: binary, a struct with binary `bytes`, or a list of one of the two.

    >>> is_image(pa.binary()), is_image(pa.struct({"bytes": pa.binary(), "path": pa.string()})), is_image(pa.string())
    (True, True, False)
    """
    if is_list(kind):
        kind = kind.value_type
    return _is_binary(kind) or is_struct(kind)


def is_struct(kind: pa.DataType) -> bool:
    """Whether a type is a struct with a binary field `bytes`."""
    place = kind.get_field_index(BYTES) if pa.types.is_struct(kind) else -1
    return place >= 0 and _is_binary(kind.field(place).type)


def is_list(kind: pa.DataType) -> bool:
    """Whether a type is that of lists."""
    checks = (pa.types.is_list, pa.types.is_large_list, pa.types.is_list_view, pa.types.is_fixed_size_list)
    return any(check(kind) for check in checks)


def _image(schema: pa.Schema, name: str) -> tuple[str | None, str]:
    """The column of images, and why there is none."""
    names = ", ".join(schema.names) or "none"
    if name:
        if name not in schema.names:
            return None, f"no column {name!r}; its columns are {names}"
        kind = schema.field(schema.names.index(name)).type
        return (name, "") if is_image(kind) else (None, f"column {name!r} has {kind}, and no images' bytes")
    found = image_columns(schema)
    if named := named_images(schema):
        kind = schema.field(schema.names.index(named)).type
        paths = (
            f"column {named!r} has {kind}, as of paths, where images' bytes or a struct of bytes and path are needed"
        )
        return None, f"{paths}; clip_batch.embed_table opens paths"
    if not found:
        return None, f"no column with images' bytes; its columns are {names}"
    known = [column for known in _NAMES for column in found if column.lower() == known]
    structs = [column for column in found if not _is_binary(schema.field(schema.names.index(column)).type)]
    for some in (found, known[:1], structs):
        if len(some) == 1:
            return some[0], ""
    return None, f"several columns with images' bytes ({', '.join(found)}): name one with --image-field"


def _caption(schema: pa.Schema, name: str) -> str | None:
    """The column of captions."""
    texts = text_columns(schema)
    return next(
        (field for field in ([name] if name else CAPTION_FIELDS) if field in (schema.names if name else texts)), None
    )


def _is_text(kind: pa.DataType) -> bool:
    if is_list(kind) or pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_binary(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _has_binary(kind: pa.DataType) -> bool:
    """Whether a type is binary, or nests a binary one."""
    if pa.types.is_fixed_size_binary(kind) and not pa.types.is_decimal(kind):
        return True
    if pa.types.is_nested(kind):
        return any(_has_binary(kind.field(number).type) for number in range(kind.num_fields))
    return _is_binary(kind)


def _feature_types(schema: pa.Schema) -> dict[str, str]:
    """What Hugging Face's `datasets` says that columns are, such as "Image" or "Audio", in the schema's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: kind for name, feature in features.items() if (kind := _feature_type(feature))}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _feature_type(feature: Any) -> str | None:
    """The type of a feature that is encoded as bytes, also within a list; None for others."""
    if isinstance(feature, Sequence) and not isinstance(feature, str) and feature:
        return _feature_type(feature[0])
    if isinstance(feature, dict) and "feature" in feature:
        return _feature_type(feature["feature"])
    kind = feature.get("_type") if isinstance(feature, dict) else None
    return kind if kind in ("Image", "Audio", "Video", "Pdf", "Nifti") else None
