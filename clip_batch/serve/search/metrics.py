"""Metrics of the search service: clip-retrieval's histograms under its own names, and some of ours."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from clip_batch.serve.http.metrics import PREFIX, SECONDS, Traffic

REQUEST = "full_knn_request_time"
"""clip-retrieval's name for the time of a whole search."""

STEPS = {
    "download_time": "fetching an image by its URL",
    "text_clip_inference_time": "encoding a batch of texts",
    "image_clip_inference_time": "encoding a batch of images",
    "metadata_get_time": "reading metadata",
    "knn_index_time": "searching the index",
    "dedup_time": "removing near duplicates",
    "safety_time": "judging safety",
    "image_prepro_time": "decoding and preprocessing an image",
    "text_prepro_time": "preparing a text; always 0 here, where this is part of encoding",
}
"""clip-retrieval's name of each step of a search, which dashboards rely on, and what the step does; in seconds."""


class Metrics(Traffic):
    """The metrics of one search service."""

    def __init__(self) -> None:
        super().__init__()
        names = {REQUEST: "a search, from request to response", **STEPS}
        self.steps = {
            name: Histogram(name, text, registry=self.registry, buckets=SECONDS) for name, text in names.items()
        }
        self.batch = Histogram(
            f"{PREFIX}batch_queries",
            "queries encoded together",
            ["lane"],
            registry=self.registry,
            buckets=(1, 2, 4, 8, 16, 32),
        )
        self.cache = Counter(
            f"{PREFIX}text_cache", "lookups in the cache of text vectors", ["result"], registry=self.registry
        )
        self.rows = Gauge(
            f"{PREFIX}index_rows", "rows of the version that is served", ["index", "version"], registry=self.registry
        )
        self.swaps = Counter(
            f"{PREFIX}index_swaps", "versions that replaced an older one", ["index"], registry=self.registry
        )

    def summary(self) -> str:
        """Return a table of the steps of a search for people: the slowest first, with their share of a search."""
        count, mean = self._mean(REQUEST)
        if not count:
            return "No search has been requested yet.\n"
        rows = [("step", "what", "calls", "average", "share")]
        means = {name: self._mean(name) for name in STEPS}
        for name in sorted(STEPS, key=lambda name: -means[name][1]):
            calls, seconds = means[name]
            rows.append((name, STEPS[name], str(calls), f"{seconds:.4f}s", f"{100 * seconds / mean:.1f}%"))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return f"{count} searches, {mean:.4f} s each on average; their steps:\n\n" + "\n".join(lines) + "\n"

    def _mean(self, name: str) -> tuple[int, float]:
        """Return how often a step ran and its mean duration in seconds."""
        (metric,) = self.steps[name].collect()
        values = {sample.name: sample.value for sample in metric.samples if not sample.labels}
        count = values[f"{name}_count"]
        return int(count), values[f"{name}_sum"] / count if count else 0.0
