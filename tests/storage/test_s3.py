"""A store on an S3 server, with injected faults."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

from clip_batch.config import StorageConfig
from clip_batch.embeddings.repair import gc
from clip_batch.errors import ClipBatchError
from clip_batch.launch.doctor import doctor
from clip_batch.storage import retry
from clip_batch.storage.store import Store
from clip_batch.storage.transfer import copy_range, remote_file
from tests import fabricated
from tests.servers.s3_server import BUCKET, S3, SECRET
from tests.servers.s3_server import s3 as s3
from tests.servers.s3_server import s3_server as s3_server
from tests.storage import store_checks

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture
def store(s3: S3) -> Store:
    return Store(f"s3://{BUCKET}/{uuid.uuid4().hex}", s3.options)


def is_put(method: str, path: str) -> bool:
    return method == "PUT"


def test_one_of_many_racing_creators_wins(store: Store) -> None:
    store_checks.one_of_many_racing_creators_wins(store)


@pytest.mark.parametrize("kind", ["slow down", "internal", "reset", "lost"])
def test_transient_errors_are_retried(store: Store, s3: S3, kind: str) -> None:
    with s3.fault(kind, times=3):
        store.replace("a/b", b"bytes")
    with s3.fault(kind, times=3):
        assert store.read("a/b") == b"bytes"
    with s3.fault(kind, times=3):
        assert store.list("a") == ["b"]
    with s3.fault(kind, times=3) as fault:
        store.rename("a/b", "c")
    assert fault.hits == 3
    assert store.read("c") == b"bytes"
    assert not store.exists("a/b")


def signed(method: str, path: str) -> bool:
    return "X-Amz-Algorithm=AWS4-HMAC-SHA256" in path


@pytest.mark.parametrize("kind", ["delay", "slow down", "internal", "reset", "lost", "cut"])
def test_large_reads_go_past_the_client(store: Store, s3: S3, kind: str, tmp_path: Path) -> None:
    store_checks.large_reads_go_past_the_client(store, s3, kind, signed, tmp_path)


def test_objects_whose_plain_requests_are_refused_are_read_by_the_client(store: Store, s3: S3, tmp_path: Path) -> None:
    store.replace("a", b"bytes")
    (tmp_path / "a").touch()
    remote = remote_file(f"{store.url}/a", {**s3.options, "default_block_size": 1})  # a filesystem of its own
    with s3.fault("expired", signed) as fault:
        for _ in range(3):
            copy_range(remote, 1, 5, str(tmp_path / "a"), 0)
    assert fault.hits == 1
    assert (tmp_path / "a").read_bytes() == b"ytes"


def test_a_create_whose_answer_is_lost_is_ours_by_content(store: Store, s3: S3) -> None:
    with s3.fault("lost", is_put, times=1) as fault:
        store.create("commit", b"ours")
    assert fault.hits == 1
    assert store.read("commit") == b"ours"
    with s3.fault("lost", is_put, times=1):
        assert not store.create("commit", b"theirs", check_first=False)
    assert store.read("commit") == b"ours"


def test_a_store_that_stays_busy_is_an_error_of_one_line(store: Store, s3: S3) -> None:
    with s3.fault("slow down"), pytest.raises(OSError, match="reading s3://") as caught:
        store.read("x")
    assert "\n" not in str(caught.value)
    assert "Service Unavailable (" in str(caught.value)


def test_expired_credentials_are_reported_once_and_never_shown(store: Store, s3: S3) -> None:
    with s3.fault("expired") as fault, pytest.raises(PermissionError, match="renew the credentials") as caught:
        store.replace("x", b"1")
    assert fault.hits == 1, "it is not retried"
    assert SECRET not in str(caught.value)
    assert str(caught.value).startswith(f"writing {store.url}/x: refused: ")


def test_an_upload_that_fails_is_aborted(store: Store, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "TRIES", 1)
    with (
        s3.fault("internal", lambda method, path: "partNumber=2" in path) as fault,
        pytest.raises(OSError, match="internal error"),
        store.writer("large.npy") as file,
    ):
        file.truncate(120 * 2**20)
    assert fault.hits
    assert not store.exists("large.npy")
    assert not [upload for upload in uploads(store) if upload["Key"].endswith("large.npy")]


def test_gc_ends_the_uploads_of_killed_writers(store: Store) -> None:
    """Those to committed partitions; to other partitions only when told that no worker runs."""
    fabricated.make_out(store, *fabricated.clustered(8, 8, 2), [4, 4], skip=[1])
    begun = [f"img_emb/img_emb_{name}.npy" for name in ("0000-cafecafe", "0001-cafecafe")]
    for name in [*begun, "strange.npy"]:
        bucket, _, key = f"{store._root}/{name}".partition("/")
        store._fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)

    def left() -> list[str]:
        keys = (f"{BUCKET}/{upload['Key']}" for upload in uploads(store))
        return sorted(key.removeprefix(f"{store._root}/") for key in keys if key.startswith(f"{store._root}/"))

    assert left() == [*begun, "strange.npy"]
    assert gc(store) == [f"{begun[0]} (unfinished upload)"]
    assert gc(store) == []
    assert gc(store, everything=True) == [f"{begun[1]} (unfinished upload)"]
    assert left() == ["strange.npy"]


def test_an_upload_goes_through_faults(store: Store, s3: S3) -> None:
    store_checks.an_upload_goes_through_faults(store, s3, is_put)


def test_a_server_that_cannot_refuse_keeps_the_last_pointer(store: Store, s3: S3) -> None:
    for kind, wins in (("unconditional", 2), ("unknown header", 2)):
        with s3.fault(kind):
            assert store.create(kind, b"first")
            assert not store.create(kind, b"second"), "who looks sees the first"
            assert [store.create(kind, b"%d" % number, check_first=False) for number in range(2)] == [True] * wins
            assert store.read(kind) == b"1"


def test_doctor_says_which_kind_it_is(store: Store, s3: S3) -> None:
    def check() -> tuple[bool | None, str]:
        found = [one for one in doctor(store.url, StorageConfig(s3.options)) if one.name == "put-if-absent"]
        return found[0].ok, found[0].message

    assert check() == (True, "1 of 8 racing creators won: a name that is taken is refused")
    with s3.fault("unconditional"):
        assert check()[0] is None
        assert "the last pointer wins here" in check()[1]
    assert Store(f"s3://{BUCKET}", s3.options).list(os.path.basename(store.url)) == []


def test_wrong_options_are_one_line_without_secrets(s3: S3) -> None:
    with pytest.raises(ClipBatchError) as caught:
        Store("s3://bucket/x", {**s3.options, "config_kwargs": {"nonsense": SECRET}}).read("x")
    assert SECRET not in str(caught.value)


def uploads(store: Store) -> list[dict[str, str]]:
    found: list[dict[str, str]] = store._fs.list_multipart_uploads(BUCKET)
    return found
