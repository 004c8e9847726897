"""A longer soak than the tests': `python -m tests.life.run LIVES [STEPS]` lives so many, by other seeds each time."""

from __future__ import annotations

import argparse
import time

from tests.life.test_life import Life, live


def main() -> None:
    """Print how long it took; the steps that went wrong are printed by hypothesis."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lives", type=int)
    parser.add_argument("steps", type=int, nargs="?", default=50)
    arguments = parser.parse_args()
    began = time.monotonic()
    live(Life, arguments.lives, arguments.steps)
    print(f"{arguments.lives} lives of up to {arguments.steps} steps in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
