"""Fetching single images out of tars."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from clip_batch.export.dataset.fetch import Fetch, Lost, Place
from clip_batch.samples.tar.links import linked_names
from clip_batch.samples.tar.scan import scan_links
from tests import corpus
from tests.servers.flaky import put


@pytest.fixture
def tar(tmp_path: Path) -> str:
    """A tar of a picture and links to it, and of a picture whose name is not UTF-8."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "0.jpg").write_bytes(corpus.jpeg(1))
    os.link(source / "0.jpg", source / "1.jpg")
    os.symlink("1.jpg", source / "2.jpg")
    (source / "caf\udce9.jpg").write_bytes(corpus.jpeg(2))
    subprocess.run(["tar", "--sort=name", "-C", source, "-cf", f"{tmp_path}/a.tar", "."], check=True)
    return f"{tmp_path}/a.tar"


def test_links_are_fetched_by_their_targets_place(tar: str) -> None:
    fetch = Fetch("tar", {}, 1, 2**20, False)
    rows = [Place(item.key, tar, item.offset, item.length) for item in corpus.samples(tar)]
    assert [row.key for row in rows] == ["./0", "./1", "./2", "./caf\\xe9"]
    assert [fetch(row) for row in rows] == [*[corpus.jpeg(1)] * 3, corpus.jpeg(2)]
    for key in ("./3", "./1.5"):
        with pytest.raises(Lost, match="no longer has member"):
            fetch(rows[0]._replace(key=key))


def test_links_of_a_remote_tar_are_those_of_the_local_one(tar: str) -> None:
    local = scan_links(tar)
    assert list(local.values()) == [["./1.jpg", "./2.jpg"]]
    assert scan_links(put("tars/links.tar", Path(tar).read_bytes())) == local
    assert linked_names(lambda: []) == {}
