"""The plan: its files, and the changes that are refused."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from clip_batch.config import PlanConfig, StorageConfig
from clip_batch.errors import ConfigError, CorruptError, InputError, PlanError
from clip_batch.plan.plan import load_plan, make_plan
from clip_batch.plan.replace import replaced
from clip_batch.plan.stored import plan_digest
from clip_batch.storage.store import Store
from clip_batch.types import IMAGE_EXTENSIONS, EncoderSpec, Partition, Plan, Shard, Slice


def slices_of(plan: Plan) -> list[Slice]:
    return [piece for partition in plan.partitions for piece in partition.slices]


def write_tar(path: Path, samples: int, image: int = 3000) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            members = (("jpg", b"\xff" * image), ("json", json.dumps({"width": number}).encode()))
            for extension, data in members:
                member = tarfile.TarInfo(f"{number:05d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for number in range(4):
        write_tar(tmp_path / "in" / f"{number}.tar", 5)
    return tmp_path / "in"


@pytest.fixture
def config(tars: Path) -> PlanConfig:
    return PlanConfig(input=[f"{tars}/*.tar"], model="fake:8", partition_count=2)


def commit_one(output: str) -> None:
    """Let a partition be committed, so that the plan stays."""
    assert Store(output).create("_clip_batch/commits/0000.json", b"{}")


@pytest.mark.parametrize("remote", [False, True])
def test_a_plan_is_read_back_as_it_was_made(config: PlanConfig, tmp_path: Path, remote: bool) -> None:
    output = f"memory:/{tmp_path}/out" if remote else f"{tmp_path}/out"
    plan = make_plan(config.input, output, config)
    store = Store(output)
    assert load_plan(store) == plan
    assert [len(partition.slices) for partition in plan.partitions] == [2, 2]
    assert plan.fields == {"width": "int64"}
    head = store.read_json("_clip_batch/plan.json")
    sizes = [piece.shard.size or 0 for piece in slices_of(plan)]
    assert (head["shards"], head["partitions"], head["bytes"]) == (4, 2, sum(sizes))
    assert head["encoder"]["fingerprint"] == plan.encoder.fingerprint
    assert head["target"] == {"partitions": 2} and head["digest"] == plan.digest
    assert yaml.safe_load(store.read("_clip_batch/config.yaml"))["plan"]["input"] == config.input


def test_the_caption_field_is_part_of_the_plan(config: PlanConfig, tmp_path: Path) -> None:
    said: list[str] = []
    without = make_plan(config.input, f"{tmp_path}/without", config)
    with_field = replace(config, caption_field="width")
    plan = make_plan(config.input, f"{tmp_path}/with", with_field, progress=said.append)
    assert (without.caption_field, plan.caption_field) == ("", "width") and without.digest != plan.digest
    assert load_plan(Store(f"{tmp_path}/with")) == plan == make_plan(config.input, f"{tmp_path}/with", with_field)
    assert not any("caption field" in line for line in said)
    commit_one(f"{tmp_path}/with")
    with pytest.raises(PlanError, match="caption_field width -> text"):
        make_plan(config.input, f"{tmp_path}/with", replace(config, caption_field="text"))
    make_plan(config.input, f"{tmp_path}/typo", replace(config, caption_field="text"), progress=said.append)
    assert any("has the caption field 'text'; their fields with text are: none" in line for line in said)


def test_a_plan_without_a_caption_field_keeps_its_digest(tmp_path: Path) -> None:
    shard = Shard("a.tar", 10240, "1")
    plan = Plan((Partition(0, (Slice(shard),)),), EncoderSpec("fake:8", "", "0" * 64), fields={"n": "int64"})
    plan = replace(plan, image_extensions=("jpg", "jpeg", "png", "webp"))  # the default of then
    assert plan_digest(plan) == "511523fcde899b3b3402520537792dad7f2cf6af7b22cb38ee25f1db9388c6eb"


def test_storage_options_are_written_nowhere(config: PlanConfig, tmp_path: Path) -> None:
    make_plan(config.input, f"{tmp_path}/out", config, storage=StorageConfig({"secret": "hunter2"}))
    written = list((tmp_path / "out" / "_clip_batch").iterdir())
    assert len(written) == 3 and not any(b"hunter2" in path.read_bytes() for path in written)


def test_planning_again_changes_nothing(config: PlanConfig, tmp_path: Path) -> None:
    said: list[str] = []
    first = make_plan(config.input, f"{tmp_path}/out", config)
    files = {path: path.read_bytes() for path in (tmp_path / "out" / "_clip_batch").iterdir()}
    assert make_plan(config.input, f"{tmp_path}/out", config, progress=said.append) == first
    assert said[-1] == "unchanged"
    assert {path: path.read_bytes() for path in (tmp_path / "out" / "_clip_batch").iterdir()} == files
    assert make_plan(config.input, f"{tmp_path}/other", config).digest == first.digest


def test_the_digest_covers_what_changes_the_result(config: PlanConfig, tmp_path: Path) -> None:
    other = [
        config,
        replace(config, model="fake:16"),
        replace(config, precision="bf16"),
        replace(config, partition_count=3),
        replace(config, input=[f"{config.input[0][:-5]}{{1,0,2,3}}.tar"]),
        replace(config, caption_extensions=["caption"]),
        replace(config, image_extensions=["png", "jpg"]),
    ]
    assert len({make_plan(each.input, f"{tmp_path}/{n}", each).digest for n, each in enumerate(other)}) == len(other)


def test_a_changed_input_is_refused_by_name(config: PlanConfig, tars: Path, tmp_path: Path) -> None:
    make_plan(config.input, f"{tmp_path}/out", config)
    commit_one(f"{tmp_path}/out")
    (tars / "0.tar").unlink()
    write_tar(tars / "1.tar", 9)
    os.utime(tars / "2.tar", ns=(5, 5))
    write_tar(tars / "7.tar", 1)
    with pytest.raises(PlanError) as caught:
        make_plan(config.input, f"{tmp_path}/out", config)
    text = str(caught.value)
    assert f"1 input added: {tars}/7.tar" in text and f"1 input removed: {tars}/0.tar" in text
    assert "2 inputs changed" in text and f"{tars}/2.tar (rewritten)" in text
    assert f"{tars}/1.tar (" in text and f"-> {(tars / '1.tar').stat().st_size} bytes)" in text
    assert "give another output" in text and "\n" not in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "fake:16"}, "model 'fake:8' -> 'fake:16'; weights"),
        ({"precision": "fp16"}, "precision 'fp32' -> 'fp16'"),
        ({"partition_count": 3}, "partition target 2 partitions -> 3 partitions"),
        ({"partition_count": None}, "partition target 2 partitions -> auto"),
        ({"partition_count": None, "partition_bytes": "4GB"}, "-> 4,000,000,000 bytes a partition"),
        ({"caption_extensions": ["cap"]}, r"caption_extensions \('txt',\) -> \('cap',\)"),
    ],
)
def test_a_changed_option_is_refused_by_name(
    config: PlanConfig, tmp_path: Path, change: dict[str, object], says: str
) -> None:
    make_plan(config.input, f"{tmp_path}/out", config)
    commit_one(f"{tmp_path}/out")
    with pytest.raises(PlanError, match=says):
        make_plan(config.input, f"{tmp_path}/out", replace(config, **change))  # type: ignore[arg-type]


def test_exif_orientation_is_applied_to_folders_of_files_unless_told_otherwise(tars: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.jpg").write_bytes(b"x")
    for format, source in (("tar", tars), ("files", pictures)):
        for choice, expected in (("auto", format == "files"), ("apply", True), ("ignore", False)):
            config = PlanConfig(model="fake:8", format=format, exif_rotation=choice)  # type: ignore[arg-type]
            output = f"{tmp_path}/{format}-{choice}"
            plan = make_plan(str(source), output, config)
            assert plan.encoder.exif_rotation == expected == load_plan(Store(output)).encoder.exif_rotation
    commit_one(f"{tmp_path}/files-auto")
    with pytest.raises(PlanError, match="exif_rotation 'True' -> 'False'"):
        make_plan(
            str(pictures), f"{tmp_path}/files-auto", PlanConfig(model="fake:8", format="files", exif_rotation="ignore")
        )


def test_a_plan_of_before_ignores_exif_orientation_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"x")
    old = PlanConfig(model="fake:8", format="files", exif_rotation="ignore")
    plan = make_plan(f"{tmp_path}/in", f"{tmp_path}/out", old)
    store = Store(f"{tmp_path}/out")
    head = store.read_json("_clip_batch/plan.json")
    assert "exif_rotation" not in head["encoder"]
    assert make_plan(f"{tmp_path}/in", f"{tmp_path}/out", replace(old, exif_rotation="auto")) == plan


def test_common_formats_of_pictures_are_planned_by_default(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, kind in enumerate(IMAGE_EXTENSIONS):
        (tmp_path / "in" / f"{number}.{kind.upper()}").write_bytes(b"x")
    plan = make_plan(f"{tmp_path}/in", f"{tmp_path}/out", PlanConfig(model="fake:8", format="files"))
    assert plan.image_extensions[:4] == ("jpg", "jpeg", "png", "webp")
    assert sum(piece.shard.samples or 0 for piece in slices_of(plan)) == len(IMAGE_EXTENSIONS) == 13


def test_another_order_is_refused(config: PlanConfig, tars: Path, tmp_path: Path) -> None:
    make_plan(config.input, f"{tmp_path}/out", config)
    commit_one(f"{tmp_path}/out")
    with pytest.raises(PlanError, match="another order"):
        make_plan([f"{tars}/{{3..0}}.tar"], f"{tmp_path}/out", config)


def test_no_plan_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=f"clip-batch plan --input ... --output {tmp_path}"):
        load_plan(Store(str(tmp_path)))


def test_damaged_files_are_refused(config: PlanConfig, tmp_path: Path) -> None:
    make_plan(config.input, f"{tmp_path}/out", config)
    home = tmp_path / "out" / "_clip_batch"
    slices = (home / "plan.parquet").read_bytes()
    (home / "plan.parquet").write_bytes(slices[:-1] + b"?")
    with pytest.raises(CorruptError, match=r"plan\.parquet"):
        load_plan(Store(f"{tmp_path}/out"))
    (home / "plan.parquet").unlink()
    with pytest.raises(CorruptError, match=r"plan\.parquet"):
        load_plan(Store(f"{tmp_path}/out"))
    (home / "plan.json").write_text("{")
    with pytest.raises(CorruptError, match=r"plan\.json"):
        load_plan(Store(f"{tmp_path}/out"))


def test_a_planner_that_died_before_plan_json_is_taken_up(config: PlanConfig, tmp_path: Path) -> None:
    plan = make_plan(config.input, f"{tmp_path}/out", config)
    home = tmp_path / "out" / "_clip_batch"
    (home / "plan.json").unlink()
    assert make_plan(config.input, f"{tmp_path}/out", config) == plan
    (home / "plan.json").unlink()
    with pytest.raises(PlanError, match="delete that file"):
        make_plan(config.input, f"{tmp_path}/out", replace(config, partition_count=3))


def test_a_large_tar_is_split_at_samples_and_its_counts_add_up(tars: Path, tmp_path: Path) -> None:
    write_tar(tars / "big.tar", 40)
    (tars / "big_stats.json").write_text('{"successes": 40}')
    size = (tars / "big.tar").stat().st_size
    config = PlanConfig(input=[f"{tars}/big.tar"], model="fake:8", partition_bytes=str(size // 4))
    plan = make_plan(config.input, f"{tmp_path}/out", config)
    slices = slices_of(plan)
    assert len(plan.partitions) >= 4
    assert [piece.start for piece in slices] == [0, *(piece.stop for piece in slices[:-1])]
    with tarfile.open(tars / "big.tar") as tar:
        first_of_sample = {member.offset for member in tar if member.name.endswith(".jpg")}
    assert {piece.start for piece in slices} <= first_of_sample
    counts = [piece.samples or 0 for piece in slices]
    assert sum(counts) == 40 and max(counts) - min(counts) <= 3  # the last has the padding
    assert load_plan(Store(f"{tmp_path}/out")) == plan


def test_partitions_by_samples_without_side_cars_scan_the_headers(config: PlanConfig, tmp_path: Path) -> None:
    plan = make_plan(config.input, f"{tmp_path}/out", replace(config, partition_count=None, partition_samples=10))
    assert [len(partition.slices) for partition in plan.partitions] == [2, 2]
    assert [piece.samples for piece in slices_of(plan)] == [5] * 4


def test_files_are_cut_by_samples(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(25):
        (tmp_path / "in" / f"{number:02d}.jpg").write_bytes(b"\xff")
    config = PlanConfig(input=[f"{tmp_path}/in"], format="files", model="fake:8", partition_samples=10)
    plan = make_plan(config.input, f"{tmp_path}/out", config)
    assert [(piece.start, piece.stop, piece.samples) for piece in slices_of(plan)] == [
        (0, 8, 8),
        (8, 17, 9),
        (17, None, 8),
    ]
    assert load_plan(Store(f"{tmp_path}/out")) == plan
    assert len(make_plan(config.input, f"{tmp_path}/whole", replace(config, partition_samples=None)).partitions) == 1
    (tmp_path / "in" / "25.jpg").write_bytes(b"\xff")
    commit_one(f"{tmp_path}/out")
    with pytest.raises(PlanError, match=r"has grown \(1 picture added: 25.jpg\)"):
        make_plan(config.input, f"{tmp_path}/out", config)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"partition_count": 0}, "a whole number, 1 or more"),
        ({"partition_samples": 0}, "a whole number, 1 or more"),
        ({"partition_count": 2, "partition_samples": 2}, "exclude each other"),
        ({"partition_bytes": "4 apples"}, "a size of 1,000 bytes or more, like 4GB"),
        ({"caption_extensions": ["txt", ".JSON"]}, "--caption-field"),
        ({"image_extensions": ["jpg", "txt"]}, "--image-extensions has txt"),
        ({"image_extensions": ["json"]}, "--image-extensions has json"),
    ],
)
def test_wrong_options(change: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        make_plan(["x.tar"], str(tmp_path), PlanConfig(model="fake:8", **change))  # type: ignore[arg-type]


def test_nothing_is_written_when_an_input_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing"):
        make_plan([f"{tmp_path}/none.tar"], f"{tmp_path}/out", PlanConfig(model="fake:8"))
    assert not (tmp_path / "out").exists()


def test_a_frozen_plan_is_a_value(config: PlanConfig, tmp_path: Path) -> None:
    plan: Plan = make_plan(config.input, f"{tmp_path}/out", config)
    with pytest.raises(AttributeError):
        plan.partitions[0].id = 3  # type: ignore[misc]


def test_the_repr_of_a_plan_is_short(config: PlanConfig, tmp_path: Path) -> None:
    plan = make_plan(config.input, f"{tmp_path}/out", config)
    assert repr(plan) == f"<Plan {plan.digest[:12]}: 2 partitions of tar, fake:8>"


def test_a_plan_of_which_nothing_is_committed_is_replaced(config: PlanConfig, tmp_path: Path) -> None:
    out = f"{tmp_path}/out"
    make_plan(config.input, out, config)
    store, said = Store(out), list[str]()
    for name in ("submissions/1.json", "failures/attempts/0000-1.json", "look.json"):
        store.create(f"_clip_batch/{name}", b"{}")
    plan = make_plan(config.input, out, replace(config, partition_count=4), progress=said.append)
    assert load_plan(store) == plan and len(plan.partitions) == 4
    assert "partition target 2 partitions -> 4 partitions" in said[-1] and "nothing was committed" in said[-1]
    assert store.list("_clip_batch/submissions") == store.list("_clip_batch/failures/attempts") == []
    assert not store.exists("_clip_batch/look.json") and not store.exists("_clip_batch/replacing.json")
    commit_one(out)
    with pytest.raises(PlanError, match=r"another plan exists .*partition target.*1 partition committed: give"):
        make_plan(config.input, out, config)


def test_a_plan_that_workers_are_at_work_on_stays(config: PlanConfig, tmp_path: Path) -> None:
    out = f"{tmp_path}/out"
    plan = make_plan(config.input, out, config)
    record = {"worker": "node7:12", "ended": False, "beat": time.time()}
    other = replace(config, partition_count=4)
    Store(out).create("_clip_batch/workers/a.json", json.dumps(record).encode())
    with pytest.raises(PlanError, match="node7:12 is at work on it: stop the workers"):
        make_plan(config.input, out, other)
    assert load_plan(Store(out)) == plan
    for change in ({"ended": True}, {"beat": time.time() - 61}):
        Store(out).replace("_clip_batch/workers/a.json", json.dumps({**record, **change}).encode())
        make_plan(config.input, out, other)
        make_plan(config.input, out, config)


def test_of_planners_at_once_one_replaces_the_plan(config: PlanConfig, tmp_path: Path) -> None:
    out = f"{tmp_path}/out"
    digest = make_plan(config.input, out, config).digest
    with replaced(Store(out), digest):
        with pytest.raises(PlanError, match=r"no plan"):
            load_plan(Store(out))
        with (
            pytest.raises(PlanError, match=r"another planner is replacing .*delete .*replacing\.json"),
            replaced(Store(out), digest),
        ):
            pass
        plan = make_plan(config.input, out, replace(config, partition_count=4))
    with pytest.raises(PlanError, match="another planner has replaced it"), replaced(Store(out), digest):
        pass
    assert load_plan(Store(out)) == plan


def test_a_commit_that_comes_while_a_plan_is_removed_brings_it_back(
    config: PlanConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{tmp_path}/out"
    plan = make_plan(config.input, out, config)
    remove = Store.remove

    def racing(store: Store, name: str) -> None:
        remove(store, name)
        if name == "_clip_batch/plan.json":
            commit_one(out)

    monkeypatch.setattr(Store, "remove", racing)
    with pytest.raises(PlanError, match="1 partition committed"):
        make_plan(config.input, out, replace(config, partition_count=4))
    assert load_plan(Store(out)) == plan and make_plan(config.input, out, config) == plan


def test_auto_is_recorded_as_what_it_is(config: PlanConfig, tmp_path: Path) -> None:
    out, said = f"{tmp_path}/out", list[str]()
    plan = make_plan(config.input, out, config, progress=said.append)
    assert plan.encoder.preprocess == "fast"
    assert "the model embeds a sample; preprocessing: fast" in said
    assert yaml.safe_load(Store(out).read("_clip_batch/config.yaml"))["plan"]["preprocess"] == "fast"
    commit_one(out)
    for mode in ("auto", "fast"):
        assert make_plan(config.input, out, replace(config, preprocess=mode)) == plan  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="preprocess 'fast' -> 'exact'"):
        make_plan(config.input, out, replace(config, preprocess="exact"))
    make_plan(config.input, f"{tmp_path}/untried", replace(config, try_model=False), progress=said.append)
    assert "the model is not tried, as --no-try-model says; preprocessing: fast" in said
