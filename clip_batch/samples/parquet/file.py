"""An open Parquet file of samples: its row groups, where it may be cut, and its rows in small batches.

Row groups lie one behind the other in nearly every file, so that a slice of whole row groups is a range of bytes, which
is fetched as a slice of a tar is. The footer, which says where everything lies, is read from the end of the file.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import IO, NamedTuple

import pyarrow as pa

from clip_batch.errors import InputError
from clip_batch.storage.arrow import ParquetFile
from clip_batch.storage.ranged import Positioned

if sys.version_info >= (3, 12):
    from collections.abc import Buffer
else:
    from typing_extensions import Buffer

MAGIC, ENCRYPTED = b"PAR1", b"PARE"
"""The first and the last four bytes of a Parquet file; of one whose footer is encrypted."""

BATCH_BYTES, MOST_ROWS = 16 * 2**20, 1024
"""Rows of about this many bytes, and at most this many, are in memory at a time."""

_BUFFER = 2**20
"""Bytes that are read of a column at a time; without a buffer, a row group's whole column would be in memory."""


class Group(NamedTuple):
    """A row group that has rows: its number in the file, the number of its first row, its rows, and its first byte."""

    number: int
    first: int
    rows: int
    start: int


class SampleFile:
    """An open Parquet file with samples. OSError or pa.ArrowException: it is not Parquet, or damaged."""

    def __init__(self, file: IO[bytes]) -> None:
        self._parquet = ParquetFile(file, buffer_size=_BUFFER)
        self.schema: pa.Schema = self._parquet.schema
        self.rows: int = self._parquet.metadata.num_rows
        self.groups: list[Group] = list(self._groups())
        starts = [group.start for group in self.groups]
        self.cuttable: bool = all(one < other for one, other in pairwise(starts))
        """Whether the bytes before each row group's first one have nothing of it."""

    def _groups(self) -> Iterator[Group]:
        metadata, first = self._parquet.metadata, 0
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            if group.num_rows < 0:
                raise pa.ArrowInvalid(f"row group {number} has {group.num_rows} rows")
            if group.num_rows:
                columns = [group.column(place) for place in range(group.num_columns)]
                if any(column.file_path for column in columns):
                    raise pa.ArrowInvalid("it only names the columns of other files; name those")
                offsets = [at for one in columns for at in (one.dictionary_page_offset, one.data_page_offset) if at]
                yield Group(number, first, group.num_rows, min(offsets, default=0))
            first += group.num_rows

    def inside(self, start: int, stop: int | None) -> list[Group]:
        """The row groups that begin in the bytes [start, stop); those of the whole file for start 0 and stop None."""
        if start == 0 and stop is None:
            return self.groups
        first = self.groups[0].start if self.groups else 0
        return [
            group
            for group in self.groups
            if (start <= group.start or (start == 0 and group.start == first)) and (stop is None or group.start < stop)
        ]

    def batches(self, group: Group, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The rows of a row group, in order, a few at a time; columns without those that are not named."""
        size = self._parquet.metadata.row_group(group.number).total_byte_size
        rows = max(1, min(MOST_ROWS, BATCH_BYTES * group.rows // max(size, 1)))
        return self._parquet.batches(group.number, rows, columns)


class Fetched(Positioned):
    """A file of `size` bytes of which those from `start` on are in memory; `rest` opens it for the others."""

    def __init__(self, data: memoryview | mmap.mmap, start: int, size: int, rest: Callable[[], IO[bytes]]) -> None:
        super().__init__(size)
        self._data, self._start, self._open = memoryview(data), start, rest
        self._rest: IO[bytes] | None = None

    def readinto(self, buffer: Buffer) -> int:
        """Fill the buffer, as far as the file goes: pyarrow takes a short answer for the end of the file."""
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view) and (data := self._some(len(view) - done)):
            view[done : done + len(data)] = data
            done += len(data)
            self._at += len(data)
        return done

    def _some(self, count: int) -> bytes | memoryview:
        """At most `count` bytes from the place on, all of them from memory or all from the rest; none at the end."""
        place = self._at - self._start
        if 0 <= place < len(self._data):
            return self._data[place : place + count]
        if self._at >= self._size:
            return b""
        self._rest = self._rest or self._open()
        self._rest.seek(self._at)
        return self._rest.read(count if place >= 0 else min(count, -place))

    def close(self) -> None:
        """Close the file that was opened for the rest."""
        if self._rest:
            self._rest.close()
        super().close()


def describe(error: Exception, head: bytes, tail: bytes, size: int) -> tuple[str, str]:
    """The reason and a message for a file that cannot be opened, by its first and its last bytes."""
    if ENCRYPTED in (head[:4], tail[-4:]):
        return "corrupt_parquet", "an encrypted Parquet file; write it without encryption"
    if head[:4] != MAGIC:
        return "not_parquet", f"not Parquet: it begins with {bytes(head[:24])!r}; look at what made or downloaded it"
    if tail[-4:] != MAGIC:
        return "corrupt_parquet", f"the file breaks off at byte {size}, before its footer; copy or download it again"
    return "corrupt_parquet", f"its footer cannot be read ({str(error)[:200]}); copy or write the file again"


def check_inside(groups: Sequence[Group], sample_file: SampleFile, url: str, whole: bool) -> None:
    """InputError where a slice is not what was planned: it has no row group, or the file cannot be cut any more."""
    if not whole and not (groups and sample_file.cuttable):
        raise InputError(f"{url} has other row groups than were planned: plan again")
