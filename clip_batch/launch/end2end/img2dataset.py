"""Running img2dataset over a frozen list, until DIR/images has each of its shards.

    DIR/images/00000.tar, 00000.parquet, 00000_stats.json   a shard; the stats are written last

img2dataset runs as a process in an environment of its own, because its requirements conflict with ours. It skips
the shards whose stats exist, so running it again resumes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

from clip_batch.config import DownloadConfig
from clip_batch.encoders.device import cores
from clip_batch.errors import ConfigError, IncompleteError
from clip_batch.launch.end2end import paths
from clip_batch.launch.end2end.urls import UrlList
from clip_batch.storage.filesystem import protocol_options
from clip_batch.storage.store import Store

Say = Callable[[str], None]

_KEEPER = """
exec 3<&0
"$@" </dev/null 3<&- 2>&1 &
child=$!
(read -r _ <&3; kill -KILL 0) >/dev/null 2>&1 &
wait "$child"
kill -KILL 0
"""
"""Runs a command in a new session, and kills the session when our end of its standard input closes or the command ends.
Otherwise its processes would outlive us and write to the files of the run that is started next."""

_PATIENCE = 5.0
"""Seconds to wait for the processes of an earlier run that was killed to end."""


def download(
    config: DownloadConfig,
    home: Store,
    url_list: UrlList,
    lock: int | None,
    max_pixels: int,
    options: dict[str, Any],
    say: Say,
) -> list[int]:
    """Download the missing shards, and return the number of images in every shard, in order.

    `lock` is what `exclusive` yielded. Raises ConfigError if there is no img2dataset or it rejects an option, and
    IncompleteError, with img2dataset's last line, if shards are still missing.
    """
    images = _image_counts(home, url_list)
    missing = [shard for shard, count in enumerate(images) if count is None]
    if not missing:
        say(f"download: all {url_list.shards:,} shards are downloaded already")
        return [count for count in images if count is not None]
    say(f"download: {len(missing):,} of {url_list.shards:,} shards are missing")
    command = _command(config, home, url_list)
    for shard in missing:  # img2dataset would take a shard for complete if a truncated stats file of it is there
        home.remove(paths.stats(shard))
    last_line = _run(command, _environment(home, max_pixels, options), lock, say)
    if last_line.startswith("ERROR:"):  # img2dataset rejects unknown options only after it has downloaded
        raise ConfigError(f"img2dataset says {last_line!r}: correct --img2dataset-options, and give another --output")
    complete = [count for count in _image_counts(home, url_list) if count is not None]
    if len(complete) < url_list.shards:
        raise IncompleteError(
            f"{url_list.shards - len(complete)} of {url_list.shards} shards are not downloaded, img2dataset said "
            f"{last_line!r}: run again"
        )
    return complete


@contextlib.contextmanager
def exclusive(home: Store) -> Iterator[int | None]:
    """Lock DIR for this run and its processes, and yield the lock's descriptor; None if DIR is not on a local disk.

    Raises ConfigError if another run has the lock.
    """
    import fcntl

    if not home.local:
        yield None
        return
    os.makedirs(home.path(""), exist_ok=True)
    with open(home.path(".download.lock"), "w") as file:
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ConfigError(f"another end2end downloads into {home.url}: wait for it, or stop it") from None
                time.sleep(0.1)
        yield file.fileno()


def tars(home: Store, images: list[int]) -> list[str]:
    """Return the tars of the shards that have images, as SPECs of a plan."""
    return [home.display(paths.tar(shard)) for shard, count in enumerate(images) if count]


def _image_counts(home: Store, url_list: UrlList) -> list[int | None]:
    """Return the number of images in each shard; None if its stats are missing or truncated."""
    existing = {f"{paths.IMAGES}/{name}" for name in home.list(paths.IMAGES)}
    counts: list[int | None] = []
    for shard in range(url_list.shards):
        name = paths.stats(shard)
        try:
            counts.append(int(home.read_json(name)["successes"]) if name in existing else None)
        except ValueError:
            counts.append(None)
    return counts


def _command(config: DownloadConfig, home: Store, url_list: UrlList) -> list[str]:
    """Return img2dataset's command line. Raises ConfigError if there is no img2dataset, or an option is taken."""
    program = shutil.which(os.path.expanduser(config.img2dataset))
    if not program:
        raise ConfigError(
            f"no img2dataset at {config.img2dataset!r}: python -m venv img2dataset && img2dataset/bin/pip install "
            "img2dataset, then --img2dataset img2dataset/bin/img2dataset"
        )
    ours = {
        "url_list": home.display(paths.URLS),
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption" if url_list.captions else None,
        "save_additional_columns": config.save_columns or None,
        "output_folder": home.display(paths.IMAGES),
        "output_format": "webdataset",
        "number_sample_per_shard": url_list.shard_samples,
        "incremental_mode": "incremental",
    }
    if taken := sorted(ours.keys() & config.img2dataset_options.keys()):
        raise ConfigError(f"img2dataset_options cannot have {', '.join(taken)}: end2end sets them itself")
    options = {
        "image_size": config.image_size,
        "resize_mode": config.resize_mode,
        "processes_count": config.download_processes or cores(),
        "thread_count": config.download_threads,
        "timeout": config.timeout,
        "retries": config.retries,
        "enable_wandb": False,
        **config.img2dataset_options,
        **ours,
    }
    # img2dataset evaluates the values as Python literals; repr keeps texts from being read as numbers or lists.
    return [program, *(f"--{name}={value!r}" for name, value in options.items())]


def _environment(home: Store, max_pixels: int, options: dict[str, Any]) -> dict[str, str]:
    """Return our environment without clip-batch's and Python's variables, with telemetry off and a limit of pixels."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CLIP_BATCH_", "PYTHON"))}
    quiet = {
        "WANDB_MODE": "disabled",
        "WANDB_ERROR_REPORTING": "false",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "OTEL_SDK_DISABLED": "true",
        "DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
        "OPENCV_IO_MAX_IMAGE_PIXELS": str(max_pixels),
    }
    if not home.local and options:  # fsspec reads them from here; on a command line others would see them
        protocol = home.url.partition("://")[0]
        quiet[f"FSSPEC_{protocol.upper()}"] = json.dumps(protocol_options(protocol, options))
    return {**kept, **quiet}


def _run(command: list[str], environment: dict[str, str], lock: int | None, say: Say) -> str:
    """Run img2dataset to its end, reporting its progress. Return the error it prints, otherwise its last line."""
    last, problem, failed = "", "", False
    keeper = subprocess.Popen(
        ["sh", "-c", _KEEPER, "sh", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
        pass_fds=[] if lock is None else [lock],
        start_new_session=True,
    )
    assert keeper.stdout and keeper.stdin
    try:
        for line in keeper.stdout:
            last = line.strip() or last
            if line.startswith("total"):
                say(f"download: {' '.join(line.split()).removeprefix('total - ')}")
            if line.startswith("ERROR:"):  # about its command line; a page of help follows
                problem = line.strip()
            if failed and not line.startswith(" "):
                break  # its traceback has ended, but it waits for a child process that never ends
            failed = failed or "fire.Fire(" in line
    finally:
        keeper.stdin.close()
        keeper.wait()
        keeper.stdout.close()
    return problem or last
