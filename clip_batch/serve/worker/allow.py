"""The paths and URLs that a request may name, or cause to be opened: those below the folders of `--allow`.

`Allowed` is the only place that decides. Local paths are compared after symbolic links are resolved. What a request
names is checked first, then what this leads to: links in folders, matches of globs, and a model's folder and files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from clip_batch.encoders.registry import locate_model
from clip_batch.errors import ConfigError
from clip_batch.plan.braces import expand_braces
from clip_batch.serve.http.errors import Refused
from clip_batch.storage.paths import absolute, is_local
from clip_batch.storage.tree import list_glob

_GLOB = "*?["

_NAME = re.compile(r"[\w.\-]+(/[\w.\-]+)?(@[\w.\-]+)?")
"""A model's name in open_clip, in timm, or on the Hugging Face hub."""

_VOCABULARY = "vocab.txt"
"""A file that the family cn-clip reads beside a checkpoint."""


class Allowed:
    """The allowed folders, as paths or URLs."""

    def __init__(self, prefixes: Sequence[str]) -> None:
        if not prefixes:
            raise ConfigError("serve-worker needs --allow: the folders, as paths or URLs, that requests may name")
        self._prefixes = [_canonical(prefix) for prefix in prefixes]
        if "" in self._prefixes:
            prefix = prefixes[self._prefixes.index("")]
            raise ConfigError(
                f"--allow {prefix!r} is not understood: write a folder, or a URL such as s3://bucket/runs"
            )

    def check(self, name: str, field: str) -> None:
        """Raise Refused (403) unless `name` is a plain path or URL below one of the folders."""
        if not self._has(name):
            raise Refused(403, f"{field}: {name!r:.300} is not below what this worker allows (--allow)", field)

    def check_input(self, spec: str, field: str) -> None:
        """Check each name that a SPEC expands to; for a glob its folder, and what it matches. Blocks."""
        if spec.startswith("@") or spec.endswith((".txt", ".list")):
            raise Refused(400, f"{field}: a list may name any path: send its lines instead", field)
        for name in expand_braces(spec):
            head = _head(name)
            self.check(head, field)
            if head == name:
                self.check_trees([name], field)
            elif is_local(name):
                self.check_trees((entry.url for entry in list_glob(absolute(name), {}).entries), field)

    def check_trees(self, names: Iterable[str], field: str) -> None:
        """Check files and folders, and where the symbolic links in local folders lead. Blocks."""
        for name in names:
            self.check(name, field)
            if is_local(name):
                for link in _links(absolute(name), set()):
                    self.check(link, field)

    def check_model(self, model: str, pretrained: str, fields: tuple[str, str] = ("model", "pretrained")) -> None:
        """Check what a model and its weights may open here: folders, their links, and paths in their JSON. Blocks.

        Names of models that this machine has, or has in its Hugging Face cache, are allowed.
        """
        prefix, colon, names = model.partition(":")
        for name in (names if colon else prefix).split("+") if locate_model(model) == model else ():
            exists = os.path.exists(os.path.expanduser(name))
            if exists or (name and not _NAME.fullmatch(name)):
                self.check_trees([name], fields[0])
                self._check_configs(absolute(name), fields[0])
        if "/" in pretrained or os.path.exists(pretrained):
            beside = os.path.join(os.path.dirname(absolute(pretrained)), _VOCABULARY)
            more = [beside] if is_local(pretrained) and os.path.exists(beside) else []
            self.check_trees([pretrained, *more], fields[1])

    def _check_configs(self, folder: str, field: str) -> None:
        """Check the strings in a folder's JSON files that are paths of this machine."""
        for path in (entry.path for entry in os.scandir(folder)) if os.path.isdir(folder) else ():
            if not path.endswith(".json") or not os.path.isfile(path):
                continue
            try:
                with open(path, encoding="utf-8") as file:
                    texts = {text for text in _strings(json.load(file)) if len(text) < 4096 and "\0" not in text}
            except (ValueError, RecursionError):
                continue  # the model's own loader refuses it
            for text in texts:
                for named in {os.path.join(folder, text), text} if text.strip("./") else ():
                    if os.path.exists(named) and not self._has(named):
                        raise Refused(403, f"{field}: {path} names {text!r}, which is not below what is allowed", field)

    def _has(self, name: str) -> bool:
        path = _canonical(name)
        return bool(path) and any(_below(path, prefix) for prefix in self._prefixes)


def _links(folder: str, seen: set[str]) -> Iterator[str]:
    """Yield what a folder's symbolic links lead to, at any depth, those behind links to folders included."""
    folder = os.path.realpath(folder)
    if folder in seen or not os.path.isdir(folder):
        return
    seen.add(folder)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                yield os.path.realpath(entry.path)
            if entry.is_dir():
                yield from _links(entry.path, seen)


def _strings(value: Any) -> Iterator[str]:
    """Yield the strings in parsed JSON, but for keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _head(name: str) -> str:
    """Return a name up to the folder before its first wildcard."""
    places = [place for place in map(name.find, _GLOB) if place >= 0]
    return name[: min(places)].rpartition("/")[0] or "/" if places else name


def _below(name: str, folder: str) -> bool:
    return name == folder or name.startswith(folder.rstrip("/") + "/")


def _canonical(name: str) -> str:
    """Return the canonical spelling of a path or URL, or "" if another program could read it differently."""
    if not name or "\0" in name or "::" in name:  # fsspec chains URLs with ::
        return ""
    if is_local(name):
        return os.path.realpath(absolute(name))
    scheme, _, path = name.partition("://")
    parts = path.rstrip("/").split("/")
    if not scheme.isalnum() or any(part in ("", ".", "..") for part in parts) or set(path) & set("?#%\\@"):
        return ""
    return f"{scheme.lower()}://{'/'.join(parts)}"
