"""`clip_batch.Encoder`: pictures and texts in memory give the vectors that `embed` commits."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_batch import ConfigError, EmbedConfig, Encoder, EncoderError, InputError, PlanConfig, embed, make_plan
from clip_batch.demo import data
from tests import corpus


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder("demo", device="cpu", batch_size=4, threads=2)


def picture(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(5).integers(0, 256, (40, 30, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def png(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def test_each_form_of_a_picture_has_the_same_vector(encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(picture()))
    forms: list[Any] = [str(path), path, path.read_bytes(), memoryview(path.read_bytes()), picture(), Image.open(path)]
    vectors = encoder.images([*forms, np.asarray(picture())])
    assert vectors.dtype == np.float32 and vectors.shape == (7, encoder.dim)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert np.allclose(vectors, vectors[0], atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "RGBA", "P", "CMYK", "I;16", "I", "F", "YCbCr"])
def test_images_of_pillow_of_each_mode(encoder: Encoder, mode: str) -> None:
    image = picture("L").convert(mode) if mode in ("I;16", "I", "F") else picture(mode)
    assert encoder.images([image]).shape == (1, encoder.dim)


def test_pillows_orientation_is_applied_as_that_of_files(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.png").write_bytes(png(picture(), exif=exif.tobytes()))
    for rotation, same in (("apply", False), ("ignore", True)):
        encoder = Encoder("demo", exif_rotation=rotation)  # type: ignore[arg-type]
        file, opened, plain = encoder.images([tmp_path / "a.png", Image.open(tmp_path / "a.png"), picture()])
        assert np.allclose(file, opened, atol=1e-5)
        assert np.allclose(file, plain, atol=1e-3) == same


def test_they_are_the_vectors_that_embed_commits(encoder: Encoder, tmp_path: Path) -> None:
    tars = data.write_tars(str(tmp_path / "tars"), shards=100)[:1]
    make_plan(tars, tmp_path / "out", PlanConfig(model="demo"))
    embed(tmp_path / "out", EmbedConfig(device="cpu"))
    (path,) = (tmp_path / "out" / "img_emb").iterdir()
    import tarfile

    with tarfile.open(tars[0]) as tar:
        names = [name for name in tar.getnames() if name.endswith((".png", ".webp", ".jpg"))]
        images = [tar.extractfile(name).read() for name in names]  # type: ignore[union-attr]
    vectors = Encoder("demo", exif_rotation="ignore", batch_size=7).images(image for image in images)
    assert len(vectors) == len(images) > 7
    assert np.allclose(vectors, np.load(path), atol=2e-3)


def test_texts_are_encoded_in_order(encoder: Encoder) -> None:
    texts = ["a red apple", "a cat", "a dog", "火车", "rain", "a flag"]
    vectors = encoder.texts(texts)
    assert vectors.shape == (6, encoder.dim) and vectors.dtype == np.float32
    assert np.allclose(vectors[3], encoder.texts(["火车"])[0], atol=1e-5)


def test_nothing_gives_no_rows(encoder: Encoder) -> None:
    assert encoder.images([]).shape == encoder.texts([]).shape == (0, encoder.dim)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        ([corpus.jpeg(1), b"no image"], "image 1: "),
        ([corpus.jpeg(1)] * 9 + ["absent.jpg"], "image 9 (absent.jpg): "),
        ([np.zeros((3, 3), np.float32)], "image 0: an array of float32 (3, 3) is no picture"),
        ([np.zeros((3, 40, 40), np.uint8)], "image 0: an array of uint8 (3, 40, 40) is no picture"),
        ([corpus.jpeg(1), None], "image 1: "),
    ],
)
def test_a_picture_that_cannot_be_used_is_named(encoder: Encoder, images: list[Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        encoder.images(images)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_one_thing_is_no_list(encoder: Encoder) -> None:
    for one in ("cat.jpg", Path("cat.jpg"), corpus.jpeg(1), picture()):
        with pytest.raises(ConfigError, match="give a list of pictures"):
            encoder.images(one)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give a list of texts"):
        encoder.texts("a cat")
    with pytest.raises(ConfigError, match="text 1 is blank"):
        encoder.texts(["a cat", " "])


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3), (4, 5, 4)])
def test_one_array_of_pixels_is_no_list_and_several_are(encoder: Encoder, shape: tuple[int, ...]) -> None:
    pixels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    with pytest.raises(ConfigError, match=r"give a list of pictures, such as \[picture\]"):
        encoder.images(pixels)
    if len(shape) == 3:
        assert np.array_equal(encoder.images(np.stack([pixels, pixels])), encoder.images([pixels, pixels]))


@pytest.mark.parametrize("given", [3, None, b"a cat", object()])
def test_what_is_no_list_is_refused(encoder: Encoder, given: Any) -> None:
    with pytest.raises(ConfigError, match="give a list of texts"):
        encoder.texts(given)
    with pytest.raises(ConfigError, match="give a list of pictures"):
        encoder.images(given)


def test_wrong_options_and_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="device is 'tpu'"):
        Encoder("demo", device="tpu")
    with pytest.raises(EncoderError):
        Encoder("nothing:8")
