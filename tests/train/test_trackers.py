"""Figures reach TensorBoard; a tracker that is not installed is refused before anything loads."""

import importlib.util

import pytest

from umarvel_ray.errors import ConfigError
from umarvel_ray.train.trackers import open_trackers, require_trackers


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else object())
    require_trackers(("tensorboard", "mlflow"))
    with pytest.raises(ConfigError, match=r"1 of 2 not installed \(first: wandb\)"):
        require_trackers(("tensorboard", "wandb"))


@pytest.mark.slow
def test_tensorboard_gets_the_numbers(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (tracker,) = open_trackers(("tensorboard",), tmp_path, name="a", settings={})
    for step in (1, 2):
        tracker.write(step, {"step": step, "loss": 1 / step, "note": "words"})
    tracker.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
