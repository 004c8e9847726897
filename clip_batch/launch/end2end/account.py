"""The account of a URL list: each URL is embedded, or listed as failed with its reason.

    DIR/failures.parquet   a row for each URL without a vector: its place in the list, url, stage, reason, message
    DIR/summary.json       written last: counts

img2dataset may record nothing of a URL, so its records are checked against the list.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from shlex import quote
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from clip_batch.embeddings.commits import read_commits
from clip_batch.errors import CorruptError, one_line
from clip_batch.launch.end2end import paths
from clip_batch.launch.end2end.urls import UrlList, read_frozen
from clip_batch.plan import paths as out
from clip_batch.storage.arrow import ParquetFile
from clip_batch.storage.store import Store

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("url", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
    ]
)
"""The columns of failures.parquet: those of `FailedUrl`."""

_MOST_MESSAGES = 20
"""The number of messages that the summary counts, the most frequent first; failures.parquet has all of them."""


class FailedUrl(NamedTuple):
    """A URL that has no vector: its place in the list, and the stage that failed with its reason and message."""

    row: int
    url: str | None
    stage: Literal["list", "download", "embed"]
    reason: str
    message: str


class Cause(NamedTuple):
    """Why a URL failed: a reason, which is one of a few words, and a message for people."""

    reason: str
    message: str


@dataclass(frozen=True)
class Account:
    """Counts: `urls` is `embedded` plus the sum of `failed`.

    `failed` maps "stage: reason" to the number of URLs; `messages` does so for the most frequent messages.
    """

    urls: int
    embedded: int
    failed: dict[str, int]
    messages: dict[str, int]


def read_account(home: Store) -> Account | None:
    """Return the account that is in DIR, or None if there is none yet."""
    try:
        return Account(**home.read_json(paths.SUMMARY))
    except FileNotFoundError:
        return None


def account(home: Store, url_list: UrlList, output: Store) -> Account:
    """Write and return the account of a list. Raises CorruptError if a URL was embedded, or failed, twice."""
    embedded, unreadable = _embed_results(url_list, output)
    failed, messages = Counter[str](), Counter[str]()
    with home.writer(paths.FAILURES) as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        for start, table in read_frozen(home, url_list):
            rows = list(_failed_urls(home, url_list, start, table, embedded, unreadable))
            writer.write_table(pa.Table.from_pylist([row._asdict() for row in rows], schema=SCHEMA))
            failed.update(f"{row.stage}: {row.reason}" for row in rows)
            messages.update(row.message for row in rows)
    result = Account(
        url_list.urls, int(embedded.sum()), dict(failed.most_common()), dict(messages.most_common(_MOST_MESSAGES))
    )
    home.replace(paths.SUMMARY, json.dumps(asdict(result), indent=1, ensure_ascii=False).encode())
    return result


def describe(result: Account) -> str:
    """Return the account as text for people."""
    lines = [f"{result.urls:,} URLs: {result.embedded:,} embedded, {result.urls - result.embedded:,} listed as failed"]
    lines += [f"  {count:,} {reason}" for reason, count in result.failed.items()]
    lines += [f"    {count:,} {message}" for message, count in result.messages.items()]
    return "\n".join(lines)


def _embed_results(url_list: UrlList, output: Store) -> tuple[npt.NDArray[np.uint8], dict[int, Cause]]:
    """Return how often each URL was embedded (n,), which is 0 or 1, and the failures of images by place in the list."""
    embedded, unreadable = np.zeros(url_list.urls, np.uint8), dict[int, Cause]()
    count = 0
    for commit in read_commits(output).values():
        if name := commit.file(out.METADATA):
            with output.open(name) as file:
                places = url_list.rows(ParquetFile(file).read(["key"])["key"])
            np.add.at(embedded, places, 1)
        if name := commit.file(out.FAILURES):
            with output.open(name) as file:
                table = ParquetFile(file).read()
            samples = [row for row in table.to_pylist() if row["key"] is not None]  # the other failures are of shards
            places = url_list.rows(pa.array([row["key"] for row in samples], pa.string()))
            count += len(samples)
            for place, row in zip(places.tolist(), samples, strict=True):
                unreadable[place] = Cause(row["reason"], row["message"])
    if embedded.max() > 1 or len(unreadable) < count or any(embedded[place] for place in unreadable):
        raise CorruptError(
            f"{output.url} has a sample twice: clip-batch verify --output {quote(output.url)} names more"
        )
    return embedded, unreadable


def _failed_urls(
    home: Store,
    url_list: UrlList,
    start: int,
    table: pa.Table,
    embedded: npt.NDArray[np.uint8],
    unreadable: dict[int, Cause],
) -> Iterator[FailedUrl]:
    """Yield each URL of a frozen file that was not embedded; the file begins at place `start` of the list."""
    urls, refused = table["url"].to_pylist(), table["refused"].to_pylist()
    for first in range(start, start + len(urls), url_list.shard_samples):
        last = min(first + url_list.shard_samples, start + len(urls))
        if embedded[first:last].all():
            continue
        downloads = _download_failures(home, url_list, first // url_list.shard_samples)
        for offset in np.flatnonzero(embedded[first:last] == 0).tolist():
            place = first + offset
            url, instead = urls[place - start], refused[place - start]
            if url is None:
                yield FailedUrl(place, instead, "list", "not_a_url", f"{instead!r:.200} is no http(s) URL")
            elif place in unreadable:
                yield FailedUrl(place, url, "embed", *unreadable[place])
            else:
                lost = Cause("lost", "img2dataset recorded nothing of it")
                yield FailedUrl(place, url, "download", *downloads.get(place, lost))


def _download_failures(home: Store, url_list: UrlList, shard: int) -> dict[int, Cause]:
    """Return what img2dataset recorded of the URLs of a shard, by place in the list; all of them count as failures."""
    with home.open(paths.records(shard)) as file:
        table = ParquetFile(file).read(["key", "status", "error_message"])
    places = url_list.rows(table["key"]).tolist()
    records = zip(table["status"].to_pylist(), table["error_message"].to_pylist(), strict=True)
    lost = Cause("lost", "img2dataset downloaded its image, but embed did not see it")
    return {
        place: lost if status == "success" else Cause(status, one_line(message))
        for place, (status, message) in zip(places, records, strict=True)
    }
