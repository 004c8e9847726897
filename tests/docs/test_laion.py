"""The simulation of docs/laion5b.md, small: no partition is lost or committed twice, and failures cost little."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from clip_batch.config import EmbedConfig, PlanConfig, SlurmConfig, StorageConfig
from clip_batch.embeddings.slots import Slot
from clip_batch.embeddings.spare import choose
from clip_batch.launch.local import run_worker
from clip_batch.plan.plan import make_plan
from clip_batch.storage.store import Store
from clip_batch.types import Plan
from tests.bench.laion import A_PARTITION, A_TAR, CALM, Cluster, Simulation, make
from tests.corpus import good_tar
from tests.servers.s3_server import BUCKET, S3
from tests.servers.s3_server import s3 as s3
from tests.servers.s3_server import s3_server as s3_server

GPUS, TARS = 40, 4000


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return make(TARS, "1GB", str(tmp_path_factory.mktemp("plan")))


@pytest.mark.parametrize("share", [True, False])
def test_every_partition_is_committed_once_whatever_happens(plan: Plan, share: bool) -> None:
    stormy = replace(Cluster(GPUS), node_life=3 * 3600.0, worker_life=30 * 3600.0, preempted=3600.0, unreadable=0.01)
    simulation = Simulation(plan, stormy, SlurmConfig(time=30, concurrency=GPUS), share, GPUS)
    result = simulation.run()
    assert set(simulation.commits) == set(range(len(plan.partitions)))
    assert result["submissions"] >= 2, "killed workers and unreadable tars need another submission"
    assert {"killed", "preempted", "time limit", "node died"} <= set(result["ends"])
    assert sum(result["in_vain"].values()) < 0.6
    assert result["over_ideal"] < 6


def test_without_trouble_the_wall_clock_is_the_ideal_one(plan: Plan) -> None:
    calm = replace(Cluster(GPUS), **CALM)
    result = Simulation(plan, calm, SlurmConfig(time=600, concurrency=GPUS), False, GPUS).run()
    assert result["submissions"] == 1
    assert result["in_vain"] == {}
    assert 1 <= result["over_ideal"] < 1.1


def test_helping_shortens_the_end_that_slow_nodes_make(plan: Plan) -> None:
    slow = replace(Cluster(GPUS), **{**CALM, "slow_nodes": 0.2})
    limits = SlurmConfig(time=6000, concurrency=GPUS)
    alone, helped = (Simulation(plan, slow, limits, share, GPUS).run() for share in (False, True))
    assert alone["over_ideal"] > 2.5
    assert helped["over_ideal"] < 1.3


def test_the_choice_is_late_among_those_who_have_most_left() -> None:
    chosen = {choose([range(0, 20), range(20, 60), range(60, 70)], set(range(55, 60))) for _ in range(1000)}
    assert chosen == {*range(10, 20), *range(37, 55)}
    assert choose([[1, 2, 3], [4, 5]], {3}) in {2, 5}
    assert choose([[1, 2, 3], [4, 5], *[[]] * 14], {3}) is None, "so many would compute it often"
    assert choose([], set()) is None


@pytest.mark.slow
def test_a_partition_asks_of_s3_what_the_simulation_counts(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    storage = StorageConfig(s3.options)

    def asked(tars: int) -> Counter[str]:
        home = f"s3://{BUCKET}/counted-{tars}"
        for number in range(tars):
            data = Path(good_tar(str(tmp_path / f"{tars}-{number}.tar"), 4, number)).read_bytes()
            Store(home, s3.options).replace(f"tars/{number:04d}.tar", data)
        config = PlanConfig(input=[f"{home}/tars"], model="fake:8", partition_count=tars)
        make_plan(config.input, f"{home}/out", config, storage=storage)
        s3.log.clear()
        run_worker(f"{home}/out", Slot(0, 1), EmbedConfig(progress=False, device="cpu"), storage)
        log = [(verb, path) for verb, path in s3.log if "/workers/" not in path and "/plan" not in path]
        kinds = [("LIST" if "list-type" in path else verb, path) for verb, path in log]
        # Listings of folders are a worker's; a partition's ask for one name.
        return Counter(kind for kind, path in kinds if kind != "LIST" or ("max-keys=1" in path and ".json" in path))

    few, many = asked(2), asked(6)
    one = Counter(A_PARTITION) + Counter({"HEAD": A_TAR["HEAD"], "GET": 1})  # a tar of one piece
    assert {verb: (many[verb] - few[verb]) / 4 for verb in many} == one
