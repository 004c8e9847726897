"""Export an index version to databases, vectors to Milvus and metadata to SQL, and search it there.

Rows keep the ids of the index. Each version has its own collection and its own table, which are named after it.
`fill` exports a version, and `backend` answers searches from it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from clip_batch.errors import ConfigError, DatabaseError
from clip_batch.index.manifest import Manifest


def table_name(prefix: str, version: str) -> str:
    """Return the name of a version's table and collection. ConfigError: the prefix is not a plain name."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,39}", prefix):
        raise ConfigError(f"--table-prefix {prefix!r}: up to 40 letters, digits and underscores, no digit first")
    return f"{prefix}_{version}"


def identity(manifest: Manifest) -> dict[str, str]:
    """Return what a database records about the version it holds: version, manifest digest and encoder fingerprint."""
    digest = hashlib.sha256(manifest.to_json().encode()).hexdigest()[:16]
    return {"version": manifest.version, "manifest": digest, "encoder": manifest.encoder.fingerprint}


def check_identity(where: str, recorded: Mapping[str, object], expected: Mapping[str, str]) -> None:
    """Raise DatabaseError if the identity that a database recorded differs from the expected one."""
    for what, value in expected.items():
        if recorded.get(what) != value:
            raise DatabaseError(f"{where} has {what} {recorded.get(what)}, not {value}: drop it and export again")
