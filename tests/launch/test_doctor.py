"""The preflight report: it is right about a good store, and names what is wrong with a bad one."""

from __future__ import annotations

import importlib.metadata
import io
import os
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from clip_batch.config import PlanConfig
from clip_batch.launch.doctor import TESTED, Check, doctor
from clip_batch.plan.plan import make_plan
from clip_batch.storage.store import Store


def report(output: str | None) -> dict[str, Check]:
    checks = doctor(output)
    assert all("\n" not in check.message and check.message for check in checks)
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


@pytest.fixture
def planned(tmp_path: Path) -> str:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("0.jpg"), io.BytesIO())
    make_plan([f"{tmp_path}/0.tar"], f"{tmp_path}/out", PlanConfig(model="fake:8"))
    return f"{tmp_path}/out"


def test_a_good_store_and_plan(planned: str) -> None:
    before = sorted(os.listdir(f"{planned}/_clip_batch"))
    found = report(planned)
    fine = {"python", "memory", "put-if-absent", "read-after-write", "removal", "clock", "plan", "weights"}
    assert all(found[name].ok for name in fine), found
    assert sorted(os.listdir(f"{planned}/_clip_batch")) == before


def test_without_output_only_the_machine_is_looked_at(tmp_path: Path) -> None:
    assert {"python", "cpu", "java", "sbatch"} <= (found := report(None)).keys()
    assert not {"put-if-absent", "plan"} & found.keys()
    assert all(found[name].ok is None for name in ("cpu", "java", "sbatch"))


def test_no_plan_is_no_fault_and_nothing_is_left(tmp_path: Path) -> None:
    found = report(f"{tmp_path}/a/b")
    assert found["plan"].ok is None and "clip-batch plan --input" in found["plan"].message
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_lets_two_create_one_name_fails(planned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def overwrite(self: Store, name: str, data: bytes, check_first: bool = True) -> bool:
        self.replace(name, data)
        return True

    monkeypatch.setattr(Store, "create", overwrite)
    found = report(planned)["put-if-absent"]
    assert found.ok is False and "8 of 8" in found.message


def test_a_store_that_serves_stale_bytes_fails(planned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Store.read
    monkeypatch.setattr(Store, "read", lambda self, name: b"stale" if ".doctor" in name else read(self, name))
    assert report(planned)["read-after-write"].ok is False


def test_a_store_that_keeps_what_is_removed_fails(planned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "remove", lambda self, name: None)
    assert report(planned)["removal"].ok is False


def test_a_folder_that_cannot_be_written_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = report(f"{tmp_path}/file/out")
    assert any(check.ok is False and "is no folder: name another one" in check.message for check in found.values())


def test_a_clock_that_is_off_is_a_warning(planned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "modified", lambda self, name: time.time() - 3600)
    found = report(planned)["clock"]
    assert found.ok is None and "off the store's" in found.message


def test_other_weights_than_planned_fail(planned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_batch.encoders.families.fake.weights_digest", lambda *_: "f" * 64)
    found = report(planned)["weights"]
    assert found.ok is False and "fake:8 has ffffffffffff here" in found.message


def test_a_damaged_plan_fails(planned: str) -> None:
    Path(planned, "_clip_batch", "plan.parquet").write_bytes(b"")
    assert report(planned)["plan"].ok is False


@pytest.mark.parametrize(("found", "ok"), [("1.26.4", True), ("2.0.1", None), ("1.9", None), (None, False)])
def test_packages(found: str | None, ok: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setitem(TESTED, "numpy", ("1.26", "2", ""))
    assert report(None)["numpy"].ok is ok


def test_remote_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: dict[str, Any] = report(f"memory:/{tmp_path}/out")
    assert all(found[name].ok for name in ("read-after-write", "removal", "clock"))
    assert found["put-if-absent"].ok is None and "the last pointer wins" in found["put-if-absent"].message
    assert "disk" not in found
