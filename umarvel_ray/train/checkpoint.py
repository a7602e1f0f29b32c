"""Training state on disk: what was trained, its moments, and how far it got; whole or not at all.

Batches and dropout are pure functions of seed and step: a state needs neither data position nor random state.
It is the same whatever the strategy and the number of workers, so that a training may go on with others.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from umarvel_ray.artifacts import atomic_folder, atomic_write, read_json, write_json
from umarvel_ray.errors import CheckpointError

_TENSORS, _STATE = "state.safetensors", "state.json"
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
    folder: Path,
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
        shutil.rmtree(old)


def latest_state(folder: Path) -> State | None:
    """The newest state; None where there is none."""
    states = _states(folder)
    if not states:
        return None
    facts = read_json(states[-1] / _STATE)
    return State(int(facts["step"]), load_file(states[-1] / _TENSORS), facts)


def restore(model: nn.Module, state: State, *, where: Path) -> None:
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
    """`metrics.jsonl`: one line a step; on resume, lines of steps that will run again are dropped."""

    def __init__(self, path: Path, *, steps_done: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # the line that was being written when the process died
                    break
                if entry["step"] <= steps_done:
                    kept.append(line + "\n")
        with atomic_write(path) as file:
            file.writelines(kept)
        self._file = path.open("a", encoding="utf-8")

    def write(self, entry: dict[str, Any]) -> None:
        """Append one step."""
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Done."""
        self._file.close()


def _states(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / _STATE).exists())
