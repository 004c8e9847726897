"""What the service measures of itself: clip-retrieval's histograms by their names, and ours."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

REQUEST = "full_knn_request_time"

STEPS = {
    "download_time": "fetching an image by its URL",
    "text_clip_inference_time": "encoding texts, a batch",
    "image_clip_inference_time": "encoding images, a batch",
    "metadata_get_time": "reading metadata",
    "knn_index_time": "searching the index",
    "dedup_time": "removing near duplicates",
    "safety_time": "judging safety",
    "image_prepro_time": "decoding and preprocessing an image",
    "text_prepro_time": "preparing a text; our encoders do that as they encode, so it counts nothing",
}
"""clip-retrieval's names, which dashboards know, and what they measure here; seconds."""

_FINE = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Traffic:
    """What is asked and answered of any service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ours, own = self.registry, "clip_batch_"
        self.requests = Counter(f"{own}requests", "answers", ["route", "status"], registry=ours)
        self.seconds = Histogram(
            f"{own}request_seconds", "from request to answer", ["route"], buckets=_FINE, registry=ours
        )
        self.pending = Gauge(f"{own}pending_requests", "requests at work or waiting", registry=ours)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)


class Metrics(Traffic):
    """The metrics of one search service."""

    def __init__(self) -> None:
        super().__init__()
        names = {REQUEST: "a search, from request to answer", **STEPS}
        self.steps = {
            name: Histogram(name, text, registry=self.registry, buckets=_FINE) for name, text in names.items()
        }
        ours, own = self.registry, "clip_batch_"
        self.batch = Histogram(
            f"{own}batch_queries", "queries encoded together", ["lane"], buckets=(1, 2, 4, 8, 16, 32), registry=ours
        )
        self.cache = Counter(f"{own}text_cache", "texts asked for", ["result"], registry=ours)
        self.rows = Gauge(f"{own}index_rows", "rows of the version that serves", ["index", "version"], registry=ours)
        self.swaps = Counter(f"{own}index_swaps", "versions that took the place of another", ["index"], registry=ours)

    def summary(self) -> str:
        """The steps of a search for people, the costliest first, with their share of a search."""
        count, mean = self._mean(REQUEST)
        if not count:
            return "No search was asked for yet.\n"
        rows = [("step", "what", "calls", "average", "share")]
        means = {name: self._mean(name) for name in STEPS}
        for name in sorted(STEPS, key=lambda name: -means[name][1]):
            calls, each = means[name]
            rows.append((name, STEPS[name], str(calls), f"{each:.4f}s", f"{100 * each / mean:.1f}%"))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return f"{count} searches, {mean:.4f} s each on average; their steps:\n\n" + "\n".join(lines) + "\n"

    def _mean(self, name: str) -> tuple[int, float]:
        values = {
            sample.name: sample.value for sample in next(iter(self.steps[name].collect())).samples if not sample.labels
        }
        count = values[f"{name}_count"]
        return int(count), values[f"{name}_sum"] / count if count else 0.0
