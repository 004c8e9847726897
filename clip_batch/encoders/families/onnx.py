"""`onnx:FOLDER` and `openvino:FOLDER`: an exported model, which the clip_batch.json in its folder describes.

    {"image": "image.onnx",             from pixels (n, 3, h, w) to rows (n, d)
     "text": "text.onnx",               from token ids, and an attention mask if it takes one, to rows; may be absent
     "pixels": {"size": [224, 224], "crop": [224, 224], "interpolation": "bicubic", "mean": [...], "std": [...]},
     "tokens": {"length": 77}}

A `size` of one number resizes the shorter side. Without `pixels`, transformers' preprocessor_config.json describes the
preprocessing. The tokenizer is that of transformers in the folder, padded to `length`, or with {"open_clip": NAME} that
of an open_clip name, "." if its configuration lies in the folder. `clip-batch export onnx` writes such a folder.
"""

from __future__ import annotations

import functools
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

    from clip_batch.encoders.torch_encoder import ImageTower, TextSide, TorchEncoder

CONFIG = "clip_batch.json"


@dataclass(frozen=True)
class Graph:
    """One exported side."""

    inputs: dict[str, str]
    """The dtype of each input, by name."""
    rows: int
    """Rows that it takes at once; 0: any number."""
    run: Callable[[dict[str, Any]], Any]
    """From arrays by name to rows (n, d)."""

    def __call__(self, values: Mapping[str, Any]) -> torch.Tensor:
        """Rows (n, d), float32, of arrays by name; those without an input are left out. A single input has any name."""
        import torch

        (first, array), count = next(iter(values.items())), len(self.inputs)
        named = values if first in self.inputs or count > 1 else {next(iter(self.inputs)): array}
        feed = {name: np.asarray(named[name], dtype) for name, dtype in self.inputs.items()}
        step = self.rows or len(array)
        starts = range(0, len(array), step)
        rows = [self.run({name: every[at : at + step] for name, every in feed.items()}) for at in starts]
        return torch.from_numpy(np.concatenate(rows, dtype=np.float32))


def weights_digest(model: str, pretrained: str) -> str:
    """sha256 over the names and contents of all files of the folder, except documents and hidden files."""
    folder = model.partition(":")[2]
    if pretrained or not os.path.isfile(os.path.join(folder, CONFIG)):
        raise EncoderError(f"no {CONFIG} in {folder}: name a folder that has it and what it names, and no --pretrained")
    names = sorted(name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name)))
    names = [name for name in names if not name.endswith(".md") and not name.startswith(".")]
    return hub.combine([f"{name} {file_digest(os.path.join(folder, name))}" for name in names])


def load(spec: EncoderSpec, device: str, compiled: int) -> TorchEncoder:
    """Load the graphs, as `Family.load` describes. An export supports only fp32, and no compiling."""
    import torch

    from clip_batch.encoders import hf_preprocess, preprocess, transforms
    from clip_batch.encoders.torch_encoder import Placement, TorchEncoder

    if spec.precision != "fp32" or compiled:
        raise EncoderError("an export has its own precision and is compiled: plan with fp32, leave out --compile")
    runtime, _, folder = spec.model.partition(":")
    with open(os.path.join(folder, CONFIG), encoding="utf-8") as file:
        config = json.load(file)
    try:
        image = _graph(runtime, os.path.join(folder, config["image"]), device)
        text_side = None
        if config.get("text"):
            text_side = _text_side(folder, config, _graph(runtime, os.path.join(folder, config["text"]), device))
        if "pixels" in config:
            preprocessing = preprocess.from_transform(
                transforms.build(config["pixels"]), spec.preprocess, spec.exif_rotation
            )
        else:
            preprocessing = hf_preprocess.from_processor(
                hf_preprocess.load_processor(folder), spec.preprocess, spec.exif_rotation
            )
    except (EncoderError, ImportError):
        raise
    except Exception as error:  # runtimes raise errors of any class
        raise EncoderError(f"{folder} cannot be loaded: {hub.line(error)}") from None
    image_tower: ImageTower = lambda pixels: image({"pixels": pixels.numpy()})  # noqa: E731
    return TorchEncoder(None, image_tower, text_side, preprocessing, Placement(torch.device("cpu"), torch.float32))


def _graph(runtime: str, path: str, device: str) -> Graph:
    """The graph in a file, run by OpenVINO if that is the `runtime`, else by ONNX Runtime."""
    return _openvino(path) if runtime == "openvino" else _onnx(path, device)


def _onnx(path: str, device: str) -> Graph:
    """A graph run by ONNX Runtime."""
    from clip_batch.encoders.onnx_runtime import open_session

    session = open_session(path, device)
    dtypes = {"tensor(float)": "f4", "tensor(float16)": "f2", "tensor(int64)": "i8", "tensor(int32)": "i4"}
    inputs = {each.name: dtypes[each.type] for each in session.get_inputs()}
    rows = session.get_inputs()[0].shape[0]
    output = _output([each.name for each in session.get_outputs()])
    return Graph(inputs, rows if isinstance(rows, int) else 0, lambda feed: session.run([output], feed)[0])


def _openvino(path: str) -> Graph:
    """A graph run by OpenVINO on the CPU, in float32, which is not its default everywhere."""
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch_threads()}
    model = _core().compile_model(path, "CPU", settings)
    inputs = {each.get_any_name(): np.dtype(each.get_element_type().to_dtype()).str for each in model.inputs}
    rows = model.inputs[0].get_partial_shape()[0]
    names = [each.get_any_name() for each in model.outputs]
    index = names.index(_output(names))
    return Graph(inputs, 0 if rows.is_dynamic else rows.get_length(), lambda feed: model(feed)[index])


@functools.cache
def _core() -> Any:
    """OpenVINO's one core of this process, which is never released.

    A core sets the stack on which signals are handled, and restores the former one when it is released: if two are
    released oldest first, that is memory which was freed, and the next signal, such as SIGTERM, ends the process.
    """
    import openvino

    return openvino.Core()


def _output(names: Sequence[str]) -> str:
    """The name of the output with the vectors: the one that ends in _embeds, as in most exports, or the first."""
    return next((name for name in names if name.endswith("_embeds")), names[0])


def _text_side(folder: str, config: dict[str, Any], graph: Graph) -> TextSide:
    """The text side, with the tokenizer that the configuration names."""
    from clip_batch.encoders.torch_encoder import TextSide

    tokens = config["tokens"]
    if "open_clip" in tokens:
        import open_clip

        from clip_batch.encoders.word_tokenizer import by_words

        name = tokens["open_clip"]
        tokenizer = by_words(open_clip.get_tokenizer(f"local-dir:{folder}" if name == "." else name))
        return TextSide(lambda texts: {"input_ids": tokenizer(list(texts)).numpy()}, graph)
    tokenize = hub.tokenizer(folder)
    options = {"padding": "max_length", "truncation": True, "max_length": tokens["length"], "return_tensors": "np"}
    return TextSide(lambda texts: dict(tokenize(list(texts), **options)), graph)
