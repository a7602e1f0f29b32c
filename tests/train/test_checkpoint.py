"""Training states and the log of metrics, as a killed run leaves them."""

import json

import pytest
import torch
from fixtures_model import replicated
from torch import nn

from umarvel_ray.errors import CheckpointError
from umarvel_ray.train.checkpoint import MetricsLog, latest_state, restore, save_state
from umarvel_ray.train.gather import Lanes
from umarvel_ray.train.strategy import Replicated


class Two(nn.Module):
    """A body of two layers, of which one trains, and a scalar beside it."""

    def __init__(self, seed: int, width: int = 2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1))
        self.model[1].requires_grad_(False)
        self.temperature = nn.Parameter(torch.tensor(1.0 + seed))


def trained(seed: int, steps: int) -> tuple[Two, Replicated]:
    model = Two(seed)
    strategy = replicated(model, Lanes(1), weight_decay=0.1)
    for _ in range(steps):
        (model.model(torch.randn(4, 3)) * model.temperature).sum().backward()
        strategy.step(0.1)
    return model, strategy


def test_a_state_comes_back_to_the_last_bit(tmp_path):
    model, strategy = trained(0, steps=3)
    save_state(tmp_path, strategy.state(), step=3, keep=2, facts={"seed": 7})
    other = Two(1)
    frozen = {name: tensor.clone() for name, tensor in other.model[1].state_dict().items()}
    state = latest_state(tmp_path)
    assert state is not None and state.step == 3 and state.facts["seed"] == 7
    restore(other, state, where=tmp_path)
    other_strategy = replicated(other, Lanes(1), weight_decay=0.1)
    other_strategy.set_moments(state.tensors, step=3)
    assert all(torch.equal(other.model[1].state_dict()[name], tensor) for name, tensor in frozen.items())
    other.model[1].load_state_dict(model.model[1].state_dict())
    for _ in range(2):  # a state is whole if the next steps are the same
        inputs = torch.randn(4, 3)
        for mine, how in ((model, strategy), (other, other_strategy)):
            (mine.model(inputs) * mine.temperature).sum().backward()
            how.step(0.1)
        before, after = strategy.state(), other_strategy.state()
        assert before.keys() == after.keys() and len(before) == 9
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_newest_whole_state_counts_and_old_ones_go_but_the_best(tmp_path):
    _, strategy = trained(0, steps=1)
    assert latest_state(tmp_path) is None
    for step in (5, 10, 15):
        save_state(tmp_path, strategy.state(), step=step, keep=2, best=step == 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step-000010", "step-000015"]
    assert json.loads((tmp_path / "best" / "state.json").read_text())["step"] == 5
    (tmp_path / ".step-000020.abc.tmp").mkdir()  # what a process killed while writing leaves
    newest = latest_state(tmp_path)
    assert newest is not None and newest.step == 15


def test_a_state_of_another_model_is_refused(tmp_path):
    model, strategy = trained(0, steps=1)
    save_state(tmp_path, strategy.state(), step=1, keep=1)
    state = latest_state(tmp_path)
    assert state is not None
    model.requires_grad_(True)
    with pytest.raises(CheckpointError, match=r"step-000001: .* 2 differ \(first: model.1.bias\)"):
        restore(model, state, where=tmp_path)
    with pytest.raises(CheckpointError, match=r"step-000001: .*first: model\.0\.(bias|weight)"):
        restore(Two(0, width=4), state, where=tmp_path)


def test_the_log_drops_lines_of_steps_that_run_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, steps_done=0)
    for step in (1, 2, 3, 4, 5):
        log.write({"step": step, "loss": step / 10})
    log.close()
    log = MetricsLog(path, steps_done=3)
    log.write({"step": 4, "loss": 9.0})
    log.close()
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(entry["step"], entry["loss"]) for entry in entries] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 9.0)]


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', "", "\n", '{"step": 3, "loss": 0.3}'])
def test_the_log_survives_a_half_written_line(tmp_path, rest):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 0.2}\n' + rest)
    log = MetricsLog(path, steps_done=2)
    log.write({"step": 3, "loss": 0.5})
    log.close()
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(entry["step"], entry["loss"]) for entry in entries] == [(1, 0.1), (2, 0.2), (3, 0.5)]
