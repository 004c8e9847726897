"""FilteredDataset: the rows of an epoch, their order and division, resuming, images, and rows that fail."""

from __future__ import annotations

import http.server
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from clip_batch import FilteredDataset, Query, QueryTerm
from clip_batch.config import StorageConfig
from clip_batch.demo import data
from clip_batch.errors import ConfigError, InputError
from clip_batch.export.dataset import deal, together
from clip_batch.export.dataset.fetch import Fetch
from clip_batch.export.dataset.select import mix
from clip_batch.export.filter import filter_rows
from clip_batch.index.ann import faiss_index
from clip_batch.search.searcher import Searcher
from clip_batch.storage.store import Store
from tests import ROOT, corpus
from tests.servers.s3_server import BUCKET, S3
from tests.servers.s3_server import s3 as s3
from tests.servers.s3_server import s3_server as s3_server
from tests.servers.serving import index_of, make_index

pytestmark = pytest.mark.slow

ROWS = 60


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An index of 60 rows from two tars; every fifth row has no caption."""
    return make_index(tmp_path_factory.mktemp("index"), ROWS)


@pytest.fixture(scope="module")
def selection(index: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A selection of all 60 rows, which the tests of this module share."""
    folder = str(tmp_path_factory.mktemp("selection") / "all")
    FilteredDataset(index, "anything", amount=ROWS, selection=folder)
    return folder


def whole(index: str, selection: str, **options: Any) -> FilteredDataset:
    return FilteredDataset(index, "anything", amount=ROWS, selection=selection, decode="raw", **options)


def ids(samples: Any) -> list[int]:
    return [sample["id"] for sample in samples]


def flat(parts: Any) -> list[int]:
    return [id for part in parts for id in part]


def batches(loader: Any) -> list[list[int]]:
    return [batch["id"].tolist() for batch in loader]


# Order, shares and phases, which are computed from numbers alone.


@given(st.integers(0, 400), st.integers(1, 7), st.integers(1, 9), st.integers(1, 70), st.integers(0, 3), st.booleans())
def test_ranks_divide_an_epoch(rows: int, world: int, workers: int, block: int, epoch: int, shuffled: bool) -> None:
    seed = 7 if shuffled else None
    shares = [deal.epoch_rows(rows, seed, epoch, block, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(shares)) == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [len(one) for one in shares] == [
        stop - start for start, stop in (deal.share(rows, r, world) for r in range(world))
    ]
    dealt = [deal.left(len(one), [])[worker::workers] for one in shares for worker in range(workers)]
    assert sum(map(len, dealt)) == rows


def test_an_epoch_keeps_neighbours_near_and_differs_from_the_next() -> None:
    rows = deal.epoch_rows(100_000, 0, 0, block=64)
    assert not np.array_equal(rows, deal.epoch_rows(100_000, 0, 1, block=64))
    assert not np.array_equal(rows, deal.epoch_rows(100_000, 1, 0, block=64))
    place = np.empty(100_000, dtype=int)
    place[rows] = np.arange(100_000)
    apart = np.abs(np.diff(place))
    assert np.mean(apart < deal.WINDOW) > 0.97  # neighbours are read within one window
    assert np.median(np.abs(np.diff(rows))) > 5_000  # and yet what follows a row is far from it
    full = deal.epoch_rows(100_000, 0, 0, block=1)
    place[full] = np.arange(100_000)
    assert np.mean(np.abs(np.diff(place)) < deal.WINDOW) < 0.1


@given(
    st.integers(0, 200), st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=5), max_size=4), st.integers(1, 5)
)
def test_what_phases_leave_and_what_they_took_is_everything(count: int, counts: list[list[int]], now: int) -> None:
    """However often the number of workers changes, every position is read exactly once."""
    phases: list[list[int]] = []
    taken: list[int] = []
    for wanted in [*counts, [10**6] * now]:
        over, gone = deal.begin(phases, len(wanted))
        todo = deal.left(count, over)
        for worker, more in enumerate(wanted):
            mine = todo[worker :: len(wanted)]
            taken += mine[gone[worker] : gone[worker] + more].tolist()
            gone[worker] = min(len(mine), gone[worker] + more)
        phases = json.loads(json.dumps([*over, gone]))
        assert sorted([*taken, *deal.left(count, phases).tolist()]) == list(range(count))
    assert sorted(taken) == list(range(count))
    assert len(phases) <= len(counts) + 1


# Mixtures.

lists = st.lists(st.lists(st.integers(0, 60), unique=True, max_size=40), min_size=1, max_size=4)


@given(lists, st.data())
def test_a_mixture_has_each_row_once_by_turns(found: list[list[int]], data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.sampled_from([0.5, 1, 2, 3]), min_size=len(found), max_size=len(found)))
    amount = data.draw(st.none() | st.integers(1, 80))
    pairs = [(np.array(one, np.int64), -np.arange(len(one), dtype=np.float32)) for one in found]
    got, scores, query = mix(pairs, weights, amount)
    union = set().union(*map(set, found))
    assert len(got) == len(union if amount is None else sorted(union)[:amount])
    assert np.all(np.diff(got) > 0)
    turns = [
        {id: ((rank + 1) / weight, number) for rank, id in enumerate(one)}
        for number, (one, weight) in enumerate(zip(found, weights, strict=True))
    ]
    for id, score, owner in zip(got.tolist(), scores, query, strict=True):
        assert owner == min(turn[id] for turn in turns if id in turn)[1]
        assert score == -found[owner].index(id)
    if amount is not None and len(got) == amount:  # each query has its best rows, in proportion to its weight
        for number in range(len(found)):
            owned = [id for id in found[number] if min(t[id] for t in turns if id in t)[1] == number]
            assert set(got[query == number]) == set(owned[: np.count_nonzero(query == number)])


def test_parts_are_as_weights_until_one_runs_out() -> None:
    def best(start: int, count: int) -> tuple[Any, Any]:
        return np.arange(start, start + count), np.ones(count, np.float32)

    _, _, query = mix([best(0, 1000), best(1000, 1000), best(2000, 1000)], [3, 2, 1], 600)
    assert np.bincount(query).tolist() == [300, 200, 100]
    _, _, query = mix([best(0, 1000), best(1000, 50), best(2000, 1000)], [3, 2, 1], 650)
    assert np.bincount(query).tolist() == [450, 50, 150]
    _, _, query = mix([best(0, 10), best(0, 10)], [1, 1])
    assert np.bincount(query, minlength=2).tolist() == [10, 0]


def test_queries_thresholds_and_amounts_are_the_searchers(index: str, tmp_path: Path) -> None:
    picture = corpus.jpeg(3)
    (tmp_path / "q.jpg").write_bytes(picture)
    with Searcher(index) as searcher:
        vector = searcher.encode_image(picture)[0]
        scores, best = (one[0] for one in searcher.search_ids(vector, ROWS))
        text = searcher.search_ids(searcher.encode_text(["blue"]), 10)[1][0]
    over = best[scores >= scores[20]]
    for query in (Query(image=picture), Query(image=str(tmp_path / "q.jpg")), Query(embedding=vector)):
        dataset = FilteredDataset(index, query, amount=7, decode="raw")
        assert sorted(ids(dataset)) == sorted(best[:7])
        assert {one["id"]: one["score"] for one in dataset}[best[0]] == pytest.approx(scores[0])
    near = FilteredDataset(index, Query(embedding=vector, threshold=float(scores[20])), decode="raw")
    assert sorted(ids(near)) == sorted(over)
    few = FilteredDataset(index, Query(embedding=vector, threshold=scores[20], k=5), decode="raw")
    assert sorted(ids(few)) == sorted(best[:5])
    both = FilteredDataset(index, [Query(embedding=vector, k=8, weight=2), Query(text="blue", k=10)], decode="raw")
    assert sorted(ids(both)) == sorted({*best[:8], *text})
    assert both.selection.queries[0] + both.selection.queries[1] == both.selection.rows
    assert Counter(one["query"] for one in both) == dict(enumerate(both.selection.queries))


def test_conditions_near_duplicates_and_terms_are_the_searchers(index: str, tmp_path: Path) -> None:
    terms = [QueryTerm(text="blue"), QueryTerm(id=3, weight=-0.5)]
    with Searcher(index) as searcher:
        both = Query(terms=terms, k=ROWS, where="number < 20 and seed = 1", unique=True, unique_threshold=0.6)
        found = [hit.id for hit in searcher.find(both).hits]
        text = [hit.id for hit in searcher.find(Query(text="blue", k=5, where="number < 20")).hits]
    query = Query(terms=terms, where="number < 20", unique=True, unique_threshold=0.6)
    dataset = FilteredDataset(index, query, amount=ROWS, where="seed = 1", decode="raw")
    assert 0 < len(found) < 20
    assert sorted(ids(dataset)) == sorted(found)
    folder = str(tmp_path / "kept")
    dataset = FilteredDataset(index, "blue", amount=5, where="number < 20", decode="raw", selection=folder)
    assert sorted(ids(dataset)) == sorted(text)
    with pytest.raises(ConfigError, match="was made with queries"):
        FilteredDataset(index, "blue", amount=5, where="number < 21", selection=folder)


# Samples.


def test_a_sample_is_what_its_tar_has(index: str, selection: str) -> None:
    tars: dict[str, bytes] = {}
    for path in sorted(Path(index).parent.glob("*.tar")):
        with tarfile.open(path) as tar:
            tars |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    raw = list(FilteredDataset(index, "anything", amount=ROWS, decode="raw", columns=["number", "seed", "shard"]))
    assert len(raw) == ROWS
    for sample in raw:
        assert set(sample) == {"id", "score", "query", "key", "caption", "number", "seed", "shard", "image"}
        assert sample["image"] == tars[f"{sample['key']}.jpg"]
        caption = tars.get(f"{sample['key']}.txt")
        assert sample["caption"] == (caption.decode() if caption else None)
        assert sample["key"] == f"{sample['seed']:03d}{sample['number']:06d}"
    pictures = {one["id"]: one["image"] for one in FilteredDataset(index, "anything", amount=ROWS, decode="pil")}
    made = {one["id"]: one["image"] for one in FilteredDataset(index, "anything", amount=ROWS, size=24)}
    means = {
        one["id"]: one["image"]
        for one in FilteredDataset(
            index, "anything", amount=ROWS, size=24, transform=lambda image: image.float().mean()
        )
    }
    for sample in raw:
        decoded = Image.open(io.BytesIO(sample["image"]))
        assert np.array_equal(np.asarray(pictures[sample["id"]]), np.asarray(decoded))
        wanted = np.asarray(decoded.resize((24, 24), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        tensor = made[sample["id"]]
        assert (tensor.dtype, tensor.shape) == (torch.uint8, (3, 24, 24))
        assert np.abs(tensor.numpy().astype(int) - wanted).max() <= 2
        assert means[sample["id"]] == tensor.float().mean()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_of_every_kind_are_known_again(tmp_path: Path, format: int) -> None:
    names = ["plain", "a/folder/x", "./dot", "folder" * 12 + "/" + "long" * 20]
    if format != tarfile.USTAR_FORMAT:
        names += ["猫/" + "名" * 60, "é" * 40, "x" * 88, "x" * 95, "y" * 200]
    files = [(f"{name}.jpg", corpus.jpeg(number)) for number, name in enumerate(names)]
    index = index_of([corpus.write_tar(str(tmp_path / "0.tar"), files, format)], tmp_path)
    dataset = FilteredDataset(index, "x", amount=len(names), decode="raw")
    assert {sample["key"]: sample["image"] for sample in dataset} == {name[:-4]: image for name, image in files}
    assert not dataset.failures.counts


def test_a_filtered_folder_is_a_source(index: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "found")
    with Searcher(index) as searcher:
        vector = searcher.encode_text(["blue"])[0]
        filter_rows(searcher, Query(embedding=vector, k=25), Store(folder))
        wanted = searcher.search_ids(vector, 25)[1][0]
    assert sorted(ids(FilteredDataset(folder, decode="raw"))) == sorted(wanted)
    dataset = FilteredDataset(folder, amount=10, columns=["number"], size=16)
    assert sorted(ids(dataset)) == sorted(wanted[:10])
    with pytest.raises(ConfigError, match="leave the queries out"):
        FilteredDataset(folder, "blue")
    about = json.loads((tmp_path / "found/filter.json").read_text())
    del about["planned"]
    (tmp_path / "found/filter.json").write_text(json.dumps(about))
    old = FilteredDataset(folder, decode="raw")
    with pytest.raises(InputError, match="no_place 25"):
        list(old)


@pytest.mark.parametrize("kind", ["index", "filtered"])
def test_files_that_only_foreign_metadata_names_are_never_opened(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tar exists and has exactly the member that the metadata names, and yet it is not read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    secret = corpus.good_tar(str(tmp_path / "secret.tar"), 4)
    with tarfile.open(secret) as tar:
        members = [member for member in tar if member.name.endswith(".jpg")]
    vectors = np.eye(4, 8, dtype=np.float32)
    folder = tmp_path / "theirs"
    (folder / "metadata").mkdir(parents=True)
    flat_index = faiss_index.train("Flat", vectors)
    faiss_index.add(flat_index, vectors, np.arange(4))
    faiss_index.write(flat_index, str(folder / "image.index"))
    columns = {
        "key": [member.name.split(".")[0] for member in members],
        "caption": ["x"] * 4,
        "shard": [secret] * 4,
        "offset": [member.offset_data for member in members],
        "length": [member.size for member in members],
    }
    pq.write_table(pa.table(columns), folder / "metadata" / "metadata_0.parquet")
    source, queries = str(folder), [Query(embedding=vectors[0], k=4)]
    if kind == "filtered":
        with Searcher(source) as searcher:
            done = filter_rows(searcher, Query(embedding=vectors[0], k=4), Store(str(tmp_path / "found")), images=True)
        assert (done.images, done.missing) == (0, 4)
        source, queries = str(tmp_path / "found"), []
    opened: list[Any] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest, **more: (opened.append(path), real(path, *rest, **more))[1])
    dataset = FilteredDataset(source, queries, decode="raw", max_failures=1, columns=["shard"])
    assert list(dataset) == []
    assert dataset.failures.counts == {"no_place": 4}
    assert secret not in opened


# Sharding and resuming.


@settings(max_examples=25)
@given(world=st.integers(1, 5), workers=st.integers(1, 4), epoch=st.integers(0, 3), shuffle=st.booleans())
def test_every_row_once_over_ranks_and_workers(
    index: str, selection: str, world: int, workers: int, epoch: int, shuffle: bool
) -> None:
    seen: list[int] = []
    for rank in range(world):
        dataset = whole(index, selection, rank=rank, world=world, shuffle=shuffle, block=4)
        dataset.set_epoch(epoch)
        over, gone = dataset.progress.begin(workers)
        for worker in range(workers):
            seen += ids(dataset.read(over, gone, worker, dataset.failures))
        assert sum(gone) == len(dataset)
    assert sorted(seen) == list(range(ROWS))


@settings(max_examples=25)
@given(st.lists(st.integers(0, 40), max_size=4), st.integers(0, 2), st.integers(1, 100))
def test_a_resumed_stream_is_the_uninterrupted_one(
    index: str, selection: str, stops: list[int], epoch: int, ahead: int
) -> None:
    dataset = whole(index, selection, block=4, seed=5)
    dataset.set_epoch(epoch)
    uninterrupted = ids(dataset)
    assert sorted(uninterrupted) == list(range(ROWS))
    seen: list[int] = []
    state: dict[str, Any] | None = None
    for stop in [*stops, ROWS]:
        again = whole(index, selection, block=4, seed=5, ahead=ahead)
        if state is None:
            again.set_epoch(epoch)
        else:
            again.load_state_dict(state)
            again.set_epoch(state["epoch"])  # as the training loop does
        stream = iter(again)
        seen += [sample["id"] for _, sample in zip(range(stop), stream, strict=False)]
        state = json.loads(json.dumps(again.state_dict()))
        stream.close()  # type: ignore[attr-defined]
    assert seen == uninterrupted


@pytest.mark.parametrize(("workers", "after"), [(0, 0), (2, 2), (2, 1), (2, 0), (0, 2)])
def test_a_loader_resumes_with_any_number_of_workers(index: str, selection: str, workers: int, after: int) -> None:
    """With the same number of workers the batches are the same; with any number no row is repeated or lost."""
    options = {"block": 4, "seed": 1}
    uninterrupted = batches(whole(index, selection, **options).loader(7, workers))
    assert sorted(flat(uninterrupted)) == list(range(ROWS))
    assert len(uninterrupted) == len(whole(index, selection, **options).loader(7, workers))
    for stop in (1, 4, len(uninterrupted)):
        dataset = whole(index, selection, **options)
        stream = iter(dataset.loader(7, workers))
        first = [next(stream)["id"].tolist() for _ in range(stop)]
        state = json.loads(json.dumps(dataset.state_dict()))
        stream.close()  # type: ignore[attr-defined]
        resumed = whole(index, selection, **options)
        resumed.load_state_dict(state)
        rest = batches(resumed.loader(7, after))
        if workers == after:
            assert first + rest == uninterrupted
        assert sorted(flat(first + rest)) == list(range(ROWS))
        assert batches(resumed.loader(7, workers)) == uninterrupted  # a loaded state is used for one pass only


def test_a_spawned_worker_gets_a_path_not_the_rows(index: str, selection: str) -> None:
    dataset = whole(index, selection)
    assert len(pickle.dumps(dataset)) < 4000
    got = batches(dataset.loader(10, 1, multiprocessing_context="spawn"))
    assert sorted(flat(got)) == list(range(ROWS))


@pytest.mark.parametrize("persistent", [False, True])
def test_torchs_own_loader_shards_and_sees_epochs(index: str, selection: str, persistent: bool) -> None:
    dataset = FilteredDataset(index, "anything", amount=ROWS, selection=selection, size=8)
    loader = DataLoader(dataset, 8, num_workers=2, persistent_workers=persistent, collate_fn=ids)
    orders = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        orders.append(flat(loader))
        assert sorted(orders[-1]) == list(range(ROWS))
    assert orders[0] != orders[1]


@pytest.mark.filterwarnings("ignore:'set_vital':UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_torchdatas_stateful_loader(index: str, selection: str, workers: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    uninterrupted = list(stateful(whole(index, selection), 7, num_workers=workers, collate_fn=ids))
    for stop in (1, 4):
        loader = stateful(whole(index, selection), 7, num_workers=workers, collate_fn=ids)
        stream = iter(loader)
        first = [next(stream) for _ in range(stop)]
        state = loader.state_dict()
        del stream
        loader = stateful(whole(index, selection), 7, num_workers=workers, collate_fn=ids)
        loader.load_state_dict(state)
        assert first + list(loader) == uninterrupted


def test_states_and_selections_of_something_else_are_refused(index: str, selection: str, tmp_path: Path) -> None:
    state = whole(index, selection).state_dict()
    for other in (whole(index, selection, seed=9), whole(index, selection, rank=0, world=2)):
        with pytest.raises(ConfigError, match="make it as it was"):
            other.load_state_dict(state)
    with pytest.raises(ConfigError, match="the state has selection"):
        FilteredDataset(index, "anything", amount=5).load_state_dict(state)
    with pytest.raises(ConfigError, match="was made with amount 60, not 5"):
        FilteredDataset(index, "anything", amount=5, selection=selection)
    with pytest.raises(ConfigError, match="name a selection folder"):
        FilteredDataset(index, "anything", amount=5, rank=0, world=2)
    dataset = FilteredDataset(index, "x", amount=5)
    for options in ({"batch_size": 0}, {"batch_size": "4"}, {"workers": -1}):
        with pytest.raises(ConfigError, match=r"it must be a whole number, [01] or more"):
            dataset.loader(**options)  # type: ignore[arg-type]
    for wrong, match in [
        ({"queries": "x"}, "a k or a threshold, or an amount"),
        ({"queries": ()}, "no query"),
        ({"queries": "x", "amount": 5, "columns": ["nonsense"]}, "no metadata column 'nonsense'"),
        ({"queries": "x", "amount": 5, "columns": ["image"]}, "something else"),
        ({"queries": "x", "amount": 5, "columns": "number"}, "columns is 'number': it must be a list of names"),
        ({"queries": "x", "amount": 5, "via": "url"}, "no metadata column 'url'"),
        ({"queries": "x", "amount": 5, "via": "ftp"}, "there are tar, url and either"),
        ({"queries": "x", "amount": 5, "decode": "jpeg"}, "tensor, pil and raw"),
        ({"queries": Query(text="x", threshold=2.0)}, "lower the threshold"),
    ]:
        with pytest.raises(ConfigError, match=match):
            FilteredDataset(index, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="just one"):
        Query(text="a", image="b")
    temporary = FilteredDataset(index, "anything", amount=5)
    folder = temporary.selection.folder
    assert os.path.isdir(folder)
    del temporary
    assert not os.path.exists(folder)


def _train(rank: int, port: int, index: str, selection: str, results: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    dataset = whole(index, selection)
    assert (dataset.rank, dataset.world) == (rank, 2)
    own = [batch["id"].tolist() for batch in together(dataset.loader(10 - 4 * rank))]
    Path(results, f"{rank}.json").write_text(json.dumps(own))
    torch.distributed.destroy_process_group()


def test_ranks_take_as_many_steps_together(index: str, selection: str, tmp_path: Path) -> None:
    """Rank 0 has 3 batches, and rank 1 has 5 smaller ones, so both train on 3."""
    from tests.servers.processes import free_ports

    [port] = free_ports(1)
    arguments = (port, index, selection, str(tmp_path))
    torch.multiprocessing.start_processes(_train, arguments, nprocs=2, start_method="fork")
    steps = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [len(one) for one in steps] == [3, 3]
    seen = flat(steps[0] + steps[1])
    assert len(set(seen)) == len(seen) == 30 + 18


# Rows that fail.


@pytest.fixture
def broken(tmp_path: Path) -> str:
    """An index of 40 rows: 10 in a tar that is deleted, 10 in one that is replaced, and 1 whose image was zeroed."""
    tars = [corpus.good_tar(str(tmp_path / f"{i}.tar"), 10, seed=i) for i in range(4)]
    index = index_of(tars, tmp_path)
    os.unlink(tars[1])
    corpus.good_tar(tars[2], 10, seed=9)
    with tarfile.open(tars[3]) as tar:
        member = tar.getmember("003000004.jpg")
    with open(tars[3], "r+b") as file:
        file.seek(member.offset_data)
        file.write(bytes(member.size))
    return index


@pytest.mark.parametrize("workers", [0, 2])
def test_failures_are_counted_listed_and_limited(
    broken: str, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = FilteredDataset(broken, "x", amount=40, size=16, max_failures=0.6, shuffle=False)
    got = flat(batches(dataset.loader(4, workers)))
    assert len(set(got)) == len(got) == 19
    assert dataset.failures.counts == {"missing_tar": 10, "changed_tar": 10, "undecodable_image": 1}
    assert dataset.failures.rows == 40
    by_reason = {one.reason: one for one in dataset.failures.listed}
    assert len(dataset.failures.listed) == 21
    assert by_reason["undecodable_image"].key == "003000004"
    assert f"{tmp_path}/1.tar does not exist" in by_reason["missing_tar"].message
    strict = FilteredDataset(broken, "x", amount=40, size=16)
    with pytest.raises(InputError, match=r"21 of 40 rows gave no sample .*missing_tar 10.*max_failures of 0.5"):
        batches(strict.loader(4, workers))
    with pytest.raises(InputError, match="21 of 40 rows"):
        list(strict)
    if not workers:
        assert sum("missing_tar: row" in line for line in caplog.messages) == 3  # the first of a pass is logged


def test_a_limit_ends_a_long_pass_early(tmp_path: Path) -> None:
    tar = corpus.good_tar(str(tmp_path / "0.tar"), 400, side=8)
    index = index_of([tar], tmp_path)
    os.unlink(tar)
    dataset = FilteredDataset(index, "x", amount=400, max_failures=0.1)
    with pytest.raises(InputError, match="100 of 100 rows"):
        next(iter(dataset))
    assert len(dataset.failures.listed) == 20


def test_a_killed_worker_surfaces(index: str, selection: str) -> None:
    dataset = whole(index, selection, ahead=1)
    workers = iter(dataset.loader(2, 1, collate=lambda samples: os.getpid(), prefetch_factor=1))
    os.kill(next(workers), signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"worker.*(killed|exited)"):
        list(workers)


# URLs.


class Web(http.server.BaseHTTPRequestHandler):
    """A web server of images by number, and of answers that are not images."""

    asked: ClassVar[Counter[str]] = Counter()
    now = most = 0
    lock = threading.Lock()

    def do_GET(self) -> None:
        with Web.lock:
            Web.asked[self.path] += 1
            Web.now += 1
            Web.most = max(Web.most, Web.now)
        try:
            self.answer(self.path.strip("/").split("/"))
        except OSError:
            pass
        finally:
            with Web.lock:
                Web.now -= 1

    def answer(self, path: list[str]) -> None:
        kind, number = path[0], int(path[1])
        if kind == "moved":
            self.send_response(302)
            self.send_header("location", f"/image/{number}")
            return self.end_headers()
        self.send_response({"absent": 404, "down": 503}.get(kind, 200))
        self.end_headers()
        if kind == "slow":
            for _ in range(200):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
        time.sleep(0.01)
        body = {"huge": bytes(300_000), "corrupt": corpus.jpeg(number)[:200]}.get(kind, corpus.jpeg(number))
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    Web.asked.clear()
    Web.most = 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def web_index(folder: Path, web: str, kinds: list[str]) -> str:
    files = []
    for number, kind in enumerate(kinds):
        fields = {"url": f"{web}/{kind}/{number}"} if kind else {}
        files += [
            (f"k{number:04d}.jpg", corpus.jpeg(1000 + number)),
            (f"k{number:04d}.json", json.dumps(fields).encode()),
        ]
    return index_of([corpus.write_tar(str(folder / "0.tar"), files)], folder)


def test_images_by_their_urls(tmp_path: Path, web: str) -> None:
    kinds = ["image", "moved", "absent", "slow", "huge", "corrupt", "down", "", "image", "image"] * 2
    index = web_index(tmp_path, web, kinds)
    options: dict[str, Any] = {"amount": 20, "via": "url", "timeout": 2, "max_bytes": "200KB", "max_failures": 1}
    dataset = FilteredDataset(index, "x", private=True, decode="pil", columns=["url"], **options)
    started = time.monotonic()
    samples = list(dataset)
    assert time.monotonic() - started < 8
    assert sorted(sample["key"] for sample in samples) == [
        f"k{i:04d}" for i in range(20) if kinds[i] in ("image", "moved")
    ]
    for sample in samples:
        wanted = Image.open(io.BytesIO(corpus.jpeg(int(sample["key"][1:]))))
        assert np.array_equal(np.asarray(sample["image"]), np.asarray(wanted))
    assert dataset.failures.counts == {
        **{"not_found": 2, "timeout": 2, "too_large": 2, "undecodable_image": 2, "http_error": 2, "no_place": 2}
    }
    assert any(one.message == f"{web}/absent/2 answers 404" for one in dataset.failures.listed)
    Web.asked.clear()
    public = FilteredDataset(index, "x", **options)
    assert list(public) == []
    assert public.failures.counts == {"private_address": 18, "no_place": 2}
    assert not Web.asked
    either = FilteredDataset(index, "x", private=True, **{**options, "via": "either"})
    assert len(list(either)) == 20
    assert not Web.asked  # all rows are in a tar
    os.unlink(tmp_path / "0.tar")
    assert len(list(FilteredDataset(index, "x", private=True, **options))) == 8


@pytest.mark.parametrize("ahead", [1, 12])
def test_a_slow_consumer_holds_the_reading_up(tmp_path: Path, web: str, ahead: int) -> None:
    index = web_index(tmp_path, web, ["image"] * 80)
    dataset = FilteredDataset(
        index, "x", amount=80, via="url", private=True, decode="raw", ahead=ahead, threads=5, shuffle=False
    )
    stream = iter(dataset)
    for taken in range(1, 6):
        next(stream)
        time.sleep(0.15)
        assert Web.asked.total() <= taken + ahead
    assert Web.asked.total() >= 5 + ahead - 1
    assert len(list(stream)) == 75
    assert Web.most <= min(5, ahead)


def test_reads_of_local_tars_are_bounded_too(index: str, selection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = Fetch.__call__
    monkeypatch.setattr(Fetch, "__call__", lambda self, place: (read.append(1), real(self, place))[1])
    stream = iter(whole(index, selection, ahead=20, threads=4))
    for taken in range(1, 30):
        next(stream)
        time.sleep(0.005)
        assert len(read) <= 20 + 16 * (1 + (taken - 1) // 16)
    assert 29 <= len(read) < ROWS


# Remote tars.


def test_tars_on_s3(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clip_batch.storage import retry

    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    storage = StorageConfig(storage_options=s3.options)
    home = Store(f"s3://{BUCKET}/{uuid.uuid4().hex}", s3.options)
    local = corpus.good_tar(str(tmp_path / "0.tar"), 12)
    home.replace("0.tar", Path(local).read_bytes())
    index = index_of_remote(f"{home.url}/0.tar", tmp_path, storage)
    os.unlink(local)
    dataset = FilteredDataset(index, "x", amount=12, decode="raw", storage=storage)
    assert not dataset.selection.local
    with s3.fault("internal", lambda method, path: "0.tar" in path, times=3) as fault:
        samples = list(dataset)
    assert fault.hits == 3
    assert {sample["key"]: sample["image"] for sample in samples} == {f"000{i:06d}": corpus.jpeg(i) for i in range(12)}
    assert sorted(flat(batches(dataset.loader(5, 2)))) == list(range(12))
    home.replace("0.tar", corpus_bytes(tmp_path, 3))
    assert len(list(FilteredDataset(index, "x", amount=12, storage=storage, max_failures=1))) == 3
    home.remove("0.tar")
    gone = FilteredDataset(index, "x", amount=12, decode="raw", storage=storage, max_failures=1)
    assert list(gone) == []
    assert gone.failures.counts == {"missing_tar": 12}


def corpus_bytes(folder: Path, n: int) -> bytes:
    return Path(corpus.good_tar(str(folder / "short.tar"), n)).read_bytes()


def index_of_remote(tar: str, folder: Path, storage: StorageConfig) -> str:
    from clip_batch.config import EmbedConfig, MergeConfig, PlanConfig
    from clip_batch.index.merge.merge import merge
    from clip_batch.launch.local import run_worker
    from clip_batch.plan.plan import make_plan

    output, index = str(folder / "out"), str(folder / "index")
    make_plan([tar], output, PlanConfig(model="fake:8"), storage=storage)
    assert all(done.state == "committed" for done in run_worker(output, None, EmbedConfig(progress=False), storage))
    merge(output, index, MergeConfig(queries=5), storage=storage)
    return index


# The examples in the documents.


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An INDEX of 239 pictures of the demo, mostly flags, made with the demo's model."""
    folder = tmp_path_factory.mktemp("demo")
    return index_of(data.write_tars(str(folder / "tars"))[-1:], folder, "demo")


def test_the_example_learns_and_goes_on(demo: str, tmp_path: Path) -> None:
    script = str(ROOT / "docs/examples/train_filtered.py")
    options = ["--text", "flag", "--amount", "64", "--batch-size", "16", "--every", "3"]
    options += ["--checkpoint", str(tmp_path / "saved.pt")]

    def run(epochs: int) -> dict[int, tuple[float, int]]:
        command = [sys.executable, script, demo, *options, "--epochs", str(epochs)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = re.findall(r"epoch (\d+): loss ([\d.]+), (\d+) batches", done.stdout)
        return {int(epoch): (float(loss), int(count)) for epoch, loss, count in found}

    first = run(3)
    assert [count for _, count in first.values()] == [4, 4, 4]
    assert first[2][0] < 0.8 * first[0][0]
    again = run(4)  # saved behind the third batch of the third epoch
    assert [(epoch, count) for epoch, (_, count) in again.items()] == [(2, 1), (3, 4)]


def test_the_snippet_of_the_page(demo: str) -> None:
    [snippet] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/training.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet.replace('"INDEX"', repr(demo)), names)
    assert names["images"].shape[1:] == (3, 64, 64)
    assert names["dataset"].selection.rows == 100
    assert names["dataset"].failures.counts == {}
    assert sum(map(sum, names["state"]["phases"])) == 100


def test_pictures_of_a_folder_are_samples(tmp_path: Path) -> None:
    pictures = {"a.jpg": 1, "b.Jpg": 2, "deep/c.jfif": 3}
    for name, seed in pictures.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(corpus.jpeg(seed))
    index = index_of([str(tmp_path / "photos")], tmp_path)
    (tmp_path / "photos" / "a.jpg").rename(tmp_path / "photos" / "gone.jpg")
    dataset = FilteredDataset(index, "anything", amount=3, selection=str(tmp_path / "s"), decode="raw", max_failures=1)
    found = {sample["key"]: bytes(sample["image"]) for sample in dataset}
    assert found == {"b": corpus.jpeg(2), "deep/c": corpus.jpeg(3)}
    assert dataset.failures.counts == {"missing_tar": 1}
