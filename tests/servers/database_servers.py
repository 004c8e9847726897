"""Real database servers for the tests, on loopback, in temporary folders: MariaDB, PostgreSQL and milvus-lite.

Each has a variable of its own in its environment, by which a keeper process kills it when this process ends, however
it ends.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.servers import processes

PASSWORD = "topsecretvalue"
USER = "exporter"


@contextlib.contextmanager
def _folder(owner: str | None) -> Iterator[Path]:
    """A temporary folder that other users can reach, unlike those of pytest."""
    with tempfile.TemporaryDirectory(prefix="clip-batch-db-") as name:
        if owner:
            shutil.chown(name, owner)
        yield Path(name)


@contextlib.contextmanager
def _running(folder: Path, command: Sequence[str], port: int, owner: str | None = None) -> Iterator[None]:
    """Run a server within the block, which begins when the server listens."""
    mark = f"CLIP_BATCH_TEST_DATABASE={folder}"
    with processes.kept(mark), (folder / "log").open("wb") as log:
        environment = {**os.environ, "CLIP_BATCH_TEST_DATABASE": str(folder), "LC_ALL": "C"}
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, user=owner)
        try:
            until = time.monotonic() + 60
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert server.poll() is None and time.monotonic() < until, (folder / "log").read_text()[-2000:]
                time.sleep(0.1)
            yield
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _set_up(command: Sequence[str], folder: Path, owner: str | None = None) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, user=owner, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]


@pytest.fixture(scope="session")
def mariadb() -> Iterator[str]:
    """The URL of an empty database of a MariaDB, with a password in it."""
    names = ("mariadbd", "mariadb-install-db", "my_print_defaults")  # the last is called by the second
    server, install, defaults = (shutil.which(name, path=_SEARCHED) for name in names)
    if not server or not install or not defaults:
        pytest.skip("MariaDB is not installed: make services")
    pymysql = pytest.importorskip("pymysql")
    with _folder(None) as folder:
        [port], data, user = processes.free_ports(1), folder / "data", f"--user={pwd.getpwuid(os.geteuid()).pw_name}"
        quick = ["--auth-root-authentication-method=normal", "--skip-test-db"]
        _set_up([install, "--no-defaults", f"--datadir={data}", user, *quick], folder)
        where = [f"--datadir={data}", f"--socket={folder}/socket", f"--pid-file={folder}/pid", f"--port={port}"]
        small = ["--bind-address=127.0.0.1", "--innodb-buffer-pool-size=64M", "--character-set-server=latin1"]
        with _running(folder, [server, "--no-defaults", user, *where, *small], port):
            with pymysql.connect(unix_socket=f"{folder}/socket", user="root") as root, root.cursor() as cursor:
                cursor.execute("CREATE DATABASE exported")
                cursor.execute(f"CREATE USER {USER}@'127.0.0.1' IDENTIFIED BY '{PASSWORD}'")
                cursor.execute(f"GRANT ALL ON exported.* TO {USER}@'127.0.0.1'")
            yield f"mysql://{USER}:{PASSWORD}@127.0.0.1:{port}/exported"


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of an empty database of a PostgreSQL, with a password in it."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    where = os.pathsep.join([os.environ.get("PATH", ""), *map(str, found)])
    server, initdb = (shutil.which(name, path=where) for name in ("postgres", "initdb"))
    if not server or not initdb:
        pytest.skip("PostgreSQL is not installed: make services")
    psycopg = pytest.importorskip("psycopg")
    owner = "nobody" if os.geteuid() == 0 else None  # it refuses to run as root
    with _folder(owner) as folder:
        [port], data = processes.free_ports(1), folder / "data"
        (folder / "password").write_text(PASSWORD)
        (folder / "password").chmod(0o644)
        how = ["--auth=scram-sha-256", f"--username={USER}", "--encoding=UTF8", "--locale=C", "--no-sync"]
        _set_up([initdb, "-D", str(data), f"--pwfile={folder}/password", *how], folder, owner)
        options = ["-h", "127.0.0.1", "-p", str(port), "-k", str(folder), "-F"]
        with _running(folder, [server, "-D", str(data), *options], port, owner):
            url = f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{port}"
            _wait_until_it_answers(psycopg, f"{url}/postgres")
            with psycopg.connect(f"{url}/postgres", autocommit=True) as connection:
                connection.execute("CREATE DATABASE exported")
            yield f"{url}/exported"


def _wait_until_it_answers(psycopg: object, url: str) -> None:
    for _ in range(100):
        with contextlib.suppress(psycopg.OperationalError):  # type: ignore[attr-defined]
            psycopg.connect(url).close()  # type: ignore[attr-defined]
            return
        time.sleep(0.1)


@pytest.fixture(scope="session")
def milvus_server() -> Iterator[str]:
    """The URL of an empty Milvus server: milvus-lite, which speaks the protocol of a server."""
    if not importlib.util.find_spec("milvus_lite"):
        pytest.skip("milvus-lite is not installed")
    with _folder(None) as folder:
        [port] = processes.free_ports(1)
        command = [sys.executable, "-m", "milvus_lite", "server", "--data-dir", f"{folder}/data"]
        with _running(folder, [*command, "--host", "127.0.0.1", "--port", str(port)], port):
            yield f"http://127.0.0.1:{port}"


_SEARCHED = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
