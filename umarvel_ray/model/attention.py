"""Attention inside each item of a packed micro-batch, in the decoder and in the vision tower.

Items lie end to end in one row of tokens. On a GPU in half precision a flash kernel takes cumulative lengths.
Elsewhere a long item, or a run of equally long ones, is looked at where it lies; for attention alone, short
items are laid side by side in blocks of like length, (B items, L tokens), so that a few dense products serve
all. T tokens, H heads, D width of a head, N items.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "umarvel_flash_packed"
"""The tower hands cumulative lengths only to kernels with "flash" in their name; ours wants them."""

Kernel = Literal["varlen", "blocks"]

_MIN_FILL = 0.75
"""A block holds items at least this long, relative to its longest: padding in a block stays under a third."""
_LONG = 128
"""Tokens. So many are worth a call of their own; fewer are worth copying together."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Block:
    """Items of like length, side by side.

    Attributes:
        index_BL: int64, token of the packed row at each place; a padded place repeats token 0 of its item.
        mask: bool, broadcastable to (B, 1, L, S), true where a token may look; None where all see all.
        causal: Look only back; padding stands behind, so it needs no mask.
        keys_BS: int64, the tokens looked at, where they are not the block's own.
        start: Where it lies in the packed row, if all of it lies there in order: nothing is copied then.
    """

    index_BL: Tensor
    mask: Tensor | None
    causal: bool
    keys_BS: Tensor | None = None
    start: int | None = None


@dataclass(frozen=True, slots=True)
class _Cut:
    """How the row of tokens is cut for its blocks: in one go, as each cut's gradient is as large as the row.

    Attributes:
        shapes: For each block (items, tokens of each).
        places: For each block which piece of the row it is; None if it is copied.
        pieces: Tokens of each piece of the row, in order.
        copied: int64, tokens of all blocks that are copied, end to end.
    """

    shapes: tuple[tuple[int, int], ...]
    places: tuple[int | None, ...]
    pieces: tuple[int, ...]
    copied: Tensor | None

    @classmethod
    def of(cls, indices: Sequence[Tensor], starts: Sequence[int | None], num_tokens: int) -> "_Cut":
        """Of the blocks with these tokens, those with a start lying in the row from there on."""
        order = sorted((start, n) for n, start in enumerate(starts) if start is not None)
        places: list[int | None] = [None] * len(indices)
        pieces, done = [], 0
        for start, number in order:
            if start > done:
                pieces.append(start - done)
            places[number] = len(pieces)
            pieces.append(indices[number].numel())
            done = start + pieces[-1]
        if order and done < num_tokens:
            pieces.append(num_tokens - done)
        copied = [index.flatten() for index, start in zip(indices, starts, strict=True) if start is None]
        return cls(
            shapes=tuple((index.shape[0], index.shape[1]) for index in indices),
            places=tuple(places),
            pieces=tuple(pieces),
            copied=torch.cat(copied) if copied else None,
        )

    def __call__(self, states: Tensor) -> list[Tensor]:
        """(H, T, D) → for each block (B, H, L, D)."""
        pieces = states.split(self.pieces, dim=1) if self.pieces else ()
        moved: Iterator[Tensor] = iter(())
        if self.copied is not None:
            sizes = [b * n for (b, n), place in zip(self.shapes, self.places, strict=True) if place is None]
            moved = iter(states.index_select(1, self.copied).split(sizes, dim=1))
        return [
            (next(moved) if place is None else pieces[place]).unflatten(1, shape).transpose(0, 1)
            for shape, place in zip(self.shapes, self.places, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Spans:
    """Items by their cumulative lengths, for kernels that take a packed row as it is.

    Attributes:
        bounds: int32 (N + 1,), where items begin and end.
        longest: Tokens of the longest item.
        causal: Look only back.
    """

    bounds: Tensor
    longest: int
    causal: bool


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where attention finds the items of a packed row.

    Attributes:
        blocks: All items, each in one block; empty with `spans`.
        queries: Cuts the tokens that look.
        keys: Cuts the tokens looked at.
        restore_T: int64, for each token of the packed row its place in the blocks' outputs laid end to end;
            None where that is its own.
        spans: For the flash kernel, in place of blocks.
        ending: For the decoder's last layer, where few tokens' states are wanted.
    """

    blocks: tuple[Block, ...]
    queries: _Cut | None = None
    keys: _Cut | None = None
    restore_T: Tensor | None = None
    spans: Spans | None = None
    ending: "PackedLayout | None" = None

    @classmethod
    def of_blocks(
        cls, blocks: Sequence[Block], *, num_tokens: int, restore_T: Tensor | None = None
    ) -> "PackedLayout":
        """Of a row of `num_tokens`, all in some block."""
        starts = [block.start for block in blocks]
        queries = keys = _Cut.of([block.index_BL for block in blocks], starts, num_tokens)
        if any(block.keys_BS is not None for block in blocks):
            looked_at = [b.index_BL if b.keys_BS is None else b.keys_BS for b in blocks]
            starts = [b.start if b.keys_BS is None else None for b in blocks]
            keys = _Cut.of(looked_at, starts, num_tokens)
        return cls(tuple(blocks), queries, keys, restore_T)

    @classmethod
    def of_lengths(
        cls,
        lengths: Sequence[int],
        *,
        causal: bool,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> "PackedLayout":
        """Each token sees the tokens of its own item: all of them, or those before it."""
        return _layout_of_lengths(tuple(lengths), causal, device, best_kernel(device, dtype))

    def ending_at(self, places_S: Tensor) -> "PackedLayout":
        """The same, but in the decoder's last layer only the tokens at `places_S` look; what the others get
        there is worthless.
        """
        if self.restore_T is None:  # items that lie in order are looked at in place
            return self
        position_S, restore_T = self.restore_T[places_S], torch.zeros_like(self.restore_T)
        blocks, first, done = [], 0, 0
        for block in self.blocks:
            rows, length = block.index_BL.shape
            mine = torch.nonzero((position_S >= first) & (position_S < first + rows * length)).squeeze(1)
            row_N, column_N = (position_S[mine] - first) // length, (position_S[mine] - first) % length
            first += rows * length
            if not len(mine):
                continue
            keys_BS = block.index_BL if block.keys_BS is None else block.keys_BS
            mask = block.mask
            if mask is None and block.causal:
                mask = torch.ones(length, length, dtype=torch.bool, device=row_N.device).tril()[None, None]
            if mask is not None:
                mask = mask.expand(rows, 1, length, keys_BS.shape[1])[row_N, :, column_N][:, :, None]
            blocks.append(
                Block(index_BL=places_S[mine, None], mask=mask, causal=False, keys_BS=keys_BS[row_N])
            )
            restore_T[places_S[mine]] = done + torch.arange(len(mine), device=row_N.device)
            done += len(mine)
        ending = PackedLayout.of_blocks(blocks, num_tokens=len(restore_T), restore_T=restore_T)
        return replace(self, ending=ending)


def best_kernel(device: torch.device, dtype: torch.dtype) -> Kernel:
    """The fastest kernel there is for items of different lengths."""
    half = dtype in (torch.float16, torch.bfloat16)
    return "varlen" if device.type == "cuda" and half and _varlen_kernel() else "blocks"


@lru_cache(maxsize=1)
def _varlen_kernel() -> Callable[..., Any] | None:
    """PyTorch's flash attention over cumulative lengths, where this build has it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept serves training too, whoever asks first
def _layout_of_lengths(
    lengths: tuple[int, ...], causal: bool, device: torch.device, kernel: Kernel
) -> PackedLayout:
    length_N = torch.tensor(lengths)
    start_N = torch.cumsum(length_N, 0) - length_N
    if kernel == "varlen":
        bounds = F.pad(length_N.cumsum(0), (1, 0)).to(device, torch.int32)
        return PackedLayout((), spans=Spans(bounds=bounds, longest=max(lengths), causal=causal))
    runs, short = _runs(lengths)
    blocks, places = [], []
    for items, lies_there in [
        *((run, True) for run in runs),
        *((group, False) for group in _alike(short, lengths)),
    ]:
        longest = lengths[items[0]]
        column_L = torch.arange(longest)
        real_BL = column_L < length_N[items, None]
        index_BL = start_N[items, None] + torch.where(real_BL, column_L, 0)
        places.append(torch.where(real_BL, index_BL, -1).flatten())
        mask = None if causal or bool(real_BL.all()) else real_BL[:, None, None, :].to(device)
        start = int(start_N[items[0]]) if lies_there else None
        blocks.append(Block(index_BL=index_BL.to(device), mask=mask, causal=causal, start=start))
    place_T = torch.cat(places)
    in_order = torch.equal(place_T, torch.arange(len(place_T)))
    restore_T = torch.empty(int(length_N.sum()), dtype=torch.long)
    restore_T[place_T[place_T >= 0]] = torch.nonzero(place_T >= 0).squeeze(1)
    return PackedLayout.of_blocks(
        blocks, num_tokens=len(restore_T), restore_T=None if in_order else restore_T.to(device)
    )


def _runs(lengths: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """Runs of neighbours of one length that are long enough together; and the items that are left over."""
    runs, short = [], []
    for length, group in groupby(range(len(lengths)), key=lengths.__getitem__):
        items = list(group)
        if length * len(items) >= _LONG:
            runs.append(items)
        else:
            short += items
    return runs, short


def _alike(items: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Groups of items of like length, each with its longest in front."""
    groups: list[list[int]] = []
    for item in sorted(items, key=lambda item: -lengths[item]):
        if groups and lengths[item] >= _MIN_FILL * lengths[groups[-1][0]]:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: PackedLayout | None = None,
    tower_layouts: Sequence[tuple[Tensor, PackedLayout]] = (),
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: query (1, H, T, D), key, value (1, H or fewer, T, D) → (1, T, H, D).

    The decoder passes `layout`. A vision tower passes cumulative lengths, of images in some layers and of
    windows in others; `tower_layouts` has the layout of each, so that no layer asks the device for lengths.
    """
    if layout is None:
        layout = next((known for bounds, known in tower_layouts if bounds is cu_seq_lens_q), None)
    if layout is None:
        if cu_seq_lens_q is None:
            raise RuntimeError(
                "packed attention needs a layout; call the backbone through Encoder or Reranker"
            )
        lengths = torch.diff(cu_seq_lens_q).tolist()
        layout = PackedLayout.of_lengths(lengths, causal=False, device=query.device, dtype=query.dtype)
    if layout.ending is not None and module.layer_idx == module.config.num_hidden_layers - 1:
        layout = layout.ending
    if layout.spans is not None:
        return _by_spans(layout.spans, query, key, value, scaling)[None], None
    assert layout.queries is not None and layout.keys is not None
    queries = layout.queries(query.squeeze(0))
    keys, values = layout.keys(key.squeeze(0)), layout.keys(value.squeeze(0))
    group = query.shape[1] // key.shape[1]
    repeated = group > 1 and query.device.type != "cpu"  # there only some kernels share keys among heads
    outputs = []
    for block, query_BHLD, key_BHSD, value_BHSD in zip(layout.blocks, queries, keys, values, strict=True):
        if repeated:
            key_BHSD = key_BHSD.repeat_interleave(group, dim=1)
            value_BHSD = value_BHSD.repeat_interleave(group, dim=1)
        output_BHLD = F.scaled_dot_product_attention(
            query_BHLD,
            key_BHSD,
            value_BHSD,
            attn_mask=block.mask,
            is_causal=block.causal,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=group > 1 and not repeated,
        )
        outputs.append(output_BHLD.transpose(1, 2).flatten(0, 1))
    packed_THD = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    if layout.restore_T is not None:
        packed_THD = packed_THD.index_select(0, layout.restore_T)
    return packed_THD[None], None


def _by_spans(spans: Spans, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    kernel = _varlen_kernel()
    assert kernel is not None, "spans are made only where the kernel is"
    offered = inspect.signature(kernel).parameters
    group = query.shape[1] // key.shape[1]
    states = [query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)]
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0 if spans.causal else -1)}
    if group > 1 and "enable_gqa" in offered:
        options["enable_gqa"] = True
    elif group > 1:
        states[1:] = [part.repeat_interleave(group, dim=1) for part in states[1:]]
    if "num_splits" in offered:
        options["num_splits"] = 1  # else the longest of the batch decides in which order others are summed
    return kernel(*states, spans.bounds, spans.bounds, spans.longest, spans.longest, **options)


def use_packed_attention(model: Any) -> None:
    """Switch a loaded backbone, decoder and vision tower, to packed attention; says which kernel serves."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
    set_attention(model, NAME)


def set_attention(model: Any, name: str) -> None:
    """Switch all parts of a model to the attention that Transformers knows as `name`."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = name


def log_kernel(device: torch.device, dtype: torch.dtype) -> Kernel:
    """Say in the log which kernel serves there."""
    kernel = best_kernel(device, dtype)
    what = {
        "varlen": "flash over cumulative lengths (torch.nn.attention.varlen)",
        "blocks": "scaled_dot_product_attention in blocks of like length",
    }[kernel]
    log.info("packed attention on %s in %s: %s", device, str(dtype).removeprefix("torch."), what)
    return kernel
