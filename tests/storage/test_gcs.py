"""A store on a test double of Google Cloud Storage, with injected faults."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

from clip_batch.config import MergeConfig, StorageConfig
from clip_batch.embeddings.commits import read_commits
from clip_batch.embeddings.repair import gc, repair
from clip_batch.embeddings.verify import verify_output
from clip_batch.errors import InputError
from clip_batch.index.merge.merge import merge
from clip_batch.index.remove import remove
from clip_batch.index.verify import verify_index
from clip_batch.index.versions import drop, use, versions
from clip_batch.launch.doctor import doctor
from clip_batch.samples import read_slice
from clip_batch.samples.prefetch import Prefetcher
from clip_batch.storage import retry
from clip_batch.storage.store import Store
from clip_batch.storage.transfer import copy_range, file_version, remote_file
from clip_batch.types import Sample, Shard, Slice
from tests import corpus, fabricated
from tests.servers.gcs_server import BUCKET, SECRET, Gcs, hurry
from tests.servers.gcs_server import gcs as gcs
from tests.servers.gcs_server import gcs_server as gcs_server
from tests.storage import store_checks

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    hurry(monkeypatch)


@pytest.fixture
def store(gcs: Gcs) -> Store:
    return Store(f"gs://{BUCKET}/{uuid.uuid4().hex}", gcs.options)


def of_objects(method: str, path: str) -> bool:
    return path != "/token"


def is_upload(method: str, path: str) -> bool:
    return path.startswith("/upload/")


def test_files_come_and_go(store: Store) -> None:
    assert store.list("") == []
    for name in ("a/b", "a/c #1?x=[y]%20.json"):
        store.replace(name, b"old")
        store.replace(name, b"0123456789")
        assert (store.read(name), store.size(name)) == (b"0123456789", 10)
    assert store.list("a") == ["b", "c #1?x=[y]%20.json"]
    assert store.list("") == ["a"]
    assert corpus.names_in(store) == ["a/b", "a/c #1?x=[y]%20.json"]
    with store.open("a/b") as file:
        assert (file.seek(-3, os.SEEK_END), file.read(2), file.tell()) == (7, b"78", 9)
    store.rename("a/c #1?x=[y]%20.json", "d/e [f]")
    store.rename("a/c #1?x=[y]%20.json", "d/e [f]")  # again, as another may
    assert corpus.names_in(store) == ["a/b", "d/e [f]"]
    store.remove("a/b")
    store.remove("a/b")
    assert not store.exists("a/b") and store.exists("d/e [f]") and store.exists("d")
    store.remove_folder("d")
    assert store.list("") == []
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        store.read("a/b")


def test_one_of_many_racing_creators_wins(store: Store) -> None:
    store_checks.one_of_many_racing_creators_wins(store)


@pytest.mark.parametrize("kind", ["slow down", "too many", "internal", "reset", "lost"])
def test_transient_errors_are_retried(store: Store, gcs: Gcs, kind: str) -> None:
    with gcs.fault(kind, times=3):
        store.replace("a/b", b"bytes")
    with gcs.fault(kind, times=3):
        assert store.read("a/b") == b"bytes"
    with gcs.fault(kind, times=3):
        assert store.list("a") == ["b"]
    with gcs.fault(kind, of_objects, times=3) as fault:
        store.rename("a/b", "c")
    assert fault.hits == 3
    assert store.read("c") == b"bytes"
    assert not store.exists("a/b")


def ranged(method: str, path: str) -> bool:
    return path.startswith("/download/")


@pytest.mark.parametrize("kind", ["delay", "slow down", "internal", "reset", "lost", "cut"])
def test_large_reads_go_past_the_client(store: Store, gcs: Gcs, kind: str, tmp_path: Path) -> None:
    store_checks.large_reads_go_past_the_client(store, gcs, kind, ranged, tmp_path)


def test_what_a_plain_request_is_refused_is_read_by_the_client(store: Store, gcs: Gcs, tmp_path: Path) -> None:
    store.replace("a", b"bytes")
    (tmp_path / "a").touch()
    remote = remote_file(f"{store.url}/a", {**gcs.options, "project": uuid.uuid4().hex})  # a client of its own
    with gcs.fault("forbidden", ranged, times=1) as fault:
        for _ in range(3):
            copy_range(remote, 1, 5, str(tmp_path / "a"), 0)
    assert fault.hits == 1
    assert (tmp_path / "a").read_bytes() == b"ytes"


def test_a_create_whose_answer_is_lost_is_ours_by_content(store: Store, gcs: Gcs) -> None:
    with gcs.fault("lost", is_upload, times=1) as fault:
        assert not store.create("commit", b"ours")
    assert fault.hits == 1
    assert store.read("commit") == b"ours"
    with gcs.fault("lost", is_upload, times=1):
        assert not store.create("commit", b"theirs", check_first=False)
    assert store.read("commit") == b"ours"


def test_a_store_that_stays_busy_is_an_error_of_one_line(
    store: Store, gcs: Gcs, capfd: pytest.CaptureFixture[str]
) -> None:
    with gcs.fault("slow down"), pytest.raises(OSError, match="reading gs://") as caught:
        store.read("x")
    assert "\n" not in str(caught.value)
    assert "503" in str(caught.value)
    assert capfd.readouterr().err == "", "its client's stacks are nobody's concern"


@pytest.mark.parametrize(("kind", "times"), [("expired", 3), ("forbidden", 1)])
def test_refusals_are_told_soon_and_without_secrets(store: Store, gcs: Gcs, kind: str, times: int) -> None:
    """gcsfs asks again after a 401, as some pass; nobody else does."""
    with gcs.fault(kind, of_objects) as fault, pytest.raises(PermissionError, match="renew the credentials") as caught:
        store.replace("x", b"1")
    assert fault.hits == times
    assert SECRET not in str(caught.value)
    assert str(caught.value).startswith(f"writing {store.url}/x: refused: ")


def test_a_key_that_was_revoked_is_told_soon(gcs: Gcs) -> None:
    store = Store(f"gs://{BUCKET}/revoked", {**gcs.options, "project": uuid.uuid4().hex})  # a client of its own
    with (
        gcs.fault("revoked", lambda method, path: path == "/token") as fault,
        pytest.raises(PermissionError, match="renew the credentials") as caught,
    ):
        store.read("x")
    assert fault.hits == 3
    assert "PRIVATE KEY" not in str(caught.value)


def test_an_upload_that_fails_publishes_nothing(store: Store, gcs: Gcs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "TRIES", 1)
    with (
        gcs.fault("internal", lambda method, path: "upload_id" in path and method != "DELETE") as fault,
        pytest.raises(OSError, match="Backend Error"),
        store.writer("large.npy") as file,
    ):
        file.truncate(120 * 2**20)
    assert fault.hits
    assert ("DELETE", True) in [(method, "upload_id" in path) for method, path in gcs.log], "it is given up"
    assert not store.exists("large.npy")


def test_an_upload_goes_through_faults(store: Store, gcs: Gcs) -> None:
    store_checks.an_upload_goes_through_faults(store, gcs, is_upload)


def test_doctor_says_which_kind_it_is(store: Store, gcs: Gcs) -> None:
    found = {one.name: one for one in doctor(store.url, StorageConfig(gcs.options))}
    assert found["put-if-absent"].message == "1 of 8 racing creators won: a name that is taken is refused"
    assert all(found[name].ok for name in ("put-if-absent", "read-after-write", "removal", "clock"))
    assert Store(f"gs://{BUCKET}", gcs.options).list(os.path.basename(store.url)) == []


def test_a_tar_is_known_by_its_generation(store: Store, gcs: Gcs, tmp_path: Path) -> None:
    """Which is new with each writing, of the same bytes too, and not with an edit of its metadata."""
    tar = Path(corpus.good_tar(str(tmp_path / "0.tar"), 3))
    store.replace("0.tar", tar.read_bytes())
    planned = remote_file(f"{store.url}/0.tar", gcs.options)
    size, generation = file_version(planned)
    assert generation == planned.fs.info(planned.path)["generation"] != planned.fs.info(planned.path)["etag"]
    shard = Shard(planned.url, size, generation)

    def read() -> int:
        with Prefetcher([piece := Slice(shard)], gcs.options) as files:
            return len(
                [one for one in read_slice(piece, corpus.plan_of(), gcs.options, files) if isinstance(one, Sample)]
            )

    assert read() == 3
    planned.fs.setxattrs(planned.path, note="edited")
    assert read() == 3
    store.replace("0.tar", tar.read_bytes())
    with pytest.raises(InputError, match=f"was planned with etag {generation} and has"):
        read()
    store.replace("0.tar", b"short")
    with pytest.raises(InputError, match=f"was planned with {size} bytes and has 5 now"):
        read()


def test_what_verify_finds_is_repaired_and_versions_come_and_go(store: Store, gcs: Gcs, tmp_path: Path) -> None:
    out, index = (Store(f"{store.url}/{name}", gcs.options) for name in ("out", "index"))
    storage, config = StorageConfig(gcs.options), MergeConfig(queries=5, shard_rows=40)
    images, texts = fabricated.clustered(80, 8, 4)
    plan = fabricated.make_out(out, images, texts, [40, 40])
    first = merge(out.url, index.url, config, storage=storage).version
    retired = dict(read_commits(out)[1].files)
    gone = next(name for name in retired if name.startswith("img_emb"))
    out.remove(gone)
    assert repair(out, verify_output(out).problems) == ([1], {})
    fabricated.commit(out, plan, 1, images[30:], texts[30:])
    lost = "img_emb/img_emb_0000-cafecafe.npy"
    out.replace(lost, b"of an attempt that lost")
    assert set(gc(out)) == {lost, *retired} - {gone}
    assert verify_output(out).ok
    second = merge(out.url, index.url, config, storage=storage).version
    assert verify_index(index, deep=True).ok
    (tmp_path / "keys.txt").write_text("0-3\n1-45\n")
    assert remove(index.url, str(tmp_path / "keys.txt"), storage=storage).rows == 2
    use(index, first)
    assert [(info.version, info.live, info.alive) for info in versions(index)] == [
        (first, True, 79),
        (second, False, 88),
    ]
    drop(index, second)
    assert index.list("") == sorted(["CURRENT", first, "publications", "tombstones"])


def test_wrong_options_are_one_line_without_secrets(gcs: Gcs) -> None:
    for wrong in ({"token": {"private_key": SECRET}}, {"access": "nonsense"}):
        with pytest.raises(InputError, match="check the URL and --storage-options") as caught:
            Store("gs://bucket/x", {**gcs.options, **wrong}).read("x")
        assert SECRET not in str(caught.value)
