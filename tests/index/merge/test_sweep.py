from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from clip_batch.config import MergeConfig, SweepConfig
from clip_batch.errors import ConfigError
from clip_batch.index.ann import footprint, index_keys
from clip_batch.index.merge import sweep as stage
from clip_batch.index.merge.sweep import Candidate, EffortResult, Sweep, sweep
from tests.fabricated import clustered, make_out

CONFIG = MergeConfig(modalities=["image"], queries=40, index_memory="1GB", recall_target=0.95)
DIM, ROWS = 16, 3000


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    out = str(tmp_path_factory.mktemp("sweep"))
    images, texts = clustered(ROWS, DIM, 40)
    texts[::3] = 0  # no caption
    make_out(out, images, texts, [1000, 0, 1200, 800])
    said: list[str] = []
    keys = ["Flat", "IVF{}_HNSW32,Flat", "IVF64,SQ4", "IVF64,RaBitQ", "HNSW8", "Flat"]
    made = sweep(out, CONFIG, options=SweepConfig(keys, 1500), progress=said.append)
    results = [line for line in said[1:] if not line.startswith("key ")]
    assert results == [stage.describe_candidate(one) for one in made.candidates]
    assert "key 4 of 5: IVF64,RaBitQ is trained, built and searched; then HNSW8" in said
    return made


def of(found: Sweep, key: str, rerank: int = 0) -> Candidate:
    return next(one for one in found.candidates if (one.key, one.rerank) == (key, rerank))


def test_each_key_is_tried_once_and_lossy_ones_with_re_ranking(found: Sweep) -> None:
    tried = [(one.key, one.rerank) for one in found.candidates]
    lossy = [(key, factor) for key in ("IVF64,SQ4", "IVF64,RaBitQ") for factor in (0, 10, 30)]
    assert tried == [("Flat", 0), ("IVF64_HNSW32,Flat", 0), *lossy, ("HNSW8", 0)]
    assert (found.rows, found.dim, found.sample, found.modality) == (ROWS, DIM, 1500, "image")


def test_what_is_measured(found: Sweep) -> None:
    flat = of(found, "Flat")
    assert flat.best == flat.tries[0] and flat.best is not None
    assert (flat.best.effort, flat.best.recall) == (None, 1.0)
    for one in found.candidates:
        efforts = [tried.effort for tried in one.tries]
        assert efforts == ([None] if one.key == "Flat" else sorted(efforts))
        assert all(tried.ms > 0 and 0 <= tried.recall <= 1 for tried in one.tries)
        reach = [tried for tried in one.tries if tried.recall >= 0.95]
        assert one.best == (reach[0] if reach else None)
        assert one.tries[-1] == one.best or not reach  # no effort beyond the one that will do
    assert of(found, "IVF64,RaBitQ").best is None  # one bit a dimension
    again = of(found, "IVF64,RaBitQ", 30).best
    assert again is not None and again.recall >= 0.95


def test_sizes_are_those_of_all_rows(found: Sweep) -> None:
    for one in found.candidates:
        size = footprint.code_bytes(one.key, DIM)
        assert (one.bytes_per_vector, one.memory) == (size, ROWS * size + footprint.template_bytes(one.key, DIM))
        assert one.disk == (ROWS * DIM * 2 if one.rerank else 0)
        assert one.fits


def test_the_fastest_that_fits_and_reaches_is_recommended(found: Sweep) -> None:
    chosen = found.recommended
    assert chosen is not None and chosen.best is not None
    assert all(one.best is None or one.best.ms >= chosen.best.ms for one in found.candidates)
    few, many = EffortResult(4, 0.96, 1.0), EffortResult(8, 0.97, 2.0)
    fast, slow = replace(chosen, best=few, memory=9), replace(chosen, best=many, memory=5)
    assert stage.recommend([slow, fast]) == fast
    assert stage.recommend([replace(fast, fits=False), slow, replace(slow, memory=4)]).memory == 4  # type: ignore[union-attr]
    assert stage.recommend([replace(fast, fits=False), replace(slow, best=None)]) is None


def test_what_people_and_programs_read(found: Sweep) -> None:
    lines = stage.describe(found).splitlines()
    assert lines[0].startswith("1,500 of 3,000 image rows; wanted: recall@10 of 0.95 within 1 GB")
    assert len(lines) == 3 + len(found.candidates)
    assert lines[-1].startswith(f"take: clip-batch merge --index-key {found.recommended.key}")  # type: ignore[union-attr]
    assert json.loads(json.dumps(asdict(found)))["candidates"][0]["tries"][0]["recall"] == 1.0
    assert "none reaches the recall" in stage.describe(replace(found, recommended=None))
    low = replace(found.candidates[0], best=None, fits=False)
    assert stage.describe_candidate(low).endswith("recall too low too large")


def test_lists_are_scaled_so_that_they_are_as_long() -> None:
    assert [index_keys.list_count(rows) for rows in (1, 3000, 10**6, 10**8)] == [4, 64, 1024, 131072]
    assert index_keys.scaled("OPQ8_64,IVF4096_HNSW32,PQ8", 0.25) == "OPQ8_64,IVF1024_HNSW32,PQ8"
    assert index_keys.scaled("IVF64k_HNSW32,Flat", 2.0) == "IVF65536_HNSW32,Flat"
    assert index_keys.scaled("IVF4096,Flat", 1e-6) == "IVF4,Flat"
    assert index_keys.scaled("IVF2,Flat", 0.5) == "IVF2,Flat"
    assert index_keys.scaled("HNSW32", 0.1) == "HNSW32"


@pytest.mark.usefixtures("autofaiss")
def test_default_keys_are_ones_that_faiss_knows() -> None:
    keys = index_keys.default_keys(10**6, 64, 2 * 10**9)
    assert len(keys) == 9
    for key in keys:
        assert footprint.code_bytes(key.replace("{}", "16"), 64) > 0
    assert len(index_keys.default_keys(10**6, 64, 10**5)) == 8  # nothing fits, says autofaiss


def test_a_small_sample_trains_no_codebook_for_which_faiss_would_warn(
    out: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, texts = clustered(400, DIM, 10)
    make_out(out, images, texts, [400])
    keys = ["OPQ2_16,IVF{}_HNSW32,PQ2x8", "IVF{},PQ4x4fs", "IVF{},SQ8"]
    monkeypatch.setattr(index_keys, "default_keys", lambda *_: keys)
    said: list[str] = []
    found = sweep(out, replace(CONFIG, queries=20), progress=said.append)
    assert {one.key for one in found.candidates} == {"IVF16,SQ8"}
    assert said[0] == "380 of 400 rows are drawn; 3 index keys to try"
    assert said[1] == "skipped: index key 'OPQ2_16,IVF16_HNSW32,PQ2x8' trains on 9,984 rows or more, the sample has 380"
    assert said[2].startswith("skipped: index key 'IVF16,PQ4x4fs' trains on 624 rows")
    assert said[3] == "key 3 of 3: IVF16,SQ8 is trained, built and searched; then which one to take"
    assert "WARNING" not in capfd.readouterr().err


def test_bad_keys_and_modalities_are_refused_by_name(out: str) -> None:
    images, texts = clustered(60, 8, 3)
    make_out(out, images, np.zeros_like(texts), [60])
    with pytest.raises(ConfigError, match="index key 'IFV4'"):
        sweep(out, CONFIG, options=SweepConfig(["IFV4"]))
    with pytest.raises(ConfigError, match="no text vectors"):
        sweep(out, replace(CONFIG, modalities=["text"]), options=SweepConfig(["Flat"]))


def test_memory_is_divided_among_the_modalities_and_too_large_is_said(out: str, tmp_path: Path) -> None:
    images, texts = clustered(300, 8, 3)
    make_out(out, images, texts, [300])
    tight = replace(CONFIG, modalities=["image", "text"], index_memory="18KB")
    made = sweep(out, tight, options=SweepConfig(["Flat", "SQ8"]))
    assert made.memory == 9000
    assert [one.fits for one in made.candidates] == [False, True, True, True]
    assert made.recommended is None or made.recommended.key == "SQ8"
