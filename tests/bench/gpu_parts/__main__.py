"""The process of one part: python -m tests.bench.gpu_parts OPTIONS, which are `Options` in JSON."""

from __future__ import annotations

import importlib
import json
import sys
import warnings

from tests.bench.gpu_parts import Options, Part


def main() -> None:
    warnings.simplefilter("ignore")
    part = Part(Options(**json.loads(sys.argv[1])))
    part.save()
    module = importlib.import_module(f"tests.bench.gpu_parts.{part.options.part}")
    try:
        module.run(part)
    except Exception as error:
        part.found.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
        part.save()
        raise


if __name__ == "__main__":
    main()
