"""Measures throughput, p50 and p99 of text queries to a running service at 1, 8 and 32 clients.

    python -m tests.bench.serve [--index INDEX] [--seconds 10] [--other URL --name INDEX_NAME] [--flags ...] [--record]

Without `--index`, an index of 2,000 random pictures is made with the demo's model. `--other` sends the same requests to
one more service, such as clip-retrieval's `back` over the same index and model: both answer /knn-service. Each query is
a text that was never asked before, so that no cache helps; `cached` asks one text again and again.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import re
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.bench import result
from tests.bench.text import WORDS
from tests.servers.serving import make_index, running


def texts(seed: int) -> Any:
    """Texts of eight words and a number: no two alike."""
    draw = random.Random(seed)
    return (f"{' '.join(draw.choices(WORDS, k=8))} {seed} {number}" for number in itertools.count())


def load(url: str, name: str, clients: int, seconds: float, cached: bool) -> dict[str, float]:
    """`clients` ask one after another for some seconds, after a short warm-up that does not count."""
    address, took, failed = urlsplit(url), list[float](), list[int]()
    begin = time.perf_counter() + 1
    end = begin + seconds

    def client(number: int) -> None:
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
        for text in itertools.repeat("a red cat") if cached else texts(number + int(begin * 1000) * 64):
            asked = {"text": text, "modality": "image", "num_images": 20, "num_result_ids": 20, "indice_name": name}
            body = json.dumps({**asked, "deduplicate": False, "aesthetic_score": "", "aesthetic_weight": ""})
            started = time.perf_counter()
            if started >= end:
                break
            connection.request("POST", "/knn-service", body, {"content-type": "application/json"})
            answer = connection.getresponse()
            found = json.loads(answer.read())
            if started >= begin:
                took.append(time.perf_counter() - started)
                if answer.status != 200 or len(found) != 20:
                    failed.append(answer.status)

    threads = [threading.Thread(target=client, args=[number]) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took.sort()
    return {
        "queries_per_second": round(len(took) / seconds, 1),
        "p50_ms": round(1000 * took[len(took) // 2], 1),
        "p99_ms": round(1000 * took[int(0.99 * len(took))], 1),
        "failed": len(failed),
    }


def steps(url: str) -> dict[str, float]:
    """Mean milliseconds of each step, as /metrics tells."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        values = dict(re.findall(r"^(\w+_time_(?:sum|count)) (\S+)$", answer.read().decode(), re.MULTILINE))
    names = [name.removesuffix("_count") for name, value in values.items() if name.endswith("_count") and float(value)]
    return {name: round(1000 * float(values[f"{name}_sum"]) / float(values[f"{name}_count"]), 2) for name in names}


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--index", default="")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--other", default="")
    parser.add_argument("--name", default="index")
    parser.add_argument("--flags", nargs="*", default=[], help="more flags of `serve`, without their dashes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        index = options.index or make_index(Path(folder), 2000, model="demo")
        figures: dict[str, Any] = {"index": options.index or "2,000 random pictures, demo model"}
        with running({"index": index}, *(f"--{flag}" for flag in options.flags)) as url:
            for clients in (1, 8, 32):
                figures[f"{clients} clients"] = load(url, "index", clients, options.seconds, False)
                if options.other:
                    other = load(options.other, options.name, clients, options.seconds, False)
                    figures[f"{clients} clients, other"] = other
            figures["steps_ms"] = steps(url)
            figures["32 clients, cached"] = load(url, "index", 32, options.seconds, True)
    rows = [row for clients in (1, 8, 32) for row in _rows(figures, clients)]
    cached = figures["32 clients, cached"]["queries_per_second"]
    rows.append(result.Row("cached", "a text that was asked before, 32 clients", "queries/s", cached))
    result.report("serve", "serve", options, rows, figures)


def _rows(figures: dict[str, Any], clients: int) -> list[result.Row]:
    ours, other = figures[f"{clients} clients"], figures.get(f"{clients} clients, other")
    rows = []
    for key, field, what, unit in (
        ("clients", "queries_per_second", f"new text queries, {clients} clients, {figures['index']}", "queries/s"),
        ("p50", "p50_ms", f"p50 at {clients} clients", "ms"),
        ("p99", "p99_ms", f"p99 at {clients} clients", "ms"),
    ):
        ratio = None
        if other:
            more = ours[field] / other[field]
            ratio = round(more if key == "clients" else 1 / more, 2)
        peer = other[field] if other else None
        rows.append(result.Row(f"{key}_{clients}", what, unit, ours[field], peer, "the other service", ratio))
    return rows


if __name__ == "__main__":
    main()
