"""The life of a data set at random: growth, embedding, kills, repairs, merges, removals and the ways back.

After each step, what a search finds, what `read` gives and what `verify` says is compared with a plain model: sets of
rows, each named by its tar and its key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from clip_batch import (
    ConfigError,
    EmbedConfig,
    MergeConfig,
    PlanConfig,
    PlanError,
    Searcher,
    StorageConfig,
    embed,
    make_plan,
    merge,
    read,
    removals,
    remove,
    undo_removal,
    verify,
    versions,
)
from clip_batch.embeddings.commits import read_commits
from clip_batch.embeddings.repair import repair
from clip_batch.index.ann import faiss_index
from clip_batch.index.gc import gc_index
from clip_batch.index.publications import live_version
from clip_batch.storage.store import Store
from tests import corpus
from tests.life.deaths import death
from tests.servers.hdfs_cluster import Hdfs
from tests.servers.s3_server import S3
from tests.servers.s3_server import s3 as s3
from tests.servers.s3_server import s3_server as s3_server

pytestmark = pytest.mark.slow

Row = tuple[str, str]
"""The name of a tar, and the key of a sample in it."""

PLAN = PlanConfig(model="fake:8", try_model=False, preprocess="exact")
EMBED = EmbedConfig(device="cpu", threads=1, progress=False)
MERGE = MergeConfig(queries=5)
TARS = 5
OUTPUTS = 5
DEATHS = st.none() | st.integers(0, 25)
"""After how many writes a stage dies; None: it does not."""
PICKS = st.integers(0, 10**6)
"""A choice among things of which there are some: its remainder by their number."""


@dataclass
class Tar:
    """A tar on disk: how often it was written, and the offset of each sample in it."""

    path: str
    written: int = 0
    samples: dict[str, int] = field(default_factory=dict)

    def write(self, number: int) -> None:
        """Write it with another content, and another number of samples, than before."""
        self.written += 1
        count = 1 + self.written + number % 2
        corpus.good_tar(self.path, count, seed=number + 100 * self.written, side=8)
        with tarfile.open(self.path) as tar:
            offsets: dict[str, int] = {}
            for member in tar:
                offsets.setdefault(member.name.split(".")[0], member.offset)
        self.samples = offsets


@dataclass
class Output:
    """An OUT: how often each planned tar was written, its partitions' rows and tars, and its commits, numbered."""

    url: str
    config: PlanConfig
    planned: dict[str, int]
    rows: dict[int, frozenset[Row]] = field(default_factory=dict)
    tars: dict[int, set[str]] = field(default_factory=dict)
    committed: dict[int, int] = field(default_factory=dict)

    @property
    def embedded(self) -> frozenset[Row]:
        return frozenset().union(*(self.rows[number] for number in self.committed))

    @property
    def complete(self) -> bool:
        return self.committed.keys() == self.rows.keys()


@dataclass
class Version:
    """What an index version holds, removed or not: rows, commits, and how often each tar was written by then."""

    rows: frozenset[Row] = frozenset()
    commits: frozenset[int] = frozenset()
    tars: dict[str, int] = field(default_factory=dict)


class Life(RuleBasedStateMachine):
    """The machine; `live` names one of `versions`, and `removed` has the keys of each removal list.

    OUTs and INDEX lie at `place`, by default on disk, beside the tars.
    """

    place: ClassVar[str] = ""
    storage: ClassVar[StorageConfig] = StorageConfig()

    def __init__(self) -> None:
        super().__init__()
        faiss_index.use_threads(1)
        self.home = Path(tempfile.mkdtemp(prefix="life-"))
        self.folder = f"{self.place or tempfile.gettempdir()}/{self.home.name}"
        self.index = f"{self.folder}/index"
        self.tars = [Tar(str(self.home / f"{number}.tar")) for number in range(TARS)]
        self.outputs: list[Output] = []
        self.commits = 0
        self.versions: dict[str, Version] = {}
        self.live: str = ""
        self.removed: dict[str, frozenset[str]] = {}
        for number, tar in enumerate(self.tars):
            tar.write(number)

    def teardown(self) -> None:
        shutil.rmtree(self.home)

    # What is planned and embedded

    @initialize()
    def begin(self) -> None:
        """Most of what can go wrong needs an index of two OUTs."""
        for numbers in ({0, 1}, {1, 2}):
            self.plan(numbers, 2)
            self.embed(len(self.outputs) - 1, None)

    @precondition(lambda self: len(self.outputs) < OUTPUTS)
    @rule(numbers=st.sets(st.integers(0, TARS - 1), min_size=1, max_size=3), partitions=st.integers(1, 3))
    def plan(self, numbers: set[int], partitions: int) -> None:
        tars = [self.tars[number] for number in sorted(numbers)]
        planned = {tar.path: tar.written for tar in tars}
        output = Output(f"{self.folder}/out{len(self.outputs)}", _with(PLAN, partition_count=partitions), planned)
        self._plan(output, output.config)
        self.outputs.append(output)

    @precondition(lambda self: self.outputs)
    @rule(pick=PICKS, number=st.integers(0, TARS - 1))
    def extend(self, pick: int, number: int) -> None:
        """An OUT gets another tar, in further partitions.

        If one of its tars was written anew, that is refused; a plan of which nothing is committed is made anew.
        """
        output = self._pick(pick)
        paths = [*output.planned, *{self.tars[number].path} - set(output.planned)]
        changed = [path for path, written in output.planned.items() if self._tar(path).written != written]
        if changed and output.committed:
            with pytest.raises(PlanError, match=Path(changed[0]).name):
                make_plan(paths, output.url, _with(output.config, extend=True), storage=self.storage)
            return
        if changed:
            output.rows, output.tars = {}, {}
        output.planned = {path: self._tar(path).written for path in paths}
        self._plan(output, _with(output.config, extend=True))

    @precondition(lambda self: self.outputs)
    @rule(pick=PICKS, some=st.none() | PICKS)
    def embed(self, pick: int, some: int | None) -> None:
        """All partitions, or one; those of tars that were written anew since fail."""
        output = self._pick(pick)
        numbers = sorted(output.rows)
        todo = set(numbers) if some is None else {numbers[some % len(numbers)]}
        outcomes = embed(output.url, EMBED, sorted(todo), storage=self.storage)
        unchanged = {path for path, written in output.planned.items() if self._tar(path).written == written}
        able = {number for number in todo if output.tars[number] <= unchanged}
        assert {outcome.partition for outcome in outcomes} == todo - output.committed.keys()
        assert all((outcome.state == "committed") == (outcome.partition in able) for outcome in outcomes), outcomes
        for number in able - output.committed.keys():
            self.commits += 1
            output.committed[number] = self.commits

    @precondition(lambda self: any(output.embedded for output in self.outputs))
    @rule(pick=PICKS)
    def damage_and_repair(self, pick: int) -> None:
        output = self._pick(pick, lambda output: bool(output.embedded))
        store = self._store(output.url)
        filled = [number for number in output.committed if output.rows[number]]
        number = filled[pick % len(filled)]
        name = str(read_commits(store)[number].file("img_emb"))
        store.replace(name, store.read(name)[:10])
        problems = verify(output.url, storage=self.storage).problems
        damaged = {number: problem for number, problem in problems.items() if int(number) in output.committed}
        assert set(map(int, damaged)) == {number}
        assert repair(store, damaged) == (sorted(map(int, damaged)), {})
        del output.committed[number]

    @rule(pick=PICKS)
    def write_anew(self, pick: int) -> None:
        """A tar gets another content; of OUTs that planned the earlier one, no other partition can be committed."""
        number = pick % TARS
        self.tars[number].write(number)

    # What is indexed

    @precondition(lambda self: any(map(_complete, self.outputs)))
    @rule(pick=PICKS, other=st.none() | PICKS, anew=st.booleans(), dies=DEATHS)
    def merge(self, pick: int, other: int | None, anew: bool, dies: int | None) -> None:
        """One OUT, or two, become a version of their own, which takes nothing away unless told so."""
        picks = [pick] if other is None else [pick, other]
        outputs = list({id(one): one for one in (self._pick(each, _complete) for each in picks)}.values())
        after = Version()
        try:
            for output in outputs:
                after = _added(after, output, replace=False)
        except ConfigError:
            after = None
        urls = [output.url for output in outputs]
        lost = self._now.rows - after.rows if after else frozenset[Row]()
        ours = {path for output in outputs for path in output.planned}
        try:
            with death(dies):
                self._merge(urls, anew=anew)
        except ConfigError:
            assert after is None or (self.live and not anew)
            after = None
        else:
            assert after or dies is not None
            assert anew or dies is not None or {path for path, _ in lost} <= ours or self._unchanged()
        self._live_is(after, dies)

    @precondition(lambda self: any(map(_complete, self.outputs)))
    @rule(pick=PICKS, replace=st.booleans(), dies=DEATHS)
    def add(self, pick: int, replace: bool, dies: int | None) -> None:
        output = self._pick(pick, _complete)
        after: Version | None = None
        with contextlib.suppress(ConfigError):
            after = _added(self._now, output, replace)
        try:
            with death(dies):
                self._merge(output.url, add=True, replace=replace)
        except ConfigError:
            assert after is None
        else:
            assert after or dies is not None
        self._live_is(after, dies)

    @precondition(lambda self: self.live and any(map(_complete, self.outputs)))
    @rule(picks=st.tuples(PICKS, PICKS))
    def add_at_once(self, picks: tuple[int, int]) -> None:
        """Of two OUTs that are added at the same time, none is lost."""
        outputs = [self._pick(pick, _complete) for pick in picks]
        after = self._now
        try:
            for output in outputs:
                after = _added(after, output, replace=False)
        except ConfigError:
            return
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda output: self._merge(output.url, add=True), outputs))
        self._live_is(after, None)

    @precondition(lambda self: self._now.rows)
    @rule(pick=PICKS)
    def remove(self, pick: int) -> None:
        keys = sorted(key for _, key in self._now.rows)
        key = keys[pick % len(keys)]
        report = remove(self.index, [key], storage=self.storage)
        self.removed[report.digest] = frozenset({key})
        assert report.rows == sum(key == other for _, other in self._now.rows)

    @precondition(lambda self: self.removed)
    @rule(pick=PICKS)
    def undo(self, pick: int) -> None:
        digest = list(self.removed)[pick % len(self.removed)]
        undo_removal(self.index, digest, storage=self.storage)
        del self.removed[digest]
        assert {info.digest for info in removals(self.index, storage=self.storage) if info.active} == set(self.removed)

    @precondition(lambda self: self.versions)
    @rule(pick=PICKS)
    def use(self, pick: int) -> None:
        version = list(self.versions)[pick % len(self.versions)]
        versions(self.index, use=version, storage=self.storage)
        self.live = version

    @precondition(lambda self: self.versions)
    @rule(pick=PICKS)
    def drop(self, pick: int) -> None:
        version = list(self.versions)[pick % len(self.versions)]
        try:
            versions(self.index, drop=version, storage=self.storage)
        except ConfigError:
            assert version == self.live or len(versions(self.index, storage=self.storage)) > 1
        else:
            assert version != self.live
            del self.versions[version]

    @precondition(lambda self: self.live)
    @rule(keep=st.integers(0, 2), dies=DEATHS)
    def collect_garbage(self, keep: int, dies: int | None) -> None:
        with death(dies):
            gc_index(self._store(self.index), keep, older_than=0)
        left = {info.version for info in versions(self.index, storage=self.storage)}
        self.versions = {version: held for version, held in self.versions.items() if version in left}
        assert self.live in self.versions

    @invariant()
    def agrees(self) -> None:
        """What is found, read and verified is what the model has."""
        if not self.live:
            return
        gone = frozenset[str]().union(*self.removed.values())
        expected = Counter({row for row in self._now.rows if row[1] not in gone})
        with Searcher(self.index, self.storage) as searcher:
            [hits] = searcher.search(np.eye(1, 8, dtype=np.float32), k=1000)
        assert Counter((hit.metadata["shard"], hit.metadata["key"]) for hit in hits) == expected
        with read(self.index, storage=self.storage) as rows:
            table = rows.to_table(columns=["shard", "key"])
        assert Counter(zip(*table.to_pydict().values(), strict=True)) == expected
        assert verify(self.index, deep=True, storage=self.storage).ok

    # Helpers

    @property
    def _now(self) -> Version:
        return self.versions.get(self.live, Version())

    def _plan(self, output: Output, config: PlanConfig) -> None:
        """Plan or extend an OUT; each sample is in one partition, and those that were planned before stay."""
        made, before = make_plan([*output.planned], output.url, config, storage=self.storage), dict(output.rows)
        for partition in made.partitions:
            output.tars[partition.id] = {slice.shard.url for slice in partition.slices}
            output.rows[partition.id] = frozenset(
                (slice.shard.url, key)
                for slice in partition.slices
                for key, offset in self._tar(slice.shard.url).samples.items()
                if slice.start <= offset and (slice.stop is None or offset < slice.stop)
            )
        assert all(output.rows[number] == rows for number, rows in before.items())
        every = Counter(row for rows in output.rows.values() for row in rows)
        assert every == Counter((path, key) for path in output.planned for key in self._tar(path).samples)

    def _store(self, url: str) -> Store:
        return Store(url, self.storage.storage_options)

    def _merge(self, output: str | list[str], **options: Any) -> None:
        merge(output, self.index, _with(MERGE, **options), storage=self.storage)

    def _unchanged(self) -> bool:
        return live_version(self._store(self.index)) == self.live

    def _live_is(self, after: Version | None, dies: int | None) -> None:
        """The live version is the earlier one or holds `after`, which it must unless the merge died or was refused."""
        live = live_version(self._store(self.index)) or ""
        if live != self.live:
            assert after
            assert self.versions.setdefault(live, after).rows == after.rows
            self.live = live
        elif after and dies is None:
            assert after.rows <= self._now.rows

    def _tar(self, path: str) -> Tar:
        return next(tar for tar in self.tars if tar.path == path)

    def _pick(self, pick: int, fits: Callable[[Output], bool] = lambda output: True) -> Output:
        some = [output for output in self.outputs if fits(output)]
        return some[pick % len(some)]


def _complete(output: Output) -> bool:
    return output.complete and bool(output.embedded)


def _added(version: Version, output: Output, replace: bool) -> Version:
    """The version with an OUT besides. ConfigError: a tar has changed, and not `replace`."""
    new = [number for number, commit in output.committed.items() if commit not in version.commits]
    paths = {path for number in new for path in output.tars[number]}
    changed = {path for path in paths if version.tars.get(path, output.planned[path]) != output.planned[path]}
    if changed and not replace:
        raise ConfigError(f"changed: {changed}")
    kept = {row for row in version.rows if row[0] not in changed}
    return Version(
        frozenset(kept.union(*(output.rows[number] for number in new))),
        version.commits | set(output.committed.values()),
        version.tars | {path: output.planned[path] for path in paths},
    )


def _with(config: Any, **options: Any) -> Any:
    return dataclasses.replace(config, **options)


def test_on_disk() -> None:
    live(Life, 50, 50)


def test_on_s3(s3: S3) -> None:
    class OnS3(Life):
        place = S3.bucket
        storage = StorageConfig(storage_options=s3.options)

    live(OnS3, 3, 20)


def test_on_hdfs(hdfs: Hdfs) -> None:
    class OnHdfs(Life):
        place = hdfs.url

    live(OnHdfs, 2, 15)


def live(life: type[Life], lives: int, steps: int) -> None:
    """Run a machine so many times, for so many steps each."""
    run_state_machine_as_test(life, settings=settings(max_examples=lives, stateful_step_count=steps, deadline=None))
