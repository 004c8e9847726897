"""The log of publications and CURRENT: comparison, races, kills, on every store."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_batch.errors import ConflictError, CorruptError
from clip_batch.index import publications
from clip_batch.index.paths import CURRENT, VersionPaths, publication
from clip_batch.index.publications import State, append, current_version, live_version, mend, publish, read_state
from clip_batch.storage import retry
from clip_batch.storage.store import Store
from tests.servers.flaky import Flaky
from tests.servers.gcs_server import BUCKET as GCS_BUCKET
from tests.servers.gcs_server import gcs as gcs
from tests.servers.gcs_server import gcs_server as gcs_server
from tests.servers.gcs_server import hurry
from tests.servers.s3_server import BUCKET as S3_BUCKET
from tests.servers.s3_server import s3 as s3
from tests.servers.s3_server import s3_server as s3_server

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("s3", "gcs", "hdfs")]


def name_of(number: int) -> str:
    return f"{number:012x}"


@pytest.fixture
def stores(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The INDEX of a test on the store of its parameter."""
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    folder = uuid.uuid4().hex
    if request.param == "local":
        yield Store(str(tmp_path / "index"))
    elif request.param == "flaky":
        Flaky.reset()
        yield Store("flaky://home/index")
        Flaky.reset()
    elif request.param == "s3":
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield Store(f"s3://{S3_BUCKET}/{folder}", request.getfixturevalue("s3").options)
    elif request.param == "gcs":
        hurry(monkeypatch)
        yield Store(f"gs://{GCS_BUCKET}/{folder}", request.getfixturevalue("gcs").options)
    else:
        yield Store(f"{request.getfixturevalue('hdfs').url}/{folder}")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "index"))


def finish(store: Store, *numbers: int) -> None:
    """Versions that have nothing but a manifest."""
    for number in numbers:
        store.replace(VersionPaths(name_of(number)).manifest, b"{}")


def check(store: Store) -> list[str | None]:
    """The log is one chain, and CURRENT is its end; the versions that were live, in order."""
    log = publications.publications(store)
    assert [entry.number for entry in log] == list(range(1, len(log) + 1))
    before: str | None = None
    for entry in log:
        assert entry.replaces == before
        assert entry.version not in entry.dropping
        before = entry.version
    assert current_version(store) == before == live_version(store)
    return [entry.version for entry in log if entry.version != entry.replaces]


@pytest.mark.parametrize("stores", ["local", "flaky", *SLOW], indirect=True)
def test_the_life_of_a_log(stores: Store) -> None:
    store = stores
    one, two, three = map(name_of, (1, 2, 3))
    finish(store, 1, 2, 3)
    assert read_state(store) == State(None)
    publish(store, one, None)
    publish(store, one, None)  # by a merge that is run again
    assert check(store) == [one]
    with pytest.raises(ConflictError, match=f"serves version {one} now, not none as when this began: run the command"):
        publish(store, two, None)
    publish(store, two, one)
    publish(store, three, two)
    publish(store, one, three)  # back
    with pytest.raises(ConflictError, match=f"serves version {one} now, not {two}"):
        publish(store, three, two)
    with pytest.raises(ConflictError, match="was deleted meanwhile"):
        publish(store, name_of(9), one)
    assert check(store) == [one, two, three, one]
    store.replace(CURRENT, f"{three}\n".encode())  # who published was killed before it wrote CURRENT
    assert live_version(store) == one
    assert current_version(store) == one
    store.remove(CURRENT)
    publish(store, one, two)
    assert check(store) == [one, two, three, one]
    assert json.loads(store.read(publication(3))).keys() == {"version", "replaces", "created", "dropping"}


@pytest.mark.parametrize("stores", ["local", *SLOW], indirect=True)
def test_of_many_writers_at_once_each_goes_live_once(stores: Store) -> None:
    store, most = stores, 6
    finish(store, *range(most))
    lost: list[int] = []

    def writer(number: int) -> None:
        while True:
            began = live_version(store)
            try:
                return publish(store, name_of(number), began)
            except ConflictError:
                lost.append(number)

    with ThreadPoolExecutor(most) as pool:
        list(pool.map(writer, range(most)))
    assert sorted(map(str, check(store))) == sorted(map(name_of, range(most)))


def test_an_index_of_an_older_release_gets_a_log(store: Store) -> None:
    one, two, three = map(name_of, (1, 2, 3))
    finish(store, 1, 2, 3)
    store.replace(CURRENT, f"{one}\n".encode())
    assert read_state(store) == State(one, logged=False)
    publish(store, one, None)
    assert check(store) == [one]
    publish(store, two, one)
    store.replace(CURRENT, f"{three}\n".encode())  # an older release again
    assert live_version(store) == current_version(store) == three
    with pytest.raises(ConflictError, match=three):
        publish(store, one, two)
    assert len(publications.publications(store)) == 2
    publish(store, two, three)
    assert check(store) == [one, two, three, two]


def check_garbage(store: Store, content: bytes) -> None:
    store.replace(CURRENT, content)
    with pytest.raises(CorruptError, match=r"CURRENT has .*not the name of a version.* --use VERSION"):
        live_version(store)
    with pytest.raises(CorruptError):
        publish(store, name_of(1), None)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"v1", b"../../etc", b"/etc/passwd", b"0" * 13, b"\xff" * 5000, b"A" * 12]
)
def test_a_current_that_names_no_version_is_refused_until_it_is_mended(store: Store, content: bytes) -> None:
    finish(store, 1)
    check_garbage(store, content)
    mend(store)
    assert live_version(store) is None
    publish(store, name_of(1), None)
    check_garbage(store, content)
    mend(store)
    mend(store)
    assert check(store) == [name_of(1)]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"version": "../x", "replaces": null, "created": 1}',
        b'{"version": 1, "replaces": null, "created": 1}',
    ],
)
def test_a_damaged_entry_is_refused_by_name(store: Store, content: bytes) -> None:
    finish(store, 1, 2)
    publish(store, name_of(1), None)
    publish(store, name_of(2), name_of(1))
    store.replace(publication(2), content)
    with pytest.raises(CorruptError, match=r"00000002.json is not an entry of the log .* --use VERSION"):
        live_version(store)
    store.remove(publication(2))
    assert live_version(store) == name_of(2)  # as CURRENT says
    publish(store, name_of(1), name_of(2))
    assert check(store) == [name_of(1), name_of(2), name_of(1)]


def test_who_may_not_write_reads_what_the_log_says(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(store, 1, 2)
    publish(store, name_of(1), None)
    publish(store, name_of(2), name_of(1))
    store.replace(CURRENT, f"{name_of(1)}\n".encode())

    def refuse(*_: object) -> None:
        raise PermissionError("read only")

    monkeypatch.setattr(Store, "replace", refuse)
    assert live_version(store) == name_of(2)


class Killed(BaseException):
    """Instead of kill -9."""


class Turns:
    """Lets one of several threads do one operation of a store at a time, in an order that is drawn; or kills it."""

    def __init__(self, threads: int, order: list[tuple[int, bool]]) -> None:
        self.order, self.waiting, self.alive = order, set[int](), set(range(threads))
        self.condition, self.own = threading.Condition(), threading.local()
        self.turn: tuple[int, bool] | None = None

    def _next(self) -> None:
        """Choose who goes on, once everybody waits."""
        if self.alive and self.waiting == self.alive and self.turn is None:
            number, kill = self.order.pop(0) if self.order else (0, False)
            self.turn = sorted(self.alive)[number % len(self.alive)], kill

    def point(self) -> None:
        if (me := getattr(self.own, "number", None)) is None:
            return
        with self.condition:
            self.waiting.add(me)
            self._next()
            self.condition.notify_all()
            while self.turn is None or self.turn[0] != me:
                self.condition.wait()
            kill, self.turn = self.turn[1], None
            self.waiting.discard(me)
        if kill:
            raise Killed

    def run(self, number: int, act: Callable[[], object]) -> None:
        self.own.number = number
        try:
            act()
        except (Killed, ConflictError):
            pass
        finally:
            with self.condition:
                self.alive.discard(number)
                self._next()
                self.condition.notify_all()


class Interleaved(Store):
    """A store of which each operation that counts waits for its turn, before and after."""

    turns: Turns

    def create(self, name: str, data: bytes, check_first: bool = True) -> bool:
        self.turns.point()
        answer = super().create(name, data, check_first)
        self.turns.point()
        return answer

    def replace(self, name: str, data: bytes) -> None:
        self.turns.point()
        super().replace(name, data)
        self.turns.point()

    def read(self, name: str) -> bytes:
        self.turns.point()
        return super().read(name)

    def list(self, folder: str) -> list[str]:
        self.turns.point()
        return super().list(folder)


ORDER = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 24).map(lambda number: number == 0)), max_size=80)


@pytest.mark.slow
@settings(max_examples=100)
@given(ORDER, st.lists(st.sampled_from(["publish", "drop"]), min_size=2, max_size=4))
def test_whatever_order_writers_run_in_and_wherever_they_die(
    tmp_path_factory: pytest.TempPathFactory, order: list[tuple[int, bool]], acts: list[str]
) -> None:
    """The log stays one chain, no version is live that was dropped, and whoever looks next finds CURRENT right."""
    folder = str(tmp_path_factory.mktemp("log"))
    plain, store = Store(folder), Interleaved(folder)
    store.turns = turns = Turns(len(acts), list(order))
    finish(plain, *range(5))
    publish(plain, name_of(4), None)

    def act(number: int) -> None:
        if acts[number] == "publish":
            publish(store, name_of(number), live_version(store))
            return
        version = name_of(number - 1 if number else 1)  # that of another writer
        while version not in (state := read_state(store)).dropping:
            if state.version == version:
                return
            append(store, state, state.version, {*state.dropping, version})
        store.remove(VersionPaths(version).manifest)
        while version in (state := read_state(store)).dropping:
            append(store, state, state.version, {*state.dropping} - {version})

    threads = [threading.Thread(target=turns.run, args=(n, lambda n=n: act(n))) for n in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    live_version(plain)
    check(plain)
    assert plain.exists(VersionPaths(str(live_version(plain))).manifest)
