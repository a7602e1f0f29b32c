"""The schedule's values, the groups, and the guard against numbers that are not finite."""

import math

import pytest
import torch
from torch import nn

from umarvel_ray.errors import TrainingError
from umarvel_ray.train.optimizer import (
    clip_gradients,
    learning_rate,
    make_optimizer,
    require_finite,
    set_learning_rate,
)


def rates(num_steps: int, warmup_ratio: float) -> list[float]:
    return [
        learning_rate(step, peak=2.0, num_steps=num_steps, warmup_ratio=warmup_ratio)
        for step in range(num_steps)
    ]


def test_the_rate_rises_in_a_line_and_falls_as_a_cosine():
    values = rates(100, 0.03)
    assert values[:4] == pytest.approx([2 / 3, 4 / 3, 2.0, 2.0])
    assert values[3 + 97 // 2] == pytest.approx(1 + math.cos(math.pi * 48 / 97))
    assert values[-1] == pytest.approx(1 + math.cos(math.pi * 96 / 97))
    assert values[2:] == sorted(values[2:], reverse=True)
    assert min(values) > 0


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.5, 1.0])
def test_short_runs_have_a_rate_in_every_step(num_steps, warmup_ratio):
    values = rates(num_steps, warmup_ratio)
    assert all(0 < value <= 2 for value in values) and max(values) == 2


def test_scalars_and_vectors_are_not_decayed():
    model = nn.ModuleDict({"linear": nn.Linear(3, 2)})
    model.register_parameter("temperature", nn.Parameter(torch.tensor(0.05)))
    model.register_parameter("frozen", nn.Parameter(torch.ones(2, 2), requires_grad=False))
    optimizer = make_optimizer(model, weight_decay=0.5, betas=(0.9, 0.99))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    linear = model["linear"]
    assert decay == {id(linear.weight): 0.5, id(linear.bias): 0.0, id(model.temperature): 0.0}
    assert optimizer.defaults["betas"] == (0.9, 0.99) and optimizer.defaults["eps"] == 1e-8
    set_learning_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


def test_a_gradient_is_clipped_to_the_norm_and_its_norm_told():
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_gradients(model, 10.0) == pytest.approx(5.0)
    assert model.weight.grad.tolist() == [[3.0, 4.0]]
    assert clip_gradients(model, 1.0) == pytest.approx(5.0)
    assert model.weight.grad.norm().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_stops_the_run(value):
    require_finite(step=3, samples=["9:1"], loss=0.5, grad_norm=1.0)
    with pytest.raises(TrainingError, match=rf"step 3: grad_norm is {value} .* 2 records \(first: 9:1\)"):
        require_finite(step=3, samples=["9:1", "9:2"], loss=0.5, grad_norm=value)
