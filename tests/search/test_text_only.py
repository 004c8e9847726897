"""An OUT of captions alone: merged, searched, filtered, served and verified as any other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from clip_batch.config import EmbedConfig, MergeConfig, PlanConfig
from clip_batch.embeddings.embed import embed
from clip_batch.errors import ConfigError
from clip_batch.export.filter import filter_rows
from clip_batch.index.merge.merge import merge
from clip_batch.index.verify import verify_index
from clip_batch.plan.plan import make_plan
from clip_batch.search.query import Query
from clip_batch.search.searcher import Searcher
from clip_batch.storage.store import Store
from tests import parquets
from tests.servers.serving import served

pytestmark = pytest.mark.slow

ROWS = 300


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("captions")
    path = parquets.write(str(folder / "a.parquet"), {"text": [f"caption {row}" for row in range(ROWS)]}, 50)
    make_plan(path, folder / "out", PlanConfig(model="fake:8", modalities=["text"], partition_samples=100))
    embed(folder / "out", EmbedConfig(batch_size=32))
    merge(folder / "out", folder / "index", MergeConfig(queries=10, shard_rows=100))
    return str(folder / "index")


@pytest.fixture
def searcher(index: str) -> Iterator[Searcher]:
    with Searcher(index) as searcher:
        yield searcher


def test_it_is_sound_and_has_text_alone(index: str, searcher: Searcher) -> None:
    assert list(searcher.manifest.key) == ["text"]
    report = verify_index(Store(index), deep=True)
    assert (report.problems, report.rows) == ({}, ROWS)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_every_caption_finds_itself(searcher: Searcher, modality: str) -> None:
    """The default modality means the only one that there is."""
    for row in range(0, ROWS, 30):
        (hit,) = searcher.find(Query(text=f"caption {row}", k=1, modality=modality)).hits
        assert hit.metadata["caption"] == f"caption {row}" and hit.score > 0.99
    vector = searcher.encode_text(["caption 7"])
    assert searcher.search(vector, 1, modality)[0][0].metadata["caption"] == "caption 7"
    assert len(searcher.reconstruct([1, 2], modality)) == 2


def test_what_is_not_there_is_refused(searcher: Searcher) -> None:
    with pytest.raises(ConfigError, match="it has text"):
        searcher.search(searcher.encode_text(["a"]), 1, "sound")


def test_filter_writes_captions(searcher: Searcher, tmp_path: Path) -> None:
    result = filter_rows(searcher, Query(text="caption 3", threshold=0.999), Store(tmp_path / "found"))
    assert result.rows >= 1


def test_the_service_finds_captions(index: str) -> None:
    with served(index) as client:
        (hit,) = client.post("/v1/search", json={"text": "caption 5", "k": 1}).json()["hits"]
        assert (hit["metadata"]["caption"], hit["image"]) == ("caption 5", None)
        (again,) = client.post("/v1/search", json={"id": hit["id"], "k": 1}).json()["hits"]
        assert again["id"] == hit["id"]
        body = {"text": "caption 9", "indice_name": "index", "num_images": 1, "num_result_ids": 1, "modality": "image"}
        (old,) = client.post("/knn-service", json=body).json()
        assert old["caption"] == "caption 9"
