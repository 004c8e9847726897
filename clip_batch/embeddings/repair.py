"""repair and gc: retire the commits that verify finds wrong, and remove the files that no commit names."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from clip_batch.embeddings import workers
from clip_batch.embeddings.commits import read_commits
from clip_batch.embeddings.renewal import Renewal, renewals
from clip_batch.plan import paths
from clip_batch.plan.stored import load_plan, unused_files
from clip_batch.storage.paths import TEMPORARY
from clip_batch.storage.store import Store


def repair(
    store: Store, problems: Iterable[str], reasons: Collection[str] = ()
) -> tuple[list[int], dict[int, Renewal]]:
    """Remove the commits of the partitions that `verify` found wrong, so that they run again.

    Returns their numbers, and the partitions that are to be embedded with their input as it is now for the sake of
    `reasons` (see `renewals`): the commits of these that are sound stay until then.
    """
    plan = load_plan(store)
    numbers = sorted(int(name) for name in problems)
    renew = renewals(store, plan, reasons) if reasons else {}
    if numbers or renew:
        workers.remove_records(store)
    for number in numbers:
        store.remove(paths.commit(plan.name(number)))
    renew = {number: one._replace(attempt="") if number in numbers else one for number, one in renew.items()}
    return [number for number in numbers if number not in renew], renew


def gc(store: Store, everything: bool = False, dry_run: bool = False) -> list[str]:
    """Remove the data files that no commit names, and unfinished uploads to S3; returns their names.

    With `dry_run` nothing is removed, and the names of uploads are left out.

    In a committed partition, such a file belongs to an attempt that lost. In an uncommitted one it may belong to a
    worker that is running now, so it is kept unless `everything` says that no worker is, and no planner.
    """
    commits = read_commits(store)
    named = {name for commit in commits.values() for name in commit.files}
    removed = []
    for folder in (*paths.DATA_FOLDERS, paths.COMMITS):

        def orphan(base: str, folder: str = folder) -> bool:
            attempt = paths.parse_attempt(base)
            if attempt is None or f"{folder}/{base}" in named:
                return folder == paths.COMMITS and TEMPORARY in base and everything
            return everything or attempt[0] in commits

        for base in filter(orphan, store.list(folder)):
            removed.append(f"{folder}/{base}")
            if not dry_run:
                store.remove(removed[-1])
        if not dry_run:
            removed += [f"{folder}/{base} (unfinished upload)" for base in store.abort_uploads(folder, orphan)]
    for name in unused_files(store) if everything else ():  # of planners that died
        removed.append(name)
        if not dry_run:
            store.remove(name)
    return removed
