"""Counters for Prometheus: worker processes show them beside Dask's own, at /metrics."""

from __future__ import annotations

from typing import Any

from tilenet.engine.meter import Spans

__all__ = ["count", "start"]

_HELP = {
    "pixels": "Pixels of masks that were finished",
    "tiles_forwarded": "Tiles that went through the network",
    "strip_bytes": "Bytes of strips and halves written to the run folder",
    "read_seconds": "Seconds spent reading pixels, added up over threads",
    "forward_seconds": "Seconds spent in the network, added up over threads",
    "write_seconds": "Seconds spent joining and writing, added up over threads",
}
_counters: dict[str, Any] = {}


def start() -> None:
    """Begin to count, if prometheus_client is installed."""
    if _counters:
        return
    try:
        from prometheus_client import Counter
    except ImportError:
        return
    # The client adds _total to the names.
    _counters.update({name: Counter(f"tilenet_{name}", text) for name, text in _HELP.items()})


def count(spans: Spans) -> None:
    """Add what a task measured."""
    if not _counters:
        return
    values = {
        "pixels": spans.pixels,
        "tiles_forwarded": spans.forwarded,
        "strip_bytes": spans.strip_bytes,
        "read_seconds": spans.read,
        "forward_seconds": spans.forward_seconds,
        "write_seconds": spans.write,
    }
    for name, value in values.items():
        _counters[name].inc(max(0.0, value))
