"""A picture that searches is turned as the pictures of the index were."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from clip_batch import Query, Searcher, embed, merge
from clip_batch.config import MergeConfig, PlanConfig
from clip_batch.plan.plan import make_plan
from tests import corpus


@pytest.mark.parametrize("choice", ["auto", "ignore"])
def test_queries_by_image_follow_the_index(choice: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    data = corpus.rotated()
    upright = corpus.encode(ImageOps.exif_transpose(Image.open(io.BytesIO(data))), "PNG")
    for name, content in {"a.jpg": data, "b.png": upright, "c.png": corpus.encode(corpus.picture(9), "PNG")}.items():
        (tmp_path / "in" / name).write_bytes(content)
    config = PlanConfig(model="fake:64", format="files", exif_rotation=choice)  # type: ignore[arg-type]
    make_plan(f"{tmp_path}/in", f"{tmp_path}/out", config)
    embed(f"{tmp_path}/out")
    merge(f"{tmp_path}/out", f"{tmp_path}/index", MergeConfig(queries=2))
    with Searcher(f"{tmp_path}/index") as searcher:
        assert searcher.manifest.encoder.exif_rotation == (choice == "auto")
        scores = {hit.metadata["key"][:1]: hit.score for hit in searcher.find(Query(image=data, k=3)).hits}
    assert scores["a"] == pytest.approx(1, abs=1e-3)
    assert (scores["b"] > 0.999) == (choice == "auto")
