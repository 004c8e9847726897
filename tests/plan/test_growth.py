"""Input that only grew extends a plan; whatever else changed is refused by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from clip_batch.cli import main
from clip_batch.config import EmbedConfig, PlanConfig, StorageConfig
from clip_batch.embeddings import slots, submission
from clip_batch.embeddings.commits import committed, read_commits
from clip_batch.embeddings.embed import embed
from clip_batch.embeddings.reader import open_embeddings
from clip_batch.embeddings.slots import Slot
from clip_batch.embeddings.status import describe, status
from clip_batch.embeddings.verify import verify_output
from clip_batch.errors import CorruptError, PlanError
from clip_batch.plan import plan as planning
from clip_batch.plan.plan import count_partitions, load_plan, make_plan
from clip_batch.plan.replace import check_digest
from clip_batch.storage.store import Store
from clip_batch.types import Generation, Partition, Plan, Slice
from tests import corpus, parquets
from tests.embeddings.test_tar_edges import table
from tests.servers.s3_server import BUCKET, S3
from tests.servers.s3_server import s3 as s3
from tests.servers.s3_server import s3_server as s3_server

CONFIG = PlanConfig(model="fake:8", partition_samples=4)
EXTEND = replace(CONFIG, extend=True)
CPU = EmbedConfig(device="cpu", progress=False)


def add(folder: Path | str, *numbers: int, samples: int = 3) -> None:
    os.makedirs(folder, exist_ok=True)
    for number in numbers:
        corpus.good_tar(f"{folder}/{number}.tar", samples, seed=number)


def slices_of(plan: Plan) -> list[Slice]:
    return [piece for partition in plan.partitions for piece in partition.slices]


def names_of(plan: Plan) -> list[str]:
    return [os.path.basename(url) for url in dict.fromkeys(piece.shard.url for piece in slices_of(plan))]


@pytest.fixture
def tars(tmp_path: Path) -> str:
    """A glob of two tars."""
    add(tmp_path / "in", 1, 3)
    return f"{tmp_path}/in/*.tar"


def test_a_plan_is_extended_again_and_again(tars: str, out: str, tmp_path: Path) -> None:
    plans, said, store = [make_plan(tars, out, CONFIG)], list[str](), Store(out)
    frozen = {name: store.read(f"_clip_batch/{name}") for name in ("plan.json", "plan.parquet", "config.yaml")}
    embed(out, CPU)
    for number in (2, 0):  # between the others, and before them
        add(tmp_path / "in", number)
        with pytest.raises(PlanError, match=rf"has grown \(1 input added: .*/{number}.tar\): plan with --extend adds"):
            make_plan(tars, out, CONFIG)
        plans.append(make_plan(tars, out, EXTEND, progress=said.append))
        assert f"the input has grown, 1 input added: {tmp_path}/in/{number}.tar: 1 partition added" in said[-1]
        assert load_plan(store) == plans[-1] == make_plan(tars, out, CONFIG) == make_plan(tars, out, EXTEND)
        embed(out, CPU)
    first, second, third = plans
    assert third.partitions[: len(second.partitions)] == second.partitions
    assert second.partitions[: len(first.partitions)] == first.partitions and names_of(first) == ["1.tar", "3.tar"]
    assert names_of(third) == ["1.tar", "3.tar", "2.tar", "0.tar"]
    assert [one.id for one in third.partitions] == list(range(len(third.partitions))) == sorted(committed(store))
    assert [one.digest for one in third.generations] == [plan.digest for plan in plans]
    digests = [read_commits(store)[one.id].plan for one in third.partitions]
    assert digests == [third.generation(number).digest for number in range(len(digests))] and len(set(digests)) == 3
    assert verify_output(store, deep=True).problems == {} and open_embeddings(store, third).rows == 12
    assert {name: store.read(f"_clip_batch/{name}") for name in frozen} == frozen


def test_the_command_line_says_generations(tars: str, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--input", tars, "--output", out, "--model", "fake:8", "--partition-samples", "4"]
    assert main(["embed", *words, "--device", "cpu"]) == 0
    assert json.loads(run_json(["status", "--output", out], capsys))["generations"] == [
        {"first": 0, "partitions": 2, "done": 2}
    ]
    assert "generation" not in describe(status(Store(out)))
    add(os.path.dirname(tars), 2, 4)
    assert main(["plan", *words]) == 2
    assert "has grown (2 inputs added: " in capsys.readouterr().err
    assert json.loads(run_json(["plan", *words, "--extend"], capsys))["generations"] == 2
    assert "added as generation 1, from partition 2 on: 0 of 2 done" in describe(status(Store(out)))
    assert json.loads(run_json(["verify", "--output", out], capsys, 1))["problems"] == {
        "0002": "not committed",
        "0003": "not committed",
    }
    assert main(["repair", "--output", out, "--device", "cpu"]) == 0
    assert main(["verify", "--output", out, "--deep"]) == 0 and main(["gc", "--output", out, "--everything"]) == 0
    assert load_plan(Store(out)).generations[1].start == 2 and sorted(committed(Store(out))) == [0, 1, 2, 3]


def run_json(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    capsys.readouterr()
    assert main([*words, "--json"]) == code
    return capsys.readouterr().out


@pytest.mark.parametrize("what", ["removed", "changed", "rewritten"])
def test_what_shrank_or_changed_is_refused_by_name(what: str, tars: str, out: str, tmp_path: Path) -> None:
    make_plan(tars, out, CONFIG)
    embed(out, CPU)
    add(tmp_path / "in", 2)
    if what == "removed":
        (tmp_path / "in" / "3.tar").unlink()
    elif what == "changed":
        add(tmp_path / "in", 3, samples=4)
    else:
        os.utime(tmp_path / "in" / "3.tar", (1, 1))
    verb = "removed" if what == "removed" else "changed"
    for config in (CONFIG, EXTEND):
        with pytest.raises(PlanError, match=rf"1 input added: .*2.tar; 1 input {verb}: .*3.tar") as refused:
            make_plan(tars, out, config)
        remedy = f"give another output; clip-batch repair --output {out} --retry-failed changed embeds"
        assert (remedy in str(refused.value)) == (verb == "changed")
    assert load_plan(Store(out)).generations == ()


def test_a_changed_tar_that_was_planned_in_slices_cannot_be_repaired(tars: str, out: str, tmp_path: Path) -> None:
    config = replace(CONFIG, partition_samples=2)
    make_plan(tars, out, config)
    embed(out, CPU)
    add(tmp_path / "in", 3, samples=5)
    with pytest.raises(PlanError, match=r"1 input changed: .*3.tar") as refused:
        make_plan(tars, out, config)
    assert str(refused.value).endswith("give another output")


def test_other_options_are_refused(tars: str, out: str, tmp_path: Path) -> None:
    make_plan(tars, out, CONFIG)
    embed(out, CPU)
    add(tmp_path / "in", 2)
    for change in ({"model": "fake:16"}, {"partition_samples": 5}, {"caption_field": "alt"}):
        with pytest.raises(PlanError, match="another plan exists"):
            make_plan(tars, out, replace(EXTEND, **change))  # type: ignore[arg-type]


def test_a_plan_of_which_nothing_is_committed_is_replaced_or_extended(tars: str, out: str, tmp_path: Path) -> None:
    first = make_plan(tars, out, EXTEND)
    add(tmp_path / "in", 0)
    extended = make_plan(tars, out, EXTEND)
    assert len(extended.generations) == 2
    add(tmp_path / "in", 2)
    anew = make_plan(tars, out, CONFIG)
    assert names_of(anew) == ["0.tar", "1.tar", "2.tar", "3.tar"] and anew.generations == ()
    assert load_plan(Store(out)) == anew and Store(out).list("_clip_batch/extensions") == []
    for plan in (first, extended):
        with pytest.raises(PlanError, match="was replaced while this worker ran"):
            check_digest(Store(out), plan, len(plan.partitions) - 1)


def test_slots_and_submissions_keep_their_meaning(tars: str, out: str, tmp_path: Path) -> None:
    store, old = Store(out), make_plan(tars, out, CONFIG)
    draft = submission.draft(submission.missing(store), "slurm", 2, 1, "again")
    submission.publish(store, draft)
    add(tmp_path / "in", 2)
    make_plan(tars, out, EXTEND)
    assert [submission.load(store, draft.id).slot(slot) for slot in (0, 1)] == [[0], [1]]
    assert slots.partitions(store, Slot(1, 2)) == [1] and slots.partitions(store, Slot(0, 2)) == [0, 2]
    check_digest(store, old, 1)  # a worker that loaded the plan before goes on
    assert [outcome.partition for outcome in embed(out, CPU, [1])] == [1]
    assert submission.missing(store) == [0, 2] and count_partitions(store) == 3


def test_names_keep_their_width() -> None:
    partitions = tuple(Partition(number, ()) for number in range(10_001))
    encoder = make_encoder()
    generations = (Generation(0, 10_000, "a"), Generation(10_000, 10_001, "b"))
    plan = Plan(partitions, encoder, digest="b", generations=generations)
    assert (plan.name(7), plan.name(9999), plan.name(10_000)) == ("0007", "9999", "10000")


def make_encoder() -> planning.EncoderSpec:
    return planning.EncoderSpec("fake:8", "", "")


@pytest.mark.parametrize("same", [True, False])
def test_of_two_that_extend_at_once_one_does(
    same: bool, tars: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_plan(tars, out, CONFIG)
    embed(out, CPU)
    add(tmp_path / "in", 2)
    write, said = planning.write_extension, list[str]()

    def racing(*arguments: object) -> Plan | None:
        monkeypatch.setattr(planning, "write_extension", write)
        make_plan(tars, out, EXTEND)  # the other one, which is faster
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(planning, "write_extension", racing)
    if same:
        plan = make_plan(tars, out, EXTEND, progress=said.append)
        assert said[-1] == "unchanged" and names_of(plan) == ["1.tar", "3.tar", "2.tar"]
    else:
        add(tmp_path / "more", 9)
        plan = make_plan([tars, f"{tmp_path}/more/*.tar"], out, EXTEND, progress=said.append)
        assert names_of(plan) == ["1.tar", "3.tar", "2.tar", "9.tar"] and len(plan.generations) == 3
    assert load_plan(Store(out)) == plan


def test_many_extend_at_once(tars: str, out: str, tmp_path: Path) -> None:
    make_plan(tars, out, CONFIG)
    embed(out, CPU)
    add(tmp_path / "in", 2, 4, 5)
    threads = [threading.Thread(target=make_plan, args=(tars, out, EXTEND)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plan = load_plan(Store(out))
    assert names_of(plan) == ["1.tar", "3.tar", "2.tar", "4.tar", "5.tar"] and len(plan.generations) == 2


KILLED = """
import os, signal, sys
from clip_batch.config import PlanConfig
from clip_batch.plan.plan import make_plan
from clip_batch.storage.store import Store

create = Store.create

def dying(store, name, *rest):
    if name.startswith("_clip_batch/extensions/") and name.endswith(".json"):
        os.kill(os.getpid(), signal.SIGKILL)
    return create(store, name, *rest)

Store.create = dying
make_plan(sys.argv[1], sys.argv[2], PlanConfig(model="fake:8", partition_samples=4, extend=True))
"""


@pytest.mark.slow
def test_a_planner_that_is_killed_between_the_two_files_leaves_the_plan(tars: str, out: str, tmp_path: Path) -> None:
    before = make_plan(tars, out, CONFIG)
    embed(out, CPU)
    add(tmp_path / "in", 2)
    done = subprocess.run([sys.executable, "-c", KILLED, tars, out], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert len(Store(out).list("_clip_batch/extensions")) == 1, "its slices are there"
    assert load_plan(Store(out)) == before and count_partitions(Store(out)) == 2
    add(tmp_path / "in", 4)  # other slices than those that were left
    after = make_plan(tars, out, EXTEND)
    assert names_of(after) == ["1.tar", "3.tar", "2.tar", "4.tar"] and load_plan(Store(out)) == after
    assert main(["gc", "--output", out, "--everything"]) == 0
    assert load_plan(Store(out)) == after and len(Store(out).list("_clip_batch/extensions")) == 2


def test_an_extension_that_is_damaged_is_named(tars: str, out: str, tmp_path: Path) -> None:
    make_plan(tars, out, CONFIG)
    add(tmp_path / "in", 2)
    make_plan(tars, out, EXTEND)
    [record, slices] = sorted(Path(out, "_clip_batch/extensions").iterdir(), key=lambda path: path.suffix)
    slices.write_bytes(slices.read_bytes()[:-1])
    with pytest.raises(CorruptError, match=r"slices-.*\.parquet is not the file that was planned: restore it"):
        load_plan(Store(out))
    record.write_text("{")
    with pytest.raises(CorruptError, match=r"0001-.*\.json is not JSON: restore it"):
        count_partitions(Store(out))


def test_parquet_files_are_extended_too(out: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    parquets.hugging_face(f"{tmp_path}/in/b.parquet", 6)
    make_plan(f"{tmp_path}/in", out, CONFIG)
    embed(out, CPU)
    columns = {"image": parquets.structs([corpus.jpeg(9)]), "text": ["new"], "licence": ["CC0"], "label": [1]}
    parquets.write(f"{tmp_path}/in/a.parquet", columns)
    plan = make_plan(f"{tmp_path}/in", out, EXTEND)
    assert names_of(plan) == ["b.parquet", "a.parquet"] and "licence" not in plan.fields
    embed(out, CPU)
    assert verify_output(Store(out), deep=True).problems == {}
    assert table(out, "metadata")[-1]["extra"] == '{"licence": "CC0"}', "the pinned schema stays"


def test_a_folder_that_could_not_be_listed_stays_a_failure_and_what_is_in_it_now_is_new(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(tmp_path / "in", 1)
    add(tmp_path / "in" / "locked", 2)
    scan, config = os.scandir, replace(EXTEND, unreadable="record")

    def refusing(folder: str) -> object:
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    make_plan(f"{tmp_path}/in", out, config)
    monkeypatch.setattr(os, "scandir", scan)
    embed(out, replace(CPU, allow_empty=True))
    plan = make_plan(f"{tmp_path}/in", out, config)
    assert names_of(plan) == ["1.tar", "locked", "2.tar"] and len(plan.generations) == 2
    embed(out, CPU)
    assert [row["key"] for row in table(out, "metadata")].count("00000") in (0, 1, 2)
    assert verify_output(Store(out), deep=True).problems == {}


@pytest.mark.slow
def test_on_s3(s3: S3, tmp_path: Path) -> None:
    storage = StorageConfig(storage_options=s3.options)
    home, out = Store(f"s3://{BUCKET}/growing-in", s3.options), f"s3://{BUCKET}/growing-out"
    for number in range(2):
        home.create(f"{number}.tar", Path(corpus.good_tar(f"{tmp_path}/{number}.tar", 3, seed=number)).read_bytes())
    specs, store = f"s3://{BUCKET}/growing-in/*.tar", Store(out, s3.options)
    make_plan(specs, out, CONFIG, storage=storage)
    embed(out, CPU, storage=storage)
    home.create("00.tar", Path(corpus.good_tar(f"{tmp_path}/00.tar", 3, seed=7)).read_bytes())
    threads = [
        threading.Thread(target=make_plan, args=(specs, out, EXTEND), kwargs={"storage": storage}) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plan = load_plan(store)
    assert names_of(plan) == ["0.tar", "1.tar", "00.tar"] and len(plan.generations) == 2
    embed(out, CPU, storage=storage)
    assert verify_output(store, True, s3.options).problems == {} and open_embeddings(store, plan).rows == 9
    home.replace("1.tar", b"other")
    with pytest.raises(PlanError, match=r"1 input changed: .*/1.tar"):
        make_plan(specs, out, EXTEND, storage=storage)


def test_what_another_out_has_planned_is_left_out(
    tars: str, out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_plan(tars, out, CONFIG)
    add(tmp_path / "in", 0, 2)
    other, said = f"{tmp_path}/other", list[str]()
    plan = make_plan(tars, other, CONFIG, excluding=out, progress=said.append)
    assert names_of(plan) == ["0.tar", "2.tar"] and f"2 inputs left out, as {out} has planned them" in said
    assert make_plan(tars, other, CONFIG, excluding=[out]) == plan == make_plan(tars, other, EXTEND, excluding=[out])
    words = ["plan", "--input", tars, "--output", f"{tmp_path}/third", "--model", "fake:8"]
    assert main([*words, "--except", out, "--except", other]) == 1
    assert f"nothing is left to plan: {out}, {other} have planned all of the input" in capsys.readouterr().err
    add(tmp_path / "in", 3, samples=5)
    said.clear()
    plan = make_plan(tars, f"{tmp_path}/fourth", CONFIG, excluding=[out, other], progress=said.append)
    assert names_of(plan) == ["3.tar"] and f"1 input other than {out} planned it: {tmp_path}/in/3.tar" in said
    with pytest.raises(PlanError, match="no plan at"):
        make_plan(tars, f"{tmp_path}/fifth", CONFIG, excluding=f"{tmp_path}/nowhere")
