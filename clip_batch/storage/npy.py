"""npy files: their headers, read and written here alone, and float16 rows as unit vectors of float32."""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

Half = npt.NDArray[np.float16]
"""float16 vectors (n, d), as files hold them."""

Vectors = npt.NDArray[np.float32]
"""float32 vectors (n, d), as faiss takes them."""

_parsing = threading.Lock()


class NpyHeader(NamedTuple):
    """The header of an npy file: the array's shape, order and dtype, and the byte `offset` where its data begins."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]
    offset: int

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}{' in Fortran order' if self.fortran_order else ''}"

    @property
    def file_size(self) -> int:
        """Bytes of a complete file with this header."""
        return self.offset + self.dtype.itemsize * math.prod(self.shape)

    def is_matrix(self, dtypes: Sequence[str]) -> bool:
        """Whether the array is (n, d), row by row, of one of these dtypes ("<f2")."""
        return len(self.shape) == 2 and not self.fortran_order and self.dtype in map(np.dtype, dtypes)


def read_npy_header(file: IO[bytes]) -> NpyHeader:
    """Read the header from the start of an npy file; ValueError if it is no npy file."""
    npy: Any = np.lib.format
    with _parsing:  # numpy parses it as Python, and threads that do so at once can break Python 3.11 (gh-106905)
        read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
    return NpyHeader(shape, fortran_order, dtype, file.tell())


def half_header(rows: int, dim: int) -> bytes:
    """The header of an npy file of float16 (rows, dim).

    numpy pads headers so that arrays can grow: `rows` does not change the length.
    """
    npy: Any = np.lib.format
    buffer = io.BytesIO()
    npy.write_array_header_1_0(buffer, {"descr": "<f2", "fortran_order": False, "shape": (rows, dim)})
    return buffer.getvalue()


def open_matrix(path: str) -> Half:
    """Memory-map a local npy file of float16 (n, d), read only; ValueError if it is no npy file."""
    with open(path, "rb") as file:
        return map_matrix(path, read_npy_header(file))


def map_matrix(path: str, header: NpyHeader) -> npt.NDArray[Any]:
    """Memory-map the array of a local npy file, read only; `header` is the file's."""
    return np.memmap(path, dtype=header.dtype, mode="r", offset=header.offset, shape=header.shape)


def norms_of(vectors: Half) -> npt.NDArray[np.float32]:
    """The norm (n,) of each row, computed in float32; over 60,000 where a value is not finite."""
    exact = widen(vectors)
    norms: npt.NDArray[np.float32] = np.sqrt(np.einsum("nd,nd->n", exact, exact))
    return norms


def widen(vectors: Half) -> Vectors:
    """Convert finite float16 to float32: the same values as `astype` gives, in a third of its time.

    Sign, exponent and mantissa are shifted to their places in float32. Multiplying by 2 ** (127 - 15) then
    corrects the exponent's bias, for subnormal values too.
    """
    bits = vectors.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= np.int32(-0x70002000)  # clears the copies of the sign bit that the shift left in between
    exact: Vectors = bits.view(np.float32)
    exact *= np.float32(2.0**112)
    return exact


def filled(vectors: Half) -> npt.NDArray[np.bool_]:
    """Which rows (n,) are not all zero."""
    nonzero: npt.NDArray[np.bool_] = np.any(vectors.view(np.uint16) & 0x7FFF, axis=1)
    return nonzero


def unit(vectors: Half) -> Vectors:
    """Scale rows (n, d) to unit norm, as float32; zero rows stay zero. The rows must be finite (see `check_rows`)."""
    exact = widen(vectors)
    norms = np.sqrt(np.einsum("nd,nd->n", exact, exact))[:, None]
    np.divide(exact, norms, out=exact, where=norms > 0)
    return exact
