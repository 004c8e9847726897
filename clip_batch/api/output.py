"""status and verify, as functions."""

from __future__ import annotations

from clip_batch.config import StorageConfig
from clip_batch.config.paths import path_text
from clip_batch.embeddings import status as output_status
from clip_batch.embeddings.status import OutputStatus
from clip_batch.embeddings.verify import VerifyReport, verify_output
from clip_batch.index.paths import CURRENT, PUBLICATIONS
from clip_batch.storage.store import Store
from clip_batch.types import StrPath


def status(output: StrPath, *, storage: StorageConfig = StorageConfig()) -> OutputStatus:
    """What is done, failed and missing in OUT, at which rate, and the command that runs what is missing.

    PlanError: there is no plan.
    """
    StorageConfig.expect(storage=storage)
    return output_status.status(Store(path_text(output, "output"), storage.storage_options))


def verify(source: StrPath, *, deep: bool = False, storage: StorageConfig = StorageConfig()) -> VerifyReport:
    """Prove that OUT, or the live version of INDEX, is complete and sound; `problems` names what is not.

    Of INDEX, that no search finds a row that was removed is part of it; a remote one is searched only with `deep`.

    `deep` reads every byte, and of OUT the input again; without it, sizes and counts are compared. PlanError: `source`
    is neither.
    """
    StorageConfig.expect(storage=storage)
    store = Store(path_text(source, "source"), storage.storage_options)
    if store.exists(CURRENT) or store.list(PUBLICATIONS):
        from clip_batch.search.verify import verify_searches

        return verify_searches(source, deep, storage)
    return verify_output(store, deep, storage.storage_options)
