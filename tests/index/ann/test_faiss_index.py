from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_batch.errors import ConfigError, CorruptError
from clip_batch.index.ann import (
    clusters,
    faiss_index,
    faiss_search,
    footprint,
    index_keys,
    libfaiss,
    recall,
    shared_lists,
)
from clip_batch.index.ann.index_keys import default_keys
from tests.fabricated import clustered, unit

AVX512 = "avx512f avx512bw avx512dq avx512vl avx512cd"
KEYS = [
    "Flat",
    "SQ8",
    "HNSW16",
    "IVF16,Flat",
    "IVF16,SQ8",
    "IVF64_HNSW32,Flat",
    "PCA16,IVF16,SQ8",
    "IVF16,PQ16x4fs,RFlat",
    "IDMap2,Flat",
    "IVF16,RaBitQ",
    "IVF16,RaBitQ4",
    "RR32,IVF16,RaBitQfs4",
    "IVF16,PQ16x4fs",
    "PQ16x4fs",
    "RaBitQfs",
]
LOSSY = ("PQ", "PCA", "RaBitQ")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny data: threads only wait for each other, badly so on a busy machine."""
    faiss_index.use_threads(1)


@pytest.mark.parametrize(
    ("vendor", "flags", "core"),
    [
        ("GenuineIntel", f"fma avx2 {AVX512}", "SkylakeX"),
        ("AuthenticAMD", f"fma avx2 {AVX512}", "SkylakeX"),
        ("AuthenticAMD", "fma avx2", "Zen"),
        ("GenuineIntel", "fma avx2", "Haswell"),
        ("GenuineIntel", "fma avx2 avx512f", "Haswell"),  # Knights Landing lacks the others
        ("GenuineIntel", "avx2", None),
        ("GenuineIntel", "sse4_2", None),
    ],
)
def test_the_kernel_is_one_that_the_cpu_has(vendor: str, flags: str, core: str | None) -> None:
    cpuinfo = f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags} lm\n\nprocessor\t: 1\n"
    assert libfaiss.openblas_core(cpuinfo) == core
    assert libfaiss.openblas_core("") is None


def test_a_kernel_that_the_user_names_stays() -> None:
    code = "import os, numpy; from clip_batch.index.ann import faiss_index as index; "
    code += "index.train('Flat', numpy.eye(4, dtype='f4'))"
    environment = {**os.environ, "OPENBLAS_CORETYPE": "Prescott"}
    done = subprocess.run(
        [sys.executable, "-c", code + "; print(os.environ['OPENBLAS_CORETYPE'])"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "Prescott\n"


@pytest.mark.parametrize("key", KEYS)
def test_every_kind_assigns_fills_saves_maps_and_searches_alike(
    key: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    vectors, _ = clustered(1500, 32, 30)
    template = faiss_index.train(key, vectors)
    assert template.ntotal == 0
    assert faiss_index.has_lists(template) == (index_keys.lists(key) > 0)
    if faiss_index.has_lists(template):
        found = faiss_index.assigner(template)(vectors)
        assert found.shape == (1500,)
        assert set(found) <= set(range(index_keys.lists(key)))
    faiss_index.add(template, vectors[:1000], np.arange(1000))
    faiss_index.add(template, vectors[1000:], np.arange(1000, 1500))
    efforts = faiss_index.efforts(template)
    assert efforts == sorted(set(efforts))
    assert (efforts == []) == (key in ("Flat", "SQ8", "IDMap2,Flat", "PQ16x4fs", "RaBitQfs"))
    faiss_index.write(template, str(tmp_path / "a.index"))
    scores, ids = faiss_search.search(template, vectors[:50], 10, efforts[-1] if efforts else None)
    for mapped in (False, True):
        again = faiss_index.read(str(tmp_path / "a.index"), mapped)
        for effort in efforts[-1:] or [None]:
            more = faiss_search.search(again, vectors[:50], 10, effort)
            np.testing.assert_array_equal(more[1], ids)
            np.testing.assert_allclose(more[0], scores, atol=1e-6)
    assert np.mean(ids[:, 0] == np.arange(50)) > (0.3 if any(kind in key for kind in LOSSY) else 0.9)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("key", ["IVF64,Flat", "HNSW4", "PCA16,IVF64,SQ8", "IVF64,PQ16x4fs,RFlat"])
def test_effort_travels_with_the_request(key: str) -> None:
    """More effort never finds less, and the index itself keeps its own setting."""
    vectors, queries = clustered(4000, 32, 4, spread=2.0)
    made = faiss_index.with_ids(faiss_index.train(key, vectors))  # an id map lets it through as well
    faiss_index.add(made, vectors, np.arange(4000))
    before = faiss_search.search(made, queries[:100], 10)[1]
    exact = faiss_search.nearest(queries[:100], vectors, 10)[1]
    shares = []
    for effort in faiss_index.efforts(made):
        found = faiss_search.search(made, queries[:100], 10, effort)[1]
        shares.append(np.mean([len(set(a) & set(b)) for a, b in zip(found, exact, strict=True)]))
    assert shares[-1] > shares[0] + 0.1
    np.testing.assert_array_equal(faiss_search.search(made, queries[:100], 10)[1], before)


def test_a_graph_of_centroids_finds_all_the_lists_it_is_asked_for() -> None:
    vectors, queries = clustered(6000, 32, 600, spread=1.0)
    made = faiss_index.train("IVF512_HNSW32,Flat", vectors)
    faiss_index.add(made, vectors, np.arange(6000))
    exact = faiss_search.nearest(queries[:100], vectors, 10)[1]
    found = faiss_search.search(made, queries[:100], 10, 512)[1]
    assert np.mean([len(set(a) & set(b)) for a, b in zip(found, exact, strict=True)]) > 9.9, "every list is visited"
    shared = shared_lists.share([made, made])
    assert shared is not None
    centroids = made.quantizer.reconstruct_n(0, 512)
    nearest = faiss_search.nearest(queries[:100], centroids, 128)[1]
    lists = shared_lists.probe(shared, queries[:100], 128).lists
    assert np.mean([len(set(a) & set(b)) for a, b in zip(lists, nearest, strict=True)]) > 0.95 * 128


@pytest.mark.parametrize("key", KEYS)
def test_explicit_ids_leave_rows_out(key: str, tmp_path: Path) -> None:
    vectors, _ = clustered(1000, 32, 30)
    ids = np.arange(0, 2000, 2)
    made = faiss_index.with_ids(faiss_index.train(key, vectors))
    faiss_index.add(made, vectors, ids)
    faiss_index.write(made, str(tmp_path / "a.index"))
    made = faiss_index.read(str(tmp_path / "a.index"), mapped=True)
    found = faiss_search.search(made, vectors[:50], 3, 16)[1]
    assert (found % 2 == 0).all()
    assert np.mean(found[:, 0] == ids[:50]) > 0.3
    faiss_index.prepare_reconstruct(made)
    assert faiss_index.reconstruct(made, 5) is None
    vector = faiss_index.reconstruct(made, 6)
    assert vector is not None
    assert vector @ vectors[3] > 0.3


REMOVAL_KEYS = [
    *KEYS,
    "PCA16,Flat",
    "PQ16x4fs,RFlat",
    "HNSW16,SQ8",
    "RaBitQ",
    "IVF16,PQ16x4fs,Refine(SQfp16)",
    "PQ8x4np",
]


@pytest.mark.parametrize("gaps", [False, True], ids=["whole", "gaps"])
@pytest.mark.parametrize("key", REMOVAL_KEYS)
def test_removed_rows_are_not_found_and_their_place_is_filled(key: str, gaps: bool, tmp_path: Path) -> None:
    """As many as before, from the rows that are left, even where the removed ones are the nearest of all."""
    vectors, queries = clustered(1200, 32, 20)
    queries = queries[:30]
    ids = np.arange(1200) * (2 if gaps else 1)
    made = faiss_index.train(key, vectors)
    made = faiss_index.with_ids(made) if gaps else made
    faiss_index.add(made, vectors, ids)
    faiss_index.write(made, str(tmp_path / "a.index"))
    made = faiss_index.read(str(tmp_path / "a.index"), mapped=True)
    effort = (faiss_index.efforts(made) or [None])[-1]
    near = np.unique(faiss_search.search(made, queries[:5], 60, effort)[1])
    removed = np.unique(np.concatenate([near[near >= 0], ids[::3]]))
    for gone in (removed, faiss_search.Removed(removed)):
        scores, found = faiss_search.search(made, queries, 10, effort, gone)
        assert (found >= 0).all()
        assert not np.isin(found, removed).any()
        assert (np.diff(scores, axis=1) <= 1e-6).all()
    before = faiss_search.search(made, queries, 10, effort)[1]
    np.testing.assert_array_equal(
        faiss_search.search(made, queries, 10, effort, np.empty(0, dtype=np.int64))[1], before
    )
    some = faiss_search.search(made, queries, 10, None, removed)[1]  # at the index's own effort
    assert not np.isin(some, removed).any()
    left = np.flatnonzero(~np.isin(ids, removed))
    exact = ids[left][faiss_search.nearest(queries, vectors[left], 10)[1]]
    share = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, exact, strict=True)])
    assert share > (0.2 if any(kind in key for kind in LOSSY) and "Refine" not in key and "RFlat" not in key else 0.9)


@pytest.mark.parametrize("gone", [False, True], ids=["all", "removed"])
@pytest.mark.parametrize("key", [*REMOVAL_KEYS, "IVF16_HNSW8,PQ16x4fsr"])
def test_a_deep_search_finds_what_others_do(key: str, gone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same scores, equal ones by ascending id; and so does the search over a threshold."""
    vectors, queries = clustered(1200, 32, 20)
    ids = np.arange(1200) * 2
    made = faiss_index.with_ids(faiss_index.train(key, vectors))
    faiss_index.add(made, vectors, ids)
    removed = faiss_search.Removed(ids[::3]) if gone else None
    effort = (faiss_index.efforts(made) or [None])[len(faiss_index.efforts(made)) // 2]
    near = 1e-6  # a transform of one query rounds otherwise than that of five

    def ask(k: int) -> tuple[list[np.ndarray], list[tuple[np.ndarray, np.ndarray]]]:
        found = faiss_search.search(made, queries[:5], k, effort, removed)
        thresholds = zip(queries[:5], found[0][:, k // 2] - near, strict=True)
        return [*found], [
            faiss_search.search_over(made, query[None], float(over), effort, removed) for query, over in thresholds
        ]

    for k in (40, 400):
        monkeypatch.setattr(faiss_search, "DEEP", 10**9)
        with monkeypatch.context() as patched:
            patched.setattr(faiss_search, "_scored_rows", lambda made, effort: float("inf"))
            (scores, found), over = ask(k)
        monkeypatch.setattr(faiss_search, "DEEP", 1)
        (deep_scores, deep), deep_over = ask(k)
        np.testing.assert_allclose(deep_scores[deep >= 0], scores[found >= 0], atol=near)
        for row in range(5):
            sure = scores[row] > scores[row, -1] + near  # of equal last ones, either may be left out
            np.testing.assert_array_equal(np.sort(deep[row][sure]), np.sort(found[row][sure]))
            np.testing.assert_array_equal(np.sort(deep_over[row][1]), np.sort(over[row][1]))
            np.testing.assert_allclose(deep_over[row][0], over[row][0], atol=near)
        if faiss_search._scored_rows(made, effort) < 4 * k:
            order = np.lexsort((deep, -deep_scores), axis=-1)
            np.testing.assert_array_equal(order, np.broadcast_to(np.arange(k), order.shape))


@settings(max_examples=30)
@given(rows=st.integers(1, 120), share=st.floats(0, 1), k=st.integers(1, 130), seed=st.integers(0, 99))
def test_kinds_without_a_selector_search_past_what_is_removed(rows: int, share: float, k: int, seed: int) -> None:
    """As many, and as good, as searching all rows and dropping the removed, whatever k and however many."""
    rng = np.random.default_rng(seed)
    vectors = unit(rng.standard_normal((rows, 8)))
    removed = np.flatnonzero(rng.random(rows) < share)
    made = faiss_index.train("PQ8x4np", unit(np.random.default_rng(0).standard_normal((64, 8))))
    faiss_index.add(made, vectors, np.arange(rows))
    scores, found = faiss_search.search(made, vectors[:3], k, None, removed)
    every, ranked = faiss_search.search(made, vectors[:3], rows)
    left = min(k, rows - len(removed))
    for at in range(len(found)):
        np.testing.assert_allclose(scores[at, :left], every[at, ~np.isin(ranked[at], removed)][:left], atol=1e-6)
        assert len(set(found[at, :left]) - set(removed)) == left
        assert (found[at, left:] == -1).all()


SIZED = [key for key in REMOVAL_KEYS if "HNSW" not in key] + ["IVF64_HNSW32,RaBitQfs", "HNSW16"]


@pytest.mark.parametrize("key", SIZED)
def test_footprint_is_the_file_that_comes_out(key: str, tmp_path: Path) -> None:
    rows = 2_000 if key == "HNSW16" else 20_000
    vectors, _ = clustered(rows, 32, 100)
    made = faiss_index.train(key, vectors[:4000])
    path = tmp_path / "a.index"
    faiss_index.write(made, str(path))
    assert path.stat().st_size == pytest.approx(footprint.template_bytes(key, 32), rel=0.05, abs=2_000)
    faiss_index.add(made, vectors, np.arange(rows))
    faiss_index.write(made, str(path))
    assert path.stat().st_size == pytest.approx(
        footprint.template_bytes(key, 32) + rows * footprint.code_bytes(key, 32), rel=0.05
    )


def test_footprint_of_an_unknown_key() -> None:
    with pytest.raises(ConfigError, match=r"index key 'IFV16' for vectors of 8: .*change --index-key"):
        footprint.code_bytes("IFV16", 8)


@pytest.mark.parametrize("key", ["IVF16,Flat", "RR32,IVF16,Flat"])
def test_known_centroids_are_rotated_as_the_vectors_are(key: str) -> None:
    vectors, _ = clustered(2000, 32, 40)
    centroids = clusters.train(vectors, 16)
    lists = clusters.nearest_of(centroids)(vectors)
    for known in (centroids, None):
        index = faiss_index.train(key, vectors, 0, known)
        assert np.mean(faiss_index.assigner(index)(vectors) == lists) > 0.99


def test_an_empty_index_finds_nothing(tmp_path: Path) -> None:
    vectors, _ = clustered(500, 16, 5)
    for key in ("Flat", "IVF4,Flat", "HNSW8"):
        faiss_index.write(faiss_index.train(key, vectors), str(tmp_path / "a.index"))
        ids = faiss_search.search(faiss_index.read(str(tmp_path / "a.index"), True), vectors[:2], 3, 4)[1]
        assert (ids == -1).all()


def test_choices_fit_the_memory_the_best_first() -> None:
    def keys(*arguments: Any, **named: Any) -> list[str]:
        return [choice.key for choice in index_keys.choices(*arguments, **named)]

    assert keys(200_000, 128, 10**9) == ["IVF512,PQ64x4fs", "RR128,IVF512,RaBitQfs", "IVF512,PQ32x4fs"]
    assert keys(200_000, 128, 10**9, 0) == ["IVF512,SQfp16", "IVF512,SQ8", "IVF512,PQ64x4fs"]
    assert keys(200_000, 128, 10**9, growing=True) == ["RR128,IVF512,RaBitQfs"]
    assert keys(200_000, 128, 10**6, mapped=True) == ["IVF512,SQ8"], "what is mapped from disk takes no memory"
    assert keys(200_000, 127, 10**9) == ["RR127,IVF512,RaBitQfs"], "no product quantizer divides it"
    assert keys(10**7, 128, 10**9)[0] == "IVF8192,PQ64x4fs"
    assert keys(10**8, 128, 10**10)[0] == "IVF131072_HNSW32,PQ64x4fs"
    fewest = footprint.served_bytes("IVF512,PQ8x4fs", 200_000, 128)
    assert keys(200_000, 128, fewest) == ["IVF512,PQ8x4fs"]
    with pytest.raises(ConfigError, match=rf"raise --index-memory \({fewest:,} bytes"):
        keys(200_000, 128, fewest - 1)
    assert {choice.rerank for choice in index_keys.choices(200_000, 128, 10**9, 7)} == {7}


@pytest.mark.usefixtures("autofaiss")
def test_autofaiss_is_asked_where_it_is_named() -> None:
    assert index_keys.autofaiss_key(200_000, 128, 10**9) == "IVF2048,Flat"
    assert index_keys.autofaiss_key(200_000, 128, 20 * 10**6).startswith("OPQ64_192,IVF2048_HNSW32,PQ64")
    with pytest.raises(ConfigError, match="autofaiss knows no index"):
        index_keys.autofaiss_key(200_000, 128, 10**6)


def test_lists_of_a_key() -> None:
    keys = "Flat", "OPQ16_112,IVF4096_HNSW32,PQ16x8", "IVF64k,SQ8"
    assert [index_keys.lists(key) for key in keys] == [0, 4096, 65536]


def test_without_autofaiss_auto_works_and_its_name_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "autofaiss.external.optimize", None)
    with pytest.raises(
        ConfigError, match=r"autofaiss is not installed: pip install 'clip-batch\[autofaiss\]'.*leave --index-key auto"
    ):
        index_keys.autofaiss_key(1001, 64, 10**9)
    assert index_keys.choices(10**6, 64, 10**9)
    assert len(default_keys(10**6, 64, 2 * 10**9)) == 8, "a sweep does without"


def test_faiss_errors_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"IVF16,Flat.*on 3 training vectors.*16 lists need as many.*; change --index-key"
    ) as error:
        faiss_index.train("IVF16,Flat", unit(np.eye(3) + 0.1))
    assert "\n" not in str(error.value)
    (tmp_path / "bad.index").write_bytes(b"not an index at all")
    with pytest.raises(CorruptError, match=r"bad\.index is not a readable faiss index"):
        faiss_index.read(str(tmp_path / "bad.index"))


def trial_of(
    queries: np.ndarray, vectors: np.ndarray, own: np.ndarray, drop: np.ndarray | None = None
) -> recall.RecallTrial:
    """Exact search, and as found the same less the rows of `drop`."""
    exact = faiss_search.nearest(queries, vectors, recall.TOP + 1)
    scores, found = faiss_search.nearest(queries, vectors, len(vectors))
    found = np.where(np.isin(found, [] if drop is None else drop), -1, found)
    return recall.measure(own, exact, {0: (scores, found, scores)})


@settings(max_examples=25)
@given(rows=st.integers(1, 300), cut=st.integers(0, 300), seed=st.integers(0, 99), some=st.booleans())
def test_trials_fold_into_the_trial_over_all_rows(rows: int, cut: int, seed: int, some: bool) -> None:
    rng = np.random.default_rng(seed)
    vectors, cut = unit(rng.standard_normal((rows, 8))), min(cut, rows)
    own = rng.integers(rows, size=5)
    queries, drop = vectors[own], np.flatnonzero(rng.random(rows) < 0.3) if some else np.empty(0, int)
    whole = trial_of(queries, vectors, own, drop)
    pieces = []
    for low, high in ((0, cut), (cut, rows)):
        inside = (own >= low) & (own < high)
        if low < high:
            pieces.append(trial_of(queries, vectors[low:high], np.where(inside, own - low, -1), drop - low))
    folded = pieces[0] if len(pieces) == 1 else recall.fold(*pieces)
    for name in ("exact", "ranked", "true"):
        np.testing.assert_allclose(getattr(folded, name), getattr(whole, name), atol=1e-6)
    for k in (1, 10, 100):
        assert recall.recall(folded, 0, k) == recall.recall(whole, 0, k)
        if not some:
            assert recall.recall(whole, 0, k) == (None if rows == 1 else 1.0)


def test_recall_counts_what_was_missed_and_forgives_equal_vectors() -> None:
    vectors = unit(np.random.default_rng(0).standard_normal((40, 8)))
    queries, own = vectors[:4] * 1, np.full(4, -1)
    best = faiss_search.nearest(queries, vectors, 40)[1]
    one_missing = trial_of(queries[:1], vectors, own[:1], drop=best[0, 2:3])
    assert recall.recall(one_missing, 0, 1) == 1.0
    assert recall.recall(one_missing, 0, 10) == 0.9  # what takes its place does not count
    assert recall.recall(one_missing, 0, 100) == 39 / 40  # only 40 rows there are
    twice = np.concatenate([vectors, vectors])
    scores, exact = faiss_search.nearest(queries, twice, 40)
    other = np.where(exact < 40, exact + 40, exact - 40)  # the twin of each
    trial = recall.measure(own, (scores, exact), {0: (scores, other, scores)})
    assert [recall.recall(trial, 0, k) for k in (1, 10)] == [1.0, 1.0]
    assert recall.least_effort(trial, 0.9, 10) == (0, True)
    assert recall.least_effort(one_missing, 0.95, 10) == (0, False)
    efforts = recall.RecallTrial(trial.exact, trial.ranked.repeat(5, 0), trial.true.repeat(5, 0), np.arange(5))
    efforts.true[0, :, 0] = efforts.true[1:, 0, 0] = -np.inf
    assert recall.least_effort(efforts, 0.99, 10) == (1, False), "the largest that gained"


def test_the_interval_is_that_of_the_mean_over_queries() -> None:
    exact = np.tile(np.linspace(1, 0, 100, dtype=np.float32), (4, 1))
    true = exact[None, :, :10].copy()
    true[0, 0, :5] = -np.inf  # one query of four finds half of its ten
    trial = recall.RecallTrial(exact, true, true, np.array([3]))
    assert recall.recall(trial, 0, 10) == pytest.approx(0.875)
    assert recall.interval(trial, 0, 10) == pytest.approx(1.96 * 0.25 / 2)
    summary = recall.summary(trial, [0, 0])
    assert summary is not None
    assert summary["interval_10"] == pytest.approx(1.96 * 0.25 / 2)


def test_trials_of_other_efforts_fold_without_a_recall_that_is_too_high() -> None:
    exact = np.linspace(1, 0.5, 10, dtype=np.float32)[None]

    def trial(places: list[int], found: list[int]) -> recall.RecallTrial:
        true = np.full((len(places), 1, 10), -np.inf, np.float32)
        for number, count in enumerate(found):
            true[number, 0, :count] = exact[0, :count]
        return recall.RecallTrial(
            np.pad(exact, ((0, 0), (0, 90)), constant_values=-np.inf), true, true, np.array(places)
        )

    folded = recall.fold(trial([1, 3], [4, 8]), trial([2, 3], [6, 9]))
    assert folded.places.tolist() == [1, 2, 3]
    assert (np.isfinite(folded.true).sum(axis=-1)).ravel().tolist() == [4, 10, 10], "below its least, a trial has none"
    assert recall.load(recall.arrays(folded, "image.text"), "image.text").places.tolist() == [1, 2, 3]


def test_the_k_best_come_from_the_candidates_for_k() -> None:
    exact = np.tile(np.linspace(1, 0, 100, dtype=np.float32), (2, 1))
    ranked = np.full((1, 2, 500), -np.inf, np.float32)
    ranked[0] = np.linspace(1, 0, 500)
    true = np.full_like(ranked, -np.inf)
    true[0, :, 150:250] = exact  # the codes put the best rows at the places 150 to 249
    trial = recall.RecallTrial(exact, ranked, true, np.array([0]))
    assert recall.recall(trial, 0, 10) == 0.0
    assert recall.recall(trial, 0, 10, factor=2) == 1.0, "200 candidates are always scored"
    assert recall.recall(trial, 0, 100, factor=2) == 0.5
    assert recall.recall(trial, 0, 100, factor=5) == 1.0


@pytest.mark.parametrize(
    "key",
    [
        "IVF16,Flat",
        "IVF16_HNSW8,SQ8",
        "OPQ4_16,IVF16,PQ4x4",
        "IVF16,PQ8x4fsr",
        "RR16,IVF16,RaBitQ",
        "IVF16,PQ4x4,RFlat",
    ],
)
def test_vectors_whose_lists_are_known_go_into_them(key: str) -> None:
    vectors = clustered(3000, 16, 16)[0]
    one, other = faiss_index.train(key, vectors), faiss_index.train(key, vectors)
    lists = faiss_index.assigner(one)(vectors)
    order = np.argsort(lists, kind="stable")
    for start in range(0, 3000, 500):
        block, ids = order[start : start + 500], np.arange(start, start + 500)
        faiss_index.add(one, vectors[block], ids)
        faiss_index.add(other, vectors[block], ids, lists[block])
    found, wanted = (faiss_search.search(made, vectors[:200], 10, 16) for made in (other, one))
    assert np.mean(found[1] == wanted[1]) > 0.99  # of an HNSW quantizer the lists may be better ones
    np.testing.assert_allclose(found[0], wanted[0], atol=0.02 if "HNSW" in key else 1e-5)
    assert faiss_index.assigner(other)(vectors[:50]).tolist() == lists[:50].tolist()
