"""remove: taking rows out of an index, listing what was taken out, and taking that back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from clip_batch.cli.arguments import IndexArguments, JsonArguments, Only, answer, say
from clip_batch.config import SearchConfig, StorageConfig
from clip_batch.config.texts import shell_text
from clip_batch.config.values import ANY
from clip_batch.errors import ConfigError

if TYPE_CHECKING:
    from clip_batch.index.remove import RemoveReport

_Texts: TypeAlias = list[str]
"""The type of `value`; within RemoveArguments, `list` is a flag."""


@dataclass(frozen=True, kw_only=True)
class RemoveArguments(JsonArguments, IndexArguments):
    """Which rows `remove` removes, or what else it does."""

    keys: str = ""
    """A file of values of `column`: one a line, or a Parquet or CSV file with that column."""
    value: _Texts = field(default_factory=list, metadata={"repeat": True})
    """A value of `column`; may be given several times, and besides `keys`."""
    column: str = "key"
    """The metadata column that the values are of, such as key or url."""
    image: str = ""
    """An image file, a path or a URL: rows that score `threshold` or more against it are removed."""
    embedding: str = ""
    """A .npy file of one vector, in place of `image`."""
    threshold: Annotated[float, ANY] | None = None
    """Lowest score of a row that `image` or `embedding` removes; look with --dry-run first."""
    modality: Literal["image", "text"] = "image"
    """What `image` or `embedding` is compared with: the rows' images, or their captions."""
    where: str | None = field(default=None, metadata={"once": True})
    """A condition on metadata, by itself or on what `image` or `embedding` finds; see docs/search.md."""
    note: str = ""
    """A text to keep with the removal, such as who asked for it."""
    dry_run: bool = False
    """Show what would be removed, and write nothing."""
    list: bool = False
    """List the removals: when, by what, how many rows, and which were undone."""
    undo: str = ""
    """The digest of a removal, as --list shows it: it no longer counts."""


def remove(
    arguments: RemoveArguments,
    search: Annotated[SearchConfig, Only(("device", "model", "pretrained"))],
    storage: StorageConfig,
) -> int:
    """Remove rows from every search, now and in later versions: by values, by an example, or by a condition."""
    from clip_batch.index import removal_history
    from clip_batch.index.remove import describe_report

    by_values = bool(arguments.keys or arguments.value)
    found = bool(arguments.image or arguments.embedding or arguments.where is not None)
    if by_values + found + arguments.list + bool(arguments.undo) != 1:
        ways = "values (--keys, --value), an example (--image, --embedding) or condition (--where), --list, --undo"
        raise ConfigError(f"remove does one thing: give just one of {ways}")
    index = arguments.index_folder
    if arguments.list:
        infos = removal_history.list_removals(index, storage)
        answer(arguments, [asdict(info) for info in infos], removal_history.describe_list(infos))
    elif arguments.undo:
        if arguments.dry_run:
            raise ConfigError("--undo has no --dry-run: --list shows the rows of each removal")
        undone = removal_history.undo(index, arguments.undo, storage, shell_text(arguments.note, "--note"))
        answer(arguments, asdict(undone), removal_history.describe_undo(undone))
    else:
        report = (_remove_values if by_values else _remove_found)(arguments, search, storage)
        answer(arguments, asdict(report), describe_report(report))
    return 0


def _remove_values(arguments: RemoveArguments, search: SearchConfig, storage: StorageConfig) -> RemoveReport:
    from clip_batch.index.remove import read_values, remove_values

    if arguments.threshold is not None:
        raise ConfigError("--threshold has no effect without --image or --embedding: leave it out")
    values = [shell_text(value, "--value") for value in arguments.value]
    if arguments.keys:
        values += read_values(arguments.keys, arguments.column, storage)
    note = shell_text(arguments.note, "--note")
    return remove_values(arguments.index_folder, values, arguments.column, storage, say, note, arguments.dry_run)


def _remove_found(arguments: RemoveArguments, search: SearchConfig, storage: StorageConfig) -> RemoveReport:
    from clip_batch.cli.search import read_vector
    from clip_batch.search.query import Query
    from clip_batch.search.remove import remove_found

    where = None if arguments.where is None else shell_text(arguments.where, "--where")
    query = None
    if arguments.image or arguments.embedding:
        if arguments.threshold is None:
            raise ConfigError("--threshold is needed with --image and --embedding, such as 0.95: look with --dry-run")
        embedding = read_vector(arguments.embedding) if arguments.embedding else None
        query = Query(
            image=arguments.image,
            embedding=embedding,
            threshold=arguments.threshold,
            modality=arguments.modality,
            where=where,
        )
        where = None
    elif arguments.threshold is not None:
        raise ConfigError("--threshold has no effect without --image or --embedding: leave it out")
    note = shell_text(arguments.note, "--note")
    return remove_found(arguments.index_folder, query, where, search, storage, say, note, arguments.dry_run)
