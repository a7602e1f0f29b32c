"""Figures of a run as Ray's metrics: every node's agent serves them to Prometheus as `ray_umarvel_*`."""

import sys
from functools import lru_cache
from typing import Any

_TAGS = ("job",)


def publish(figures: dict[str, float], *, job: str) -> None:
    """Set gauges `umarvel_NAME` of a job; nothing where this process has no Ray."""
    if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
        return
    for name, value in figures.items():
        _gauge(name).set(float(value), tags={"job": job})


@lru_cache(maxsize=64)
def _gauge(name: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(f"umarvel_{name}", description=f"{name} of the job that runs", tag_keys=_TAGS)
