"""Planning Parquet files: what their columns hold and how many rows they have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from clip_batch.errors import InputError, StorageUnavailable
from clip_batch.plan.threads import map_in_threads
from clip_batch.storage.paths import split_url
from clip_batch.storage.store import Store
from clip_batch.types import MODALITIES, Plan, Shard

if TYPE_CHECKING:
    import pyarrow as pa

    from clip_batch.samples.parquet.file import SampleFile

LOOKED_AT = 16
"""Files whose columns are looked at: the first, the last, and some between."""

_URLS = ("url", "image_url", "img_url", "imageurl", "image_link", "link", "uri")
"""Names of columns of URLs, in lower case."""

Kind = Literal["images", "captions", "urls", "other"]
"""What a Parquet file is a list of."""


def parquet_kind(schema: pa.Schema) -> Kind:
    """What a Parquet file holds, by its schema: images, or else URLs, or else captions, or none of these."""
    from clip_batch.samples.parquet.columns import find_columns, image_columns

    if image_columns(schema):
        return "images"
    if any(name.lower() in _URLS for name in schema.names):
        return "urls"
    return "captions" if find_columns(schema, images=False).caption else "other"


def read_schema(url: str, options: dict[str, Any]) -> pa.Schema | None:
    """The schema of a file; None if it is not Parquet or cannot be read. OSError: the store does not answer."""
    file = read_footer(Shard(url), options)
    return file.schema if file else None


def count_rows(shard: Shard, options: dict[str, Any]) -> Shard:
    """A file with its number of rows, by its footer, if that can be read. OSError: the store does not answer."""
    file = read_footer(shard, options)
    return replace(shard, samples=file.rows) if file else shard


def look_at_columns(shards: Sequence[Shard], draft: Plan, options: dict[str, Any]) -> tuple[tuple[str, ...], list[str]]:
    """What is embedded of files, and lines that say which columns, after a look at some of them.

    Of files of captions that have no images, and where no option names a column of images, the captions alone are
    embedded. InputError: none of the files that can be read has the columns that are asked for.
    """
    from clip_batch.samples.parquet.columns import find_columns, text_columns

    count = min(len(shards), LOOKED_AT)
    spread = [shards[(len(shards) - 1) * k // max(count - 1, 1)] for k in range(count)]
    read = map_in_threads(lambda shard: (shard.url, read_schema(shard.url, options)), spread)
    schemas = [(url, schema) for url, schema in read if schema is not None]
    if not schemas:
        return draft.modalities, []
    url, first = schemas[0]
    lines = []
    modalities = draft.modalities
    if modalities == MODALITIES and not draft.image_field and _captions_alone(draft, [one for _, one in schemas]):
        modalities = ("text",)
        lines.append("no column of images: the captions alone are embedded, as with --modalities text")
    images = "image" in modalities
    found = [find_columns(schema, draft.image_field, draft.caption_field, images) for _, schema in schemas]
    if images and not any(columns.image for columns in found):
        problem = found[0].problem
        raise InputError(f"{url} has {problem}{'' if '--image-field' in problem else _remedy(first)}")
    texts = text_columns(first)
    if not any(columns.caption for columns in found) and (draft.caption_field or not images):
        named = f"no column {draft.caption_field!r}" if draft.caption_field else "no column of captions"
        columns = f"its columns with text are {', '.join(texts) or 'none'}"
        raise InputError(f"{url} has {named}: name one with --caption-field; {columns}")
    if images:
        lines.append(f"images: {_named(columns.image for columns in found)}")
    if any(columns.caption for columns in found):
        lines.append(f"captions: {_named(columns.caption for columns in found)}")
    elif "text" in modalities:
        lines.append(f"no column of captions: --caption-field takes one of {', '.join(texts[:20]) or 'none'}")
    if passed_over := list(dict.fromkeys(name for columns in found for name in columns.passed_over)):
        lines.append(f"columns with binary values that are passed over: {', '.join(passed_over[:20])}")
    return modalities, lines


def _captions_alone(draft: Plan, schemas: Iterable[pa.Schema]) -> bool:
    """Whether each file has captions, in the column that is named or by looking, and none images or URLs of them."""
    from clip_batch.samples.parquet.columns import named_images

    def alone(schema: pa.Schema) -> bool:
        kind = parquet_kind(schema)
        captioned = kind == "captions" or (kind == "other" and draft.caption_field in schema.names)
        return captioned and named_images(schema) in (None, draft.caption_field)

    return all(map(alone, schemas))


def _named(columns: Iterable[str | None]) -> str:
    """The columns of the files that were looked at, each with the number of files if they differ."""
    counts = Counter(f"column {name}" if name else "none" for name in columns)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} ({count:,} of {counts.total():,} files)" for name, count in counts.most_common())


def _remedy(schema: pa.Schema) -> str:
    """What takes a file without images."""
    if parquet_kind(schema) == "urls":
        return ": clip-batch end2end --urls downloads the images and embeds them"
    return ": name another file, or --modalities text and --caption-field to embed a column of captions"


def read_footer(shard: Shard, options: dict[str, Any]) -> SampleFile | None:
    """The footer of a file; None if it cannot be read, which `embed` records. OSError: the store does not answer."""
    import pyarrow as pa

    from clip_batch.samples.parquet.file import SampleFile

    folder, name = split_url(shard.url)
    try:
        with Store(folder, options).open(name) as opened:
            return SampleFile(opened)
    except StorageUnavailable:
        raise
    except (OSError, pa.ArrowException, ValueError):
        return None
