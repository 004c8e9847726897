"""A whole run by HTTP alone, over workers that `clip-batch serve-worker` started.

    python drive_by_http.py --input 'data/*.tar' --output OUT --index INDEX http://node1:1234 http://node2:1234

Each worker is given one task at a time. A worker that is busy, or that is lost, costs time alone: its task goes
to another one, and whatever was committed meanwhile is answered at once.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from typing import Any

POLL = 30
"""Seconds after which a worker answers 202 and goes on; shorter than what proxies allow a request."""

LOST = 5
"""Times in a row that a worker may fail to answer before it is given up."""


def post(worker: str, path: str, body: dict[str, Any]) -> dict[str, Any] | float:
    """The answer; or, where the worker has none yet, the seconds to wait. OSError: it cannot be reached."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {os.environ.get('CLIP_BATCH_TOKEN', '')}"}
    request = urllib.request.Request(worker + path, json.dumps({**body, "wait": POLL}).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=2 * POLL) as answer:
            if answer.status == 202:
                return 0.0
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        with error:
            detail = json.load(error)["detail"]
        if error.code == 503:
            return float(error.headers["retry-after"])
        raise SystemExit(f"{worker}{path} answers {error.code}: {detail}") from None


def drive(workers: list[str], path: str, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Post each body to one worker or another until it is answered; the answers, in order."""
    tasks: queue.Queue[int] = queue.Queue()
    answers: dict[int, dict[str, Any]] = {}
    errors: list[BaseException] = []
    for number in range(len(bodies)):
        tasks.put(number)

    def feed(worker: str) -> None:
        lost = 0
        while len(answers) < len(bodies) and not errors and lost < LOST:
            try:
                number = tasks.get(timeout=0.2)
            except queue.Empty:  # others are at the last ones, and may yet put them back
                continue
            pause = 0.0
            try:
                found = post(worker, path, bodies[number])
                lost = 0
            except SystemExit as error:
                errors.append(error)
                return
            except (OSError, ValueError):
                found, lost = 1.0, lost + 1
            if isinstance(found, dict):
                answers[number] = found
                print(f"{path} {number + 1} of {len(bodies)}: {worker}", flush=True)
            else:
                tasks.put(number)
                pause = found
            time.sleep(pause)

    threads = [threading.Thread(target=feed, args=[worker]) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    if len(answers) < len(bodies):
        raise SystemExit(f"no worker is left: run again, {len(bodies) - len(answers)} tasks of {path} are not done")
    return [answers[number] for number in range(len(bodies))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--index", required=True)
    parser.add_argument("--plan", type=json.loads, default={}, help='options of plan, as JSON: {"model": "ViT-B-32"}')
    parser.add_argument("workers", nargs="+")
    given = parser.parse_args()

    out = {"output": given.output}
    [plan] = drive(given.workers, "/v1/plan", [{**out, "input": given.input, **given.plan}])
    embedded = drive(given.workers, "/v1/embed", [{**out, "partition": n} for n in range(plan["partitions"])])
    rows = sum(one["commit"]["rows"] for one in embedded)
    failed = sum(sum(one["commit"]["failed"].values()) for one in embedded)
    print(f"{rows:,} samples embedded, {failed:,} listed as failed", flush=True)

    merge = {**out, "index": given.index}
    [trained] = drive(given.workers, "/v1/merge", [{**merge, "task": "train"}])
    shards = range(trained["index_shards"])
    drive(given.workers, "/v1/merge", [{**merge, "task": "shard", "shard": shard} for shard in shards])
    [merged] = drive(given.workers, "/v1/merge", [{**merge, "task": "manifest"}])
    print(f"{merged['manifest']['rows']:,} rows in {given.index}, version {merged['version']}")


if __name__ == "__main__":
    main()
