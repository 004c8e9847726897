"""The folders of serve/: search and worker share http/, and neither imports the other."""

from __future__ import annotations

import pytest

from tests.test_layers import FILES, imports

ALLOWED = {"http": {"http"}, "search": {"http", "search"}, "worker": {"http", "worker"}}


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("clip_batch.serve.")])
def test_search_and_worker_share_http_alone(name: str) -> None:
    folder = name.split(".")[2]
    targets = {target.split(".")[2] for target in imports(name) if target.startswith("clip_batch.serve.")}
    assert targets <= ALLOWED[folder]
