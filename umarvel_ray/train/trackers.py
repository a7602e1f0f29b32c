"""Where figures go besides `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow; each if asked for."""

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any, Protocol

from umarvel_ray.errors import ConfigError
from umarvel_ray.storage import Place
from umarvel_ray.train.settings import TrackerName

_PACKAGES: dict[TrackerName, str] = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


class Tracker(Protocol):
    """Takes the figures of each step."""

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """Note the numbers among `figures`."""
        ...

    def close(self) -> None:
        """Done."""
        ...


class _TensorBoard:
    def __init__(self, folder: Place, name: str, settings: Mapping[str, Any], steps_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run wrote beyond its state will be written again.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=steps_done + 1)

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        for key, value in _numbers(figures).items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Place, name: str, settings: Mapping[str, Any], steps_done: int) -> None:
        wandb: Any = importlib.import_module("wandb")

        self._run: Any = wandb.init(
            dir=str(folder), name=name, id=name.replace("/", "-"), resume="allow", config=dict(settings)
        )

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        self._run.log(_numbers(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, folder: Place, name: str, settings: Mapping[str, Any], steps_done: int) -> None:
        mlflow: Any = importlib.import_module("mlflow")

        self._mlflow: Any = mlflow
        mlflow.start_run(run_name=name)
        mlflow.log_dict(dict(settings), "settings.json")

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        self._mlflow.log_metrics(_numbers(figures), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


_TRACKERS: dict[TrackerName, type[Any]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _Mlflow}


def require_trackers(names: tuple[TrackerName, ...]) -> None:
    """Look before the model loads.

    Raises:
        ConfigError: A tracker's package is not installed.
    """
    missing = [name for name in names if importlib.util.find_spec(_PACKAGES[name]) is None]
    if missing:
        raise ConfigError(
            f"train.trackers: {len(missing)} of {len(names)} not installed (first: {missing[0]}). "
            "pip install 'umarvel-ray[tracking]', or leave it out."
        )


def open_trackers(
    names: tuple[TrackerName, ...],
    folder: Place,
    *,
    name: str,
    settings: Mapping[str, Any],
    steps_done: int = 0,
) -> list[Tracker]:
    """Start them; `folder` is the stage's."""
    return [_TRACKERS[tracker](folder, name, settings, steps_done) for tracker in names]


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in figures.items() if isinstance(value, int | float) and key != "step"}
