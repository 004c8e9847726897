"""Which pictures are too large to decode: the header decides, in pixels and in memory."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image

from clip_batch.errors import DecodeError
from clip_batch.samples import sizes
from clip_batch.samples.decode import open_image, read_header
from tests import corpus

LIMIT = 10**6


def test_an_icon_does_not_hide_a_large_picture() -> None:
    inner = corpus.bomb(20_000)
    icon = b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 32, 32, 0, 0, 1, 32, len(inner), 22) + inner
    with pytest.raises(DecodeError, match="20000 x 20000 pixels"):
        open_image(icon, LIMIT)
    header = struct.pack("<IiiHHIIiiII", 40, 30_000, 60_000, 1, 32, 0, 0, 0, 0, 0, 0)
    icon = b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 32, 32, 0, 0, 1, 32, len(header), 22) + header
    with pytest.raises(DecodeError, match="30000 x 60000 pixels"):
        open_image(icon, LIMIT)


@pytest.mark.parametrize("kind", ["WEBP", "AVIF", "JPEG2000", "TIFF", "PNG"])
def test_memory_is_bounded_by_the_format(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    data = corpus.encode(Image.new("RGB", (1000, 1000)), kind)
    monkeypatch.setattr(sizes, "LEAST", 0)
    assert open_image(data, 3 * LIMIT).size == (1000, 1000)
    if kind in ("WEBP", "AVIF", "JPEG2000"):
        with pytest.raises(DecodeError, match=f"in {kind} needs 1[37],000,000|in {kind} needs 20,000,000") as caught:
            open_image(data, LIMIT)
        assert caught.value.reason == "too_many_pixels"
    else:
        assert open_image(data, LIMIT).size == (1000, 1000)


def test_progressive_jpegs_and_deep_tiffs_need_more() -> None:
    plain, progressive = (corpus.encode(Image.new("RGB", (100, 100)), progressive=value) for value in (False, True))
    assert [sizes.decoding_memory(read_header(data, LIMIT)) for data in (plain, progressive)] == [40_000, 100_000]
    deep = corpus.encode(Image.fromarray(np.zeros((100, 100), np.float32)), "TIFF", strip_size=2**20)
    assert sizes.decoding_memory(read_header(deep, LIMIT)) == 80_000


def test_a_tile_larger_than_its_picture_is_counted() -> None:
    data = corpus.encode(Image.new("L", (64, 64)), "TIFF", tiffinfo={65000: 60_000, 65001: 60_000})
    data = data.replace(struct.pack("<H", 65000), struct.pack("<H", 322)).replace(
        struct.pack("<H", 65001), struct.pack("<H", 323)
    )
    with pytest.raises(DecodeError) as caught:
        open_image(data, LIMIT)
    assert caught.value.reason == "too_many_pixels"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["F", "I;16"])
def test_a_large_deep_tiff_takes_little_more_than_its_pixels(mode: str) -> None:
    import subprocess
    import sys

    code = f"""
import io, numpy as np
from PIL import Image
from clip_batch.samples.decode import open_image
buffer = io.BytesIO()
zeros = np.zeros((7000, 7000), {"np.float32" if mode == "F" else "np.uint16"})
Image.fromarray(zeros).save(buffer, "TIFF", compression="tiff_lzw")
data = buffer.getvalue()
del buffer, zeros
high = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
open("/proc/self/clear_refs", "w").write("5")
before = high()
assert open_image(data, 10**8).size == (7000, 7000)
print(high() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) < {"F": 196 + 49 + 60, "I;16": 98 + 49 + 60}[mode]
