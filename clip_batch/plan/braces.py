"""Brace patterns, as bash expands them: `{000..999}`, `{a,b}`, nested."""

from __future__ import annotations

import re

from clip_batch.errors import ConfigError

LONGEST_RANGE = 10_000_000


def expand_braces(pattern: str) -> list[str]:
    """All names of a pattern, the leftmost brace varying slowest.

    A brace holds a comma list or a range of whole numbers. A bound with a leading zero pads all numbers to the longer
    bound, and `{8..0..2}` has a step. A brace that opens neither a list nor a range, or never closes, stands for
    itself. ConfigError: a range of more than `LONGEST_RANGE` numbers.

    >>> expand_braces("{a,b}{08..10}.tar")
    ['a08.tar', 'a09.tar', 'a10.tar', 'b08.tar', 'b09.tar', 'b10.tar']
    """
    for start, character in enumerate(pattern):
        if character == "{" and (group := _group(pattern, start)):
            parts, end = group
            if len(parts) > 1:
                middles = [middle for part in parts for middle in expand_braces(part)]
            else:
                middles = _range(parts[0]) or [f"{{{middle}}}" for middle in expand_braces(parts[0])]
            tails = expand_braces(pattern[end + 1 :])
            return [pattern[:start] + middle + tail for middle in middles for tail in tails]
    return [pattern]


def _group(pattern: str, start: int) -> tuple[list[str], int] | None:
    """The alternatives of the brace that opens at `start`, and where it closes; None if it does not close."""
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


def _range(text: str) -> list[str]:
    """The numbers of `000..999` or `0..8..2`, padded; [] for any other text."""
    match = re.fullmatch(r"([0-9]+)\.\.([0-9]+)(?:\.\.([0-9]+))?", text)
    if not match:
        return []
    first, last, step = int(match[1]), int(match[2]), int(match[3] or 1) or 1
    if abs(last - first) // step >= LONGEST_RANGE:
        raise ConfigError(f"{{{text}}} names over {LONGEST_RANGE:,} inputs: correct the range, or plan several outputs")
    padded = any(bound.startswith("0") and len(bound) > 1 for bound in (match[1], match[2]))
    width = max(len(match[1]), len(match[2])) if padded else 0
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    return [f"{number:0{width}d}" for number in numbers]
