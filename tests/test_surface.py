"""The public surface takes what a program may give it: paths of any kind, and refuses the rest in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clip_batch
from clip_batch import (
    AsyncClient,
    Client,
    ConfigError,
    EmbedConfig,
    FakeService,
    FilteredDataset,
    Hit,
    MergeConfig,
    PlanConfig,
    Query,
    QueryTerm,
    SearchConfig,
    Searcher,
    ServeConfig,
    SlurmConfig,
    StorageConfig,
    embed,
    make_plan,
    merge,
)
from clip_batch.embeddings.verify import verify_output
from clip_batch.export.filter import filter_rows
from clip_batch.index.remove import remove
from clip_batch.index.verify import verify_index
from clip_batch.storage.store import Store
from tests import corpus


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """INDEX of six pictures, made with path objects alone."""
    home = tmp_path_factory.mktemp("surface")
    corpus.good_tar(f"{home}/a.tar", 6)
    make_plan(home / "a.tar", home / "out", PlanConfig(model="fake:8"))
    embed(home / "out", EmbedConfig(device="cpu"))
    merge(home / "out", home / "index")
    (home / "cat.jpg").write_bytes(corpus.jpeg(1))
    return home / "index"


def test_path_objects_are_paths_everywhere(index: Path, tmp_path: Path) -> None:
    home = index.parent
    with Searcher(index) as searcher:
        (hit,) = searcher.find(Query(image=home / "cat.jpg", k=1)).hits
        assert searcher.find(Query(terms=[QueryTerm(image=home / "cat.jpg")], k=1)).hits == [hit]
        assert filter_rows(searcher, Query(image=home / "cat.jpg", k=2), Store(tmp_path / "rows")).rows == 2
    assert len(FilteredDataset(index, "a cat", amount=3, selection=tmp_path / "selection")) == 3
    assert len(FilteredDataset(tmp_path / "rows")) == 2
    with Client("http://search", transport=FakeService([hit]).transport) as client:
        assert client.embed_image(home / "cat.jpg").shape == client.embed_image([home / "cat.jpg"]).shape == (1, 8)
        assert client.search(image=home / "cat.jpg") == [hit]
    assert verify_output(Store(home / "out")).ok and verify_index(Store(index)).ok
    config = PlanConfig(input=[home / "a.tar"], pretrained=home / "weights.pt")  # type: ignore[list-item, arg-type]
    assert (config.input, config.pretrained) == ([f"{home}/a.tar"], f"{home}/weights.pt")
    (tmp_path / "keys").write_text(hit.metadata["key"])
    assert remove(index, tmp_path / "keys").rows == 1


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: make_plan(5, "o"), "an input is 5: it must be a path or a URL"),
        (lambda: make_plan(["a.tar", None], "o"), "an input is None"),
        (lambda: make_plan(b"a.tar", "o"), "an input is b'a.tar'"),
        (lambda: make_plan("pyproject.toml", 5), "output is 5"),
        (lambda: embed(5), "output is 5: it must be a path or a URL"),
        (lambda: embed(""), "output is ''"),
        (lambda: merge(5, "i"), "output is 5"),
        (lambda: merge("o", None), "index is None"),
        (lambda: Searcher(5), "index is 5: it must be a path or a URL"),
        (lambda: FilteredDataset(5), "source is 5"),
        (lambda: FilteredDataset("i", selection=5), "selection is 5"),
        (lambda: Client(5), "service URL 5 does not start with http"),
        (lambda: AsyncClient(Path("x")), "does not start with http"),
        (lambda: FakeService("abc"), "hits is 'abc': it must be a list of Hit"),
        (lambda: FakeService([1]), "hits is [1]"),
        (lambda: FakeService(Hit(1, 0.5, {})), "hits is Hit("),
        (lambda: Query(image=5), "image is 5: it must be a path"),
        (lambda: Searcher("i", config={}), "config is {}: it must be of clip_batch.SearchConfig"),
        (lambda: Searcher("i", {}), "storage is {}: it must be of clip_batch.StorageConfig"),
        (lambda: merge("o", "i", "x"), "config is 'x': it must be of clip_batch.MergeConfig"),
        (lambda: merge("o", "i", storage=None), "storage is None: it must be of clip_batch.StorageConfig"),
        (lambda: make_plan("a.tar", "o", EmbedConfig()), "it must be of clip_batch.PlanConfig"),
        (lambda: embed("o", {"batch_size": 4}), "config is {'batch_size': 4}: it must be of clip_batch.EmbedConfig"),
        (lambda: FilteredDataset("i", search={}), "search is {}: it must be of clip_batch.SearchConfig"),
    ],
)
def test_what_is_no_path_is_refused_in_one_line(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "values", "says"),
    [
        (PlanConfig, {"partition_count": "3"}, "PlanConfig: partition_count is '3': it must be a whole number"),
        (PlanConfig, {"partition_count": -1}, "partition_count is -1: it must be a whole number, 1 or more"),
        (PlanConfig, {"partition_samples": 2.5}, "partition_samples is 2.5: it must be a whole number"),
        (PlanConfig, {"partition_samples": True}, "partition_samples is True: it must be a whole number"),
        (PlanConfig, {"model": 5}, "model is 5: it must be a text"),
        (PlanConfig, {"model": None}, "model is None: it must be a text"),
        (PlanConfig, {"input": 5}, "input is 5: it must be a list"),
        (PlanConfig, {"input": [5]}, "input is [5]: it must be a list, each a text"),
        (PlanConfig, {"precision": "fp8"}, "precision is 'fp8': it must be one of fp32, fp16"),
        (EmbedConfig, {"batch_size": "x"}, "EmbedConfig: batch_size is 'x': it must be a whole number"),
        (EmbedConfig, {"batch_size": -1}, "batch_size is -1: it must be a whole number, 0 or more"),
        (EmbedConfig, {"device": "gpu"}, "device is 'gpu': it must be auto, cpu, cuda or cuda:N"),
        (EmbedConfig, {"device": "cuda:x"}, "it must be auto, cpu, cuda or cuda:N"),
        (EmbedConfig, {"max_bad_share": float("nan")}, "max_bad_share is nan: it must be a number"),
        (EmbedConfig, {"share": "no"}, "share is 'no': it must be True or False"),
        (SearchConfig, {"device": "tpu"}, "it must be auto, cpu, cuda or cuda:N"),
        (ServeConfig, {"poll": -1.0}, "poll is -1.0: it must be a number between 0 and 86,400"),
        (MergeConfig, {"modalities": ["image", "sound"]}, "it must be a list, each one of image, text"),
        (SlurmConfig, {"nodes": "2"}, "nodes is '2': it must be a whole number"),
        (StorageConfig, {"storage_options": "x"}, "it must be a mapping"),
    ],
)
def test_values_of_options_are_checked_in_programs_too(section: Any, values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        section(**values)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_values_that_flags_take_are_taken() -> None:
    assert EmbedConfig(batch_size=np.int64(4), max_bad_share=1, device="cuda:3").batch_size == 4  # type: ignore[arg-type]
    assert SearchConfig(threshold=-0.5, aesthetic=-1).threshold == -0.5
    assert PlanConfig(input=("a.tar", "b.tar")).input == ["a.tar", "b.tar"]  # type: ignore[arg-type]
    for name in clip_batch.__all__:
        if name.endswith("Config"):
            getattr(clip_batch, name)()


def test_an_empty_text_and_no_query_at_all_are_refused() -> None:
    with Client("http://search", transport=FakeService([]).transport) as client:
        with pytest.raises(ConfigError, match="text is empty"):
            client.search(text="")
        with pytest.raises(clip_batch.ServiceError, match="exactly one of text"):
            client.search()
        assert json.dumps(client.search(text="a")) == "[]"
