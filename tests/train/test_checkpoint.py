"""Training states and the log of metrics, as a killed run leaves them."""

import json

import pytest
import torch
from torch import nn

from umarvel_ray.errors import CheckpointError
from umarvel_ray.train.checkpoint import MetricsLog, restore_latest, save_state
from umarvel_ray.train.optimizer import make_optimizer


def trained_model(seed: int, steps: int, width: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1)).requires_grad_(True)
    model[1].requires_grad_(False)
    optimizer = make_optimizer(model, weight_decay=0.1, betas=(0.9, 0.999))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for _ in range(steps):
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_a_state_comes_back_to_the_last_bit(tmp_path):
    model, optimizer = trained_model(0, steps=3)
    save_state(tmp_path, model, optimizer, step=3, keep=2)
    other, other_optimizer = trained_model(1, steps=0)
    frozen = {name: tensor.clone() for name, tensor in other[1].state_dict().items()}
    assert restore_latest(tmp_path, other, other_optimizer) == 3
    for name, tensor in model[0].state_dict().items():
        assert torch.equal(other[0].state_dict()[name], tensor)
    assert all(torch.equal(other[1].state_dict()[name], tensor) for name, tensor in frozen.items())
    before, after = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert before.keys() == after.keys()
    assert all(
        torch.equal(torch.as_tensor(before[n][k]), torch.as_tensor(after[n][k]))
        for n in before
        for k in before[n]
    )


def test_the_newest_whole_state_counts_and_old_ones_go(tmp_path):
    model, optimizer = trained_model(0, steps=1)
    assert restore_latest(tmp_path, model, optimizer) == 0
    for step in (5, 10, 15):
        save_state(tmp_path, model, optimizer, step=step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-000015"]
    (tmp_path / ".step-000020.abc.tmp").mkdir()  # what a process killed while writing leaves
    assert restore_latest(tmp_path, model, optimizer) == 15


def test_a_state_of_another_model_is_refused(tmp_path):
    model, optimizer = trained_model(0, steps=1)
    save_state(tmp_path, model, optimizer, step=1, keep=1)
    model.requires_grad_(True)
    with pytest.raises(CheckpointError, match=r"step-000001: .* 2 differ \(first: 1.bias\)"):
        restore_latest(tmp_path, model, optimizer)
    wider, wider_optimizer = trained_model(0, steps=1, width=4)
    with pytest.raises(CheckpointError, match=r"step-000001: .*first: 0\.(bias|weight)"):
        restore_latest(tmp_path, wider, wider_optimizer)


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
