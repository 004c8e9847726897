"""Expands SPECs, which `--input` takes, to shards with their sizes and versions, in a fixed order.

A SPEC is a path or URL of a tar, a folder, a glob (`*`, `?`, `[..]`, `**`), a brace pattern
(`{000..999}`, `{a,b}`, nested), or a list of SPECs (`@FILE`, `FILE.txt`, `FILE.list`). A `pipe:`
command that only copies a URL to standard output stands for that URL. Shards are in the order of the
SPECs; the shards of a brace pattern are in its order, those of a glob or a folder are sorted.
"""

from __future__ import annotations

import glob
import io
import os
import shlex
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from clip_batch.errors import ConfigError, InputError
from clip_batch.plan.braces import expand_braces
from clip_batch.plan.threads import map_in_threads
from clip_batch.storage.filesystem import filesystem
from clip_batch.storage.paths import absolute, is_local
from clip_batch.storage.retry import call_store
from clip_batch.storage.store import Store
from clip_batch.storage.text import encoding
from clip_batch.storage.transfer import etag_of
from clip_batch.types import Shard

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
"""Suffixes of the files in a folder that are its tars."""

SIDE_CARS = ("_stats.json", ".parquet")
"""Suffixes of the files that img2dataset writes beside NAME.tar: globs skip them, and counts come from them."""

Options = dict[str, Any]
"""Storage options, as fsspec takes them."""

_QUIET = {"--quiet", "--no-progress", "--only-show-errors"}
"""Switches of the AWS command line that do not change what a command copies."""


class Entry(NamedTuple):
    """What a store tells about one file or folder."""

    url: str
    size: int | None
    etag: str | None
    folder: bool


def expand_inputs(specs: Sequence[str], format: str = "tar", options: Options | None = None) -> list[Shard]:
    """The shards that SPECs name: tars, or folders with format "files".

    ConfigError: there is no SPEC. InputError: an input is missing, matches nothing, or is named twice.
    """
    if not specs:
        raise ConfigError("no input: name tars or folders with --input SPEC")
    shards = [
        shard for spec in _read_lists(specs, options) for shard in _expand_spec(spec, format == "files", options or {})
    ]
    if len({shard.url for shard in shards}) < len(shards):
        repeated = [url for url, times in Counter(shard.url for shard in shards).items() if times > 1]
        raise InputError(f"named more than once: {some(repeated)}; name each input once")
    return shards


def some(names: Sequence[str], most: int = 5) -> str:
    """The first `most` names of a list as text, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def unpiped(spec: str) -> str:
    """The URL that a `pipe:` command copies to its standard output; any other SPEC as it is.

    The commands are `aws s3 cp URL -`, `hdfs dfs -cat URL` and `hadoop fs -cat URL`, and switches that
    only make them quiet. InputError: any other command, whose output cannot be frozen in a plan.

    >>> unpiped("pipe:aws s3 cp --quiet s3://bucket/{000..999}.tar -")
    's3://bucket/{000..999}.tar'
    """
    if not spec.startswith("pipe:"):
        return spec
    why = "no other command has a size and version to freeze in a plan"
    try:
        words = [word for word in shlex.split(spec.removeprefix("pipe:")) if word not in _QUIET]
    except ValueError as error:
        raise InputError(f"{spec}: {error}; name files or URLs") from None
    match words:
        case ["aws", "s3", "cp", url, "-"] if url.startswith("s3://"):
            return url
        case ["hdfs" | "hadoop", "dfs" | "fs", "-cat", url] if url.startswith(("hdfs://", "viewfs://")):
            return url
        case ["aws", "s3", "cp", *_]:
            why = "of aws only `s3 cp [--quiet] s3://... -` is understood; the rest belongs in --storage-options"
        case ["hdfs" | "hadoop", "dfs" | "fs", "-cat", *_]:
            why = "of hdfs only `dfs -cat hdfs://...`, with one URL, is understood"
    raise InputError(f"{spec} is not run: {why}; name files or URLs")


def _read_lists(specs: Sequence[str], options: Options | None) -> Iterable[str]:
    """The SPECs, with each list file replaced by its lines; a list in a list is not read.

    Lists are UTF-8, or UTF-16 with its byte-order mark. Names in them may have any bytes, as those of files may.
    """
    for spec in specs:
        if not (spec.startswith("@") or spec.endswith((".txt", ".list"))):
            yield spec
            continue
        folder, _, name = absolute(spec.removeprefix("@")).rpartition("/")
        try:
            raw = Store(folder or "/", options).read(name)
            lines = io.StringIO(
                raw.decode(encoding(raw[:4]), "surrogateescape"), newline=None
            )  # names may be any bytes
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"list {spec} cannot be read: {error}; name a text file with one SPEC a line") from None
        listed = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
        if not listed:
            raise InputError(f"list {spec} names no input: write one SPEC a line")
        yield from listed


def _expand_spec(spec: str, folders: bool, options: Options) -> list[Shard]:
    """The shards of one SPEC; `folders` tells that they are folders of files, not tars."""
    names = [absolute(name) for name in expand_braces(unpiped(spec))]
    if not any(map(_is_glob, names)):
        return _shards(_entries(names, options), folders, options)
    shards = []
    for name in names:
        entries = _glob(name, folders, options) if _is_glob(name) else _entries([name], options)
        shards += _shards(entries, folders, options)
    return shards


def _is_glob(name: str) -> bool:
    """Whether a name has wildcards. A local name that exists has none; in http(s) URLs, `?` starts a query."""
    if name.startswith(("http://", "https://")):
        return "*" in name
    return any(character in name for character in "*?[") and not (is_local(name) and os.path.exists(name))


def _shards(entries: Iterable[Entry], folders: bool, options: Options) -> list[Shard]:
    """Entries as shards; a folder that is not a shard itself is searched for tars."""
    shards: list[Shard] = []
    for url, size, etag, folder in entries:
        if folders and not folder:
            raise InputError(f"{url} is a file: --format files takes folders (for tars: --format tar)")
        if folder and not folders:
            shards += [Shard(*entry[:3]) for entry in _tars_under(url, options)]
        else:
            shards.append(Shard(url) if folder else Shard(url, size, etag))
    return shards


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


def _local_entry(path: str) -> Entry | None:
    """The entry of a local path; None if it does not exist."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check its permissions and the disk") from None
    return Entry(path, status.st_size, f"{status.st_mtime_ns:x}", stat.S_ISDIR(status.st_mode))


def _remote_entry(example: str, options: Options) -> Callable[[str], Entry | None]:
    """A function that gives the entry of a URL in the store of `example`; None if it does not exist."""
    fs, _ = filesystem(example, options)

    def info(url: str) -> Entry | None:
        try:
            return _entry(url, call_store(lambda: fs.info(fs._strip_protocol(url)), f"asking for {url}", options))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise InputError(f"{url} cannot be read: {error}; check the URL and --storage-options") from None

    return info


def _entry(url: str, info: dict[str, Any]) -> Entry:
    return Entry(url, info.get("size"), etag_of(info), info.get("type") == "directory")


def _glob(pattern: str, folders: bool, options: Options) -> list[Entry]:
    """The folders, or the files except img2dataset's side-cars, that a glob matches, sorted; no hidden ones."""
    if is_local(pattern):
        entries = list(_entries(paths, options)) if (paths := sorted(glob.glob(pattern, recursive=True))) else []
    else:
        entries = _listing(pattern, "glob", options)
    visible = [entry for entry in entries if entry.folder == folders and not _base(entry).startswith(".")]
    matches = [entry for entry in visible if folders or not entry.url.endswith(SIDE_CARS)]
    if not matches:
        raise InputError(f"{pattern} matches no {'folder' if folders else 'file'}: correct the pattern, or quote it")
    return matches


def _tars_under(folder: str, options: Options) -> list[Entry]:
    """All tars in a folder and below, sorted; hidden ones are skipped, since most are still being copied."""
    if is_local(folder):
        walk = ((place, name) for place, _, names in os.walk(folder) for name in names)
        paths = sorted(os.path.join(place, name) for place, name in walk if _is_tar(name))
        entries = list(_entries(paths, options)) if paths else []
    else:
        entries = [entry for entry in _listing(folder, "find", options) if _is_tar(_base(entry))]
    if not entries:
        raise InputError(f"{folder} holds no tar ({' '.join(TAR_SUFFIXES)}): name another folder, or --format files")
    return entries


def _base(entry: Entry) -> str:
    return entry.url.rpartition("/")[2]


def _is_tar(name: str) -> bool:
    return name.endswith(TAR_SUFFIXES) and not name.startswith(".")


def _listing(url: str, call: str, options: Options) -> list[Entry]:
    """The entries that one listing call (`glob` or `find`) of a remote store gives, with full URLs, sorted."""
    fs, path = filesystem(url, options)
    prefix = url.removesuffix("/").removesuffix(path)
    try:
        listed = call_store(lambda: getattr(fs, call)(path, detail=True), f"listing {url}", options)
    except Exception as error:
        raise InputError(f"{url} cannot be listed: {error}; check the URL and --storage-options") from None
    # `pop` frees each dictionary when its entry is made: there may be a million.
    return sorted(_entry(prefix + name, listed.pop(name)) for name in list(listed))
