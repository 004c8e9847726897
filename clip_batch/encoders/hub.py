"""Model folders on this machine: local ones, and those of the Hugging Face hub in its cache.

`plan` and `prefetch` may download; inside `offline()` nothing is downloaded. This module does not load torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from clip_batch.errors import EncoderError, one_line
from clip_batch.storage.store import file_digest

_WEIGHTS = (".safetensors", ".bin")
_TEXTS = (".json", ".txt", ".model", ".jinja")
_DOCUMENTS = ("LICENSE.txt", "requirements.txt")


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Make the Hugging Face libraries of this process read their cache and download nothing."""
    name = "HF_HUB_OFFLINE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    loaded = sys.modules.get("huggingface_hub.constants")  # it read the environment when it was imported
    setting = getattr(loaded, name, None)
    if loaded:
        setattr(loaded, name, True)
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
        if loaded := sys.modules.get("huggingface_hub.constants"):
            was = before is not None and before.upper() in ("1", "ON", "YES", "TRUE")
            setattr(loaded, name, was if setting is None else setting)


def reachable() -> bool:
    """Whether the hub's name is known here, or a proxy may know it. Its libraries try for a minute where it is not."""
    from urllib.request import getproxies

    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT)
    if host.scheme in getproxies():
        return True
    try:
        socket.getaddrinfo(host.hostname, host.port or host.scheme)
    except OSError:
        return False
    return True


def relevant(names: Sequence[str]) -> list[str]:
    """Those of a model folder's file names that can decide a vector, sorted; names in subfolders cannot.

    Weights are the .safetensors files, or the .bin files if there are none.
    """
    safe = [name for name in names if name.endswith(".safetensors")]
    weights = safe or [name for name in names if name.endswith(".bin")]
    texts = [name for name in names if name.endswith(_TEXTS) and name not in _DOCUMENTS]
    if safe:
        texts = [name for name in texts if not name.endswith(".bin.index.json")]
    return sorted(name for name in weights + texts if "/" not in name)


def folder(name: str) -> str:
    """The path of a model folder: a local one, or the cached snapshot of a hub name. EncoderError: it is neither.

    Relevant files that are not cached are downloaded, unless `offline` is active.
    """
    if os.path.isdir(name):
        return os.path.abspath(name)
    from huggingface_hub import HfApi, constants, snapshot_download

    with contextlib.suppress(Exception):  # it is not cached, or not the name of a repository
        snapshot = snapshot_download(name, local_files_only=True)
        if _has_weights(snapshot):
            return str(snapshot)
    if constants.HF_HUB_OFFLINE or not reachable():
        raise _missing(name)
    try:
        names = relevant(HfApi().list_repo_files(name))
        return str(snapshot_download(name, allow_patterns=names))
    except Exception as error:
        raise _missing(name, error) from None


def file(name: str, inside: str) -> str:
    """The path of one file of a model folder, local or cached; as `folder`."""
    if os.path.isdir(name):
        path = os.path.join(name, inside)
        if not os.path.isfile(path):
            raise EncoderError(f"no {inside} in {name}: name a folder that has it")
        return path
    from huggingface_hub import constants, hf_hub_download

    with contextlib.suppress(Exception):
        return str(hf_hub_download(name, inside, local_files_only=True))
    if constants.HF_HUB_OFFLINE or not reachable():
        raise _missing(name)
    try:
        return str(hf_hub_download(name, inside))
    except Exception as error:
        raise _missing(name, error) from None


def folder_digest(path: str) -> str:
    """sha256 over the names and contents of the relevant files of a local folder.

    EncoderError: it has no weights, or its model is code of its own.
    """
    refuse_code(path)
    if not _has_weights(path):
        raise EncoderError(f"no weights (.safetensors, .bin) in {path}: name a folder that has them")
    names = relevant(os.listdir(path))
    return combine([f"{name} {file_digest(os.path.join(path, name))}" for name in names])


def refuse_code(path: str) -> None:
    """EncoderError if a folder's configuration names code of its own, which transformers would import and run."""
    for name in filter(lambda name: name.endswith(".json"), relevant(os.listdir(path))):
        with contextlib.suppress(ValueError), open(os.path.join(path, name), encoding="utf-8") as file:
            if name.endswith("config.json") and "auto_map" in json.load(file):
                raise EncoderError(
                    f"{os.path.join(path, name)} names code of its own (auto_map), which clip-batch never runs: take a "
                    "model whose class is part of transformers, or its export (docs/models.md)"
                )


def tokenizer(path: str) -> Any:
    """The tokenizer of a local folder. EncoderError: it has none; transformers would make one that knows no words."""
    from transformers import AutoTokenizer

    names = set(os.listdir(path))
    if not (
        {"tokenizer.json", "vocab.txt"} & names
        or {"vocab.json", "merges.txt"} <= names
        or any(name.endswith(".model") for name in names)
    ):
        raise EncoderError(
            f"no tokenizer files (tokenizer.json, or vocab.json and merges.txt, vocab.txt, or *.model) in {path}: "
            "save the processor there too"
        )
    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def combine(parts: Sequence[str]) -> str:
    """sha256 over several digests or names."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def line(error: Exception) -> str:
    """The message of a library's error, in one line of at most 300 characters."""
    return textwrap.shorten(one_line(error), 300, placeholder=" ...")


def _has_weights(path: str) -> bool:
    return any(name.endswith(_WEIGHTS) for name in relevant(os.listdir(path)))


def _missing(name: str, error: Exception | None = None) -> EncoderError:
    why = f" ({line(error)})" if error else ""
    return EncoderError(
        f"{name} is neither a folder nor in the Hugging Face cache of this machine{why}: give a folder's path, "
        "or run clip-batch prefetch --model with its name where there is network"
    )
