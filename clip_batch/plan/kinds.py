"""Tells what input is: `detect_format` for `--format auto`, and what is no tar is refused, by names and first bytes.

A refusal says which format or command takes it. Only input of which nothing that is looked at is a tar is refused: a
broken tar among others is a worker's to record.
"""

from __future__ import annotations

import contextlib
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from clip_batch.errors import ConfigError, InputError
from clip_batch.plan.braces import expand_braces
from clip_batch.plan.parquet import parquet_kind, read_schema
from clip_batch.plan.threads import map_in_threads
from clip_batch.samples.kinds import picture
from clip_batch.samples.tar.suffixes import is_tar
from clip_batch.storage.filesystem import filesystem
from clip_batch.storage.paths import absolute, is_local
from clip_batch.storage.transfer import has_ranges, read_range, remote_file
from clip_batch.storage.tree import Say, list_glob, list_tree, silent
from clip_batch.types import IMAGE_EXTENSIONS, UNREADABLE, Shard, extension

PICTURES = {*IMAGE_EXTENSIONS, "dds", "dng", "j2k", "jp2", "pbm", "pcx", "pgm", "pnm", "ppm", "psd", "tga"}
"""Extensions of pictures that Pillow can read, some of them with a plugin."""

LOOKED_AT = 16
"""Inputs whose first bytes are looked at: the first, the last, and some between."""

_HEAD = 512
"""Bytes of a tar's header."""

_LISTS = ("csv", "tsv", "json", "jsonl", "ndjson")

_NAMED = {
    **dict.fromkeys(PICTURES, "picture"),
    **dict.fromkeys(_LISTS, "list"),
    **{"parquet": "Parquet", "npy": "npy", "html": "HTML", "htm": "HTML", "pdf": "PDF"},
    **dict.fromkeys(("zip", "rar", "7z"), "archive"),
}
"""Kinds by extension, of names without a tar's suffix."""

_BEGINS = {
    b"PAR1": "Parquet",
    b"\x93NUMPY": "npy",
    b"PK\x03\x04": "archive",
    b"Rar!": "archive",
    b"7z\xbc\xaf": "archive",
    b"%PDF": "PDF",
    b"<!doctype html": "HTML",
    b"<html": "HTML",
    b"<?xml": "XML",
}
"""Kinds by first bytes, in lower case for text."""

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

_TARS = ("tar", "tgz", "tbz", "tbz2", "txz", "tzst")

_REMEDIES = {
    "picture": "a picture: name its folder",
    "list": "a list: clip-batch end2end --urls downloads and embeds what it names",
    "Parquet": "a Parquet file: --format parquet embeds the images or captions in it, clip-batch end2end --urls a list "
    "of URLs, and clip-batch merge takes embeddings",
    "npy": "a file of vectors: clip-batch merge --output takes the folder of embeddings that it is in",
    "archive": "an archive, but no tar: unpack it, and name the folder",
    "HTML": "an HTML page, as servers send in place of a file: check the URL, and download it again",
    "XML": "an XML document, as stores send in place of a file: check the URL, and download it again",
    "PDF": "a PDF: make pictures of its pages, and name their folder",
    "no tar": "no tar: name tars, or a folder of pictures",
}
"""What a kind is, and what takes it."""


Format = Literal["tar", "parquet", "files"]
"""A kind of input that a plan may have."""


def detect_format(specs: Sequence[str], options: dict[str, Any], say: Say = silent) -> Format | Literal["urls"]:
    """What SPECs, of which lists have been replaced by their lines, name: tars, Parquet, folders of pictures, or URLs.

    Some of them are looked at: a folder by the extensions of all that is in it, a Parquet file by its columns (images,
    or captions without URLs). Parquet files beside tars or pictures are side-cars of these. What cannot be told apart,
    and what does not exist, is left to what reads tars, whose errors say what is wrong. ConfigError: tars and pictures
    are beside each other, so that either would be left out.
    """
    count = min(len(specs), LOOKED_AT)
    spread = dict.fromkeys(specs[(len(specs) - 1) * k // max(count - 1, 1)] for k in range(count))
    if all(_by_name(spec) == "Parquet" and not _is_folder(spec, options) for spec in spread):
        return _parquet_format(specs[0], options)
    if all(_by_name(spec) in ("list", "Parquet") and not _is_folder(spec, options) for spec in spread):
        return "urls"
    found, tables = Counter[str](), list[str]()
    for folder in (spec for spec in spread if not is_tar(spec) and _is_folder(spec, options)):
        for entry in list_tree(absolute(folder), options, say).entries:
            if is_tar(entry.url):
                found["tar"] += 1
            elif extension(entry.url) in PICTURES:
                found["files"] += 1
            elif _extension(entry.url) == "parquet":
                tables.append(entry.url)
            elif extension(entry.url) == "npy":
                return "tar"  # embeddings and their metadata; the error says what takes them
        if len(found) > 1:
            both = f"{folder} holds {found['tar']:,} tars and {found['files']:,} pictures"
            raise ConfigError(f"{both}: say which are the input, with --format tar or --format files")
    if tables and not found:
        return _parquet_format(tables[0], options)
    return "files" if found["files"] else "tar"


def _parquet_format(spec: str, options: dict[str, Any]) -> Literal["parquet", "urls"]:
    """What a Parquet file, or the first one that a pattern names, makes of the input."""
    name = absolute(expand_braces(spec)[0])
    with contextlib.suppress(Exception):  # each remote store has exceptions of its own; expanding the SPEC raises them
        if any(character in name for character in "*?[") and not (is_local(name) and os.path.exists(name)):
            name = list_glob(name, options).entries[0].url
        schema = read_schema(name, options)
        if schema is not None and parquet_kind(schema) == "urls":
            return "urls"
    return "parquet"


def _is_folder(spec: str, options: dict[str, Any]) -> bool:
    """Whether a SPEC is the name of a folder that exists."""
    if is_local(spec):
        return os.path.isdir(absolute(spec))
    if any(character in spec for character in "*{") or spec.startswith(("http://", "https://", "pipe:")):
        return False
    with contextlib.suppress(Exception):  # each remote store has exceptions of its own; expanding the SPEC raises them
        fs, path = filesystem(spec, options)
        return bool(fs.isdir(path))
    return False


def check_names(specs: Sequence[str]) -> None:
    """Refuse SPECs of tars before a store is asked for any. InputError: each is something else by its name."""
    kinds = {spec: kind for spec in specs if (kind := _by_name(spec)) and not os.path.isdir(spec)}
    if len(kinds) == len(specs):
        raise _refusal(specs[0], kinds[specs[0]], len(specs))


def check_kinds(tars: Sequence[Shard], options: dict[str, Any], format: str = "tar") -> None:
    """Refuse files of which none is of the format. InputError: each of those that are looked at is something else."""
    files = [tar.url for tar in tars if tar.etag != UNREADABLE]
    count = min(len(files), LOOKED_AT)
    spread = [files[(len(files) - 1) * k // max(count - 1, 1)] for k in range(count)]
    heads = map_in_threads(lambda url: _head(url, options), spread)
    what = _not_parquet if format == "parquet" else kind_of
    kinds = [kind for url, head in zip(spread, heads, strict=True) if (kind := what(url, head))]
    if kinds and len(kinds) == len(spread) and format == "parquet":
        raise InputError(f"{spread[0]} is {_REMEDIES.get(kinds[0], kinds[0])}")
    if kinds and len(kinds) == len(spread):
        raise _refusal(spread[0], kinds[0], len(files))


def _refusal(name: str, kind: str, count: int) -> InputError:
    others = f" (nor is any other that was looked at of {count:,} inputs a tar)" if count > 1 else ""
    return InputError(f"{name} is {_REMEDIES[kind]}{others}")


def _head(url: str, options: dict[str, Any]) -> bytes | None:
    """The first bytes of a file; None where a worker has to say what is wrong."""
    with contextlib.suppress(Exception):  # each remote store has exceptions of its own
        if is_local(url):
            with open(url, "rb") as file:
                return file.read(_HEAD)
        if has_ranges(remote := remote_file(url, options)):
            return read_range(remote, 0, _HEAD, _at_once)
    return None


def _at_once(seconds: float) -> None:
    """In place of a pause before another try: a look is not worth waiting for."""
    raise TimeoutError


def kind_of(name: str, head: bytes | None) -> str | None:
    """What a file is that is no tar, by its name and its first bytes; None if it is a tar, or may be a broken one.

    `head` is None where it could not be read. What has no tar's suffix needs the first bytes of one.

    >>> kind_of("a.tar", b"PAR1..."), kind_of("a.tar", b"noise"), kind_of("notes", b"noise")
    ('Parquet', None, 'no tar')
    """
    if not head:
        return None
    if head[:2] == b"\x1f\x8b":
        with contextlib.suppress(zlib.error):
            head = zlib.decompressobj(31).decompress(head, _HEAD)
    elif head.startswith((b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")):
        return _by_name(name)
    if _is_header(head):
        return None
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if picture(head):
        return "picture"
    known = next((kind for start, kind in _BEGINS.items() if head.startswith(start) or text.startswith(start)), None)
    return known or (None if _extension(name) in _TARS else _by_name(name) or "no tar")


def _not_parquet(name: str, head: bytes | None) -> str | None:
    """What a file is that is no Parquet file; None if it is one, or may be a broken one."""
    if not head or head.startswith((b"PAR1", b"PARE")):
        return None
    kind = kind_of(name, head)
    if kind is None and _is_header(head):
        return "a tar: --format tar takes it"
    return kind if kind not in (None, "no tar", "Parquet") else None


def _is_header(head: bytes) -> bool:
    """Whether a file begins as a tar; an empty tar has zeros alone."""
    try:
        tarfile.TarInfo.frombuf(head[:_HEAD], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return not head.strip(b"\0")
    return True


def _by_name(name: str) -> str | None:
    """What the name of a file says that it is; None if that may be a tar."""
    return _NAMED.get(_extension(name))


def _extension(name: str) -> str:
    """The extension of a path or URL, that within a compressed file if it is one."""
    if name.startswith(("http://", "https://")):
        name = name.partition("?")[0]
    suffix = next((suffix for suffix in _COMPRESSED if name.lower().endswith(suffix)), "")
    return extension(name[: len(name) - len(suffix)])
