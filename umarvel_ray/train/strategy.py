"""How parameters, gradients and optimizer state lie on the workers: one interface, three ways.

`Replicated` is `ddp`: all of it everywhere. `Sharded` is `fsdp2`, `Zero` is `deepspeed`. The loop and the
tasks do not know which it is. τ is outside all three: every worker has it, with the same gradient.

A run is a call that computes a part of the step and returns a tensor with the gradient that it takes.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from umarvel_ray.train.gather import Lanes
from umarvel_ray.train.optimizer import clip_gradients, make_optimizer, set_learning_rate
from umarvel_ray.train.settings import StrategySettings, TrainSettings

PLAIN = StrategySettings()
Run = Callable[[], tuple[Tensor, Tensor]]
_MOMENTS = ("exp_avg", "exp_avg_sq")
_BUCKET = 2**25
"""Numbers that travel together: 128 MB in float32."""


class _Body(nn.Module):
    """What is wrapped: the backbone. All computation goes through `forward`, so that wrappers see it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """`call(*arguments)`."""
        return call(*arguments)


class Replicated:
    """Every worker holds all parameters; gradients are summed in lane order.

    Args:
        model: Encoder or Reranker, its trained parameters as the last state had them.
        lanes: Who computes what.
        settings: Of the training.
        how: Of the strategy.
        half: Compute in bfloat16; what is trained stays as it is.

    Attributes:
        lockstep: Whether all workers must run the same modules equally often.
    """

    lockstep = False

    def __init__(
        self,
        model: nn.Module,
        lanes: Lanes,
        settings: TrainSettings,
        how: StrategySettings = PLAIN,
        *,
        half: bool = False,
    ) -> None:
        self.model = model
        self.lanes = lanes
        self._half = half
        self._how = how
        self._body = _Body(cast(nn.Module, model.model))
        self._optimizers = self._make_optimizers(settings)

    def _make_optimizers(self, settings: TrainSettings) -> list[torch.optim.Optimizer]:
        return [make_optimizer(self.model, weight_decay=settings.weight_decay, betas=settings.betas)]

    @property
    def device(self) -> torch.device:
        """Where this worker computes."""
        return next(self._body.parameters()).device

    def run(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Compute with the backbone: `call(*arguments)`."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._half):
            return self._body(call, *arguments)

    def backward(self, runs: Mapping[int, Sequence[Run]]) -> None:
        """Leave the sum of the gradients of all runs of all lanes; `runs` holds those of the lanes here.

        What a lane did not use gets zeros from it: a lane of texts alone keeps nobody waiting.
        """
        trained = _trained(self._body)
        sums: list[Tensor] = []
        for lane_runs in runs.values():
            for parameter in trained:
                parameter.grad = None
            for run in lane_runs:
                tensor, gradient = run()
                tensor.backward(gradient)
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
            found = [gradient.float() for gradient in found]
            sums = found if not sums else [total.add_(part) for total, part in zip(sums, found, strict=True)]
        for bucket in _buckets(trained):
            flat = torch.cat([sums[index].flatten() for index in bucket])
            parts = self.lanes.sum([flat]).split([trained[index].numel() for index in bucket])
            for index, part in zip(bucket, parts, strict=True):
                trained[index].grad = part.view_as(trained[index]).to(trained[index].dtype)

    def clip(self, max_norm: float) -> float:
        """Scale gradients down to `max_norm` where they exceed it.

        Returns:
            Their norm before, τ's included.
        """
        return clip_gradients(self.model, max_norm)

    def step(self, rate: float) -> None:
        """Update what is trained, and drop the gradients."""
        for optimizer in self._optimizers:
            set_learning_rate(optimizer, rate)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def drop_gradients(self) -> None:
        """Forget what `backward` left."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything trained, with its moments, by name, whole and in float32; all workers have to ask.

        Of a parameter `a.b`: `a.b`, `a.b/exp_avg`, `a.b/exp_avg_sq`. The same whatever the strategy and the
        number of workers, so that each can go on from any other's.
        """
        found = {}
        for name, parameter in self._named():
            found[name] = self._whole(parameter.detach())
            for moment, value in self._moments_of(parameter).items():
                found[f"{name}/{moment}"] = self._whole(value)
        return found

    def set_moments(self, state: Mapping[str, Tensor], *, step: int) -> None:
        """Go on from the moments of a `state` that was made after `step` steps."""
        by_parameter = {id(p): name for name, p in self._named()}
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name = by_parameter[id(parameter)]
                    if f"{name}/{_MOMENTS[0]}" in state:
                        optimizer.state[parameter] = {
                            "step": torch.tensor(float(step)),
                            **{m: self._share(state[f"{name}/{m}"], parameter) for m in _MOMENTS},
                        }

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _moments_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        states = [optimizer.state.get(parameter, {}) for optimizer in self._optimizers]
        return {m: state[m] for state in states for m in _MOMENTS if m in state}

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor.detach().cpu()

    def _share(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        return whole.to(parameter.device, parameter.dtype).clone()


class Sharded(Replicated):
    """Every worker holds a slice of each layer, and borrows the rest while it computes: PyTorch's FSDP2."""

    lockstep = True

    def __init__(
        self,
        model: nn.Module,
        lanes: Lanes,
        settings: TrainSettings,
        how: StrategySettings = PLAIN,
        *,
        half: bool = False,
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        body = _Body(cast(nn.Module, model.model))
        mesh = init_device_mesh(next(body.parameters()).device.type, (lanes.count,))
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32 if half else None
        )
        layers = [layer for part in body.modules() if isinstance(part, nn.ModuleList) for layer in part]
        for part in [*layers, body]:
            fully_shard(part, mesh=mesh, mp_policy=policy)
        super().__init__(model, lanes, settings, how)
        self._body = body

    def backward(self, runs: Mapping[int, Sequence[Run]]) -> None:
        """See `Replicated.backward`: each run's gradients go to the workers that own them, as means."""
        (mine,) = runs.values()
        for run in mine:
            tensor, gradient = run()
            tensor.backward(gradient * self.lanes.count)

    def clip(self, max_norm: float) -> float:
        """See `Replicated.clip`."""
        sharded = [p.grad for p in _trained(self._body) if p.grad is not None]
        squares = [_local(gradient).float().square().sum() for gradient in sharded]
        square = self.lanes.sum([torch.stack(squares).sum()]).item()
        others = [p.grad for _, p in self._named() if p.grad is not None and not hasattr(p, "placements")]
        norm = math.sqrt(square + sum(gradient.float().square().sum().item() for gradient in others))
        if norm > max_norm:
            for gradient in [*sharded, *others]:
                gradient.mul_(max_norm / (norm + 1e-6))
        return norm

    def _whole(self, tensor: Tensor) -> Tensor:
        return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu()  # type: ignore[attr-defined]

    def _share(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        share = super()._share(whole, parameter)
        if not hasattr(parameter, "placements"):
            return share
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(share, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


class Zero(Replicated):
    """DeepSpeed's ZeRO: 1 shards the optimizer's state, 2 the gradients too, 3 the parameters too."""

    lockstep = True

    def _make_optimizers(self, settings: TrainSettings) -> list[torch.optim.Optimizer]:
        deepspeed = _import_deepspeed(self.device)
        temperature = [p for name, p in self._named() if not name.startswith("model.")]
        base = make_optimizer(self._body, weight_decay=settings.weight_decay, betas=settings.betas)
        masters = {name: p.detach().clone() for name, p in self._named()} if self._half else {}
        self._engine, *_ = deepspeed.initialize(
            model=self._body,
            optimizer=base,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "bf16": {"enabled": self._half},
                "zero_optimization": {
                    "stage": self._how.zero_stage,
                    "stage3_param_persistence_threshold": 0,
                    **({"offload_optimizer": {"device": "cpu"}} if self._how.offload_optimizer else {}),
                },
            },
        )
        # DeepSpeed lays out the moments in its first step, or has made one of zeros. A resumed training needs
        # them before, and its step counted right.
        for parameter in self._masters(base):
            base.state[parameter] = {
                "step": torch.tensor(0.0),
                **{moment: torch.zeros_like(parameter) for moment in _MOMENTS},
            }
        if self._how.zero_stage < 3:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._named():
            if name in masters and name.startswith("model."):
                self._set(parameter, masters[name], None)
        if not temperature:
            return [base]
        return [base, torch.optim.AdamW(temperature, lr=0.0, betas=settings.betas, weight_decay=0.0)]

    def _masters(self, base: torch.optim.Optimizer) -> list[Tensor]:
        """The flat tensors that the optimizer steps: ZeRO-3 lends them to it for the time of a step alone."""
        if self._how.zero_stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [parameter for group in base.param_groups for parameter in group["params"]]

    def run(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """See `Replicated.run`."""
        return self._engine(call, *arguments)

    def backward(self, runs: Mapping[int, Sequence[Run]]) -> None:
        """See `Replicated.backward`. The engine means over workers, so it is told W times as much."""
        (mine,) = runs.values()
        for number, run in enumerate(mine, start=1):
            self._engine.set_gradient_accumulation_boundary(number == len(mine))
            tensor, gradient = run()
            self._engine.backward((tensor * gradient).sum() * self.lanes.count)

    def clip(self, max_norm: float) -> float:
        """See `Replicated.clip`. The engine clips by its own norm when it steps, so its bound is moved."""
        optimizer = self._engine.optimizer
        if self._how.zero_stage == 3:
            own = math.sqrt(sum(float(norm) ** 2 for norm in optimizer._get_norm_groups()))
        else:
            own = float(optimizer.scaled_global_norm())
        others = [p.grad for name, p in self._named() if not name.startswith("model.") and p.grad is not None]
        norm = math.sqrt(own**2 + sum(gradient.float().square().sum().item() for gradient in others))
        scale = max_norm / (norm + 1e-6)
        optimizer.clip_grad = (own + 1e-6) * scale if scale < 1 else 0.0
        for gradient in others:
            gradient.mul_(min(scale, 1.0))
        return norm

    def step(self, rate: float) -> None:
        """See `Replicated.step`."""
        for optimizer in self._optimizers:
            set_learning_rate(optimizer, rate)
        self._engine.step()
        for optimizer in self._optimizers[1:]:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def drop_gradients(self) -> None:
        """See `Replicated.drop_gradients`."""
        self._engine.optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """See `Replicated.state`."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found: dict[str, Tensor] = {}
        for name, parameter in self._named():
            if not name.startswith("model."):
                found[name] = parameter.detach().cpu()
                found |= {f"{name}/{m}": v.cpu() for m, v in self._moments_of(parameter).items()}
                continue
            asked: dict[str, Any] = {name: safe_get_full_fp32_param(parameter)}
            for moment in _MOMENTS:
                asked[f"{name}/{moment}"] = safe_get_full_optimizer_state(parameter, moment)
            found |= {key: tensor.detach().cpu() for key, tensor in asked.items()}
        return found

    def set_moments(self, state: Mapping[str, Tensor], *, step: int) -> None:
        """See `Replicated.set_moments`."""
        base, *others = self._optimizers
        for name, parameter in self._named():
            if name.startswith("model."):
                self._set(parameter, state[name], {m: state[f"{name}/{m}"] for m in _MOMENTS})
            else:
                others[0].state[parameter] = {
                    "step": torch.tensor(float(step)),
                    **{m: self._share(state[f"{name}/{m}"], parameter) for m in _MOMENTS},
                }
        for shard in base.state.values():
            shard["step"] = torch.tensor(float(step))

    def _set(self, parameter: nn.Parameter, value: Tensor, moments: Mapping[str, Tensor] | None) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        safe_set_full_fp32_param(parameter, value.to(self.device))
        for name, moment in (moments or {}).items():
            safe_set_full_optimizer_state(parameter, moment.to(self.device), name)


def make_strategy(
    model: nn.Module, lanes: Lanes, settings: TrainSettings, how: StrategySettings, *, half: bool = False
) -> Replicated:
    """The strategy that the settings name."""
    kinds = {"ddp": Replicated, "fsdp2": Sharded, "deepspeed": Zero}
    return kinds[how.kind](model, lanes, settings, how, half=half)


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    if device.type == "cpu":
        # Its shared-memory collectives are compiled at first use, and ask for a compiler; gloo does.
        __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _trained(body: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in body.parameters() if parameter.requires_grad]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[attr-defined]


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterable[list[int]]:
    """Indices of parameters that travel together."""
    bucket: list[int] = []
    size = 0
    for index, parameter in enumerate(parameters):
        if bucket and size + parameter.numel() > _BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(index)
        size += parameter.numel()
    if bucket:
        yield bucket
