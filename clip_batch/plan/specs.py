"""SPECs to shards: what `--input` names, with sizes, versions and counts, in a fixed order.

A SPEC is a path or URL of a tar, a folder, a glob (`*`, `?`, `[..]`, `**`), a brace pattern
(`{000..999}`, `{a,b}`, nested), or a list of SPECs (`@FILE`, `FILE.txt`, `FILE.list`). Of `pipe:`
commands those that only copy a URL to standard output stand for it. Shards come in the order of the
SPECs, a brace pattern's in its own, a glob's and a folder's sorted.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from clip_batch.errors import ConfigError, InputError
from clip_batch.storage.filesystem import filesystem
from clip_batch.storage.paths import absolute, is_local
from clip_batch.storage.retry import ask
from clip_batch.storage.store import Store
from clip_batch.storage.transfer import etag_of
from clip_batch.types import Shard

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
"""What a folder is searched for."""

SIDE_CARS = ("_stats.json", ".parquet")
"""What img2dataset writes beside NAME.tar: a glob passes over these, and counts come from them."""

THREADS = 32
"""Requests in flight: a stat or HEAD waits, it does not work."""


_LONGEST_RANGE = 10_000_000

T = TypeVar("T")
R = TypeVar("R")
Options = dict[str, Any]


class Entry(NamedTuple):
    """What a store says of one name."""

    url: str
    size: int | None
    etag: str | None
    folder: bool


def expand_inputs(specs: Sequence[str], format: str = "tar", options: Options | None = None) -> list[Shard]:
    """Shards named by SPECs: tars, or (format "files") folders, each once.

    InputError names what is missing, matches nothing, or is named twice; ConfigError: no SPEC.
    """
    if not specs:
        raise ConfigError("no input: name tars or folders with --input SPEC")
    shards = [
        shard for spec in _read_lists(specs, options) for shard in _expand_spec(spec, format == "files", options or {})
    ]
    if len({shard.url for shard in shards}) < len(shards):
        twice = [url for url, times in Counter(shard.url for shard in shards).items() if times > 1]
        raise InputError(f"named more than once: {some(twice)}; name each input once")
    return shards


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def expand_braces(pattern: str) -> list[str]:
    """bash's brace expansion: comma lists and ranges of whole numbers, nested; leftmost slowest.

    A bound with a leading zero pads all numbers to the longer bound, `{8..0..2}` steps, and a brace
    that opens neither a list nor a range, or never closes, stands for itself.
    """
    for start, character in enumerate(pattern):
        if character == "{" and (group := _group(pattern, start)):
            parts, end = group
            if len(parts) > 1:
                middles = [middle for part in parts for middle in expand_braces(part)]
            else:
                middles = _numbers(parts[0]) or [f"{{{middle}}}" for middle in expand_braces(parts[0])]
            tails = expand_braces(pattern[end + 1 :])
            return [pattern[:start] + middle + tail for middle in middles for tail in tails]
    return [pattern]


def _group(pattern: str, start: int) -> tuple[list[str], int] | None:
    """The alternatives of the group that opens at `start`, and where it closes; None if it does not."""
    depth, begin = 0, start + 1
    parts: list[str] = []
    for at in range(start, len(pattern)):
        if pattern[at] == "{":
            depth += 1
        elif pattern[at] == "}":
            depth -= 1
            if not depth:
                return [*parts, pattern[begin:at]], at
        elif pattern[at] == "," and depth == 1:
            parts.append(pattern[begin:at])
            begin = at + 1
    return None


def _numbers(text: str) -> list[str]:
    """`000..999` or `0..8..2` as padded numbers; [] for anything else."""
    found = re.fullmatch(r"([0-9]+)\.\.([0-9]+)(?:\.\.([0-9]+))?", text)
    if not found:
        return []
    first, last, step = int(found[1]), int(found[2]), int(found[3] or 1) or 1
    if abs(last - first) // step >= _LONGEST_RANGE:
        raise InputError(f"{{{text}}} names over {_LONGEST_RANGE:,} inputs: mend the range, or plan several outputs")
    padded = any(bound.startswith("0") and len(bound) > 1 for bound in (found[1], found[2]))
    width = max(len(found[1]), len(found[2])) if padded else 0
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    return [f"{number:0{width}d}" for number in numbers] if width else [str(number) for number in numbers]


def _read_lists(specs: Sequence[str], options: Options | None) -> Iterable[str]:
    """SPECs with each list file replaced by its lines; lists do not nest."""
    for spec in specs:
        if not (spec.startswith("@") or spec.endswith((".txt", ".list"))):
            yield spec
            continue
        folder, _, name = absolute(spec.removeprefix("@")).rpartition("/")
        try:
            text = Store(folder or "/", options).read(name).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"list {spec} cannot be read: {error}; name a text file with one SPEC a line") from None
        lines = [line.strip() for line in text.splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise InputError(f"list {spec} names no input: write one SPEC a line")
        yield from found


def _expand_spec(spec: str, folders: bool, options: Options) -> list[Shard]:
    names = [absolute(name) for name in expand_braces(unpiped(spec))]
    if not any(map(_is_glob, names)):
        return _shards(_look(names, options), folders, options)
    shards = []
    for name in names:
        entries = _glob(name, folders, options) if _is_glob(name) else _look([name], options)
        shards += _shards(entries, folders, options)
    return shards


def unpiped(spec: str) -> str:
    """The URL that a `pipe:` command copies to its standard output; any other SPEC as it is.

    Understood are `aws s3 cp URL -`, `hdfs dfs -cat URL` and `hadoop fs -cat URL`, with the switches
    that only make them quiet. InputError on all other commands: what they give cannot be frozen in a plan.
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


_QUIET = {"--quiet", "--no-progress", "--only-show-errors"}


def _is_glob(name: str) -> bool:
    """A local name that exists is no glob, whatever its characters; in http(s), `?` starts a query."""
    if name.startswith(("http://", "https://")):
        return "*" in name
    return any(character in name for character in "*?[") and not (is_local(name) and os.path.exists(name))


def _shards(entries: Iterable[Entry], folders: bool, options: Options) -> list[Shard]:
    shards: list[Shard] = []
    for url, size, etag, folder in entries:
        if folders and not folder:
            raise InputError(f"{url} is a file: --format files takes folders (for tars: --format tar)")
        if folder and not folders:
            shards += [Shard(*entry[:3]) for entry in _tars_under(url, options)]
        else:
            shards.append(Shard(url) if folder else Shard(url, size, etag))
    return shards


def _look(names: Sequence[str], options: Options) -> Iterable[Entry]:
    """Entries of exact names, in order; InputError names all that are missing."""
    missing: list[str] = []
    entries = threaded(_stat if is_local(names[0]) else _info(names[0], options), names)
    for name, entry in zip(names, entries, strict=True):
        if entry is None:
            missing.append(name)
        elif not missing:
            yield entry
    if missing:
        raise InputError(f"{len(missing)} of {len(names)} inputs missing: {some(missing)}; mend the SPEC or the files")


def _stat(path: str) -> Entry | None:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; mend its permissions or the disk") from None
    return Entry(path, found.st_size, f"{found.st_mtime_ns:x}", stat.S_ISDIR(found.st_mode))


def _info(example: str, options: Options) -> Callable[[str], Entry | None]:
    fs, _ = filesystem(example, options)

    def info(url: str) -> Entry | None:
        try:
            return _entry(url, ask(lambda: fs.info(fs._strip_protocol(url)), f"asking for {url}", options))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise InputError(f"{url} cannot be read: {error}; mend the URL or --storage-options") from None

    return info


def _entry(url: str, info: dict[str, Any]) -> Entry:
    return Entry(url, info.get("size"), etag_of(info), info.get("type") == "directory")


def _glob(pattern: str, folders: bool, options: Options) -> list[Entry]:
    """What a glob matches, sorted: folders, or files without img2dataset's side-cars; nothing hidden."""
    if is_local(pattern):
        entries = list(_look(paths, options)) if (paths := sorted(glob.glob(pattern, recursive=True))) else []
    else:
        entries = _listing(pattern, "glob", options)
    kind = [entry for entry in entries if entry.folder == folders and not _base(entry).startswith(".")]
    found = [entry for entry in kind if folders or not entry.url.endswith(SIDE_CARS)]
    if not found:
        raise InputError(f"{pattern} matches no {'folder' if folders else 'file'}: mend the pattern, or quote it")
    return found


def _tars_under(folder: str, options: Options) -> list[Entry]:
    """All tars in a folder and below, sorted; hidden ones (being copied, mostly) are passed over."""
    if is_local(folder):
        walk = ((place, name) for place, _, names in os.walk(folder) for name in names)
        paths = sorted(os.path.join(place, name) for place, name in walk if _is_tar(name))
        entries = list(_look(paths, options)) if paths else []
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
    """One listing call (`glob` or `find`) of a remote store, as entries with whole URLs, sorted."""
    fs, path = filesystem(url, options)
    prefix = url.removesuffix("/").removesuffix(path)
    try:
        found = ask(lambda: getattr(fs, call)(path, detail=True), f"listing {url}", options)
    except Exception as error:
        raise InputError(f"{url} cannot be listed: {error}; mend the URL or --storage-options") from None
    # Popped, so that a million listed dictionaries go as the entries come.
    return sorted(_entry(prefix + name, found.pop(name)) for name in list(found))


def threaded(work: Callable[[T], R], items: Sequence[T]) -> Iterable[R]:
    """`map` over threads, in order, several items a task so that a million items stay cheap."""
    step = max(1, min(256, len(items) // THREADS))
    with ThreadPoolExecutor(min(THREADS, len(items))) as pool:
        chunks = (items[at : at + step] for at in range(0, len(items), step))
        for results in pool.map(lambda chunk: [work(item) for item in chunk], chunks):
            yield from results
