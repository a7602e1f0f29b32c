"""A stage killed and started again ends like one that never stopped; a number gone wrong stops it."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_model import write_nli
from safetensors.torch import load_file
from torch import nn

from umarvel_ray.data.records import Query
from umarvel_ray.errors import TrainingError
from umarvel_ray.model.encoder import Encoder
from umarvel_ray.model.settings import EncoderSettings, LoraSettings
from umarvel_ray.train.checkpoint import latest_state
from umarvel_ray.train.gather import Lanes
from umarvel_ray.train.loop import Watchers, train
from umarvel_ray.train.settings import (
    ContrastiveSettings,
    NliData,
    StageConfig,
    TrainSettings,
    ValidationSettings,
)
from umarvel_ray.train.stage import train_stage
from umarvel_ray.train.strategy import Replicated


class Killed(Exception):
    """Stands for the end of a process."""


def stage(backbone: str, folder: Path, output: str, **train_settings: Any) -> StageConfig:
    return StageConfig(
        start=backbone,
        output=str(folder / output),
        seed=11,
        data=NliData(kind="nli", path=str(folder / "nli.csv"), use_hard_negatives=True),
        train=TrainSettings(
            **{
                "lora": LoraSettings(rank=2, alpha=4, dropout=0.1),
                "learn_temperature": True,
                "batch_size": 4,
                "num_steps": 6,
                "learning_rate": 0.01,
                "save_every": 3,
                "max_tokens": 120,
            }
            | train_settings
        ),
        loss=ContrastiveSettings(),
    )


def metrics(output: str) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in entry.items() if key not in ("queries_per_s", "waited_s")}
        for entry in entries
    ]


@pytest.mark.parametrize("num_lanes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_stopped_and_resumed_is_never_stopped(backbone, tmp_path, num_lanes):
    """Six steps over two epochs, a state every three; killed in the fourth and once more in the sixth."""
    write_nli(tmp_path)
    whole = stage(backbone, tmp_path, "whole")
    train_stage(whole, Lanes(num_lanes))

    halves = stage(backbone, tmp_path, "halves")
    for last in (4, 6):

        def kill(entry: dict[str, Any], last: int = last) -> None:
            if entry["step"] == last:
                raise Killed

        with pytest.raises(Killed):
            train_stage(halves, Lanes(num_lanes), kill)
        assert [entry["step"] for entry in metrics(halves.output)] == list(range(1, last + 1))
        assert not (Path(halves.output) / "checkpoint").exists()
        torch.manual_seed(last)  # another process has another random state
    train_stage(halves, Lanes(num_lanes))

    assert metrics(halves.output) == metrics(whole.output)
    assert [entry["step"] for entry in metrics(whole.output)] == [1, 2, 3, 4, 5, 6]
    for name in ("states/step-000006/state.safetensors", "checkpoint/model.safetensors"):
        undisturbed, resumed = (load_file(Path(config.output) / name) for config in (whole, halves))
        assert undisturbed.keys() == resumed.keys()
        assert all(torch.equal(undisturbed[key], resumed[key]) for key in undisturbed), name
    settings = [(Path(config.output) / "checkpoint/embedding.json").read_text() for config in (whole, halves)]
    assert settings[0] == settings[1]


@pytest.mark.slow
def test_a_finished_stage_learned_and_stays_as_it_is(backbone, tmp_path):
    write_nli(tmp_path)
    config = stage(backbone, tmp_path, "out", num_steps=8, learning_rate=0.02)
    train_stage(config, Lanes(2))
    losses = [entry["loss"] for entry in metrics(config.output)]
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.1
    encoder = Encoder.load(Path(config.output) / "checkpoint")
    assert encoder.settings == EncoderSettings()
    learned = load_file(Path(config.output) / "states/step-000008/state.safetensors")["temperature"]
    assert encoder.temperature.item() == learned.item() != pytest.approx(0.05, abs=1e-4)
    assert encoder.embed_queries([Query(qid="nli:1", txt="a red kite")]).shape == (1, 32)
    before = (Path(config.output) / "checkpoint/model.safetensors").read_bytes()
    shutil.rmtree(Path(config.output) / "checkpoint")  # killed before its last file
    train_stage(config, Lanes(2))
    assert (Path(config.output) / "checkpoint/model.safetensors").read_bytes() == before
    assert len(metrics(config.output)) == 8


class Sums:
    """A task of one weight whose loss the test dictates."""

    def __init__(self, losses: list[float], gradients: list[float]) -> None:
        self.model = nn.Module()
        self.model.model = nn.Linear(1, 1, bias=False)
        self.weight = self.model.model.weight
        self.prepared: list[int] = []
        self._losses, self._gradients = losses, gradients
        self.looked: list[int] = []

    def prepare(self, step: int) -> int:
        self.prepared.append(step)
        return step

    def samples(self, prepared: int) -> list[str]:
        return [f"9:{prepared}", "9:x"]

    def backward(self, prepared: int, *, seed: int) -> dict[str, float]:
        self.weight.grad = torch.full_like(self.weight, self._gradients[prepared])
        return {"loss": self._losses[prepared]}

    def after_step(self) -> None:
        pass

    def validate(self) -> dict[str, float]:
        return {"score": self._losses[len(self.looked)], "step": self.looked.append(0) or 0.0}

    def close(self) -> None:
        pass


SETTINGS = TrainSettings(batch_size=2, num_steps=3, learning_rate=0.1, save_every=1)


def go(task: Sums, settings: TrainSettings, output: Path, **watchers: Any) -> None:
    train(
        task,
        Replicated(task.model, Lanes(1), settings),
        settings,
        num_steps=3,
        seed=0,
        output=output,
        state=latest_state(output / "states"),
        watchers=Watchers(**watchers),
    )


@pytest.mark.parametrize(
    ("losses", "gradients", "what"),
    [
        ([1.0, math.nan, 1.0], [1.0, 1.0, 1.0], "loss is nan"),
        ([1.0] * 3, [1.0, math.inf, 1.0], "grad_norm is inf"),
    ],
)
def test_a_number_that_is_not_finite_stops_the_run_before_the_weights_take_it(
    tmp_path, losses, gradients, what
):
    task = Sums(losses, gradients)
    with pytest.raises(TrainingError, match=rf"step 2: {what} for a batch of 2 records \(first: 9:1\)"):
        go(task, SETTINGS, tmp_path)
    assert [entry["step"] for entry in metrics(str(tmp_path))] == [1]
    stored = load_file(tmp_path / "states/step-000001/state.safetensors")
    assert torch.equal(stored["model.weight"], task.weight.detach()) and task.weight.isfinite().all()


def test_each_step_is_prepared_once_in_order(tmp_path):
    task = Sums([1.0] * 3, [1.0] * 3)
    seen: list[dict[str, Any]] = []
    go(task, SETTINGS, tmp_path, on_step=seen.append)
    assert task.prepared == [0, 1, 2]
    assert [entry["step"] for entry in seen] == [1, 2, 3]
    assert seen[0]["learning_rate"] == pytest.approx(0.1) and not task.model.training
    go(task, SETTINGS, tmp_path, on_step=seen.append)
    assert task.prepared == [0, 1, 2] and len(seen) == 3


def test_the_best_state_on_held_out_queries_is_kept(tmp_path):
    """Scores of 0.2, 0.9 and 0.5 after steps 1, 2 and 3; a resumed run remembers the best."""
    settings = SETTINGS.model_copy(
        update={"keep_last": 1, "validation": ValidationSettings(queries=1, every=1)}
    )
    go(Sums([0.2, 0.9, 0.5], [1.0] * 3), settings, tmp_path)
    states = {
        path.name: json.loads((path / "state.json").read_text()) for path in (tmp_path / "states").iterdir()
    }
    assert {name: state["step"] for name, state in states.items()} == {"best": 2, "step-000003": 3}
    assert states["step-000003"]["best"] == 0.9
    assert [entry["validation_score"] for entry in metrics(str(tmp_path))] == [0.2, 0.9, 0.5]


def test_a_worker_that_must_go_leaves_its_state(tmp_path):
    """Told in the first step; a state would otherwise be due at the end alone."""
    told = iter([True, False, False])
    settings = SETTINGS.model_copy(update={"save_every": 100, "keep_last": 9})
    go(Sums([1.0] * 3, [1.0] * 3), settings, tmp_path, must_save=lambda: next(told))
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == ["step-000001", "step-000003"]


def test_the_rate_grows_with_the_root_of_the_batch():
    """Table 4: from 480 queries at 1e-4 to 1920 at 2e-4."""
    settings = TrainSettings(batch_size=1920, num_steps=1, learning_rate=1e-4, rate_of_batch_size=480)
    assert settings.rate == pytest.approx(2e-4)
    assert settings.model_copy(update={"rate_of_batch_size": None}).rate == 1e-4


def test_length_is_given_in_steps_or_epochs():
    both = {"batch_size": 2, "learning_rate": 0.1}
    assert TrainSettings(**both, num_steps=7).steps(100) == 7
    assert TrainSettings(**both, num_epochs=1.5).steps(100) == 150
    assert TrainSettings(**both, num_epochs=0.001).steps(100) == 1
    for wrong in ({}, {"num_steps": 3, "num_epochs": 1}):
        with pytest.raises(ValueError, match="num_steps or num_epochs"):
            TrainSettings(**both, **wrong)
