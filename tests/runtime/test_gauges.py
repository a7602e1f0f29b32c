"""Figures become Ray's gauges where there is Ray, and nothing where there is none."""

import subprocess
import sys

import pytest

from umarvel_ray.runtime import metrics


def test_without_ray_nothing_is_published_and_nothing_imported():
    program = (
        "import sys\nfrom umarvel_ray.runtime.metrics import publish\n"
        "publish({'done': 1.0}, job='embed')\nassert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_figures_are_gauges_by_job(ray_session, monkeypatch):
    from ray.util.metrics import Gauge

    told: list[tuple[str, float, dict[str, str]]] = []

    def note(self: Gauge, value: float, tags: dict[str, str]) -> None:
        told.append((self.info["name"], value, tags))
        original(self, value, tags)  # Ray refuses a name or a tag that it does not know

    original = Gauge.set
    monkeypatch.setattr(Gauge, "set", note)
    metrics.publish({"done": 3, "total": 7}, job="embed with hard")
    metrics.publish({"done": 4}, job="embed with hard")
    tags = {"job": "embed with hard"}
    assert told == [("umarvel_done", 3.0, tags), ("umarvel_total", 7.0, tags), ("umarvel_done", 4.0, tags)]
