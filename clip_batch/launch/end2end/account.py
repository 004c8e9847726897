"""What became of each URL of a list: embedded, or listed as failed with its reason.

    DIR/failures.parquet   a row each that has no vector: row in the list, url, stage, reason, message
    DIR/summary.json       written last: counts

What img2dataset tells of a URL is not trusted to be there: rows are counted against the list.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from clip_batch.embeddings.commits import read_commits
from clip_batch.errors import CorruptError, one_line
from clip_batch.launch.end2end.img2dataset import table_name
from clip_batch.launch.end2end.urls import UrlList, read_frozen
from clip_batch.plan import paths
from clip_batch.storage.arrow import ParquetFile
from clip_batch.storage.store import Store

FAILURES = "failures.parquet"
SUMMARY = "summary.json"

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("url", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
    ]
)

_MOST_MESSAGES = 20
"""Of what servers and decoders said, counted in the summary; each row's own is in the Parquet file."""


@dataclass(frozen=True)
class Account:
    """`urls` = `embedded` + the sum of `failed`, which maps "stage: reason" to a count, as `messages` does words."""

    urls: int
    embedded: int
    failed: dict[str, int]
    messages: dict[str, int]


def read_account(home: Store) -> Account | None:
    """What was found before; None while not all is committed."""
    try:
        return Account(**home.read_json(SUMMARY))
    except FileNotFoundError:
        return None


def account(home: Store, frozen: UrlList, output: Store) -> Account:
    """Find each URL in what img2dataset and embed recorded. CorruptError: one was embedded, or failed, twice."""
    embedded, unreadable = _of_embed(frozen, output)
    failed, messages = Counter[str](), Counter[str]()
    with home.writer(FAILURES) as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        for start, listed in read_frozen(home, frozen):
            rows = list(_failures(home, frozen, start, listed, embedded, unreadable))
            writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
            failed.update(f"{row['stage']}: {row['reason']}" for row in rows)
            messages.update(row["message"] for row in rows)
    found = Account(
        frozen.urls, int(embedded.sum()), dict(failed.most_common()), dict(messages.most_common(_MOST_MESSAGES))
    )
    home.replace(SUMMARY, json.dumps(asdict(found), indent=1, ensure_ascii=False).encode())
    return found


def describe(found: Account) -> str:
    """For people."""
    lines = [f"{found.urls:,} URLs: {found.embedded:,} embedded, {found.urls - found.embedded:,} listed as failed"]
    lines += [f"  {count:,} {reason}" for reason, count in found.failed.items()]
    lines += [f"    {count:,} {message}" for message, count in found.messages.items()]
    return "\n".join(lines)


def _of_embed(frozen: UrlList, output: Store) -> tuple[npt.NDArray[np.uint8], dict[int, tuple[str, str]]]:
    """How often each URL was embedded (n,): 0 or 1; and (reason, message) of those whose image it could not use."""
    embedded, unreadable = np.zeros(frozen.urls, np.uint8), dict[int, tuple[str, str]]()
    count = 0
    for commit in read_commits(output).values():
        if name := commit.file(paths.METADATA):
            with output.open(name) as file:
                numbers = frozen.rows(ParquetFile(file).read(["key"])["key"])
            np.add.at(embedded, numbers, 1)
        if name := commit.file(paths.FAILURES):
            with output.open(name) as file:
                table = ParquetFile(file).read()
            told = [row for row in table.to_pylist() if row["key"] is not None]  # others are of a shard
            numbers = frozen.rows(pa.array([row["key"] for row in told], pa.string()))
            count += len(told)
            for number, row in zip(numbers.tolist(), told, strict=True):
                unreadable[number] = row["reason"], row["message"]
    if embedded.max() > 1 or len(unreadable) < count or any(embedded[number] for number in unreadable):
        raise CorruptError(f"{output.url} has a sample twice: clip-batch verify --output {output.url} names more")
    return embedded, unreadable


def _failures(
    home: Store,
    frozen: UrlList,
    start: int,
    listed: pa.Table,
    embedded: npt.NDArray[np.uint8],
    unreadable: dict[int, tuple[str, str]],
) -> Iterator[dict[str, Any]]:
    """A row of `SCHEMA` for each URL of a frozen file that was not embedded."""
    urls, refused = listed["url"].to_pylist(), listed["refused"].to_pylist()
    for first in range(start, start + len(urls), frozen.shard_samples):
        last = min(first + frozen.shard_samples, start + len(urls))
        if embedded[first:last].all():
            continue
        told = _of_download(home, frozen, first // frozen.shard_samples)
        for row in first + np.flatnonzero(embedded[first:last] == 0):
            number = int(row)
            url, instead = urls[number - start], refused[number - start]
            if url is None:
                why = "list", "not_a_url", f"{instead!r:.200} is no http(s) URL"
            elif number in unreadable:
                why = "embed", *unreadable[number]
            else:
                why = "download", *told.get(number, ("lost", "img2dataset recorded nothing of it"))
            yield dict(zip(SCHEMA.names, (number, url if url is not None else instead, *why), strict=True))


def _of_download(home: Store, frozen: UrlList, shard: int) -> dict[int, tuple[str, str]]:
    """(reason, message) of the URLs of a shard, as img2dataset has them."""
    with home.open(table_name(shard)) as file:
        table = ParquetFile(file).read(["key", "status", "error_message"])
    numbers = frozen.rows(table["key"]).tolist()
    pairs = zip(table["status"].to_pylist(), table["error_message"].to_pylist(), strict=True)
    lost = ("lost", "img2dataset has its image, embed saw none")
    return {
        number: lost if status == "success" else (status, one_line(message))
        for number, (status, message) in zip(numbers, pairs, strict=True)
    }
