"""Images of rows that came from Parquet files: the service, filter, lineage and FilteredDataset give them out."""

from __future__ import annotations

import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from clip_batch import FilteredDataset
from clip_batch.config import EmbedConfig, MergeConfig, PlanConfig, StorageConfig
from clip_batch.embeddings.embed import embed
from clip_batch.embeddings.verify import verify_output
from clip_batch.export.filter import filter_rows
from clip_batch.index.merge.merge import merge
from clip_batch.plan.plan import make_plan
from clip_batch.search import lineage
from clip_batch.search.query import Query
from clip_batch.search.searcher import Searcher
from clip_batch.storage.store import Store
from tests import corpus, parquets
from tests.corpus import jpeg
from tests.servers.s3_server import BUCKET, S3
from tests.servers.s3_server import s3 as s3
from tests.servers.s3_server import s3_server as s3_server
from tests.servers.serving import index_of, served

pytestmark = pytest.mark.slow

ROWS = 30


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An index of two Parquet files of different schemas, 30 rows each; the seed of a row's image is its caption's."""
    folder = tmp_path_factory.mktemp("parquet")
    files = [parquets.hugging_face(str(folder / "a.parquet"), ROWS)]
    files += [parquets.img2dataset(str(folder / "b.parquet"), ROWS, seed=100)]
    return index_of(files, folder)


@pytest.fixture
def searcher(index: str) -> Iterator[Searcher]:
    with Searcher(index) as searcher:
        yield searcher


def seed(caption: str) -> int:
    return int(caption.removeprefix("picture "))


def test_every_row_leads_to_its_image(searcher: Searcher) -> None:
    rows = searcher.metadata(range(2 * ROWS))
    assert {row["image_column"] for row in rows} == {"image", "jpg"}
    for id, row in enumerate(rows):
        assert lineage.is_planned(searcher.manifest, id)
        assert lineage.image(row) == jpeg(seed(row["caption"]))
        place = lineage.where(searcher.manifest, id, row)
        assert (place.offset, place.row_group) == (seed(row["caption"]) % 100, seed(row["caption"]) % 100 // 10)


def test_an_image_that_is_not_there_any_more_is_none(tmp_path: Path) -> None:
    path = parquets.hugging_face(str(tmp_path / "a.parquet"), 3)
    row = {"shard": path, "offset": 2, "length": None, "image_column": "image"}
    assert lineage.image(row) == jpeg(2)
    assert lineage.image({**row, "offset": 3}) is None
    assert lineage.image({**row, "image_column": "text"}) is None
    assert lineage.image({**row, "image_column": None}) is None
    Path(path).write_bytes(b"PAR1")
    assert lineage.image(row) is None
    Path(path).unlink()
    assert lineage.image(row) is None


def test_the_service_gives_them_out(index: str) -> None:
    with served(index) as client:
        hits = client.post("/v1/search", json={"text": "anything", "k": 60}).json()["hits"]
        assert len(hits) == 2 * ROWS
        for hit in hits:
            assert client.get(hit["image"]).content == jpeg(seed(hit["metadata"]["caption"]))
        narrow = client.post("/v1/search", json={"text": "anything", "k": 1, "columns": ["caption"]}).json()["hits"]
        assert narrow[0]["metadata"].keys() == {"caption"} and narrow[0]["image"]


def test_filter_copies_them(searcher: Searcher, tmp_path: Path) -> None:
    result = filter_rows(searcher, Query(text="anything", k=20), Store(tmp_path / "found"), images=True)
    assert (result.rows, result.images, result.missing) == (20, 20, 0)
    with tarfile.open(tmp_path / "found/images/00000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    pictures = [name for name in members if name.endswith(".jpg")]
    assert len(pictures) == 20
    for name in pictures:
        assert members[name] == jpeg(seed(members[name.replace(".jpg", ".txt")].decode()))


def test_training_reads_them(index: str, tmp_path: Path) -> None:
    dataset = FilteredDataset(index, "anything", amount=2 * ROWS, selection=str(tmp_path / "all"), decode="raw")
    samples = list(dataset)
    assert len(samples) == 2 * ROWS
    assert all(sample["image"] == jpeg(seed(sample["caption"])) for sample in samples)


def test_training_tells_a_file_that_changed(tmp_path: Path) -> None:
    path = parquets.img2dataset(str(tmp_path / "a.parquet"), ROWS)
    index = index_of([path], tmp_path)
    parquets.img2dataset(path, ROWS, seed=1)
    dataset = FilteredDataset(
        index, "anything", amount=ROWS, selection=str(tmp_path / "all"), decode="raw", max_failures=1.0
    )
    assert list(dataset) == []
    assert dataset.failures.counts == {"changed_tar": ROWS}


def test_tars_and_parquet_in_one_index(index: str, tmp_path: Path) -> None:
    """What is added later may be of another format."""
    tar = corpus.good_tar(str(tmp_path / "a.tar"), 10, seed=7)
    path = parquets.hugging_face(str(tmp_path / "a.parquet"), 10)
    for name, input in (("one", tar), ("two", path)):
        make_plan(input, tmp_path / name, PlanConfig(model="fake:8"))
        embed(tmp_path / name, EmbedConfig(batch_size=8))
    merge(tmp_path / "one", tmp_path / "index", MergeConfig(queries=2))
    merge(tmp_path / "two", tmp_path / "index", MergeConfig(queries=2, add=True))
    with Searcher(str(tmp_path / "index")) as searcher:
        images = [lineage.image(row) for row in searcher.metadata(range(20))]
    assert None not in images and len(set(images)) == 20


def test_on_s3(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned, cut, embedded, verified, and read back; a slice costs its own bytes and the footer."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    storage = StorageConfig(storage_options=s3.options)
    home = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    store = Store(home, s3.options)
    for number in range(2):
        path = parquets.hugging_face(str(tmp_path / "a.parquet"), ROWS, 100 * number)
        store.replace(f"data/{number}.parquet", Path(path).read_bytes())
    plan = make_plan(f"{home}/data", f"{home}/out", PlanConfig(model="fake:8", partition_samples=10), storage=storage)
    assert plan.format == "parquet" and len(plan.partitions) == 6
    outcomes = embed(f"{home}/out", EmbedConfig(batch_size=8), storage=storage)
    assert [outcome.state for outcome in outcomes] == ["committed"] * 6
    assert [outcome.failed for outcome in outcomes] == [0] * 6, outcomes
    report = verify_output(Store(f"{home}/out", s3.options), deep=True, options=s3.options)
    assert (report.problems, report.rows) == ({}, 2 * ROWS)
    merge(f"{home}/out", tmp_path / "index", MergeConfig(queries=2), storage=storage)
    with Searcher(str(tmp_path / "index"), storage) as searcher:
        for row in searcher.metadata(range(0, 2 * ROWS, 7)):
            assert lineage.image(row, storage) == jpeg(seed(row["caption"]))
    samples = list(
        FilteredDataset(
            str(tmp_path / "index"), "x", amount=5, storage=storage, decode="raw", selection=str(tmp_path / "s")
        )
    )
    assert [sample["image"] for sample in samples] == [jpeg(seed(sample["caption"])) for sample in samples]
    other = make_plan(f"{home}/data/1.parquet", f"{home}/other", PlanConfig(model="fake:8"), storage=storage)
    store.replace("data/1.parquet", Path(path).read_bytes()[:-1] + b"x")
    assert len(other.partitions) == 1
    [outcome] = embed(f"{home}/other", storage=storage)
    assert outcome.state == "failed" and "was planned with etag" in outcome.error
