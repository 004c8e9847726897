"""Expands SPECs, which `--input` takes, to shards with their sizes and versions, in a fixed order.

A SPEC is a path or URL of a tar or a Parquet file, a folder, a glob (`*`, `?`, `[..]`, `**`), a brace pattern
(`{000..999}`, `{a,b}`, nested), or a list of SPECs (`@FILE`, `FILE.txt`, `FILE.list`). A `pipe:`
command that only copies a URL to standard output stands for that URL. Shards are in the order of the
SPECs; the shards of a brace pattern are in its order, those of a glob or a folder are sorted.
"""

from __future__ import annotations

import io
import os
import shlex
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from clip_batch.errors import ConfigError, InputError, some
from clip_batch.plan.braces import expand_braces
from clip_batch.plan.kinds import Format, check_names, detect_format
from clip_batch.plan.threads import map_in_threads
from clip_batch.samples.tar.suffixes import TAR_SUFFIXES, is_tar
from clip_batch.storage.filesystem import filesystem
from clip_batch.storage.names import name_text
from clip_batch.storage.paths import absolute, is_local, split_url
from clip_batch.storage.retry import call_store
from clip_batch.storage.store import Store
from clip_batch.storage.text import encoding
from clip_batch.storage.transfer import local_etag
from clip_batch.storage.tree import Entry, Say, Tree, entry_of, list_glob, list_tree, silent
from clip_batch.types import Shard, extension, format_counts

SIDE_CARS = ("_stats.json", ".parquet")
"""Suffixes of the files that img2dataset writes beside NAME.tar: globs skip them, and counts come from them."""

PARQUET_SUFFIXES = (".parquet", ".pq")
"""Suffixes of the files in a folder that are its Parquet files."""

Options = dict[str, Any]
"""Storage options, as fsspec takes them."""

_QUIET = {"--quiet", "--no-progress", "--only-show-errors"}
"""Switches of the AWS command line that do not change what a command copies."""


@dataclass
class Inputs:
    """What SPECs name.

    - `format`: the kind of input, which `--format auto` found.
    - `shards`: tars, Parquet files, or folders with format "files".
    - `passed_over`: the number of files in listed folders, and of matches of globs, that are no input, by extension.
    - `unreadable`: folders that cannot be listed, and why.
    - `folders`: the folders in which files that are shards were looked for, at any depth.
    - `say`: is told how far it is in a large folder.
    """

    format: Format = "tar"
    shards: list[Shard] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    unreadable: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    say: Say = silent

    def entries(self, tree: Tree) -> list[Entry]:
        """The entries of a tree, after taking note of what it passed over."""
        self.passed_over.update(tree.passed_over)
        self.unreadable.update(tree.unreadable)
        return tree.entries

    def leave(self, entries: Iterable[Entry]) -> None:
        """Count entries that are no input."""
        self.passed_over.update("folder" if entry.folder else name_text(extension(entry.url)) for entry in entries)


def expand_inputs(
    specs: Sequence[str],
    format: Format | Literal["auto"] = "auto",
    options: Options | None = None,
    say: Say = silent,
) -> Inputs:
    """The shards that SPECs name: tars, Parquet files, or folders with format "files"; "auto" looks what they are.

    `say` is told how far it is in a large folder.

    ConfigError: there is no SPEC, or one is named twice. InputError: an input is missing, or matches nothing.
    """
    if not specs:
        raise ConfigError("no input: name tars, Parquet files or folders with --input SPEC")
    named = list(read_lists(specs, options))
    found = detect_format(named, options or {}, say) if format == "auto" else format
    if found in ("tar", "urls"):
        check_names(named)
    inputs = Inputs("tar" if found == "urls" else found, say=say)
    for spec in named:
        _expand_spec(spec, inputs.format, options or {}, inputs)
    if len({shard.url for shard in inputs.shards}) < len(inputs.shards):
        repeated = [url for url, times in Counter(shard.url for shard in inputs.shards).items() if times > 1]
        raise ConfigError(f"named more than once: {some(repeated)}; name each input once")
    if inputs.format == "files" and (inside := _inside(shard.url for shard in inputs.shards)):
        raise ConfigError(f"named twice, as they are in other folders that are named: {some(inside)}; name only those")
    return inputs


def _inside(folders: Iterable[str]) -> list[str]:
    """The folders that are in another one of them."""
    inside, outer = list[str](), "\0"
    for folder in sorted(folder.rstrip("/") + "/" for folder in folders):
        if folder.startswith(outer):
            inside.append(folder[:-1])
        else:
            outer = folder
    return inside


def unpiped(spec: str) -> str:
    """The URL that a `pipe:` command copies to its standard output; any other SPEC as it is.

    The commands are `aws s3 cp URL -`, `hdfs dfs -cat URL` and `hadoop fs -cat URL`, and switches that
    only make them quiet. ConfigError: any other command, whose output cannot be frozen in a plan.

    >>> unpiped("pipe:aws s3 cp --quiet s3://bucket/{000..999}.tar -")
    's3://bucket/{000..999}.tar'
    """
    if not spec.startswith("pipe:"):
        return spec
    why = "no other command has a size and version to freeze in a plan"
    try:
        words = [word for word in shlex.split(spec.removeprefix("pipe:")) if word not in _QUIET]
    except ValueError as error:
        raise ConfigError(f"{spec}: {error}; name files or URLs") from None
    match words:
        case ["aws", "s3", "cp", url, "-"] if url.startswith("s3://"):
            return url
        case ["hdfs" | "hadoop", "dfs" | "fs", "-cat", url] if url.startswith(("hdfs://", "viewfs://")):
            return url
        case ["aws", "s3", "cp", *_]:
            why = "of aws only `s3 cp [--quiet] s3://... -` is understood; the rest belongs in --storage-options"
        case ["hdfs" | "hadoop", "dfs" | "fs", "-cat", *_]:
            why = "of hdfs only `dfs -cat hdfs://...`, with one URL, is understood"
    raise ConfigError(f"{spec} is not run: {why}; name files or URLs")


def read_lists(specs: Sequence[str], options: Options | None) -> Iterable[str]:
    """The SPECs, with each list file replaced by its lines; a list in a list is not read.

    Lists are UTF-8, or UTF-16 with its byte-order mark. Names in them may have any bytes, as those of files may.
    """
    for spec in specs:
        if not (spec.startswith("@") or spec.endswith((".txt", ".list"))):
            yield spec
            continue
        folder, name = split_url(absolute(spec.removeprefix("@")))
        try:
            raw = Store(folder, options).read(name)
            lines = io.StringIO(
                raw.decode(encoding(raw[:4]), "surrogateescape"), newline=None
            )  # names may be any bytes
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"list {spec} cannot be read: {error}; name a text file with one SPEC a line") from None
        listed = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
        if not listed:
            raise InputError(f"list {spec} names no input: write one SPEC a line")
        yield from listed


def _expand_spec(spec: str, format: str, options: Options, inputs: Inputs) -> None:
    """Add the shards of one SPEC, which are of the plan's format."""
    exists = is_local(spec) and os.path.exists(absolute(spec))  # then what looks like a pattern is its name
    names = [absolute(name) for name in ([spec] if exists else expand_braces(unpiped(spec)))]
    if not any(map(_is_glob, names)):
        _add(_entries(names, options), format, options, inputs)
        return
    for name in names:
        entries = _glob(name, format, options, inputs) if _is_glob(name) else _entries([name], options)
        _add(entries, format, options, inputs)


def _is_glob(name: str) -> bool:
    """Whether a name has wildcards. A local name that exists has none; in http(s) URLs, `?` starts a query."""
    if name.startswith(("http://", "https://")):
        return "*" in name
    return any(character in name for character in "*?[") and not (is_local(name) and os.path.exists(name))


def _add(entries: Iterable[Entry], format: str, options: Options, inputs: Inputs) -> None:
    """Add entries as shards; a folder that is not a shard itself is searched for files of the format."""
    folders = format == "files"
    for url, size, etag, folder in entries:
        if folders and not folder:
            place, _ = split_url(url)
            raise ConfigError(
                f"{url} is a file: --format files takes folders, such as {place} (for tars: --format tar)"
            )
        if folder and not folders:
            inputs.shards += [Shard(*entry[:3]) for entry in _files_under(url, format, options, inputs)]
        else:
            inputs.shards.append(Shard(url) if folder else Shard(url, size, etag))


def _entries(names: Sequence[str], options: Options) -> Iterable[Entry]:
    """The entries of exact names, in order; InputError lists the names that are missing."""
    missing: list[str] = []
    entries = map_in_threads(_local_entry if is_local(names[0]) else _remote_entry(names[0], options), names)
    for name, entry in zip(names, entries, strict=True):
        if entry is None:
            missing.append(name)
        elif not missing:
            yield entry
    if missing:
        remedy = "correct the SPEC or restore the files"
        raise InputError(f"{len(missing)} of {len(names)} inputs missing: {some(missing)}; {remedy}")


def present_versions(urls: Iterable[str], options: Options) -> dict[str, tuple[int | None, str | None] | None]:
    """The size and etag that each tar or Parquet file has now; None where it does not exist."""
    names = sorted(urls)
    if not names:
        return {}
    entries = map_in_threads(lambda url: (_local_entry if is_local(url) else _remote_entry(url, options))(url), names)
    return {url: entry and (entry.size, entry.etag) for url, entry in zip(names, entries, strict=True)}


def _local_entry(path: str) -> Entry | None:
    """The entry of a local path; None if it does not exist."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check its permissions and the disk") from None
    return Entry(path, status.st_size, local_etag(status), stat.S_ISDIR(status.st_mode))


def _remote_entry(example: str, options: Options) -> Callable[[str], Entry | None]:
    """A function that gives the entry of a URL in the store of `example`; None if it does not exist."""
    fs, _ = filesystem(example, options)

    def info(url: str) -> Entry | None:
        try:
            return entry_of(url, call_store(lambda: fs.info(fs._strip_protocol(url)), f"asking for {url}", options))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise InputError(f"{url} cannot be read: {error}; check the URL and --storage-options") from None

    return info


def _glob(pattern: str, format: str, options: Options, inputs: Inputs) -> list[Entry]:
    """The folders, or the files of the format, that a glob matches, sorted; what else it matches is counted.

    Names without a suffix of the format are taken where no match has one, and folders where no file matches.
    """
    folders = format == "files"
    if "**" in pattern:
        inputs.folders.append(pattern.partition("**")[0].rstrip("/") or "/")
    tree = list_glob(pattern, options)
    matches = [entry for entry in inputs.entries(tree) if not _base(entry).startswith(".")]
    if folders:
        taken = [entry for entry in matches if entry.folder]
    else:
        side_cars = SIDE_CARS if format == "tar" else SIDE_CARS[:1]
        files = [entry for entry in matches if not entry.folder and not entry.url.endswith(side_cars)]
        taken = [entry for entry in files if _is_input(_base(entry), format)] or files
        taken = taken or [entry for entry in matches if entry.folder]
    if not taken and not tree.unreadable:
        raise InputError(f"{pattern} matches no {'folder' if folders else 'file'}: {_hint(pattern, folders, matches)}")
    kept = set(taken)
    inputs.leave(entry for entry in matches if entry not in kept)
    return _with_versions(taken, options)


def _hint(pattern: str, folders: bool, matches: Sequence[Entry]) -> str:
    """What to do about a glob without a match of the kind that is wanted."""
    if matches and folders:
        return f"it matches files, and --format files takes folders, such as {split_url(matches[0].url)[0]}"
    return "correct the pattern, or quote it"


def _files_under(folder: str, format: str, options: Options, inputs: Inputs) -> list[Entry]:
    """All files of the format in a folder and below, sorted; hidden ones are skipped: most are still being copied."""
    inputs.folders.append(folder)
    tree = list_tree(folder, options, inputs.say)
    entries = inputs.entries(tree)
    files = [entry for entry in entries if _is_input(_base(entry), format)]
    if not files and not tree.unreadable:
        counts = Counter(extension(entry.url) for entry in entries)
        found = f", but {format_counts(counts)}"
        kind = f"tar ({' '.join(TAR_SUFFIXES)})" if format == "tar" else f"Parquet file ({' '.join(PARQUET_SUFFIXES)})"
        if not counts:
            raise InputError(f"{folder} holds no pictures, tars or Parquet files: name another folder")
        raise InputError(f"{folder} holds no {kind}{found}: name another folder{_other(counts)}")
    inputs.leave(entry for entry in entries if not _is_input(_base(entry), format))
    return _with_versions(files, options)


def _other(counts: Counter[str]) -> str:
    """The format or command that takes a folder whose files have these extensions."""
    if "npy" in counts:
        return ", or merge these embeddings with clip-batch merge --output"
    if "parquet" in counts:
        return ", or --format parquet"
    return ", or --format tar" if "tar" in counts else ", or --format files" if counts else ""


def _with_versions(entries: list[Entry], options: Options) -> list[Entry]:
    """Local entries with their sizes and times, which a listing does not tell."""
    if entries and is_local(entries[0].url):
        return list(_entries([entry.url for entry in entries], options))
    return entries


def _base(entry: Entry) -> str:
    return entry.url.rpartition("/")[2]


def _is_input(name: str, format: str) -> bool:
    """Whether a file in a folder is of the format, by its name.

    Hidden files are not, nor are Spark's `_metadata` and the like, which repeat what stands in others.
    """
    if format == "tar":
        return is_tar(name) and not name.startswith(".")
    return name.lower().endswith(PARQUET_SUFFIXES) and not name.startswith((".", "_"))
