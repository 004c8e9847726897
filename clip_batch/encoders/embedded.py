"""The model that this package carries, for `--model demo`."""

from importlib.resources import files


def model_path() -> str:
    """The folder of the embedded model, which open_clip loads as "local-dir:" and this path."""
    return str(files("clip_batch") / "demo" / "model")
