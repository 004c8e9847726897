"""Precision int8 against fp32 on the demo's own pictures: near vectors, the same neighbours, no batch in them."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from clip_batch import encoders
from clip_batch.demo import data
from clip_batch.errors import EncoderError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def full() -> Any:
    return encoders.load(encoders.resolve("demo"), "cpu")


@pytest.fixture(scope="module")
def int8() -> Any:
    pytest.importorskip("onnxruntime")
    return encoders.load(encoders.resolve("demo", precision="int8"), "cpu")


@pytest.fixture(scope="module")
def pixels(full: Any) -> np.ndarray:
    return np.stack([full.preprocess(image, 10**6) for image in data.load()["image"].to_pylist()])


def neighbours(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The ten rows nearest to each query, int (n, 10)."""
    found: np.ndarray = np.argsort(-(queries @ rows.T), axis=1, kind="stable")[:, :10]
    return found


def agreement(found: np.ndarray, wanted: np.ndarray) -> float:
    """The share of the wanted neighbours that were found."""
    return float(np.mean([np.isin(*rows).mean() for rows in zip(wanted, found, strict=True)]))


def test_vectors_are_near_and_find_the_same(full: Any, int8: Any, pixels: np.ndarray) -> None:
    exact, near = full.encode_images(pixels), int8.encode_images(pixels)
    cosines = (exact * near).sum(1)
    assert cosines.mean() >= 0.9995 and cosines.min() >= 0.999
    names = full.encode_texts(data.load()["name_en"].to_pylist())
    assert agreement(neighbours(near, near), neighbours(exact, exact)) >= 0.97
    assert agreement(neighbours(names, near), neighbours(names, exact)) >= 0.97


def test_a_vector_depends_on_its_own_image_alone(int8: Any, pixels: np.ndarray) -> None:
    together = int8.encode_images(pixels[:7])
    np.testing.assert_array_equal(int8.encode_images(pixels[3:4]), together[3:4])


def test_captions_are_those_of_fp32(full: Any, int8: Any) -> None:
    np.testing.assert_array_equal(int8.encode_texts(["a red apple"]), full.encode_texts(["a red apple"]))


def test_it_is_another_encoder_than_fp32() -> None:
    assert encoders.resolve("demo", precision="int8").fingerprint != encoders.resolve("demo").fingerprint


@pytest.mark.parametrize(("device", "compiled"), [("cuda", 0), ("cpu", 8)])
def test_it_is_for_cpus_and_not_compiled(device: str, compiled: int) -> None:
    with pytest.raises(EncoderError, match="give --device cpu, leave out --compile"):
        encoders.load(encoders.resolve("demo", precision="int8"), device, compiled=compiled)


def test_without_its_runtime_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EncoderError, match=r"pip install 'clip-batch\[onnx\]'"):
        encoders.load(encoders.resolve("demo", precision="int8"), "cpu")
