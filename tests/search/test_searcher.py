from __future__ import annotations

import fcntl
import functools
import os
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clip_batch.cli import main
from clip_batch.config import MergeConfig, StorageConfig
from clip_batch.errors import ConfigError, CorruptError
from clip_batch.index import removals
from clip_batch.index.merge.merge import merge
from clip_batch.search.conditions import Compare
from clip_batch.search.query import Query
from clip_batch.search.searcher import Searcher
from clip_batch.storage import download, retry
from clip_batch.storage.store import Store
from tests.fabricated import clustered, make_out
from tests.servers.flaky import Flaky, put

IMAGES, TEXTS = clustered(400, 16, 20)
CONFIG = MergeConfig(queries=20, shard_rows=150, index_key="IVF8,Flat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("search")
    make_out(root / "out", IMAGES, TEXTS, [100, 300])
    merge(str(root / "out"), str(root / "index"), CONFIG)
    return str(root)


@pytest.fixture
def searcher(folder: str) -> Searcher:
    with Searcher(f"{folder}/index") as opened:
        yield opened


def test_a_searcher_says_what_it_has_open(searcher: Searcher) -> None:
    assert repr(searcher).endswith(f"/index: version {searcher.manifest.version}, 400 rows>")


def test_one_query_and_many_agree(searcher: Searcher) -> None:
    many = searcher.search(IMAGES[:5], k=7)
    assert many == [searcher.search(query, k=7)[0] for query in IMAGES[:5]]
    assert many[0][0].score == pytest.approx(1, abs=1e-3)
    assert [hit.score for hit in many[0]] == sorted((hit.score for hit in many[0]), reverse=True)
    assert searcher.search(np.empty((0, 16), np.float32)) == []
    scores, ids = searcher.search_ids(IMAGES[:5], 7)
    assert ids.tolist() == [[hit.id for hit in line] for line in many]
    assert (scores.dtype, ids.dtype, ids.shape) == (np.float32, np.int64, (5, 7))


def test_more_hits_than_rows(searcher: Searcher) -> None:
    (line,) = searcher.search(IMAGES[0], k=1000, effort=8)
    assert sorted(hit.id for hit in line) == list(range(400))
    scores, ids = searcher.search_ids(IMAGES[0], 1000, effort=8)
    assert ids.shape == scores.shape == (1, 400)
    scores, ids = searcher.search_ids(IMAGES[0], 1000, effort=1)  # three lists of 24
    few = len(searcher.search(IMAGES[0], k=1000, effort=1)[0])
    assert few < 400 and (ids[0, few:] == -1).all() and np.isneginf(scores[0, few:]).all()


@pytest.mark.parametrize("k", [10**9, 2**31, 10**12])
def test_any_k_costs_what_the_rows_cost(folder: str, searcher: Searcher, k: int) -> None:
    tracemalloc.start()
    try:
        assert len(searcher.search(IMAGES[0], k=k)[0]) <= 400
        assert len(searcher.search(IMAGES[0], k=k, where="row >= 0")[0]) == 400
        assert len(searcher.find(Query(embedding=IMAGES[0], k=k, unique=True)).hits) <= 400
        assert searcher.search_ids(IMAGES[:3], k, among=searcher.select([1, 2]))[1].shape == (3, 400)
        command = ["search", "--index", f"{folder}/index", "--id", "3", "--no-unique", "--json", "-k", str(k)]
        assert main(command) == 0
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_equal_scores_come_by_ascending_id(tmp_path: Path) -> None:
    images = np.repeat(IMAGES[:1], 30, axis=0)
    make_out(tmp_path / "out", images, images, [10, 20])
    manifest = merge(str(tmp_path / "out"), str(tmp_path / "index"), replace(CONFIG, shard_rows=7, index_key="Flat"))
    assert manifest.recall["image"]["image"]["1"] == 1.0  # any of the equal ones will do
    with Searcher(str(tmp_path / "index")) as searcher:
        assert [hit.id for hit in searcher.search(images[0], k=30)[0]] == list(range(30))


def test_requests_do_not_disturb_each_other(searcher: Searcher) -> None:
    alone = {effort: searcher.search_ids(IMAGES, 50, effort=effort)[1] for effort in (1, 3, 8)}
    assert (alone[1] != alone[8]).any()
    with ThreadPoolExecutor(8) as pool:
        together = list(
            pool.map(lambda effort: (effort, searcher.search_ids(IMAGES, 50, effort=effort)[1]), [1, 3, 8] * 8)
        )
    for effort, ids in together:
        np.testing.assert_array_equal(ids, alone[effort])


@pytest.mark.parametrize("rerank", [0, 3])
@pytest.mark.parametrize("quick", [0, 2**20], ids=["threads", "alone"])
def test_shards_searched_together_answer_as_each_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rerank: int, quick: int
) -> None:
    monkeypatch.setattr("clip_batch.index.ann.shards.QUICK", quick)
    monkeypatch.setattr("clip_batch.search.searcher.EXACT", -1)
    texts = TEXTS.copy()
    texts[::5] = 0
    make_out(tmp_path / "out", IMAGES, texts, [400])
    index = str(tmp_path / "index")
    merge(str(tmp_path / "out"), index, replace(CONFIG, shard_rows=100, index_key="IVF8,SQ8", rerank=rerank))
    with Searcher(index) as searcher:
        keys = [row["key"] for row in searcher.metadata(range(3, 90, 4))]
    removals.add(Store(index), "key", keys)
    with Searcher(index) as searcher:
        some = searcher.select([id for id in range(0, 400, 3) if id not in set(searcher.removed.tolist())])
        cases = [
            (queries, k, effort) for queries in (IMAGES[:1], IMAGES[:6]) for k in (1, 10, 500) for effort in (1, 8)
        ]
        for modality in ("image", "text"):
            shards = searcher.indices[modality]
            assert shards.shared is not None
            for among in (None, some):
                together = [searcher.search_ids(q, k, modality, effort, among) for q, k, effort in cases]
                monkeypatch.setitem(searcher.indices, modality, replace(shards, shared=None))
                apart = [searcher.search_ids(q, k, modality, effort, among) for q, k, effort in cases]
                monkeypatch.setitem(searcher.indices, modality, shards)
                for (scores, ids), (expected_scores, expected_ids) in zip(together, apart, strict=True):
                    np.testing.assert_array_equal(ids, expected_ids)
                    np.testing.assert_array_equal(scores, expected_scores)
                assert among is None or np.isin(together[-1][1], [*some.ids, -1]).all()


def test_a_query_with_little_to_compare_waits_for_no_other_thread(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = searcher.search(IMAGES[0], k=7)
    searcher._pool.shutdown()
    assert searcher.search(IMAGES[0], k=7) == expected
    monkeypatch.setattr("clip_batch.index.ann.shards.QUICK", 0)
    with pytest.raises(RuntimeError, match="after shutdown"):
        searcher.search(IMAGES[0], k=7)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"queries": np.zeros((2, 15))}, r"shape \(2, 15\): this index needs \(n, 16\)"),
        ({"queries": np.zeros((2, 2, 16))}, "shape"),
        ({"queries": np.full(16, np.nan)}, "NaN"),
        ({"queries": np.full(16, np.inf)}, "infinity"),
        ({"queries": ["a"] * 16}, "not an array of real numbers"),
        ({"queries": np.ones(16) * 1j}, "not an array of real numbers"),
        ({"queries": ["1.0"] * 16}, "not an array of real numbers"),
        ({"k": 0}, "k is 0"),
        ({"k": 2.5}, "k is 2.5"),
        ({"effort": 0}, "effort is 0"),
        ({"kind": "sound"}, "a query's kind is 'sound': it must be image or text"),
        ({"kind": 7, "where": "n < 100"}, "a query's kind is 7"),
        ({"modality": "sound"}, "modality 'sound' is not in this index: it has image, text"),
    ],
)
def test_wrong_arguments(searcher: Searcher, arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        searcher.search(**{"queries": IMAGES[0], **arguments})  # type: ignore[arg-type]


def test_metadata_in_the_order_asked(searcher: Searcher) -> None:
    rows = searcher.metadata([399, 0, 200, 0])
    again = [searcher.metadata([id])[0] for id in (399, 0, 200, 0)]
    assert rows == again
    assert rows[1] == rows[3] != rows[0]
    assert searcher.metadata([5], ["caption"]) == [{"caption": searcher.metadata([5])[0]["caption"]}]
    assert searcher.metadata([]) == []
    for ids in ([-1], [400], [0.5]):
        with pytest.raises(ConfigError, match="0 to 399"):
            searcher.metadata(ids)
    with pytest.raises(ConfigError, match="no metadata column nothing: there are key, shard"):
        searcher.metadata([0], ["nothing"])


def test_reconstruct(searcher: Searcher) -> None:
    vectors = searcher.reconstruct([300, 2, 2])
    assert [line[0].id for line in searcher.search(vectors, k=1)] == [300, 2, 2]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some=st.sets(st.integers(0, 399)), exact=st.booleans(), k=st.sampled_from([1, 7, 500]), row=st.integers(0, 399))
def test_only_selected_rows_are_found(folder: str, some: set[int], exact: bool, k: int, row: int) -> None:
    with pytest.MonkeyPatch.context() as patch, Searcher(f"{folder}/index") as searcher:
        patch.setattr("clip_batch.search.searcher.EXACT", 10_000 if exact else -1)
        scores, ids = searcher.search_ids(IMAGES[row], 400, effort=8)
        kept = np.isin(ids[0], list(some))
        k = min(k, 400)
        wanted = np.concatenate([ids[0][kept], np.full(k, -1)])[:k]
        found, places = searcher.search_ids(IMAGES[row], k, effort=8, among=searcher.select(sorted(some)))
        np.testing.assert_allclose(found[0], np.concatenate([scores[0][kept], np.full(k, -np.inf)])[:k], atol=1e-6)
        assert sorted(places[0]) == sorted(wanted)


def test_a_selection_has_no_removed_rows(tmp_path: Path) -> None:
    texts = TEXTS.copy()
    texts[::3] = 0
    make_out(tmp_path / "out", IMAGES, texts, [400])
    index = str(tmp_path / "index")
    merge(str(tmp_path / "out"), index, MergeConfig(queries=20))
    with Searcher(index) as searcher:
        keys = [row["key"] for row in searcher.metadata([5, 7])]
    removals.add(Store(index), "key", keys)
    with Searcher(index) as searcher:
        selection = searcher.select(np.arange(30))
        assert set(range(30)) - set(selection.ids.tolist()) == {5, 7}
        assert set(searcher.search_ids(IMAGES[0], 100, among=selection)[1][0]) == set(selection.ids) | {-1}
        captions = searcher.search_ids(IMAGES[0], 100, "text", among=selection)[1][0]
        has = [i for i in selection.ids if searcher.reconstruct([i], "text").any()]
        assert sorted(captions[captions >= 0]) == has
        with pytest.raises(ConfigError, match="ids are 0 to 399"):
            searcher.select([400])


def test_an_encoder_of_another_dimension(folder: str) -> None:
    class Encoder:
        dim = 512

    with pytest.raises(ConfigError, match="has 16 dimensions, this encoder"):
        Searcher(f"{folder}/index", encoder=Encoder())  # type: ignore[arg-type]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    make_out(tmp_path / "out", IMAGES, TEXTS, [400])
    manifest = merge(str(tmp_path / "out"), str(tmp_path / "index"), CONFIG)
    path = tmp_path / "index" / manifest.version / "text/0001.index"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptError, match=r"text/0001\.index does not have the recorded size of \d+ bytes"):
        Searcher(str(tmp_path / "index"))
    path.unlink()
    with pytest.raises(CorruptError, match=r"text/0001\.index is missing"):
        Searcher(str(tmp_path / "index"))


@pytest.fixture
def remote(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same index in a remote store, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "pieces", functools.partial(download.pieces, size=5_000))
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.001)
    for path in Path(folder, "index").rglob("*"):
        if path.is_file():
            put(f"index/{path.relative_to(Path(folder, 'index'))}", path.read_bytes())
    yield "flaky://index"
    Flaky.reset()


def fetched() -> list[tuple[str, int]]:
    """Collect (file, first byte) of each piece of an index or metadata file that is read."""
    return [(path, at) for what, path, at, _ in Flaky.calls if what == "read" and path.endswith((".index", ".arrow"))]


def copies(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_a_remote_index_is_copied_once_and_searched_there(searcher: Searcher, remote: str, tmp_path: Path) -> None:
    with Searcher(remote) as copied:
        assert copied.search(IMAGES[:3]) == searcher.search(IMAGES[:3])
    reads = len(fetched())
    assert reads > 9, "9 files, some in several pieces"
    with Searcher(remote) as copied, ThreadPoolExecutor(2) as pool:
        list(pool.map(copied.search, IMAGES[:4]))
    assert len(fetched()) == reads
    assert not [path for path in copies(tmp_path) if path.suffix in (".part", ".pieces")]


def test_a_copy_that_was_killed_goes_on(remote: str, tmp_path: Path) -> None:
    def kill(what: str, path: str, at: int) -> None:
        if what == "read" and len(fetched()) > 8:
            raise KeyboardInterrupt

    Flaky.before = kill
    with pytest.raises(KeyboardInterrupt):
        Searcher(remote)
    Flaky.before = None
    first = fetched()[:8]
    Flaky.calls.clear()
    with Searcher(remote) as copied:
        assert len(copied.search(IMAGES[0])[0]) == 10
    assert not set(first[:7]) & set(fetched()), "what had arrived is not read again"


def test_a_wrong_copy_is_refused_and_a_wrong_remnant_is_mended(remote: str, tmp_path: Path) -> None:
    with Searcher(remote) as opened:
        name = f"{opened.manifest.version}/text/0002.index"
    (path,) = (path for path in copies(tmp_path) if str(path).endswith("text/0002.index"))
    size = path.stat().st_size
    path.unlink()
    Path(f"{path}.part").write_bytes(bytes(size))
    Path(f"{path}.pieces").write_text("0-5000\n")
    Searcher(remote).close()
    assert path.stat().st_size == size
    path.unlink()
    put(f"index/{name}", bytes(size))
    with pytest.raises(CorruptError, match=r"text/0002\.index has not its recorded sha256"):
        Searcher(remote)
    assert not path.exists()


def test_two_at_once_copy_each_piece_once(remote: str) -> None:
    with ThreadPoolExecutor(3) as pool:
        for opened in pool.map(lambda _: Searcher(remote), range(3)):
            opened.close()
    assert len(fetched()) == len(set(fetched()))


def test_old_versions_make_room_unless_they_are_in_use(remote: str, tmp_path: Path) -> None:
    with Searcher(remote) as opened:
        size = sum(wanted["bytes"] for shard in opened.manifest.shards for wanted in shard.files.values())
        home = next((tmp_path / "cache").rglob(opened.manifest.version)).parent
        for number, name in enumerate(("older", "newer", "used")):
            (home / name).mkdir()
            (home / name / "x").write_bytes(bytes(1000))
            os.utime(home / name, (number, number))
    used = os.open(home / "used.used", os.O_RDWR | os.O_CREAT)
    fcntl.flock(used, fcntl.LOCK_SH)
    try:
        Searcher(remote, StorageConfig(index_cache=str(size + 2000))).close()
        assert sorted(path.name for path in home.iterdir() if path.is_dir() and len(path.name) < 6) == ["newer", "used"]
        with pytest.raises(ConfigError, match=r"raise --index-cache"):
            Searcher(remote, StorageConfig(index_cache=str(size + 999)))
        assert (home / "used").is_dir() and not (home / "newer").exists()
    finally:
        os.close(used)


def test_an_image_that_is_absent_is_named(searcher: Searcher, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"image: .*/no\.jpg is no file: give the path or URL"):
        searcher.find(Query(image=f"{tmp_path}/no.jpg"))
    with pytest.raises(ConfigError, match="is no file"):
        searcher.find(Query(image=str(tmp_path)))


def test_a_closed_searcher_says_so(folder: str) -> None:
    searcher = Searcher(f"{folder}/index")
    row = searcher.reconstruct([0])
    selected = searcher.select([1, 2])
    searcher.close()
    for ask in (
        lambda: searcher.find(Query(id=0)),
        lambda: searcher.search(row),
        lambda: searcher.search_ids(row, among=selected),
        lambda: list(searcher.search_over(row[0], 0.5)),
        lambda: searcher.metadata([0]),
        lambda: searcher.reconstruct([0]),
        lambda: searcher.where(Compare("key", "=", "x")),
    ):
        with pytest.raises(ConfigError, match=r"^the Searcher of \S+ is closed: open another one$"):
            ask()
    searcher.close()


def test_recall_is_kept_where_rows_may_not_be_found(tmp_path: Path) -> None:
    """Rows that were removed, or that a condition leaves out, take places in the lists that a search visits."""
    images, texts = clustered(12_200, 32, 12, spread=1.2)
    queries, images, texts = images[12_000:], images[:12_000], texts[:12_000]
    make_out(tmp_path / "out", images, texts, [12_000])
    index = str(tmp_path / "index")
    config = MergeConfig(modalities=["image"], queries=200, index_key="IVF64,Flat", shard_rows=6000)
    assert merge(str(tmp_path / "out"), index, config).efforts["image"]["image"]["100"] < 16

    def recall(searcher: Searcher, kept: np.ndarray, **how: object) -> float:
        order = [row["row"] for row in searcher.metadata(np.flatnonzero(kept), ["row"])]
        scores = queries @ images[order].T
        least = np.sort(scores, axis=1)[:, -100] - 1e-3  # codes are of float16
        found, _ = searcher.search_ids(queries, 100, kind="image", **how)  # type: ignore[arg-type]
        return float((found >= least[:, None]).mean())

    with Searcher(index) as searcher:
        every = recall(searcher, np.ones(12_000, bool))
        some = np.zeros(12_000, bool)
        some[np.random.default_rng(1).choice(12_000, 10_500, replace=False)] = True
        assert recall(searcher, some, among=searcher.select(np.flatnonzero(some))) > every - 0.01
    keys = [f"0-{row}" for row in np.random.default_rng(0).permutation(12_000)[:9600]]
    removals.add(Store(index), "key", keys)
    with Searcher(index) as searcher:
        kept = np.ones(12_000, bool)
        kept[searcher.removed] = False
        assert kept.sum() == 2400
        assert recall(searcher, kept) > every - 0.01
        assert recall(searcher, kept, effort=4) < every - 0.01, "an effort that is given is the number of lists"
