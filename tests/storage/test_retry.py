"""What is tried again, and what the errors of a store become."""

from __future__ import annotations

import pytest

from clip_batch.errors import CorruptError
from clip_batch.storage.retry import Unavailable, corrupt_unless_unavailable


@pytest.mark.parametrize(
    "error", [OSError("bad\n  bytes"), FileNotFoundError("bad bytes"), KeyError("bad bytes"), ValueError("bad bytes")]
)
def test_a_file_that_cannot_be_read_is_corrupt(error: Exception) -> None:
    with (
        pytest.raises(CorruptError, match=r"^s3://x is not a readable y \('?bad bytes'?\): copy it again$"),
        corrupt_unless_unavailable("s3://x is not a readable y", "copy it again", ValueError, KeyError),
    ):
        raise error


@pytest.mark.parametrize("error", [Unavailable("busy"), PermissionError("no"), ValueError("bug"), CorruptError("x: y")])
def test_a_store_that_does_not_answer_is_not_corrupt(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, corrupt_unless_unavailable("s3://x is not readable", "copy it again"):
        raise error
    assert caught.value is error
