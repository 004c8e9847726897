"""Tests. Folders mirror those of `clip_batch/`; `servers/` starts the real servers that they talk to."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
"""The root of the repository."""
