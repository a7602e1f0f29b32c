"""Faster ways through modules of a stock backbone: the same numbers up to rounding."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SLICE = 512
"""Rows whose intermediate values stay in a core's cache."""
_SILUS = ("SiLU", "SiLUActivation")
"""Torch's, and Transformers' own."""


def use_fast_modules(core: Any) -> None:
    """Let a backbone embed patches by one matrix product, and, on a CPU when it does not train, pass its MLPs
    slice by slice and its norms in fewer rounds. `use_stock_modules` takes it back.
    """
    embed = core.visual.patch_embed
    embed.forward = partial(_project, embed.proj)
    for mlp in _mlps(core):
        mlp.forward = partial(_by_slices, mlp)
    for norm in _norms(core):
        norm.forward = partial(_normalise, norm)


def use_stock_modules(core: Any) -> None:
    """Patches, MLPs and norms as Transformers has them."""
    for module in (core.visual.patch_embed, *_mlps(core), *_norms(core)):
        module.__dict__.pop("forward", None)


def takes_stills(core: Any) -> bool:
    """Whether the tower takes a still image once, and not once for each frame."""
    return "forward" in core.visual.patch_embed.__dict__


def _mlps(core: Any) -> Iterator[nn.Module]:
    for block in (*core.visual.blocks, *core.language_model.layers):
        yield block.mlp


def _project(convolution: Any, patches: Tensor) -> Tensor:
    """The tower convolves with a stride of the kernel's size, which is this product, five times as slow on a
    CPU. All frames of a still are alike, so it is multiplied by the sum of their weights: half the work.
    """
    weight = convolution.weight
    if patches.shape[1] < weight[0].numel():
        weight = weight.sum(2)
    return F.linear(patches.to(weight.dtype), weight.flatten(1), convolution.bias)


def _norms(core: Any) -> Iterator[nn.Module]:
    """RMS norms; Transformers has one class of them for each architecture."""
    return (module for module in core.modules() if hasattr(module, "variance_epsilon"))


def _is_ours(module: nn.Module, states: Tensor) -> bool:
    """Whether memory, not launches of kernels, is what time goes into, and nobody wants a gradient: not now,
    nor from a second pass, which has to repeat the first to the bit."""
    return states.device.type == "cpu" and not torch.is_grad_enabled() and not module.training


def _by_slices(mlp: nn.Module, states: Tensor) -> Tensor:
    """(…, D) → (…, D). On a CPU the inner width of all rows at once is written to memory and read back many
    times; a slice's stays in the cache.
    """
    forward = partial(type(mlp).forward, mlp)
    rows = states.flatten(0, -2)
    if not _is_ours(mlp, states) or len(rows) <= _SLICE:
        return forward(states)
    if _is_gated(mlp):
        return _gated(mlp, rows).view(states.shape)
    return torch.cat([forward(part) for part in rows.split(_SLICE)]).view(states.shape)


def _is_gated(mlp: Any) -> bool:
    """Whether it is a plain SwiGLU, without adapters around its layers."""
    layers = (getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    return all(type(layer) is nn.Linear for layer in layers) and type(mlp.act_fn).__name__ in _SILUS


def _gated(mlp: Any, rows_TD: Tensor) -> Tensor:
    """(T, D) → (T, D). All slices take turns in the same memory, which no page fault interrupts."""
    gate_SI, up_SI = rows_TD.new_empty(2, _SLICE, mlp.gate_proj.out_features)
    output_TD = torch.empty_like(rows_TD)
    for part, output in zip(rows_TD.split(_SLICE), output_TD.split(_SLICE), strict=True):
        gate, up = gate_SI[: len(part)], up_SI[: len(part)]
        _linear(mlp.gate_proj, part, out=gate)
        _linear(mlp.up_proj, part, out=up)
        _linear(mlp.down_proj, F.silu(gate, inplace=True).mul_(up), out=output)
    return output_TD


def _linear(layer: nn.Linear, rows: Tensor, out: Tensor) -> None:
    if layer.bias is None:
        torch.mm(rows, layer.weight.t(), out=out)
    else:
        torch.addmm(layer.bias, rows, layer.weight.t(), out=out)


def _normalise(norm: Any, states: Tensor) -> Tensor:
    """(…, D) → (…, D). Squares are summed without being written down."""
    if not _is_ours(norm, states) or states.dtype != torch.float32:
        return type(norm).forward(norm, states)
    squares = torch.linalg.vector_norm(states, dim=-1, keepdim=True).square_()
    return (states * squares.div_(states.shape[-1]).add_(norm.variance_epsilon).rsqrt_()).mul_(norm.weight)


@contextmanager
def only_at(modules: Iterable[nn.Module], places_S: Tensor) -> Iterator[None]:
    """Pass only the tokens at `places_S` of a packed row, (1, T, D), through modules that treat each token by
    itself; the others get zeros.
    """
    lengths: list[int] = []

    def take(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        lengths.append(args[0].shape[1])
        return (args[0].index_select(1, places_S),)

    def put(_: Any, __: Any, output: Tensor) -> Tensor:
        whole = output.new_zeros(1, lengths.pop(), output.shape[2])
        return whole.index_copy(1, places_S, output)

    handles = [
        handle
        for module in modules
        for handle in (module.register_forward_pre_hook(take), module.register_forward_hook(put))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
