"""A whole run by HTTP alone, on workers that `clip-batch serve-worker` started.

    python drive_by_http.py --input 'data/*.tar' --output OUT --index INDEX http://node1:1234 http://node2:1234

Each worker gets one task at a time. If a worker is busy or lost, its task goes to another worker; that costs only time,
since a task that was committed meanwhile is answered at once.
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
"""Seconds after which a worker answers 202 and continues the task; shorter than the timeouts of proxies."""

LOST = 5
"""Consecutive requests that a worker may leave unanswered before it counts as lost."""


def post(worker: str, path: str, body: dict[str, Any]) -> dict[str, Any] | float:
    """Return the answer, or the seconds to wait if the worker has none yet. Raises OSError if it cannot be reached."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {os.environ.get('CLIP_BATCH_TOKEN', '')}"}
    request = urllib.request.Request(worker + path, json.dumps({**body, "wait": POLL}).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=2 * POLL) as response:
            if response.status == 202:
                return 0.0
            answer: dict[str, Any] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        with error:
            detail = json.load(error)["detail"]
        if error.code == 503:
            return float(error.headers["retry-after"])
        raise SystemExit(f"{worker}{path} answers {error.code}: {detail}") from None


def drive(workers: list[str], path: str, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Post each body to any worker until it is answered, and return the answers in order."""
    tasks: queue.Queue[int] = queue.Queue()
    answers: dict[int, dict[str, Any]] = {}
    errors: list[BaseException] = []
    for number in range(len(bodies)):
        tasks.put(number)

    def feed(worker: str) -> None:
        unanswered = 0
        while len(answers) < len(bodies) and not errors and unanswered < LOST:
            try:
                number = tasks.get(timeout=0.2)
            except queue.Empty:  # other threads have the last tasks and may still put them back
                continue
            pause = 0.0
            try:
                result = post(worker, path, bodies[number])
                unanswered = 0
            except SystemExit as error:
                errors.append(error)
                return
            except (OSError, ValueError):
                result, unanswered = 1.0, unanswered + 1
            if isinstance(result, dict):
                answers[number] = result
                print(f"{path} {number + 1} of {len(bodies)}: {worker}", flush=True)
            else:
                tasks.put(number)
                pause = result
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
    options = parser.parse_args()

    out = {"output": options.output}
    [plan] = drive(options.workers, "/v1/plan", [{**out, "input": options.input, **options.plan}])
    embedded = drive(options.workers, "/v1/embed", [{**out, "partition": n} for n in range(plan["partitions"])])
    commits = [answer["commit"] for answer in embedded]
    rows = sum(commit["rows"] for commit in commits)
    failed = sum(sum(commit["failed"].values()) for commit in commits)
    print(f"{rows:,} samples embedded, {failed:,} listed as failed", flush=True)

    merge = {**out, "index": options.index}
    [trained] = drive(options.workers, "/v1/merge", [{**merge, "task": "train"}])
    shards = range(trained["index_shards"])
    drive(options.workers, "/v1/merge", [{**merge, "task": "shard", "shard": shard} for shard in shards])
    [merged] = drive(options.workers, "/v1/merge", [{**merge, "task": "manifest"}])
    print(f"{merged['manifest']['rows']:,} rows in {options.index}, version {merged['version']}")


if __name__ == "__main__":
    main()
