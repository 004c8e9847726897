"""status, verify, repair and gc: what is done, whether it is sound, and mending what is not."""

from __future__ import annotations

import sys
from dataclasses import asdict

from clip_batch.cli.arguments import Options, answer
from clip_batch.cli.embed import report


def status(options: Options) -> int:
    """Done, failed, missing, rate, ETA, and the command that relaunches what is missing."""
    from clip_batch.embeddings.status import describe, status
    from clip_batch.storage.store import Store

    found = status(Store(options.output, options.storage.storage_options))
    answer(options, found, describe(found))
    return 0


def verify(options: Options) -> int:
    """Prove that OUT, or an index, is complete and sound; exit 1 and the names of what is not."""
    from clip_batch.embeddings.verify import verify_output
    from clip_batch.index.verify import verify_index
    from clip_batch.storage.store import Store

    store_options = options.storage.storage_options
    if options.target.index:
        found = verify_index(Store(options.index, store_options), options.target.deep)
    else:
        found = verify_output(Store(options.output, store_options), options.target.deep, store_options)
    for name, problem in found.problems.items():
        print(f"{name}: {problem}", file=sys.stderr)
    proof = "deep" if options.target.deep else "quick"
    text = f"{found.checked - len(found.problems)} of {found.checked} sound ({proof}), {found.rows:,} rows"
    text += f", {found.failed:,} listed as failed" if found.failed else ""
    answer(options, {"ok": found.ok, **asdict(found)}, text)
    return 0 if found.ok else 1


def repair(options: Options) -> int:
    """Run again only what verify names."""
    from clip_batch.embeddings.repair import repair
    from clip_batch.embeddings.verify import verify_output
    from clip_batch.launch import local
    from clip_batch.storage.store import Store

    store_options = options.storage.storage_options
    store = Store(options.output, store_options)
    numbers = repair(store, verify_output(store, options.target.deep, store_options).problems)
    return report(options, local.run_worker(options.output, numbers, options.embed, options.storage))


def gc(options: Options) -> int:
    """Remove what no commit names."""
    from clip_batch.embeddings.repair import gc
    from clip_batch.storage.store import Store

    removed = gc(Store(options.output, options.storage.storage_options), options.target.everything)
    answer(options, removed, f"{len(removed)} files removed")
    return 0
