"""An image tower run by ONNX Runtime on a CPU: as it is, or in int8.

In int8 weights of a channel, and activations of an image, share a scale. Nothing is calibrated, and images go through
one at a time: so a vector depends on the weights and its own image alone, whatever else lies in the batch and
whichever worker it is.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from clip_batch.encoders.device import pick_device, torch_threads
from clip_batch.errors import EncoderError, one_line

Tower = Callable[[torch.Tensor], torch.Tensor]

_CUDA = "CUDAExecutionProvider"


class Side(torch.nn.Module):
    """One side of a model, a function that uses its weights, as what can be exported."""

    def __init__(self, model: Any, encode: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.model, self.encode = model, encode

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return self.encode(*values)


def compiled(model: Any, encode: Tower, blank: torch.Tensor) -> Tower:
    """`encode`, a function of images that uses `model`, in float32, for batches like `blank`, (n, 3, h, w).

    EncoderError: ONNX Runtime is missing, or cannot run this model.
    """
    run = _session(model, encode, blank, "--compile", "leave it out", quantize=False)
    return lambda pixels: torch.from_numpy(run(pixels.numpy()))


def quantized(model: Any, encode: Tower, blank: torch.Tensor) -> Tower:
    """The same in int8, for batches of any size of images like `blank`, (1, 3, h, w)."""
    run = _session(model, encode, blank, "precision int8", "plan with another --precision", quantize=True)

    def tower(pixels: torch.Tensor) -> torch.Tensor:
        images = pixels.numpy()
        return torch.from_numpy(np.concatenate([run(images[at : at + 1]) for at in range(len(images))]))

    return tower


def opened(path: str, device: str) -> Any:
    """ONNX Runtime's session of an ONNX file, on the CPU or the GPU that `device` names; EncoderError without CUDA."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # decoding wants the cores
    options.log_severity_level = 3  # errors
    device = pick_device(device)
    wanted = [provider for provider in _providers(device) if provider[0] in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(path, options, providers=wanted)
    if device != "cpu" and _CUDA not in session.get_providers():  # it would go on on the CPU, unasked
        raise EncoderError(f"this ONNX Runtime has no CUDA for {path}: --device cpu, or pip install onnxruntime-gpu")
    return session


def _providers(device: str) -> list[tuple[str, dict[str, str]]]:
    """ONNX Runtime's names of what runs on a device, and its options: CUDA first, on the GPU of that number."""
    gpu = (_CUDA, {"device_id": device.partition(":")[2] or "0"})
    return [*([gpu] if device != "cpu" else []), ("CPUExecutionProvider", {})]


def _session(
    model: Any, encode: Tower, blank: torch.Tensor, what: str, instead: str, quantize: bool
) -> Callable[[Any], Any]:
    """What gives the rows of images of blank's shape, float32 both; an EncoderError names `what` and `instead`."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise EncoderError(f"{what} on a CPU needs more ({error}): pip install 'clip-batch[onnx]'") from None
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = _export(Side(model, encode), blank, folder, quantize)
            session = opened(path, "cpu")
        except Exception as error:  # exporter and runtime raise what they like
            line = one_line(error, 200)
            raise EncoderError(f"{what}: ONNX Runtime cannot run this model ({line}): {instead}") from None
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def _export(side: Side, blank: torch.Tensor, folder: str, quantize: bool) -> str:
    """The path of the ONNX file in `folder`."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain, path = (os.path.join(folder, name) for name in ("plain.onnx", "int8.onnx"))
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # they advise how to call them
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(side, (blank,), plain, dynamo=True, verbose=False)
            if not quantize:
                return plain
            # 7 bits of weight: AVX2 adds two products of 8 bits in 16, and they would not fit.
            quantize_dynamic(
                plain,
                path,
                ["MatMul", "Gemm"],
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=True,
            )
    finally:
        logging.disable(before)
    return path
