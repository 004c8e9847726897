"""Run img2dataset over a frozen list, until each of its shards stands whole in DIR/images.

    DIR/images/00000.tar, 00000.parquet, 00000_stats.json   a shard, the stats written last

img2dataset has an environment of its own, as its requirements clash with ours, so it is a process. It skips
the shards whose stats stand: running it again is resuming.
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
from clip_batch.launch.end2end.urls import FOLDER, IMAGES, UrlList
from clip_batch.storage.filesystem import own_options
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
"""Runs a command in a session of its own, all of which is killed when our end of its standard input closes, or the
command has ended: its processes would else outlive us, and write to the files of those that are started next."""

_PATIENCE = 5.0
"""Seconds for the processes of a run that was killed to go."""


def download(
    config: DownloadConfig,
    home: Store,
    frozen: UrlList,
    lock: int | None,
    max_pixels: int,
    options: dict[str, Any],
    say: Say,
) -> list[dict[str, Any]]:
    """Download what is missing; the stats of every shard, in order, as img2dataset wrote them.

    `lock` is what `alone` gave. ConfigError: there is no img2dataset, or it does not know an option. IncompleteError:
    shards are missing after all; what it said last is in the message.
    """
    stats = _stats(home, frozen)
    if not (missing := [shard for shard, one in enumerate(stats) if one is None]):
        say(f"download: all {frozen.shards:,} shards stand already")
        return [one for one in stats if one is not None]
    say(f"download: {len(missing):,} of {frozen.shards:,} shards are missing")
    command = _command(config, home, frozen)
    for shard in missing:  # cut off while it was written, img2dataset would take its shard for done
        home.remove(f"{IMAGES}/{_name(shard)}_stats.json")
    said = _run(command, _environment(home, max_pixels, options), lock, say)
    if said.startswith("ERROR:"):  # of its command line, which it reads to the end when it has downloaded
        raise ConfigError(f"img2dataset says {said!r}: mend --img2dataset-options, and give another --output")
    whole = [one for one in _stats(home, frozen) if one is not None]
    if len(whole) < frozen.shards:
        raise IncompleteError(
            f"{frozen.shards - len(whole)} of {frozen.shards} shards are not downloaded, img2dataset said {said!r}: "
            "run again"
        )
    return whole


@contextlib.contextmanager
def alone(home: Store) -> Iterator[int | None]:
    """Hold DIR for this run and what it starts, where it is on a local disk; the lock's descriptor.

    ConfigError: another run is at work there.
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
                    raise ConfigError(f"another end2end downloads into {home.url}: wait for it, or end it") from None
                time.sleep(0.1)
        yield file.fileno()


def tars(home: Store, stats: list[dict[str, Any]]) -> list[str]:
    """The tars that have images, as SPECs of a plan."""
    return [home.display(f"{IMAGES}/{_name(shard)}.tar") for shard, one in enumerate(stats) if one["successes"]]


def table_name(shard: int) -> str:
    """The Parquet file in which img2dataset tells of each URL of a shard."""
    return f"{IMAGES}/{_name(shard)}.parquet"


def _name(shard: int) -> str:
    return f"{shard:05d}"


def _stats(home: Store, frozen: UrlList) -> list[dict[str, Any] | None]:
    """Of each shard what img2dataset wrote last of it; None where it has not, or not to the end."""
    there = set(home.list(IMAGES))
    found: list[dict[str, Any] | None] = []
    for shard in range(frozen.shards):
        name = f"{_name(shard)}_stats.json"
        try:
            found.append(dict(home.read_json(f"{IMAGES}/{name}")) if name in there else None)
        except ValueError:
            found.append(None)
    return found


def _command(config: DownloadConfig, home: Store, frozen: UrlList) -> list[str]:
    program = shutil.which(os.path.expanduser(config.img2dataset))
    if not program:
        raise ConfigError(
            f"no img2dataset at {config.img2dataset!r}: python -m venv img2dataset && img2dataset/bin/pip install "
            "img2dataset, then --img2dataset img2dataset/bin/img2dataset"
        )
    ours = {
        "url_list": home.display(FOLDER),
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption" if frozen.captions else None,
        "save_additional_columns": config.save_columns or None,
        "output_folder": home.display(IMAGES),
        "output_format": "webdataset",
        "number_sample_per_shard": frozen.shard_samples,
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
    # Its command line evaluates values as Python literals; repr leaves no text to be taken for a number or a list.
    return [program, *(f"--{name}={value!r}" for name, value in options.items())]


def _environment(home: Store, max_pixels: int, options: dict[str, Any]) -> dict[str, str]:
    """Ours without what is only ours; nothing is sent to anyone, and an image is refused before it fills the memory."""
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
    if not home.local and options:  # fsspec reads them there; a command line would show them
        protocol = home.url.partition("://")[0]
        quiet[f"FSSPEC_{protocol.upper()}"] = json.dumps(own_options(protocol, options))
    return {**kept, **quiet}


def _run(command: list[str], environment: dict[str, str], lock: int | None, say: Say) -> str:
    """Run img2dataset to its end, telling how far it is; what it said is wrong, or else its last line."""
    last, wrong, broken = "", "", False
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
            if line.startswith("ERROR:"):  # of its command line; a page of help follows
                wrong = line.strip()
            if broken and not line.startswith(" "):
                break  # it has failed, but waits for a process of its own that never ends
            broken = broken or "fire.Fire(" in line
    finally:
        keeper.stdin.close()
        keeper.wait()
        keeper.stdout.close()
    return wrong or last
