"""Training state on disk: what was trained, the optimizer, and how far it got; whole or not at all.

Batches and dropout are pure functions of seed and step: a state needs neither data position nor random state.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from umarvel_ray.artifacts import atomic_folder, atomic_write, read_json, write_json
from umarvel_ray.errors import CheckpointError

_WEIGHTS, _OPTIMIZER, _STATE = "trained.safetensors", "optimizer.pt", "state.json"


def save_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int, keep: int
) -> None:
    """Write `folder/step-NNNNNN` and drop all but the `keep` newest."""
    with atomic_folder(folder / f"step-{step:06d}") as place:
        save_file(_trained(model), place / _WEIGHTS)
        torch.save(optimizer.state_dict(), place / _OPTIMIZER)
        write_json(place / _STATE, {"step": step})
    for old in _states(folder)[:-keep]:
        shutil.rmtree(old)


def restore_latest(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest state into model and optimizer.

    Returns:
        The number of steps done; 0 where there is no state.

    Raises:
        CheckpointError: The state is of another model.
    """
    states = _states(folder)
    if not states:
        return 0
    newest = states[-1]
    trained = _trained(model)
    stored = load_file(newest / _WEIGHTS)
    shapes, wanted = ({name: tensor.shape for name, tensor in half.items()} for half in (stored, trained))
    if shapes != wanted:
        odd = sorted(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name))
        raise CheckpointError(
            f"{newest}: holds other parameters than this model trains: {len(odd)} differ (first: {odd[0]}). "
            "Remove the folder to train this stage again."
        )
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.copy_(stored[name])
    optimizer.load_state_dict(torch.load(newest / _OPTIMIZER, weights_only=True))
    return int(read_json(newest / _STATE)["step"])


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


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}


def _states(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / _STATE).exists())
