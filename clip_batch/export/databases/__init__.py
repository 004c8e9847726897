"""Databases that hold an index version for others: vectors in Milvus, metadata in SQL, by the index's own row ids.

`export` fills them and `serve` answers from them. A version has a collection and a table named after it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from clip_batch.errors import ConfigError, DatabaseError
from clip_batch.index.manifest import Manifest


def table_name(prefix: str, version: str) -> str:
    """The table and the collection of a version. ConfigError: the prefix is no plain name."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,39}", prefix):
        raise ConfigError(f"--table-prefix {prefix!r}: up to 40 letters, digits and underscores, no digit first")
    return f"{prefix}_{version}"


def identity(manifest: Manifest) -> dict[str, str]:
    """What a database records of the version it holds, and is checked by: version, manifest digest, encoder."""
    digest = hashlib.sha256(manifest.to_json().encode()).hexdigest()[:16]
    return {"version": manifest.version, "manifest": digest, "encoder": manifest.encoder.fingerprint}


def check_identity(where: str, found: Mapping[str, object], wanted: Mapping[str, str]) -> None:
    """DatabaseError where what a database says it holds is not what is wanted."""
    for what, value in wanted.items():
        if found.get(what) != value:
            raise DatabaseError(f"{where} has {what} {found.get(what)}, not {value}: drop it and export again")
