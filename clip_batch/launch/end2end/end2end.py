"""`clip-batch end2end`: from a URL list to an index. Each stage resumes where it stopped.

The stages write DIR/urls, images, embeddings and index. DIR/failures.parquet and summary.json account for each URL.
"""

from __future__ import annotations

from collections.abc import Callable

from clip_batch.config import DownloadConfig, EmbedConfig, MergeConfig, PlanConfig, StorageConfig
from clip_batch.errors import InputError
from clip_batch.index.merge.merge import merge
from clip_batch.launch.end2end import paths
from clip_batch.launch.end2end.account import Account, account, read_account
from clip_batch.launch.end2end.img2dataset import download, exclusive, tars
from clip_batch.launch.end2end.urls import freeze
from clip_batch.launch.line import embed_all
from clip_batch.plan.plan import make_plan
from clip_batch.storage.store import Store

Say = Callable[[str], None]


def end2end(
    folder: str,
    download_config: DownloadConfig,
    plan_config: PlanConfig,
    embed_config: EmbedConfig,
    merge_config: MergeConfig,
    storage: StorageConfig,
    workers: int,
    say: Say,
) -> tuple[str, Account]:
    """Build an index of a URL list in `folder`; return the index's URL and the account of the list.

    Raises InputError if the list cannot be read or gives no image, IncompleteError if shards or partitions are missing
    (running it again resumes), Preempted, and what each stage raises.
    """
    options = storage.storage_options
    home, output, index = Store(folder, options), f"{folder}/{paths.OUTPUT}", f"{folder}/{paths.INDEX}"
    with exclusive(home) as lock:
        url_list = freeze(download_config, home, options)
        say(f"list: {url_list.urls:,} URLs in {url_list.shards:,} shards")
        for note in url_list.notes:
            say(f"list: {note}")
        images = download(download_config, home, url_list, lock, embed_config.max_pixels, options, say)
    store = Store(output, options)
    if inputs := tars(home, images):
        make_plan(inputs, output, plan_config, storage=storage, progress=lambda line: say(f"plan: {line}"))
        embed_all(output, embed_config, storage, workers, say)
    result = read_account(home) or account(home, url_list, store)
    if not result.embedded:
        raise InputError(f"none of {url_list.urls:,} URLs gave an image: {home.display(paths.FAILURES)} says why")
    merge(output, index, merge_config, storage=storage, progress=lambda line: say(f"merge: {line}"))
    return index, result
