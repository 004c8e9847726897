"""Prometheus metrics that any of the services keeps."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

PREFIX = "clip_batch_"

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
"""Upper bounds of the histogram buckets of durations."""


class Traffic:
    """Requests and responses of one service, in a registry that it shares with no other."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            f"{PREFIX}requests", "responses by route and status", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            f"{PREFIX}request_seconds",
            "time from request to response",
            ["route"],
            registry=self.registry,
            buckets=SECONDS,
        )
        self.pending = Gauge(
            f"{PREFIX}pending_requests", "requests that are handled now or wait", registry=self.registry
        )

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
