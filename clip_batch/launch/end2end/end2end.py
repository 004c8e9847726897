"""`clip-batch end2end`: from a URL list to an index, each stage going on where it was.

What the stages write lies in DIR/urls, images, embeddings and index; what became of each URL, in
DIR/failures.parquet and summary.json.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from clip_batch.config import DownloadConfig, EmbedConfig, MergeConfig, PlanConfig, StorageConfig
from clip_batch.errors import IncompleteError, InputError, Preempted
from clip_batch.index.merge.merge import merge
from clip_batch.launch import local
from clip_batch.launch.end2end.account import FAILURES, Account, account, read_account
from clip_batch.launch.end2end.img2dataset import alone, download, tars
from clip_batch.launch.end2end.urls import freeze
from clip_batch.plan.plan import make_plan
from clip_batch.storage.store import Store

Say = Callable[[str], None]


def end2end(
    folder: str,
    listed: DownloadConfig,
    planned: PlanConfig,
    embed: EmbedConfig,
    merged: MergeConfig,
    storage: StorageConfig,
    workers: int,
    say: Say,
) -> tuple[str, Account]:
    """The index made of a URL list in `folder`, and what became of each URL.

    InputError: the list cannot be read, or gave no image. IncompleteError: shards or partitions are missing; run
    again. Preempted, and what each stage raises.
    """
    home, output, index = Store(folder, storage.storage_options), f"{folder}/embeddings", f"{folder}/index"
    options = storage.storage_options
    with alone(home) as lock:
        frozen = freeze(listed, home, options)
        say(f"list: {frozen.urls:,} URLs in {frozen.shards:,} shards")
        stats = download(listed, home, frozen, lock, embed.max_pixels, options, say)
    store = Store(output, options)
    if found := tars(home, stats):
        make_plan(replace(planned, input=found), output, storage, lambda line: say(f"plan: {line}"))
        _embed(output, embed, storage, workers, say)
    became = read_account(home) or account(home, frozen, store)
    if not became.embedded:
        raise InputError(f"none of {frozen.urls:,} URLs gave an image: {home.display(FAILURES)} says why")
    merge(output, index, merged, storage, lambda line: say(f"merge: {line}"))
    return index, became


def _embed(output: str, config: EmbedConfig, storage: StorageConfig, workers: int, say: Say) -> None:
    """Embed what is not committed. IncompleteError: partitions failed."""
    if workers > 1:
        code = local.run_workers(output, workers, config, storage)
        if code == Preempted.exit_code:
            raise Preempted()
        failed = code != 0
    else:
        outcomes = [one for one in local.run_worker(output, None, config, storage) if one.state == "failed"]
        for one in outcomes:
            say(f"partition {one.partition} failed: {one.error}")
        failed = bool(outcomes)
    if failed:
        raise IncompleteError(f"partitions of {output} are not embedded: see clip-batch status --output {output}")
