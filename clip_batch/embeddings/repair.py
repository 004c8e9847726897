"""repair and gc: put right what verify names, and remove what no commit names."""

from __future__ import annotations

from clip_batch.embeddings import workers
from clip_batch.embeddings.commits import read_commits
from clip_batch.plan import paths
from clip_batch.plan.plan import load_plan
from clip_batch.storage.paths import TEMPORARY
from clip_batch.storage.store import Store


def repair(store: Store, problems: dict[str, str]) -> list[int]:
    """Retire the commits that `verify` found wrong, so that their partitions run again; returns these."""
    plan = load_plan(store)
    numbers = sorted(int(name) for name in problems)
    if numbers:
        workers.remove_records(store)
    for number in numbers:
        store.remove(paths.commit(plan.name(number)))
    return numbers


def gc(store: Store, everything: bool = False) -> list[str]:
    """Remove data files, and uploads to S3, that no commit names; returns their names.

    A file of a committed partition that its commit does not name belongs to an attempt that lost,
    for certain. Files of uncommitted partitions may be some worker's, at work now: they are kept,
    unless `everything` says that none is.
    """
    commits = read_commits(store)
    named = {name for commit in commits.values() for name in commit.files}
    removed = []
    for folder in (*paths.DATA_FOLDERS, paths.COMMITS):

        def orphan(base: str, folder: str = folder) -> bool:
            found = paths.parse_attempt(base)
            if found is None or f"{folder}/{base}" in named:
                return folder == paths.COMMITS and TEMPORARY in base and everything
            return everything or found[0] in commits

        for base in filter(orphan, store.list(folder)):
            store.remove(f"{folder}/{base}")
            removed.append(f"{folder}/{base}")
        removed += [f"{folder}/{base} (unfinished upload)" for base in store.abort_uploads(folder, orphan)]
    return removed
