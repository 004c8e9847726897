"""verify --index: checks that the files of the live version are those that its manifest names."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from shlex import quote

from clip_batch.embeddings.verify import VerifyReport, check_file
from clip_batch.errors import CorruptError
from clip_batch.index import kept, publications, removals
from clip_batch.index.ann import faiss_index
from clip_batch.index.manifest import IndexShard, Manifest, load_manifest
from clip_batch.index.metadata import MetadataFile
from clip_batch.index.versions import folders_of
from clip_batch.storage.npy import open_matrix
from clip_batch.storage.store import Store


def verify_index(store: Store, deep: bool = False) -> VerifyReport:
    """Check that the live version of INDEX is complete: sizes and rows, and with `deep` every byte.

    That includes what only `merge --add` reads (see `clip_batch.index.kept`), the removal lists, and whether CURRENT
    and the log of publications agree. `deep` also opens every index and metadata file and compares their rows.
    """
    wrong = publications.problems(store)
    try:
        manifest = load_manifest(store, publications.read_state(store, mending=False).version)
    except CorruptError as error:
        others = [name for name in folders_of(store) if publications.is_finished(store, name)]
        remedy = f"; clip-batch versions --index {quote(store.url)} --use goes back to {' or '.join(others)}"
        return VerifyReport(problems={"what is live": f"{error}{remedy if others else ''}", **wrong})
    report = VerifyReport(checked=len(manifest.shards), rows=manifest.rows, problems=wrong)
    offset = 0
    for shard in manifest.shards:
        problem = _check_index_shard(store, manifest, shard, deep)
        if shard.offset != offset:
            problem = problem or f"starts at id {shard.offset}, the shards before it end at {offset}"
        if problem:
            report.problems[f"index shard {shard.name}"] = problem
        offset += shard.rows
    for modality, files in manifest.single.items():
        for name, stored in files.items():
            if problem := check_file(store, name, stored, deep):
                report.problems[f"{modality} index"] = problem
    for modality, predictions in manifest.predicted.items():
        for kind, prediction in predictions.items():
            for name, stored in prediction["file"].items():
                if problem := check_file(store, name, stored, deep):
                    report.problems[f"predictor of {kind} queries in the {modality} index"] = problem
    for name, stored in manifest.replaced.items():
        if problem := check_file(store, name, stored, deep):
            report.problems["replaced rows"] = problem
    for source in manifest.sources:
        for name, stored in source.held.items():
            if problem := check_file(store, name, stored, deep):
                report.problems[f"shards held of {source.output}"] = problem
    report.problems |= dict(kept.problems(store, manifest, deep))
    with ThreadPoolExecutor(16) as pool:  # there may be thousands
        report.problems |= filter(None, pool.map(partial(_check_removals, store), removals.names(store)))
    if offset != manifest.rows:
        report.problems["manifest"] = f"{offset} rows in shards, {manifest.rows} in all"
    return report


def _check_removals(store: Store, digest: str) -> tuple[str, str] | None:
    """What is wrong with a removal list, by its name, or None."""
    try:
        removals.load(store, digest)
    except CorruptError as error:
        return f"removal list {digest}", str(error)
    return None


def _check_index_shard(store: Store, manifest: Manifest, shard: IndexShard, deep: bool) -> str | None:
    for name, stored in shard.files.items():
        whole = manifest.paths(shard).file(name)
        if problem := check_file(store, whole, stored, deep):
            return problem
        if deep and (problem := _check_index_file(store, whole, name, shard.rows)):
            return problem
    return None


def _check_index_file(store: Store, whole: str, name: str, rows: int) -> str | None:
    """Open a file of a shard and compare its rows; the problem, or None."""
    try:
        with store.fetch(whole) as path:
            if name.startswith("metadata/"):
                count = MetadataFile(path).rows
            elif name.endswith(".npy"):
                count = len(open_matrix(path))
            else:
                count = int(faiss_index.read(path, mapped=True).ntotal)
    except CorruptError as error:
        return str(error)
    # A row may have no caption; of an OUT whose plan had captions alone, no row has an image.
    fewer = (name.startswith("text") and count < rows) or (name.startswith("image") and not count)
    if count != rows and not fewer:
        return f"{whole} holds {count} rows, the manifest says {rows}"
    return None
