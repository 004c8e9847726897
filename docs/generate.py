"""Writes the generated documents; `python -m docs.generate --check` fails instead where one is stale.

`configs/reference.yaml` and `docs/config.md` derive from the config dataclasses, the table of folders in
`docs/architecture.md` from the test of layers and each folder's docstring, and `docs/benchmarks.md` from the result
files in `docs/benchmarks/`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from docs.benchmark_page import benchmark_page
from docs.options_page import reference_markdown, reference_yaml
from tests.test_layers import FOLDERS, HEAVY, PACKAGE

ROOT = Path(__file__).parent.parent
ARCHITECTURE = "docs/architecture.md"
BEGIN, END = "<!-- folders: written by docs/generate.py -->", "<!-- end of folders -->"


def architecture() -> str:
    """`docs/architecture.md` with its table of folders as the package has them now."""
    before, _, rest = (ROOT / ARCHITECTURE).read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise SystemExit(f"{ARCHITECTURE} has lost its markers: put {BEGIN!r} and {END!r} around the table of folders")
    return f"{before}{BEGIN}\n{folder_table()}\n{END}{after}"


def folder_table() -> str:
    """A Markdown table with a row for each module outside the folders, each folder and each folder within one."""
    lines = ["| folder | what it holds | libraries that it alone imports |", "|---|---|---|"]
    lines += [f"| `{name}.py` | {summary(PACKAGE / f'{name}.py')} | |" for name in ("errors", "types")]
    for place in places():
        libraries = ", ".join(sorted(name for name, homes in HEAVY.items() if _is_home(place, homes)))
        lines.append(f"| `{place}/` | {summary(PACKAGE / place / '__init__.py')} | {libraries} |")
    return "\n".join(lines)


def places() -> Iterator[str]:
    """The folders in the order of layers, each followed by the folders of modules inside it."""
    for folder in FOLDERS:
        yield folder
        for path in sorted((PACKAGE / folder).rglob("__init__.py")):
            if path.parent != PACKAGE / folder:
                yield path.parent.relative_to(PACKAGE).as_posix()


def summary(path: Path) -> str:
    """The first line of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    if not docstring:
        raise SystemExit(f"{path} has no docstring: say in one sentence what it holds")
    return docstring.splitlines()[0]


def _is_home(place: str, homes: set[str]) -> bool:
    """Whether a library's only home is this folder, or a file of it."""
    (home, *others) = homes
    folder = home.rpartition("/")[0] if (PACKAGE / f"{home}.py").is_file() else home
    return not others and folder == place


GENERATED = {
    "configs/reference.yaml": reference_yaml,
    "docs/config.md": reference_markdown,
    ARCHITECTURE: architecture,
    "docs/benchmarks.md": benchmark_page,
}


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
