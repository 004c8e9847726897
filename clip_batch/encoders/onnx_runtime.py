"""ONNX Runtime: runs ONNX files, and image towers on a CPU, in float32 or in int8.

In int8, the weights of a channel share one scale, and so do the activations of an image. Nothing is calibrated, and
images run one at a time, so a vector depends only on the weights and its own image, not on the other images of the
batch or on the worker.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from clip_batch.encoders.device import pick_device, torch_threads
from clip_batch.errors import EncoderError, one_line

Tower = Callable[[torch.Tensor], torch.Tensor]

_CUDA = "CUDAExecutionProvider"


def compile_tower(model: Any, tower: Tower, blank: torch.Tensor) -> Tower:
    """An image tower, a function that uses `model`, in float32 for batches of the shape of `blank`, (n, 3, h, w).

    EncoderError: ONNX Runtime is missing, or cannot run this model.
    """
    run = _tower_session(model, tower, blank, int8=False)
    return lambda pixels: torch.from_numpy(run(pixels.numpy()))


def quantize(model: Any, tower: Tower, blank: torch.Tensor) -> Tower:
    """The same in int8, for batches of any number of images of the shape of `blank`, (1, 3, h, w)."""
    run = _tower_session(model, tower, blank, int8=True)

    def quantized(pixels: torch.Tensor) -> torch.Tensor:
        images = pixels.numpy()
        return torch.from_numpy(np.concatenate([run(images[at : at + 1]) for at in range(len(images))]))

    return quantized


def open_session(path: str, device: str) -> Any:
    """ONNX Runtime's session of an ONNX file on a device, as `load` takes it. EncoderError: it has no CUDA."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # decoding needs the cores
    options.log_severity_level = 3  # errors
    device = pick_device(device)
    available = onnxruntime.get_available_providers()
    providers = [provider for provider in _providers(device) if provider[0] in available]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    if device != "cpu" and _CUDA not in session.get_providers():  # it would fall back to the CPU without a word
        raise EncoderError(f"this ONNX Runtime has no CUDA for {path}: --device cpu, or pip install onnxruntime-gpu")
    return session


def write_onnx(
    model: Any,
    encode: Callable[..., torch.Tensor],
    examples: dict[str, torch.Tensor],
    path: str,
    any_rows: bool = False,
) -> None:
    """Export a function that uses `model` to an ONNX file, by examples of its inputs.

    Inputs have the names and shapes of the examples; with `any_rows` they take any number of rows. The output is
    called "embeds". Torch's exporter raises errors of any class.
    """
    more: dict[str, Any] = {}
    if any_rows:
        rows = torch.export.Dim("rows")
        more["dynamic_shapes"] = (tuple({0: rows} for _ in examples),)
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            _Exported(model, encode), tuple(examples.values()), path, dynamo=True, verbose=False,
            input_names=list(examples), output_names=["embeds"], **more,
        )  # fmt: skip


class _Exported(torch.nn.Module):
    """A function and the model whose weights it uses, as the module that torch's exporter takes."""

    def __init__(self, model: Any, encode: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.model, self.encode = model, encode

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return self.encode(*values)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the advice that torch's exporter and the quantizer give about how to call them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _providers(device: str) -> list[tuple[str, dict[str, str]]]:
    """ONNX Runtime's names and options of what runs on a device: CUDA first, on the GPU of its number."""
    gpu = (_CUDA, {"device_id": device.partition(":")[2] or "0"})
    return [*([gpu] if device != "cpu" else []), ("CPUExecutionProvider", {})]


def _tower_session(model: Any, tower: Tower, blank: torch.Tensor, int8: bool) -> Callable[[Any], Any]:
    """A function from images of the shape of `blank` to rows, both float32 arrays."""
    option, remedy = ("precision int8", "plan with another --precision") if int8 else ("--compile", "leave it out")
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise EncoderError(f"{option} on a CPU needs more ({error}): pip install 'clip-batch[onnx]'") from None
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "tower.onnx")
        try:
            write_onnx(model, tower, {"pixels": blank}, path)
            session = open_session(_to_int8(path) if int8 else path, "cpu")
        except Exception as error:  # exporter and runtime raise errors of any class
            line = one_line(error, 200)
            raise EncoderError(f"{option}: ONNX Runtime cannot run this model ({line}): {remedy}") from None
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def _to_int8(path: str) -> str:
    """The path of a copy, beside an ONNX file, with its matrix products in int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    int8 = f"{path.removesuffix('.onnx')}.int8.onnx"
    with _quiet():
        # reduce_range leaves weights 7 bits: AVX2 adds two products of 8 bits in 16 bits, where they would overflow.
        quantize_dynamic(
            path, int8, ["MatMul", "Gemm"], per_channel=True, reduce_range=True, weight_type=QuantType.QInt8,
            use_external_data_format=True,
        )  # fmt: skip
    return int8
