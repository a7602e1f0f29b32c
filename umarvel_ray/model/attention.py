"""Attention inside each item of a packed micro-batch, in the decoder and in the vision tower.

Items lie end to end in one row of tokens. For attention alone they are laid side by side in blocks of items
of like length, (B items, L tokens), so that a few dense products serve all; everything else in the model sees
the packed row. T tokens, H heads, D width of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "umarvel_flash_packed"
"""The tower hands cumulative lengths only to kernels with "flash" in their name; ours wants them."""

_MIN_FILL = 0.75
"""A block holds items at least this long, relative to its longest: padding in a block stays under a third."""


@dataclass(frozen=True, slots=True)
class Block:
    """Items of like length, side by side.

    Attributes:
        index_BL: int64, token of the packed row at each place; a padded place repeats token 0 of its item.
        mask: bool, broadcastable to (B, 1, L, L), true where a token may look; None where all see all.
        causal: Look only back; padding stands behind, so it needs no mask.
    """

    index_BL: Tensor
    mask: Tensor | None
    causal: bool


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where attention finds the items of a packed row.

    Attributes:
        blocks: All items, each in one block.
        restore_T: int64, for each token of the packed row its place in the blocks' outputs laid end to end.
    """

    blocks: tuple[Block, ...]
    restore_T: Tensor

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], *, causal: bool, device: torch.device) -> "PackedLayout":
        """Each token sees the tokens of its own item: all of them, or those before it."""
        return _layout_of_lengths(tuple(lengths), causal, device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept serves training too, whoever asks first
def _layout_of_lengths(lengths: tuple[int, ...], causal: bool, device: torch.device) -> PackedLayout:
    length_N = torch.tensor(lengths)
    start_N = torch.cumsum(length_N, 0) - length_N
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    blocks, restore_T, place = [], torch.empty(int(length_N.sum()), dtype=torch.long), 0
    first = 0
    while first < len(order):
        longest = lengths[order[first]]
        last = first
        while last < len(order) and lengths[order[last]] >= _MIN_FILL * longest:
            last += 1
        items = torch.tensor(order[first:last])
        column_L = torch.arange(longest)
        real_BL = column_L < length_N[items, None]
        index_BL = start_N[items, None] + torch.where(real_BL, column_L, 0)
        restore_T[index_BL[real_BL]] = place + torch.nonzero(real_BL.flatten()).squeeze(1)
        place += real_BL.numel()
        mask = None if causal or bool(real_BL.all()) else real_BL[:, None, None, :].to(device)
        blocks.append(Block(index_BL=index_BL.to(device), mask=mask, causal=causal))
        first = last
    return PackedLayout(blocks=tuple(blocks), restore_T=restore_T.to(device))


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: PackedLayout | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: query (1, H, T, D), key, value (1, H or fewer, T, D) → (1, T, H, D).

    The decoder passes `layout`; the vision tower passes cumulative lengths.
    """
    if layout is None:
        if cu_seq_lens_q is None:
            raise RuntimeError(
                "packed attention needs a layout; call the backbone through Encoder or Reranker"
            )
        lengths = torch.diff(cu_seq_lens_q).tolist()
        layout = PackedLayout.of_lengths(lengths, causal=False, device=query.device)
    group = query.shape[1] // key.shape[1]
    outputs = []
    for block in layout.blocks:
        shape_BL = block.index_BL.shape
        index = block.index_BL.flatten()
        query_BHLD, key_BHLD, value_BHLD = (
            states[0].index_select(1, index).unflatten(1, shape_BL).transpose(0, 1)
            for states in (query, key, value)
        )
        if group > 1:
            key_BHLD = key_BHLD.repeat_interleave(group, dim=1)
            value_BHLD = value_BHLD.repeat_interleave(group, dim=1)
        output_BHLD = F.scaled_dot_product_attention(
            query_BHLD,
            key_BHLD,
            value_BHLD,
            attn_mask=block.mask,
            is_causal=block.causal,
            dropout_p=dropout,
            scale=scaling,
        )
        outputs.append(output_BHLD.transpose(1, 2).flatten(0, 1))
    packed_THD = (torch.cat(outputs) if len(outputs) > 1 else outputs[0]).index_select(0, layout.restore_T)
    return packed_THD[None], None


def use_packed_attention(model: Any) -> None:
    """Switch a loaded backbone, decoder and vision tower, to packed attention."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = NAME
