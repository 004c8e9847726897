"""Leaves out of input what other OUTs have planned (`plan --except`): tars by URL and content, pictures by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from clip_batch.errors import InputError, PlanError, some
from clip_batch.plan.folders import is_listed, known_as, planned_names, shards_of
from clip_batch.plan.growth import named, planned_shards
from clip_batch.plan.stored import load_plan
from clip_batch.samples.files import Folder
from clip_batch.samples.listings import ListedSample
from clip_batch.storage.store import Store
from clip_batch.types import UNREADABLE, Plan, Shard, counted


def leave_out(
    shards: list[Shard],
    folders: dict[str, Folder],
    others: Sequence[Store],
    own: tuple[Store, Plan] | None,
    say: Callable[[str], None],
) -> None:
    """Take out of `shards` those that other OUTs have planned, unless the plan of this one (`own`) has them too.

    Of folders, `folders` loses the samples that others have. PlanError: another OUT has no plan, or an
    old one, which does not know the names in its folders. InputError: nothing is left.
    """
    for store in others:
        plan = load_plan(store)
        before = len(shards)
        if plan.format == "files":
            left_out, what = _leave_out_pictures(shards, folders, store, plan, own), "picture"
            shards[:] = [shard for shard in shards if shard.url not in folders or folders[shard.url].samples]
        else:
            planned, ours = planned_shards(store, plan), planned_shards(*own) if own else {}
            known = [shard for shard in shards if shard.url in planned and shard.url not in ours]
            same = {shard.url for shard in known if _content(shard) == _content(planned[shard.url])}
            if others_content := [shard.url for shard in known if shard.url not in same]:
                say(f"{named(len(others_content), 'input', f'other than {store.url} planned it', others_content)}")
            shards[:] = [shard for shard in shards if shard.url not in same]
            left_out, what = before - len(shards), "input"
        say(f"{counted(left_out, what)} left out, as {store.url} has planned them")
    if not shards:
        raise InputError(
            f"nothing is left to plan: {some([store.url for store in others])} have planned all of the input"
        )


def _content(shard: Shard) -> tuple[int | None, str | None]:
    return shard.size, shard.etag


def _leave_out_pictures(
    shards: Sequence[Shard], folders: dict[str, Folder], store: Store, plan: Plan, own: tuple[Store, Plan] | None
) -> int:
    """Take out of `folders` what a plan has of them; the number of samples."""
    count, planned = 0, shards_of(plan)
    for shard in shards:
        if shard.etag == UNREADABLE or shard.url not in planned:
            continue
        now = folders[shard.url]
        if is_listed(plan, shard.url):
            names = planned_names(store, plan, shard.url)
        elif planned[shard.url][-1].etag == shard.etag:
            names = {_known(key, files, plan) for key, files in now.samples}
        else:
            raise PlanError(f"an older version planned {shard.url} in {store.url}: it cannot be told what of it is new")
        names -= planned_names(*own, shard.url) if own else set()
        left = [(key, files) for key, files in now.samples if _known(key, files, plan) not in names]
        count += len(now.samples) - len(left)
        folders[shard.url] = now._replace(samples=left)
    return count


def _known(key: str, files: dict[str, str], plan: Plan) -> str:
    return known_as(ListedSample(key, dict.fromkeys(files.values(), (None, None))), plan.image_extensions)
