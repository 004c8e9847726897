"""`embed_table`: a table, a data set or a generator of samples is embedded to OUT, with the commits of tars.

The rows become tars in OUT/samples, which are then planned and embedded as any others: that gives rows their byte
ranges, from which searches show the pictures, and the same partitions, commits and failures.
"""

from __future__ import annotations

import io
import json
import math
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import IO, Any

from clip_batch.api.output import status
from clip_batch.config import EmbedConfig, PlanConfig, StorageConfig
from clip_batch.config.paths import path_text
from clip_batch.embeddings.embed import embed as embed_partitions
from clip_batch.embeddings.encoder import image_bytes
from clip_batch.embeddings.status import OutputStatus
from clip_batch.errors import ConfigError, InputError, PlanError, one_line
from clip_batch.plan import paths
from clip_batch.plan.plan import make_plan
from clip_batch.samples import kinds
from clip_batch.storage.store import Store, stream_digest
from clip_batch.storage.text import as_caption
from clip_batch.types import CAPTION_FIELDS, ERROR_FIELD, StrPath, counted

SAMPLES = "samples"
"""The folder of OUT that has the tars."""

LIST = "samples/rows.json"
"""Written once all tars are: the sha256 of each by its name, by which a second call knows whether rows are the same."""

ROWS, BYTES = 10_000, 2**28
"""A tar ends with the row at which it has this many rows or bytes."""

TOLD = 10
"""Rows without a picture that `progress` names one by one; the failures of OUT name all."""

Rows = Iterable[Mapping[str, Any]]
"""Samples: an image, a caption, and other values by name."""


def embed_table(
    rows: Any,
    output: StrPath,
    plan: PlanConfig = PlanConfig(),
    embed: EmbedConfig = EmbedConfig(),
    *,
    image: str = "image",
    caption: str | None = "caption",
    storage: StorageConfig = StorageConfig(),
    progress: Callable[[str], None] = lambda line: None,
) -> OutputStatus:
    """Embed the rows of a table to OUT, each of them or a failure with its reason; the state of OUT afterwards.

    `rows` is a pandas DataFrame, an Arrow table, batch or reader, a data set of Hugging Face, or any iterable of
    mappings, which is read once, a few thousand rows at a time. The column `image` has pictures: paths or URLs, bytes
    of image files, images of Pillow, arrays, or Hugging Face's {"bytes", "path"}; the column `caption` has texts, lists
    of them or None (None as its name: there are none). By default it is the first of `caption`, `captions`, `text` and
    `TEXT` that the first row has. All other columns become metadata, the row's number its key.

    Another call with the same rows goes on where an earlier one was stopped. A picture that cannot be read, or that a
    row lacks, is listed as failed with its reason. A value that JSON cannot hold, such as bytes, is left out, and
    `progress` says of how many rows. `plan` has the model, and how partitions are made; its `input` and `format` are
    ours.

    With the plan's `modalities=["text"]`, rows need no picture.

    Example: `embed_table(frame, "out", PlanConfig(model="ViT-B-32", pretrained="openai"))`.

    ConfigError: the first row lacks a column that was named, or a row is no mapping. PlanError: OUT was made of other
    rows. Other errors: as `make_plan` and `embed`.
    """
    PlanConfig.expect(plan=plan), EmbedConfig.expect(embed=embed), StorageConfig.expect(storage=storage)
    if plan.input or plan.format != PlanConfig.format:
        raise ConfigError("embed_table takes its rows as its input: leave input and format out of the PlanConfig")
    store = Store(path_text(output, "output"), storage.storage_options)
    names = _write(
        store, _samples(_as_rows(rows, image), image, caption, "image" in plan.modalities, storage, progress), progress
    )
    if not names:
        raise InputError("there is no row to embed: give at least one")
    tars = [store.display(name) for name in names]
    rotation: Any = "apply" if plan.exif_rotation == "auto" else plan.exif_rotation  # as of files, and as Encoder does
    make_plan(tars, output, replace(plan, exif_rotation=rotation), storage=storage, progress=progress)
    embed_partitions(output, embed, storage=storage, progress=progress)
    return status(output, storage=storage)


def _as_rows(rows: Any, image: str) -> Rows:
    """The rows of a table of any kind, one by one. ConfigError: it is none."""
    feature: Any = (getattr(rows, "features", None) or {}).get(image)
    if getattr(feature, "decode", False) and hasattr(rows, "cast_column"):  # Hugging Face: keep files as they are
        rows = rows.cast_column(image, type(feature)(decode=False))
    if hasattr(rows, "to_batches"):  # an Arrow table or dataset
        rows = rows.to_batches()
    elif hasattr(rows, "read_next_batch"):  # an Arrow reader
        rows = iter(rows)
    elif hasattr(rows, "itertuples"):  # a pandas DataFrame
        columns = [str(name) for name in rows.columns]
        return (dict(zip(columns, values, strict=True)) for values in rows.itertuples(index=False, name=None))
    elif hasattr(rows, "iter_rows"):  # a Polars DataFrame
        rows = rows.iter_rows(named=True)
    elif hasattr(rows, "to_pylist"):  # an Arrow record batch
        rows = [rows]
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise ConfigError(f"rows is a {type(rows).__name__}: give a table, or an iterable of mappings")
    return _flat(rows)


def _flat(rows: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
    number = 0
    for item in rows:
        if hasattr(item, "to_pylist"):
            for start in range(0, len(item), 1000):
                yield from item.slice(start, 1000).to_pylist()
            number += len(item)
        elif isinstance(item, Mapping):
            yield item
            number += 1
        else:
            raise ConfigError(f"row {number} is a {type(item).__name__}: it must be a mapping from names to values")


def _samples(
    rows: Rows, image: str, caption: str | None, pictured: bool, storage: StorageConfig, say: Callable[[str], None]
) -> Iterator[dict[str, bytes]]:
    """The files of each row by extension: its picture if it has one, its caption if it has one, and its metadata.

    Rows that are not `pictured` need no picture, and one that they have is left out but for its path.
    """
    lost: Counter[str] = Counter()
    failed = 0
    for number, row in enumerate(rows):
        if number == 0:
            caption = _caption_column(row, image if pictured else None, caption, say)
        rest = {str(name): value for name, value in row.items() if name not in (image, caption)}
        data, problem, path = _image(row, image, storage) if pictured else (None, "", _path(row.get(image)))
        files = {}
        if path is not None:
            rest.setdefault("image_path", path)
        if data is not None:
            files[_extension(data)] = data
        elif pictured:
            failed += 1
            if failed <= TOLD:
                say(f"row {number} has no picture, and will be listed as failed: {problem}")
            if _is_missing(rest.get(ERROR_FIELD)):
                rest[ERROR_FIELD] = problem
        value = None if caption is None else row.get(caption)
        text = _caption(value)
        if text is not None:
            files["txt"] = text.encode(errors="replace")
        if caption is not None and not isinstance(value, str) and not _is_missing(value):
            rest[str(caption)] = value  # it has more than its text, or none
        files["json"] = _metadata(rest, lost)
        yield files
    if failed > TOLD:
        say(f"{failed:,} rows have no picture, and will be listed as failed")
    for column, count in lost.items():
        say(f"column {column!r}: no metadata can hold the values of {counted(count, 'row')}, and they are left out")


def _caption_column(
    row: Mapping[str, Any], image: str | None, caption: str | None, say: Callable[[str], None]
) -> str | None:
    """The column of captions, by the first row. ConfigError: that row lacks a column; None for images needs none."""
    remedy = {image: f'{_ARGUMENT}, or embed captions alone by PlanConfig(modalities=["text"])'}
    for column in filter(None, (image, caption if caption != CAPTION_FIELDS[0] else None)):
        if column not in row:
            known = ", ".join(map(str, row)) or "none"
            raise ConfigError(
                f"row 0 has no column {column!r}: there are {known}; name it by {remedy.get(column, _ARGUMENT)}"
            )
    if caption != CAPTION_FIELDS[0]:
        return caption
    found = next((name for name in CAPTION_FIELDS if name in row and name != image), None)
    say(f"captions are in the column {found!r}" if found else "there is no column of captions; caption= names one")
    return found or caption


_ARGUMENT = "embed_table's image= or caption="


def _caption(value: Any) -> str | None:
    """A caption, as of a JSON field: of a list the first that is not blank, of a number its text, of objects none."""
    value = value.tolist() if hasattr(value, "tolist") else value
    known = isinstance(value, str | bytes | list | tuple | bool | int | float)
    return as_caption(value) if known and not _is_missing(value) else None


def _image(row: Mapping[str, Any], column: str, storage: StorageConfig) -> tuple[bytes | None, str, str | None]:
    """The bytes of a row's picture, or None and what is wrong; and its path, where it has one."""
    if column not in row:
        return None, f"it has no column {column!r}", None
    value = row[column]
    path = _path(value)
    if isinstance(value, Mapping):
        value = path if value.get("bytes") is None else value["bytes"]
    if _is_missing(value):
        return None, f"its {column} is empty", path
    try:
        return bytes(image_bytes(value, storage)), "", path
    except Exception as error:  # whatever a value does, such as a path with a null byte, is a failure of its row alone
        return None, one_line(error, 300), path


def _path(value: Any) -> str | None:
    """The path of a picture, where it has one."""
    if isinstance(value, Mapping):
        path: str | None = value.get("path")
        return path
    return str(value) if isinstance(value, str) or hasattr(value, "__fspath__") else None


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or type(value).__name__ == "NAType"


def _metadata(values: Mapping[str, Any], lost: Counter[str]) -> bytes:
    """The JSON side-car of a row. Values that JSON cannot hold become null, and are counted by column."""
    try:
        text = _json(values)
    except Exception:  # whatever a value's own code raises
        kept = {name: value if _is_json(value) else None for name, value in values.items()}
        lost.update(name for name, value in values.items() if value is not None and kept[name] is None)
        text = _json(kept)
    return text.encode(errors="replace")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _is_json(value: Any) -> bool:
    try:
        _json(value)
    except Exception:  # as above
        return False
    return True


def _plain(value: Any) -> Any:
    """A value of numpy, pandas and the like as JSON can hold it. TypeError: there is no such form."""
    if _is_missing(value) or type(value).__name__ == "NaTType":
        return None
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, bytes | bytearray | memoryview):
        raise TypeError("bytes")
    if isinstance(value, set | frozenset):
        return list(value)
    return str(value)


_EXTENSIONS = {"PNG": "png", "WebP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "AVIF": "avif", "HEIC": "heic"}


def _extension(data: bytes) -> str:
    return _EXTENSIONS.get(kinds.picture(data) or "", "jpg")


def _write(store: Store, samples: Iterator[dict[str, bytes]], progress: Callable[[str], None]) -> list[str]:
    """Write the samples as tars, and their list last; the tars' names.

    Where there is a list, the same rows give the same tars, which stay as they are. PlanError: the rows are others.
    """
    known: dict[str, str] | None = store.read_json(LIST) if store.exists(LIST) else None
    if known is None and store.exists(paths.PLAN):
        raise PlanError(f"{store.url} has a plan of other input: name another output")
    written: dict[str, str] = {}
    keyed = enumerate(samples)
    while True:
        name = f"{SAMPLES}/{len(written):05d}.tar"
        with tempfile.TemporaryFile() as file:
            if not _fill(file, keyed):
                break
            file.seek(0)
            written[name] = stream_digest(file)
            if known is None:
                file.seek(0)
                with store.writer(name) as target:
                    shutil.copyfileobj(file, target, 2**20)
                progress(f"{name} written")
            elif known.get(name) != written[name]:
                raise PlanError(f"{store.display(name)} was made of other rows: name another output")
    if known is None and written:
        store.replace(LIST, json.dumps(written, indent=1).encode())
    elif known is not None and known != written:
        raise PlanError(f"{store.url} was made of {len(known)} tars of rows, not {len(written)}: name another output")
    return list(written)


def _fill(file: IO[bytes], samples: Iterator[tuple[int, dict[str, bytes]]]) -> int:
    """Write samples as a tar until it is large enough; the number of rows."""
    rows = 0
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, files in samples:
            for extension, data in files.items():
                member = tarfile.TarInfo(f"{number:012d}.{extension}")
                member.size, member.mode = len(data), 0o644
                tar.addfile(member, io.BytesIO(data))
            rows += 1
            if rows >= ROWS or file.tell() >= BYTES:
                break
    return rows
