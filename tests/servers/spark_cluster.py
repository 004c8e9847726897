"""A real Spark for the tests: a standalone master and two workers on loopback, each with one pretended GPU.

The workers have addresses of their own (127.0.0.2 and 127.0.0.3), as hosts have: Spark starts no
speculative attempt on the host of the first one. Everything lies in one folder, on free ports; each
process dies with the one that started it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clip_batch.config import SparkConfig
from clip_batch.launch.spark import command

GPUS = {"127.0.0.2": "3", "127.0.0.3": "5"}
"""The address of each worker's GPU, as its discovery script prints it."""

DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL", "--")
"""util-linux sets this in the child; Python's preexec_fn can hang if the test process has threads."""

SMALL = {
    "spark.driver.memory": "512m",
    "spark.executor.memory": "512m",
    "spark.ui.enabled": False,
    "spark.log.level": "WARN",
    "spark.driver.host": "127.0.0.1",
}


@dataclass(frozen=True)
class Spark:
    """A Spark to submit to: `home` is SPARK_HOME, `work` the folder of the executors' folders."""

    home: Path
    work: Path
    master: str
    pythonpath: str = ""

    def submit(self, *arguments: str, env: dict[str, str] | None = None, **conf: Any) -> subprocess.Popen[str]:
        """spark-submit of the driver with `arguments`; in `conf`, __ stands for a dot, archives for itself."""
        archives = conf.pop("archives", "")
        named = {key.replace("__", "."): value for key, value in conf.items()}
        config = SparkConfig(
            master=self.master,
            archives=archives,
            spark_conf={**SMALL, **named},
            spark_submit=str(self.home / "bin" / "spark-submit"),
        )
        words = command(config, arguments)
        return self.popen(words, env or {})

    def popen(self, words: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
        whole = {**_environment(self.home), **env}
        if self.pythonpath:
            whole["PYTHONPATH"] = self.pythonpath
        return subprocess.Popen(
            [*DIE_WITH_PARENT, *words], env=whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *arguments: str, code: int = 0, env: dict[str, str] | None = None, **conf: Any) -> str:
        """Submit and wait for the end with this exit code; returns what it printed."""
        return finish(self.submit(*arguments, env=env, **conf), code)

    def logs(self) -> dict[str, str]:
        """The standard error of each executor, by APPLICATION/EXECUTOR."""
        return {
            str(path.parent.relative_to(self.work)): path.read_text(errors="replace")
            for path in self.work.glob("app-*/*/stderr")
        }


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    printed = process.communicate(timeout=500)[0]
    assert process.returncode == code, printed[-6000:]
    return printed


def _environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPARK_", "PYSPARK_"))}
    folders = {"SPARK_HOME": str(home), "SPARK_LOCAL_DIRS": str(home / "tmp"), "SPARK_CONF_DIR": str(home / "conf")}
    return {**kept, **folders, "SPARK_LOCAL_IP": "127.0.0.1", "SPARK_DAEMON_MEMORY": "256m"}


def spark_home(folder: Path, pyspark: Path) -> Path:
    """A separate SPARK_HOME for an installed pyspark, as clusters write into it."""
    if not shutil.which("java"):
        pytest.skip("Spark needs Java 17 or newer, which is not installed")
    for name in ("tmp", "conf"):
        (folder / name).mkdir(parents=True)
    for name in ("bin", "sbin", "jars", "python"):
        (folder / name).symlink_to(pyspark / name)
    return folder


def installed() -> Path:
    """The folder of this environment's pyspark."""
    spec = importlib.util.find_spec("pyspark")
    if not spec or not spec.origin:
        pytest.skip("pyspark is not installed")
    return Path(spec.origin).parent


def local_cluster(folder: Path, pyspark: Path, pythonpath: str = "") -> Spark:
    """`local-cluster[2,1,1024]`: two executors, each a JVM of its own."""
    home = spark_home(folder, pyspark)
    return Spark(home, home / "work", "local-cluster[2,1,1024]", pythonpath)


@contextlib.contextmanager
def standalone(folder: Path, pyspark: Path) -> Iterator[Spark]:
    """Run a standalone cluster within the block."""
    home = spark_home(folder / "home", pyspark)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    master = f"spark://127.0.0.1:{port}"
    processes = [_start(home, folder, "master.Master", "127.0.0.1", "--host", "127.0.0.1", "--port", port)]
    for host, address in GPUS.items():
        script = folder / f"gpus-{address}.sh"
        script.write_text(f'#!/bin/sh\necho \'{{"name": "gpu", "addresses": ["{address}"]}}\'\n')
        script.chmod(0o755)
        gpu = "spark.worker.resource.gpu"
        (folder / f"{host}.conf").write_text(f"{gpu}.amount 1\n{gpu}.discoveryScript {script}\n")
        arguments = ["--host", host, "--cores", "1", "--memory", "1g", "--work-dir", str(folder / "work")]
        arguments += ["--properties-file", str(folder / f"{host}.conf"), master]
        processes.append(_start(home, folder, "worker.Worker", host, *arguments))
    try:
        log = folder / "127.0.0.1.log"
        until(lambda: log.read_text().count("Registering worker") == 2, 60)
        yield Spark(home, folder / "work", master)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _start(home: Path, folder: Path, name: str, host: str, *arguments: str) -> subprocess.Popen[bytes]:
    words = [str(home / "bin" / "spark-class"), f"org.apache.spark.deploy.{name}", "--webui-port", "0", *arguments]
    with open(folder / f"{host}.log", "wb") as log:
        env = {
            **_environment(home),
            "SPARK_LOCAL_IP": host,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        return subprocess.Popen([*DIE_WITH_PARENT, *words], env=env, stdout=log, stderr=log)


def until(happened: Callable[[], Any], seconds: float) -> Any:
    """Wait until a call returns something true, and return it."""
    end = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.05)
    return found


def executors(spark: Spark) -> list[int]:
    """The executors' processes."""
    return [pid for pid, words in _processes(spark) if "CoarseGrainedExecutorBackend" in words]


def python_workers(spark: Spark) -> list[int]:
    """The executors' Python processes that run tasks: the children of their daemons."""
    daemons = {pid for pid, words in _processes(spark) if "pyspark.daemon" in words}
    return [pid for pid in daemons if _parent(pid) in daemons]


def _processes(spark: Spark) -> list[tuple[int, str]]:
    """(pid, command line) of the processes whose SPARK_HOME is this one's."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"SPARK_HOME={spark.home}\0".encode() in (path / "environ").read_bytes() + b"\0":
                words = (path / "cmdline").read_bytes().replace(b"\0", b" ")
                found.append((int(path.name), words.decode(errors="replace")))
    return found


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0
