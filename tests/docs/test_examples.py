"""docs/examples and configs: each example runs, as a dry run if it needs a cluster."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from clip_batch.cli import COMMANDS, main
from clip_batch.config import parse_bytes
from clip_batch.config.options import read_file
from clip_batch.demo import data
from clip_batch.index.ann import footprint
from clip_batch.index.merge import job
from clip_batch.storage.store import Store
from tests import ROOT
from tests.servers.s3_server import BUCKET, S3
from tests.servers.s3_server import s3 as s3
from tests.servers.s3_server import s3_server as s3_server

EXAMPLES = sorted(ROOT.glob("docs/examples/*.sh"))


def tars(folder: Path) -> list[str]:
    """Write two of the 24 tars of the demo set to a folder, one of which has the watermelon."""
    names = data.load()["name_zh"].to_pylist()
    watermelon = names.index("西瓜") * 24 // len(names)
    written = data.write_tars(str(folder), 24)
    kept = written[watermelon : watermelon + 2]
    for path in set(written) - set(kept):
        os.unlink(path)
    return kept


def run(name: str, **places: str) -> str:
    """Run an example with the demo's model and return its standard output."""
    folders = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = {
        **os.environ,
        "PATH": folders,
        "MODEL": "demo",
        "QUERY": "西瓜",
        **{f"CLIP_BATCH_{section}_DEVICE": "cpu" for section in ("EMBED", "SEARCH", "SERVE")},
        **places,
    }
    command = ["bash", str(ROOT / "docs/examples" / name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.name)
def test_it_is_sound_bash_and_names_what_exists(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = re.sub(r"(?m)^ *#.*$", "", script.read_text()).replace("\\\n", " ")
    calls = re.findall(r"clip-batch +((?:submit +)?[a-z]+)([^\n]*)", text)
    assert calls
    for command, rest in calls:
        assert command in COMMANDS
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        known = capsys.readouterr().out
        for flag in re.findall(r"(?<![\w-])--[a-z-]+", re.sub(r" # .*", "", rest)):
            assert flag in known, f"{command} has no {flag}"
    assert script.name in (script.parent / "README.md").read_text()


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_every_key_of_the_configurations_exists(path: Path) -> None:
    assert read_file(str(path))


def test_the_merge_of_laions_size_fits_its_memory() -> None:
    merge = read_file(str(ROOT / "configs" / "laion.yaml"))["merge"]
    row = 2 * 768 + footprint.code_bytes(merge["index_key"], 768) + job.ROW_BYTES
    template = footprint.template_bytes(merge["index_key"], 768)
    room = parse_bytes(merge["max_memory"]) - job.BASE_BYTES - template
    assert row * merge["shard_rows"] <= room
    assert 16 * 768 * merge["train_rows"] <= room
    lists = int(re.findall(r"IVF(\d+)", merge["index_key"])[0])
    assert merge["train_rows"] >= 39 * lists


@pytest.mark.slow
def test_one_machine(tmp_path: Path) -> None:
    tars(tmp_path / "tars")
    said = run("one_machine.sh", TARS=f"{tmp_path}/tars", OUT=f"{tmp_path}/out", INDEX=f"{tmp_path}/index")
    assert "watermelon" in said


@pytest.mark.slow
def test_submitting_dry_says_what_would_run_and_runs_nothing(tmp_path: Path) -> None:
    tars(tmp_path / "tars")
    places = {"TARS": f"{tmp_path}/tars", "OUT": f"{tmp_path}/out", "INDEX": f"{tmp_path}/index", "DRY": "--dry-run"}
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"  # as on a login node
    scontrol.write_text("#!/bin/sh\necho 'MaxArraySize            = 1001'\n")
    scontrol.chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), os.path.dirname(sys.executable), os.environ["PATH"]])
    laion = str(ROOT / "configs" / "laion.yaml")
    for name, wanted, more in (
        ("slurm.sh", ["#SBATCH --gpus-per-task=1", "module load cuda", "#SBATCH --dependency=afterok:JOBID"], {}),
        ("slurm.sh", ["#SBATCH --mem=96G", "#SBATCH --time=1440", "export HF_HUB_OFFLINE=1"], {"CONFIG": laion}),
        ("spark.sh", ["spark-submit", "--master yarn", "spark.executor.resource.gpu.amount=1"], {}),
    ):
        said = run(name, **places, PATH=path, **more)
        assert [words for words in wanted if words not in said] == []
        assert "0 of 1 partitions done" in said
    assert not Path(tmp_path, "out", "_clip_batch", "submissions").exists()


@pytest.mark.slow
def test_s3(s3: S3, tmp_path: Path) -> None:
    home = f"s3://{BUCKET}/examples"
    store = Store(home, s3.options)
    for path in map(Path, tars(tmp_path / "tars")):
        store.replace(f"tars/{path.name}", path.read_bytes())
    places = {"TARS": f"{home}/tars", "OUT": f"{home}/out", "INDEX": f"{home}/index", "ENDPOINT": s3.endpoint}
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    assert "watermelon" in run("s3.sh", **places, **keys, XDG_CACHE_HOME=str(tmp_path / "cache"))
