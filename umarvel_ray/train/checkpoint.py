"""Training state on disk: what was trained, its moments, and how far it got; whole or not at all.

Batches and dropout are pure functions of seed and step: a state needs neither data position nor random state.
It is the same whatever the strategy and the number of workers, so that a training may go on with others.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from umarvel_ray.artifacts import atomic_folder, atomic_write, read_json, write_json
from umarvel_ray.errors import CheckpointError
from umarvel_ray.storage import Place, RemotePath, local_file, remove_tree

_TENSORS, _STATE = "state.safetensors", "state.json"
_REMOTE_PAUSE_S = 10.0
BEST = "best"
"""Beside the newest states: the one that was best on the validation slice."""


@dataclass(frozen=True, slots=True)
class State:
    """A training state.

    Attributes:
        step: Optimizer steps done.
        tensors: Of `Strategy.state`.
        facts: What else was noted.
    """

    step: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def save_state(
    folder: Place,
    tensors: Mapping[str, Tensor],
    *,
    step: int,
    keep: int,
    facts: Mapping[str, Any] | None = None,
    best: bool = False,
) -> None:
    """Write `folder/step-NNNNNN` and drop all but the `keep` newest; as `folder/best` too, if it is."""
    written = {name: tensor.contiguous() for name, tensor in tensors.items()}
    for name in (f"step-{step:06d}", *([BEST] if best else [])):
        with atomic_folder(folder / name) as place:
            save_file(written, place / _TENSORS)
            write_json(place / _STATE, {"step": step, **(facts or {})})
    for old in _states(folder)[:-keep]:
        remove_tree(old)


def latest_state(folder: Place, *, most: int | None = None) -> State | None:
    """The newest state, of `most` steps where given; None where there is none."""
    states = [path for path in _states(folder) if most is None or _step_of(path) <= most]
    if not states:
        return None
    facts = read_json(states[-1] / _STATE)
    return State(int(facts["step"]), load_file(local_file(states[-1] / _TENSORS)), facts)


def latest_step(folder: Place) -> int:
    """Steps done in the newest state; 0 where there is none."""
    states = _states(folder)
    return _step_of(states[-1]) if states else 0


def restore(model: nn.Module, state: State, *, where: Place) -> None:
    """Put a state's weights into the model.

    Raises:
        CheckpointError: The state is of another model.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    shapes = {name: tensor.shape for name, tensor in state.tensors.items() if "/" not in name}
    wanted = {name: parameter.shape for name, parameter in trained.items()}
    if shapes != wanted:
        odd = sorted(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name))
        raise CheckpointError(
            f"{where}/step-{state.step:06d}: holds other parameters than this model trains: {len(odd)} "
            f"differ (first: {odd[0]}). Remove the folder to train this stage again."
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state.tensors[name])


class MetricsLog:
    """`metrics.jsonl`: one line a step; on resume, lines of steps that will run again are dropped.

    Object storage cannot append: there the file is written anew now and then, and at the end.
    """

    def __init__(self, path: Place, *, steps_done: int) -> None:
        self._path = path
        self._lines = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # the line that was being written when the process died
                    break
                if entry["step"] <= steps_done:
                    self._lines.append(line + "\n")
        self._write_all()
        self._file = None if isinstance(path, RemotePath) else path.open("a", encoding="utf-8")

    def write(self, entry: dict[str, Any]) -> None:
        """Append one step."""
        line = json.dumps(entry) + "\n"
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            return
        self._lines.append(line)
        if time.monotonic() - self._written > _REMOTE_PAUSE_S:
            self._write_all()

    def close(self) -> None:
        """Done."""
        if self._file is not None:
            self._file.close()
        else:
            self._write_all()

    def _write_all(self) -> None:
        with atomic_write(self._path) as file:
            file.writelines(self._lines)
        self._written = time.monotonic()


def _step_of(path: Place) -> int:
    return int(path.name.removeprefix("step-"))


def _states(folder: Place) -> list[Place]:
    """Whole ones, oldest first."""
    return sorted(
        (path for path in folder.iterdir() if path.name.startswith("step-") and (path / _STATE).exists())
        if folder.is_dir()
        else [],
        key=lambda path: path.name,
    )
