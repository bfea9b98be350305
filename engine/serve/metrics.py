"""What `/metrics` shows."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TILES = (1, 2, 3, 4, 6, 8, 12, 16, 32)


class Metrics:
    """The figures of one service."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter("gdpo_requests", "requests answered", ["path", "code"], registry=r)
        self.seconds = Histogram("gdpo_upscale_seconds", "from a request to its picture", buckets=_SECONDS, registry=r)
        self.pixels = Counter("gdpo_input_pixels", "pixels of the pictures that were upscaled", registry=r)
        self.batch = Histogram(
            "gdpo_batch_tiles", "tiles that went through the model at once", buckets=_TILES, registry=r
        )
        self.waiting = Gauge("gdpo_waiting", "accepted requests whose turn has not come", registry=r)
        self.running = Gauge("gdpo_running", "pictures that are worked on", registry=r)
