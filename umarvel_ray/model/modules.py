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


def use_fast_modules(core: Any) -> None:
    """Let a backbone embed patches by one matrix product, and pass its MLPs slice by slice where no gradient
    is taken. `use_stock_modules` takes it back.
    """
    embed = core.visual.patch_embed
    embed.forward = partial(_project, embed.proj)
    for mlp in _mlps(core):
        mlp.forward = partial(_by_slices, mlp)


def use_stock_modules(core: Any) -> None:
    """Patches and MLPs as Transformers has them."""
    for module in (core.visual.patch_embed, *_mlps(core)):
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


def _by_slices(mlp: nn.Module, states: Tensor) -> Tensor:
    """(…, D) → (…, D). On a CPU the inner width of all rows at once is written to memory and read back many
    times; a slice's stays in the cache.
    """
    forward = partial(type(mlp).forward, mlp)
    rows = states.flatten(0, -2)
    if states.device.type != "cpu" or torch.is_grad_enabled() or len(rows) <= _SLICE:
        return forward(states)
    return torch.cat([forward(part) for part in rows.split(_SLICE)]).view(states.shape)


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
