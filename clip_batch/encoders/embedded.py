"""The model that is part of this package, `--model demo`."""

from importlib.resources import files


def model_path() -> str:
    """The folder of the embedded model, in the format of `local-dir:FOLDER`."""
    return str(files("clip_batch") / "demo" / "model")
