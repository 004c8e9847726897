"""Writes the generated documents; `python -m docs.generate --check` fails where one is stale instead."""

from __future__ import annotations

import sys
from pathlib import Path

from clip_batch.config.options import reference_markdown, reference_yaml

ROOT = Path(__file__).parent.parent
GENERATED = {"configs/reference.yaml": reference_yaml, "docs/config.md": reference_markdown}


def main() -> int:
    stale = [name for name, make in GENERATED.items() if not _same(ROOT / name, make())]
    if "--check" in sys.argv:
        for name in stale:
            print(f"{name} is stale: run `make docs`", file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        (ROOT / name).write_text(GENERATED[name]())
    return 0


def _same(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


if __name__ == "__main__":
    raise SystemExit(main())
