"""Parameter groups, learning-rate schedule, clipping, and the guard against numbers that are not finite."""

import math

import torch
from torch import nn

from umarvel_ray.errors import TrainingError


def make_optimizer(model: nn.Module, *, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW with ε 1e-8; scalars and vectors are not decayed, and τ, a scalar, has a group of its own."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        {"params": [p for p in trained if p.ndim == 0], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=betas, eps=1e-8)


def learning_rate(step: int, *, peak: float, num_steps: int, warmup_ratio: float) -> float:
    """Linear warm-up over `warmup_ratio` of the steps, then a cosine to 0."""
    warmup = math.ceil(num_steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """The same rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = value


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale gradients down to `max_norm` where they exceed it.

    Returns:
        Their norm before.
    """
    return float(nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], max_norm))


def require_finite(*, step: int, samples: list[str], **values: float) -> None:
    """Stop the run on a number that is not finite, naming the batch.

    Raises:
        TrainingError: One of `values` is NaN or infinite.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            raise TrainingError(
                f"step {step}: {name} is {value} for a batch of {len(samples)} records "
                f"(first: {samples[0]}). Lower the learning rate, or look at these records."
            )
