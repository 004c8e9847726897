"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re
from decimal import Decimal

from clip_batch.errors import ConfigError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(text: str) -> int:
    """Parse a size such as "4GB", "512MiB" or "1000" into bytes; ConfigError on anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if not match or match[2] not in _UNITS:
        raise ConfigError(f"size {text!r} is not understood: write it like 4GB, 512MiB or 1000000")
    return int(Decimal(match[1]) * _UNITS[match[2]])
