"""npy files: headers as numpy writes and reads them, and float16 rows as unit vectors."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from clip_batch.storage.npy import filled, half_header, open_matrix, read_npy_header, unit, widen


@pytest.mark.parametrize(
    ("array", "text", "is_matrix"),
    [
        (np.ones((3, 8), np.float16), "float16 (3, 8)", True),
        (np.ones((3, 8), np.float32), "float32 (3, 8)", True),
        (np.ones((3, 8), np.float64), "float64 (3, 8)", False),
        (np.ones((3, 8), ">f2"), ">f2 (3, 8)", False),
        (np.asfortranarray(np.ones((3, 8), np.float16)), "float16 (3, 8) in Fortran order", False),
        (np.ones(8, np.float16), "float16 (8,)", False),
        (np.ones((0, 8), np.float16), "float16 (0, 8)", True),
    ],
)
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_a_header_tells_what_numpy_wrote(
    array: np.ndarray, text: str, is_matrix: bool, version: tuple[int, int], tmp_path: Path
) -> None:
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array(file, array, version)
    with open(tmp_path / "x.npy", "rb") as file:
        header = read_npy_header(file)
    assert (str(header), header.is_matrix(["<f2", "<f4"])) == (text, is_matrix)
    assert header.file_size == (tmp_path / "x.npy").stat().st_size
    assert header.offset == header.file_size - array.nbytes


def test_other_bytes_have_no_header() -> None:
    for data in (b"", b"no", b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f4', 'shape': (8,)}"):
        with pytest.raises(ValueError):  # noqa: PT011
            read_npy_header(io.BytesIO(data))


def test_a_header_keeps_its_length_as_rows_are_added(tmp_path: Path) -> None:
    assert {len(half_header(10**power, 512)) for power in range(10)} == {len(half_header(0, 512))}
    rows = np.arange(24, dtype=np.float16).reshape(3, 8)
    (tmp_path / "x.npy").write_bytes(half_header(3, 8) + rows.tobytes())
    assert np.array_equal(np.load(tmp_path / "x.npy"), rows)
    assert np.array_equal(open_matrix(str(tmp_path / "x.npy")), rows)


def test_float16_is_widened_as_numpy_does() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    finite = np.isfinite(every)
    np.testing.assert_array_equal(
        widen(every)[finite].view(np.uint32), every.astype(np.float32)[finite].view(np.uint32)
    )
    assert (np.abs(widen(every)[~finite]) >= 2**16).all()
    rows = np.array([[0, -0.0], [0, 6e-8], [1, 0]], dtype=np.float16)
    assert filled(rows).tolist() == [False, True, True]
    np.testing.assert_array_equal(unit(rows[:, ::-1]), np.array([[0, 0], [1, 0], [0, 1]], dtype=np.float32))
