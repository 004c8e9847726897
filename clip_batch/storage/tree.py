"""Lists folders with all that is below them, and expands globs. Nothing that is there is left out in silence.

Links are followed, but no link to a folder that it lies in, so that every walk ends. Hidden files and hidden folders
are counted, and the latter are not entered. Folders that cannot be listed are named.
"""

from __future__ import annotations

import fnmatch
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from clip_batch.errors import InputError, one_line
from clip_batch.storage.filesystem import filesystem
from clip_batch.storage.paths import is_local
from clip_batch.storage.retry import call_store
from clip_batch.storage.transfer import etag_of
from clip_batch.types import counted

Options = dict[str, Any]

Say = Callable[[str], None]
"""Takes one line of text about progress."""

SECONDS = 5.0
"""Seconds between two lines about a long walk."""

_LINK, _SPECIAL, _HIDDEN = "link", "special file", "hidden"
"""What counts of files that are passed over call a broken or circular link, a pipe or device, and a hidden file."""


class Entry(NamedTuple):
    """What a store tells about one file or folder; of local files that were only listed, no more than the path."""

    url: str
    size: int | None
    etag: str | None
    folder: bool


@dataclass
class Tree:
    """What was found in a folder and below it, or by a glob.

    - `entries`: the visible files below a folder, or the files and folders that match a glob; sorted by URL.
    - `passed_over`: the number of other entries: "hidden", "link" (broken or circular) and "special file".
    - `unreadable`: what cannot be listed or looked at, by its path or URL, and why.
    """

    entries: list[Entry] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    unreadable: dict[str, str] = field(default_factory=dict)


def silent(line: str) -> None:
    """Says nothing."""


def list_tree(url: str, options: Options | None = None, say: Say = silent) -> Tree:
    """All files in a folder and below it. InputError: there is no such folder, or its store does not answer.

    `say` is told every few seconds how many there are so far.
    """
    return _listed(url, "find", options or {}, say)


def list_glob(pattern: str, options: Options | None = None) -> Tree:
    """All files and folders that match a glob; as in a shell, `*` and `**` match no hidden ones."""
    return _listed(pattern, "glob", options or {}, silent)


def entry_of(url: str, info: dict[str, Any]) -> Entry:
    """What a remote store says about a file or folder, as fsspec returns it."""
    return Entry(url, info.get("size"), etag_of(info), info.get("type") == "directory")


def _listed(url: str, call: Literal["find", "glob"], options: Options, say: Say) -> Tree:
    if is_local(url):
        walk = _Walk(_Local(), say)
        return walk.tree(walk.below(url.rstrip("/")) if call == "find" else walk.glob(url))
    fs, path = filesystem(url, options)
    prefix = url.removesuffix("/").removesuffix(path)
    try:
        if _lists_at_once(fs):
            say(f"{url} is being listed")
            listed = call_store(lambda: getattr(fs, call)(path, detail=True), f"listing {url}", options)
            # `pop` frees each dictionary when its entry is made: there may be a million.
            found = (entry_of(prefix + name, listed.pop(name)) for name in list(listed))
            return _visible(found, prefix + path) if call == "find" else Tree(sorted(_unhidden(found, url)))
        walk = _Walk(_Remote(fs, prefix, options), say)
        return walk.tree(walk.below(path) if call == "find" else walk.glob(path))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{url} cannot be listed: {one_line(error)}; check the URL and --storage-options") from None


def _lists_at_once(fs: Any) -> bool:
    """Whether a filesystem lists all below a folder by requests of its own, which raise errors.

    fsspec's own method asks folder by folder, and leaves out those that it may not list.
    """
    from fsspec import AbstractFileSystem
    from fsspec.asyn import AsyncFileSystem

    kind = type(fs)
    if issubclass(kind, AsyncFileSystem):
        return kind._find is not AsyncFileSystem._find or kind._glob is not AsyncFileSystem._glob
    return bool(kind.find is not AbstractFileSystem.find)


def _visible(found: Iterable[Entry], root: str) -> Tree:
    """The files that are not hidden below `root`, of all files below it; a hidden folder counts as one."""
    tree = Tree()
    hidden: set[str] = set()
    start = len(root.rstrip("/")) + 1
    for entry in found:
        name = entry.url[start:]
        if not name or entry.folder or name.endswith("/"):  # what object stores keep in place of folders
            continue
        if name.startswith(".") or "/." in name:
            at = 0 if name.startswith(".") else name.index("/.") + 1
            end = name.find("/", at)
            hidden.add(name if end < 0 else name[:end])
        else:
            tree.entries.append(entry)
    tree.entries.sort()
    if hidden:
        tree.passed_over[_HIDDEN] = len(hidden)
    return tree


def _unhidden(found: Iterable[Entry], pattern: str) -> Iterator[Entry]:
    """The entries that a glob matches, but hidden ones only where the pattern says so."""
    start = next(at for at, character in enumerate(pattern) if _has_magic(character))
    start = pattern.rfind("/", 0, start)
    return (entry for entry in found if "/." in pattern[start:] or "/." not in entry.url[start:])


class _Found(NamedTuple):
    """One name in a folder; `kind` is "folder", "file", or what it is passed over as."""

    name: str
    kind: str
    entry: Entry


class _Place(Protocol):
    """Where folders are walked; `prefix` makes a path in it a URL."""

    prefix: str

    def scan(self, folder: str) -> list[_Found]:
        """What is in a folder. OSError: it cannot be listed."""

    def look(self, folder: str, name: str) -> _Found | None:
        """What has a name in a folder; None where nothing has. OSError: that cannot be told."""

    def identity(self, folder: str) -> object:
        """What two paths of one folder share; None where folders have one path each. OSError: that cannot be told."""


class _Local:
    prefix = ""

    def scan(self, folder: str) -> list[_Found]:
        with os.scandir(folder or "/") as entries:
            return [_found_local(folder, entry) for entry in entries]

    def look(self, folder: str, name: str) -> _Found | None:
        path = f"{folder}/{name}"
        try:
            mode = os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return _Found(name, _LINK, Entry(path, None, None, False)) if os.path.islink(path) else None
        kind = "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else _SPECIAL
        return _Found(name, kind, Entry(path, None, None, kind == "folder"))

    def identity(self, folder: str) -> object:
        status = os.stat(folder or "/")
        return status.st_dev, status.st_ino


def _found_local(folder: str, entry: os.DirEntry[str]) -> _Found:
    try:
        kind = "folder" if entry.is_dir() else "file" if entry.is_file() else _LINK if entry.is_symlink() else _SPECIAL
    except PermissionError:  # a link to a place that this user may not see: listing it will say so
        kind = "folder"
    except OSError:
        kind = _LINK
    return _Found(entry.name, kind, Entry(f"{folder}/{entry.name}", None, None, kind == "folder"))


class _Remote:
    def __init__(self, fs: Any, prefix: str, options: Options) -> None:
        self._fs, self.prefix, self._options = fs, prefix, options

    def scan(self, folder: str) -> list[_Found]:
        url = self.prefix + folder
        listed = call_store(lambda: self._fs.ls(folder or "/", detail=True), f"listing {url}", self._options)
        return [self._found(info) for info in listed if str(info["name"]).rstrip("/") != folder]

    def look(self, folder: str, name: str) -> _Found | None:
        path = f"{folder}/{name}"
        try:
            info = call_store(lambda: self._fs.info(path), f"asking for {self.prefix}{path}", self._options)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return self._found({**info, "name": path})

    def _found(self, info: dict[str, Any]) -> _Found:
        path = str(info["name"]).rstrip("/")
        kind = "folder" if info.get("type") == "directory" else "file"
        return _Found(path.rpartition("/")[2], kind, entry_of(self.prefix + path, info))

    def identity(self, folder: str) -> object:
        return None


class _Walk:
    """One walk, and what it could not enter."""

    def __init__(self, place: _Place, say: Say) -> None:
        self._place, self._say = place, say
        self._tree = Tree()

    def tree(self, entries: Iterable[Entry]) -> Tree:
        """What a walk yields, sorted, with what it passed over."""
        self._tree.entries = sorted(set(entries))
        return self._tree

    def below(self, top: str) -> Iterator[Entry]:
        """The visible files in a folder and below it."""
        files, told = 0, time.monotonic()
        for folders, (_, found) in enumerate(self._folders(top, listing=True), 1):
            if (now := time.monotonic()) - told >= SECONDS:
                so_far = f"{counted(files, 'file')} in {counted(folders, 'folder')} so far"
                self._say(f"{self._place.prefix}{top} is being listed: {so_far}")
                told = now
            for one in found:
                if one.kind == "file":
                    files += 1
                    yield one.entry
                elif one.kind != "folder":
                    self._tree.passed_over[one.kind] += 1

    def glob(self, pattern: str) -> Iterator[Entry]:
        """The files and folders that match a pattern."""
        parts = pattern.split("/")
        magic = next(number for number, part in enumerate(parts) if _has_magic(part))
        yield from self._match("/".join(parts[:magic]), parts[magic:])

    def _match(self, folder: str, parts: list[str]) -> Iterator[Entry]:
        part, rest = parts[0], parts[1:]
        if part == "**":
            if rest:
                for below, _ in self._folders(folder):
                    yield from self._match(below, rest)
            else:
                for _, found in self._folders(folder):
                    yield from self._take(found)
            return
        for one in self._named(folder, part):
            if not rest:
                yield from self._take([one])
            elif one.kind == "folder":
                yield from self._match(f"{folder}/{one.name}", rest)

    def _named(self, folder: str, part: str) -> list[_Found]:
        """What in a folder matches one part of a pattern."""
        try:
            if not _has_magic(part):
                one = self._place.look(folder, part)
                return [one] if one else []
            found = self._place.scan(folder)
        except (FileNotFoundError, NotADirectoryError):  # what is before the first wildcard does not exist
            return []
        except OSError as error:
            self._refused(folder, error)
            return []
        names = set(fnmatch.filter([one.name for one in found], part))
        return [one for one in found if one.name in names and (part[0] == "." or one.name[0] != ".")]

    def _take(self, found: Iterable[_Found]) -> Iterator[Entry]:
        for one in found:
            if one.kind in ("file", "folder"):
                yield one.entry
            else:
                self._tree.passed_over[one.kind] += 1

    def _folders(self, top: str, listing: bool = False) -> Iterator[tuple[str, list[_Found]]]:
        """A folder and all visible ones below it, each with the visible entries in it.

        `listing` counts the hidden ones, and raises InputError where there is no folder `top`.
        """
        stack: list[tuple[str, tuple[object, ...]]] = [(top, ())]
        while stack:
            folder, above = stack.pop()
            try:
                identity = self._place.identity(folder)
                if identity is not None and identity in above:
                    self._tree.passed_over[_LINK] += 1
                    continue
                found = self._place.scan(folder)
            except OSError as error:
                if folder != top or not isinstance(error, FileNotFoundError | NotADirectoryError):
                    self._refused(folder, error)
                elif listing:
                    raise InputError(f"no folder {self._place.prefix}{folder}: check the path") from None
                continue
            visible = [one for one in found if one.name[0] != "."]
            if listing and len(visible) < len(found):
                self._tree.passed_over[_HIDDEN] += len(found) - len(visible)
            yield folder, visible
            stack += [(f"{folder}/{one.name}", (*above, identity)) for one in visible if one.kind == "folder"]

    def _refused(self, folder: str, error: OSError) -> None:
        """Note a folder that cannot be listed. What a remote store may do another time is raised."""
        if self._place.prefix and not isinstance(error, PermissionError | FileNotFoundError):
            raise error
        self._tree.unreadable[self._place.prefix + folder] = error.strerror or one_line(error)


def _has_magic(part: str) -> bool:
    return any(character in part for character in "*?[")
