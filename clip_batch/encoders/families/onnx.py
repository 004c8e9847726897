"""`onnx:FOLDER` and `openvino:FOLDER`: an exported model, which a small clip_batch.json in its folder describes.

    {"image": "image.onnx",             pixels (n, 3, h, w) to rows (n, d)
     "text": "text.onnx",               token ids, and an attention mask if it takes one, to rows; may be absent
     "pixels": {"size": [224, 224], "crop": [224, 224], "interpolation": "bicubic", "mean": [...], "std": [...]},
     "tokens": {"length": 77}}

`size` of one number resizes the shorter side. Where there are no `pixels`, transformers' preprocessor_config.json is
taken. Tokens are those of transformers' tokenizer in the folder, padded to `length`, or of {"open_clip": NAME}, an
open_clip name, "." for one whose configuration lies in the folder. `clip-batch export onnx` writes such a folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_batch.encoders import hub
from clip_batch.encoders.device import torch_threads
from clip_batch.errors import EncoderError
from clip_batch.storage.store import file_digest
from clip_batch.types import EncoderSpec

if TYPE_CHECKING:
    import torch

    from clip_batch.encoders.towers import Texts, TorchEncoder, Tower

CONFIG = "clip_batch.json"


@dataclass(frozen=True)
class Graph:
    """One exported side: its inputs' names and dtypes, how many rows it takes (0: any), and how to run it."""

    inputs: dict[str, str]
    rows: int
    run: Callable[[dict[str, Any]], Any]

    def __call__(self, values: Mapping[str, Any]) -> torch.Tensor:
        """Rows (n, d) of arrays by name, of which those are taken that there are inputs for; only one needs no name."""
        import torch

        (first, array), count = next(iter(values.items())), len(self.inputs)
        named = values if first in self.inputs or count > 1 else {next(iter(self.inputs)): array}
        fed = {name: np.asarray(named[name], kind) for name, kind in self.inputs.items()}
        step = self.rows or len(array)
        made = [self.run({name: one[at : at + step] for name, one in fed.items()}) for at in range(0, len(array), step)]
        return torch.from_numpy(np.concatenate(made, dtype=np.float32))


def weights_digest(model: str, pretrained: str) -> str:
    """sha256 over the names and contents of all files of the folder, but texts for people. EncoderError."""
    folder = model.partition(":")[2]
    if pretrained or not os.path.isfile(os.path.join(folder, CONFIG)):
        raise EncoderError(f"no {CONFIG} in {folder}: name a folder that has it and what it names, and no --pretrained")
    names = sorted(name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name)))
    names = [name for name in names if not name.endswith(".md") and not name.startswith(".")]
    return hub.combine([f"{name} {file_digest(os.path.join(folder, name))}" for name in names])


def load(spec: EncoderSpec, device: str, compiled: int) -> TorchEncoder:
    """Load the graphs; EncoderError if they cannot be, or if more is asked than to run them as they are."""
    import torch

    from clip_batch.encoders import hf_preprocess, preprocess
    from clip_batch.encoders.towers import TorchEncoder

    if spec.precision != "fp32" or compiled:
        raise EncoderError("an export has its own precision and is compiled: plan with fp32, leave out --compile")
    runtime, _, folder = spec.model.partition(":")
    with open(os.path.join(folder, CONFIG), encoding="utf-8") as file:
        config = json.load(file)
    try:
        image = _graph(runtime, os.path.join(folder, config["image"]), device)
        texts = _texts(folder, config, _graph(runtime, os.path.join(folder, config["text"]), device)) if (
            config.get("text")
        ) else None  # fmt: skip
        if "pixels" in config:
            steps, last = preprocess.split(preprocess.composed(config["pixels"]))
            prepare = preprocess.preparing(spec.preprocess, steps, last)
        else:
            prepare, last = hf_preprocess.preparing(hf_preprocess.read(folder), spec.preprocess)
    except (EncoderError, ImportError):
        raise
    except Exception as error:  # runtimes raise what they like
        raise EncoderError(f"{folder} cannot be loaded: {hub.line(error)}") from None
    tower: Tower = lambda values: image({"pixels": values.numpy()})  # noqa: E731
    return TorchEncoder(spec, None, tower, texts, prepare, last, (torch.device("cpu"), torch.float32))


def _graph(runtime: str, path: str, device: str) -> Graph:
    return _openvino(path) if runtime == "openvino" else _onnx(path, device)


def _onnx(path: str, device: str) -> Graph:
    """By ONNX Runtime."""
    from clip_batch.encoders.onnx_runtime import opened

    session = opened(path, device)
    kinds = {"tensor(float)": "f4", "tensor(float16)": "f2", "tensor(int64)": "i8", "tensor(int32)": "i4"}
    inputs = {one.name: kinds[one.type] for one in session.get_inputs()}
    rows = session.get_inputs()[0].shape[0]
    output = _output([one.name for one in session.get_outputs()])
    return Graph(inputs, rows if isinstance(rows, int) else 0, lambda fed: session.run([output], fed)[0])


def _openvino(path: str) -> Graph:
    """By OpenVINO on the CPU, in float32: its default may be less."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch_threads()}
    model = openvino.Core().compile_model(path, "CPU", settings)
    inputs = {one.get_any_name(): np.dtype(one.get_element_type().to_dtype()).str for one in model.inputs}
    rows = model.inputs[0].get_partial_shape()[0]
    names = [one.get_any_name() for one in model.outputs]
    at = names.index(_output(names))
    return Graph(inputs, 0 if rows.is_dynamic else rows.get_length(), lambda fed: model(fed)[at])


def _output(names: Sequence[str]) -> str:
    """The output that is the embedding: by the name that most exports give it, or else the first."""
    return next((name for name in names if name.endswith("_embeds")), names[0])


def _texts(folder: str, config: dict[str, Any], graph: Graph) -> Texts:
    tokens = config["tokens"]
    if "open_clip" in tokens:
        import open_clip

        name = tokens["open_clip"]
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}" if name == "." else name)
        return lambda texts: graph({"input_ids": tokenizer(list(texts)).numpy()})
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    options = {"padding": "max_length", "truncation": True, "max_length": tokens["length"], "return_tensors": "np"}
    return lambda texts: graph(dict(found(list(texts), **options)))
