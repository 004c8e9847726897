"""Preflight checks: whether this machine, the storage and the plan are fit for a long run.

The only thing it writes is a folder `.doctor-<random>` under OUT/_clip_batch, which it removes again.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import itertools
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from clip_batch.config import StorageConfig
from clip_batch.encoders.device import cores, gpus, pick_device
from clip_batch.errors import ClipBatchError, PlanError, one_line
from clip_batch.plan import paths
from clip_batch.storage.store import Store

TESTED = {
    "numpy": ("1.26", "3", ""),
    "pyarrow": ("25", "27", ""),
    "fsspec": ("2026", "2027", ""),
    "torch": ("2.15", "3", "embed"),
    "open_clip_torch": ("3.3", "4", "embed"),
    "pillow": ("13", "14", ""),
    "faiss-cpu": ("1.15", "2", "merge"),
    "autofaiss": ("2.18", "3", "autofaiss"),
}
"""Package -> (from, below, extra): the range of versions that the tests run with; others may work too."""

RACERS = 8
"""Threads that try to create the same file at once."""

MOST_SKEW = 60.0
"""Seconds by which this clock may differ from the store's."""

LEAST_DISK = 10 * 2**30
"""Free bytes of a local OUT and of the temporary folder below which `doctor` warns."""


@dataclass(frozen=True)
class Check:
    """One line of the report; `ok` is None for information and warnings."""

    name: str
    ok: bool | None
    message: str


def doctor(output: str | None, storage: StorageConfig = StorageConfig(), embeds: bool = False) -> list[Check]:
    """Check this machine and, where `output` is given, its storage, plan and weights.

    `embeds` says that this machine will embed; the planned model is then loaded and tried.
    """
    checks: list[Check] = []
    for check in (_python, _packages, _machine, _gpu, _scratch, _tools, _slurm):
        checks += _run(check.__name__.strip("_"), check)
    if output is not None:
        checks += _run("storage", lambda: _storage(Store(output, storage.storage_options)))
        checks += _run("plan", lambda: _plan(Store(output, storage.storage_options), embeds))
    return checks


def _run(name: str, check: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """The results of a check. An error in it becomes a result too, so that the other checks still run."""
    try:
        yield from check()
    except Exception as error:  # stores and drivers raise anything
        message = one_line(f"{type(error).__name__}: {error}", 300)
        yield Check(name, False, f"{message}: mend what it names")


def _python() -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    supported = sys.version_info >= (3, 11)
    too_old = f"{version} is too old: make the environment with Python 3.11 or newer"
    yield Check("python", supported, version if supported else too_old)


def _packages() -> Iterator[Check]:
    for name, (least, below, extra) in TESTED.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            remedy = f"pip install 'clip-batch[{extra}]', where it is needed" if extra else ""
            yield Check(name, None if extra else False, f"not installed: {remedy or f'pip install {name}'}")
            continue
        tested = _numbers(least) <= _numbers(version) < _numbers(below)
        remedy = f"{version} is not what is tested; if something fails: pip install '{name}>={least},<{below}'"
        yield Check(name, True if tested else None, version if tested else remedy)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])


def _machine() -> Iterator[Check]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Check("cpu", None, f"{cores()} cores may be used")
    if memory < 4 * 2**30:
        yield Check("memory", False, f"{memory / 2**30:.1f} GiB is little: give the job 4 GiB or more")
    else:
        yield Check("memory", True, f"{memory / 2**30:.1f} GiB")


def _gpu() -> Iterator[Check]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(gpus())]
        yield Check("gpu", True, f"{len(names)} visible: {', '.join(sorted(set(names)))}")
    elif os.path.exists("/dev/nvidiactl"):
        yield Check("gpu", False, f"the machine has one but torch {torch.__version__} sees none: install a CUDA build")
    elif given := os.environ.get("SLURM_STEP_GPUS") or os.environ.get("SLURM_JOB_GPUS"):
        message = f"SLURM gave this job GPU {given}, but torch {torch.__version__} sees none: look at nvidia-smi here"
        yield Check("gpu", False, message)
    else:
        yield Check("gpu", None, "none visible: --device auto takes the CPU")


def _scratch() -> Iterator[Check]:
    """The temporary folder, in which workers spool what they write to a remote OUT."""
    folder = tempfile.gettempdir()
    remedy = "a worker spools a partition's files there; set TMPDIR to a larger disk"
    yield _free_space("scratch", shutil.disk_usage(folder).free, f" in {folder}", remedy)


def _free_space(name: str, free: int, where: str, remedy: str) -> Check:
    """Too little space is only a warning, because how much is needed depends on the run."""
    message = f"{free / 2**30:.0f} GiB free{where}"
    return Check(name, True, message) if free >= LEAST_DISK else Check(name, None, f"{message}: {remedy}")


def _slurm() -> Iterator[Check]:
    """The limits and partitions of SLURM, where it is installed."""
    if shutil.which("scontrol") is None:
        return
    config = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True)
    if config.returncode:
        reason = one_line(config.stderr, 200)
        yield Check("slurm", None, f"the controller does not answer ({reason}): only `submit slurm` needs it")
        return
    settings = dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", config.stdout, re.MULTILINE))
    limits = ", ".join(f"{name} {settings[name]}" for name in ("MaxArraySize", "MaxJobCount") if name in settings)
    yield Check("slurm", True, f"{settings.get('ClusterName', '?')} answers: {limits}")
    nodes = subprocess.run(["sinfo", "--noheader", "--format=%R|%a, %D nodes, %G"], capture_output=True, text=True)
    for partition, lines in itertools.groupby(sorted(nodes.stdout.splitlines()), lambda line: line.partition("|")[0]):
        yield Check(f"slurm {partition}", None, "; ".join(line.partition("|")[2] for line in lines))


def _tools() -> Iterator[Check]:
    for tool, needed in (("java", "submit spark"), ("sbatch", "submit slurm")):
        path = shutil.which(tool)
        yield Check(tool, None, path or f"not on PATH: only `{needed}` needs it")


def _storage(store: Store) -> Iterator[Check]:
    """What commits rely on: one of several creators wins, what was written is read back, what is removed is gone."""
    if (free := store.free_space()) is not None:
        yield _free_space("disk", free, "", "little for a long run; make room, or name another --output")
    missing = _missing_folders(store)
    folder = f"{paths.HOME}/.doctor-{secrets.token_hex(8)}"
    race = f"{folder}/race"
    try:
        started = time.time()
        with ThreadPoolExecutor(RACERS) as pool:
            won = list(pool.map(lambda racer: store.create(race, b"%d" % racer, check_first=False), range(RACERS)))
        finished = time.time()
        yield _race(store, sum(won))
        yield _read_back(store, race, won)
        if (changed := store.modified(race)) is not None:
            yield _clock(changed, started, finished)
        store.remove(race)
        removed = not store.exists(race)
        remedy = f"{store.display(race)} is still there: allow deleting in {store.url}"
        yield Check("removal", removed, "works" if removed else remedy)
    finally:
        _clean(store, race, missing)


def _race(store: Store, winners: int) -> Check:
    """Whether one creator won; those of a store without put-if-absent all win, as they do not look first."""
    if winners == 1:
        return Check("put-if-absent", True, f"1 of {RACERS} racing creators won: a name that is taken is refused")
    if store.local or store.url.startswith("hdfs://"):
        remedy = "two workers could commit one partition; use a file system whose create and link are exclusive"
        return Check("put-if-absent", False, f"{winners} of {RACERS} racing creators won at {store.url}: {remedy}")
    remedy = "the last pointer wins here: each partition has one commit still, but run one merge at a time"
    return Check("put-if-absent", None, f"{winners} of {RACERS} racing creators won at {store.url}: {remedy}")


def _read_back(store: Store, name: str, won: list[bool]) -> Check:
    written = [b"%d" % racer for racer, winner in enumerate(won) if winner]
    consistent = store.read(name) in written and store.list(name.rpartition("/")[0]) == ["race"]
    remedy = "another file came back than was written; switch caches in front of the store off"
    return Check("read-after-write", consistent, "works" if consistent else f"{store.display(name)}: {remedy}")


def _clock(changed: float, started: float, finished: float) -> Check:
    skew = max(started - changed, changed - finished, 0.0)
    if skew <= MOST_SKEW:
        return Check("clock", True, f"within {max(skew, 1):.0f} s of the store's")
    return Check("clock", None, f"{skew:.0f} s off the store's: start NTP here, else times in `status` mislead")


def _missing_folders(store: Store) -> list[str]:
    """The local folders of OUT that do not exist yet, innermost first."""
    if not store.local:
        return []
    missing, path = [], store.path(paths.HOME)
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    return missing


def _clean(store: Store, name: str, created: list[str]) -> None:
    """Remove the file and its folder, and those of the `created` local folders that are empty."""
    with contextlib.suppress(Exception):
        store.remove(name)
        if not store.local:
            store.remove_folder(name.rpartition("/")[0])
    if store.local:
        for path in [os.path.dirname(store.path(name)), *created]:
            with contextlib.suppress(OSError):
                os.rmdir(path)


def _plan(store: Store, embeds: bool) -> Iterator[Check]:
    from clip_batch import encoders
    from clip_batch.encoders import hub
    from clip_batch.plan.plan import load_plan

    try:
        plan = load_plan(store)
    except PlanError as error:
        yield Check("plan", None, str(error))
        return
    except ClipBatchError as error:
        yield Check("plan", False, str(error))
        return
    yield Check("plan", True, f"{len(plan.partitions):,} partitions, digest {plan.digest[:12]}")
    if (visible := gpus()) > len(plan.partitions):
        message = f"{len(plan.partitions)} partitions are fewer than the {visible} GPUs here, and some would be idle"
        yield Check("partitions", None, f"{message}: plan with --partition-count {visible} or more")
    spec = plan.encoder
    try:
        with hub.offline():
            cached: Any = encoders.resolve(spec.model, spec.pretrained, spec.preprocess, spec.precision, store.options)
    except ClipBatchError as error:
        yield Check("weights", False, f"not on this machine: {error}")
        return
    planned = spec.weights[:12]
    matches = cached.weights == spec.weights
    remedy = f"{spec.model} has {cached.weights[:12]} here, planned were {planned}: put the planned weights back"
    yield Check("weights", matches, f"{spec.model} is what was planned ({planned})" if matches else remedy)
    if embeds and matches:
        started = time.monotonic()
        encoder = encoders.load(spec, options=store.options)
        if encoder.has_text:
            encoder.encode_texts(["a test"])
        seconds = time.monotonic() - started
        yield Check("model", True, f"loads and encodes on {pick_device('auto')} in {seconds:.1f} s")
