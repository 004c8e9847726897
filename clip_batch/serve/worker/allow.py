"""The paths and URLs that a request may name: those below the folders that the worker was started with."""

from __future__ import annotations

import os
from collections.abc import Sequence

from clip_batch.errors import ConfigError
from clip_batch.plan.braces import expand_braces
from clip_batch.serve.http.errors import Refused
from clip_batch.storage.paths import absolute, is_local

_GLOB = "*?["


class Allowed:
    """The allowed folders, as paths or URLs. Symbolic links in local paths are resolved before paths are compared."""

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
        path = _canonical(name)
        if not path or not any(_below(path, prefix) for prefix in self._prefixes):
            raise Refused(403, f"{field}: {name!r:.300} is not below what this worker allows (--allow)", field)

    def check_input(self, spec: str, field: str) -> None:
        """Check each name that a SPEC of tars expands to; for a glob, the folder in which it matches."""
        if spec.startswith("@") or spec.endswith((".txt", ".list")):
            raise Refused(400, f"{field}: a list may name any path: send its lines instead", field)
        for folder in sorted({_head(name) for name in expand_braces(spec)}):
            self.check(folder, field)


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
