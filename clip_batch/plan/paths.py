"""The names of all files in OUT, relative to OUT. No other module spells one.

    img_emb/img_emb_<partition>-<attempt>.npy         text_emb/ likewise; counted only where a commit names them
    metadata/metadata_<partition>-<attempt>.parquet
    _clip_batch/plan.json, plan.parquet, config.yaml  the plan; plan.json is written last
    _clip_batch/extensions/<number>-<digest>.json     the partitions that were added to the plan with that digest
    _clip_batch/extensions/slices-<digest>.parquet    their slices, named by the file's sha256
    _clip_batch/listings/<digest>.parquet             what a planned folder of files had, named by its sha256
    _clip_batch/commits/<partition>.json              what each partition committed
    _clip_batch/renewed/<partition>-<attempt>.json    a commit that another one has replaced since, or was to replace
    _clip_batch/failures/failures_<partition>-<attempt>.parquet     samples that cannot be embedded
    _clip_batch/failures/attempts/<partition>-<attempt>.json        attempts that failed, and why
    _clip_batch/submissions/<id>.json                 what was handed to a scheduler
    _clip_batch/workers/<id>.json                     what each worker is doing and has done
    _clip_batch/look.json                             which partitions could be taken from slow workers
    _clip_batch/replacing.json                        that a planner is replacing the plan
    _clip_batch/logs/                                 the logs of SLURM jobs

<partition> is zero-padded (see `Plan.name`); <attempt> is random, so that no two attempts share a file.
"""

from __future__ import annotations

IN_RUN = "embeddings"
"""The name of OUT in the folder of `run` and `end2end`."""

OF_INDEX = "CURRENT"
"""A file that no OUT has and every index has, so that one is not taken for the other."""

HOME = "_clip_batch"
"""The folder of all that is not data."""

PLAN = f"{HOME}/plan.json"
SLICES = f"{HOME}/plan.parquet"
CONFIG = f"{HOME}/config.yaml"
EXTENSIONS = f"{HOME}/extensions"
LISTINGS = f"{HOME}/listings"
COMMITS = f"{HOME}/commits"
FAILURES = f"{HOME}/failures"
ATTEMPTS = f"{FAILURES}/attempts"
SUBMISSIONS = f"{HOME}/submissions"
WORKERS = f"{HOME}/workers"
LOOK = f"{HOME}/look.json"
RENEWED = f"{HOME}/renewed"
REPLACING = f"{HOME}/replacing.json"
LOGS = f"{HOME}/logs"

VECTORS = {"image": "img_emb", "text": "text_emb"}
"""The folder of each kind of vectors."""

METADATA = "metadata"

DATA_FOLDERS = (*VECTORS.values(), METADATA, FAILURES)
"""Folders whose files carry `<partition>-<attempt>` and count only if a commit names them."""


def extension(number: int, digest: str) -> str:
    """The extension of the plan with this digest, whose generations are 0 to `number` - 1.

    >>> extension(1, "0a1b2c3d4e5f67")
    '_clip_batch/extensions/0001-0a1b2c3d4e5f.json'
    """
    return f"{EXTENSIONS}/{number:04d}-{digest[:12]}.json"


def extension_slices(sha256: str) -> str:
    """The base name of the Parquet file of an extension, given its sha256."""
    return f"slices-{sha256[:12]}.parquet"


def commit(partition: str) -> str:
    """The commit of a partition, given its zero-padded number."""
    return f"{COMMITS}/{partition}.json"


def renewed(partition: str, attempt: str) -> str:
    """The copy of a commit that another one replaces."""
    return f"{RENEWED}/{partition}-{attempt}.json"


def data_file(folder: str, partition: str, attempt: str) -> str:
    """The file that an attempt at a partition writes in one of `DATA_FOLDERS`.

    >>> data_file("img_emb", "0003", "1a2b3c4d")
    'img_emb/img_emb_0003-1a2b3c4d.npy'
    """
    suffix = ".npy" if folder in VECTORS.values() else ".parquet"
    return f"{folder}/{folder.rsplit('/', 1)[-1]}_{partition}-{attempt}{suffix}"


def parse_attempt(name: str) -> tuple[int, str] | None:
    """(partition, attempt) of the base name of a data file, its spool or a failed attempt; None for any other."""
    stem = name.lstrip(".").split(".", 1)[0].rsplit("_", 1)[-1]
    partition, dash, attempt = stem.partition("-")
    return (int(partition), attempt) if dash and partition.isdigit() else None


def failed_attempt(partition: str, attempt: str) -> str:
    """The record of an attempt that failed."""
    return f"{ATTEMPTS}/{partition}-{attempt}.json"


def submission(id: str) -> str:
    """A submission by its id."""
    return f"{SUBMISSIONS}/{id}.json"


def worker(id: str) -> str:
    """The record of a worker."""
    return f"{WORKERS}/{id}.json"
