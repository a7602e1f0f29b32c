"""A large batch in small chunks, with the gradient of the whole batch.

First every item is embedded without a graph, then the loss of the whole batch gives each embedding its
gradient, then every chunk is embedded again and takes its part backward. A lane whose items fit one chunk
keeps its graph and is embedded once. Source: Gao et al. 2021, arXiv:2101.06983.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from umarvel_ray.model.encoder import Encoder
from umarvel_ray.model.inputs import Item, micro_batches
from umarvel_ray.model.trees import Tree
from umarvel_ray.train.gather import Lanes
from umarvel_ray.train.strategy import Replicated


@dataclass(frozen=True, slots=True)
class LossGradient:
    """The loss of a global batch.

    Attributes:
        loss: Mean over the queries, a scalar.
        temperature: dloss/dτ, a scalar.
        items: For each lane computed here, dloss/d(embeddings of its items), (n, D), in their order.
    """

    loss: Tensor
    temperature: Tensor
    items: Mapping[int, Tensor]


BatchLoss = Callable[[Tensor, Tensor], LossGradient]
"""(all embeddings (N, D), temperature) → loss and gradients."""


def cached_backward(
    encoder: Encoder,
    items_by_lane: dict[int, list[Item]],
    indices: Sequence[np.ndarray],
    batch_loss: BatchLoss,
    *,
    strategy: Replicated,
    max_tokens: int,
    seed: int,
    filler: Item | None = None,
) -> Tensor:
    """Leave the gradient of the mean loss over the global batch with the strategy, and in τ's `.grad`.

    Args:
        encoder: What is trained.
        items_by_lane: Prepared items of the lanes computed here.
        indices: For each of all lanes, where its items stand in the global batch.
        batch_loss: The loss.
        strategy: How parameters lie.
        max_tokens: Token budget of a chunk.
        seed: Of this step; a chunk's dropout follows from (seed, lane, chunk), so its second pass repeats
            its first.
        filler: An item of any kind that the batch has, the same on all workers; where a strategy asks all to
            run the same modules, it stands in for what a lane lacks, and gets no gradient.

    Returns:
        The loss of the global batch, a scalar.
    """
    lanes = strategy.lanes
    chunks = lane_chunks(items_by_lane, max_tokens, lanes=lanes, filled=filler is not None)

    def embed(lane: int, number: int) -> Tensor:
        torch.manual_seed(hash((seed, lane, number)) % 2**63)
        items = [items_by_lane[lane][index] for index in chunks[lane][number]]
        return _embed(encoder, items, strategy, filler)

    kept: dict[int, Tensor] = {}
    parts: dict[int, Tensor] = {}
    for lane, own_chunks in chunks.items():
        with torch.set_grad_enabled(len(own_chunks) == 1):
            embedded = [embed(lane, number) for number in range(len(own_chunks))]
        if len(own_chunks) == 1:
            kept[lane] = embedded[0]
        parts[lane] = _in_order(encoder, len(items_by_lane[lane]), own_chunks, embedded)

    found = batch_loss(lanes.gather(parts, indices), encoder.temperature.detach())

    def run(lane: int, number: int) -> tuple[Tensor, Tensor]:
        rows = kept.pop(lane) if lane in kept else embed(lane, number)
        gradient = torch.zeros_like(rows)
        chunk = chunks[lane][number]
        gradient[: len(chunk)] = found.items[lane][chunk]
        return rows, gradient

    strategy.backward(
        {
            lane: [partial(run, lane, number) for number in range(len(own_chunks))]
            for lane, own_chunks in chunks.items()
        }
    )
    if encoder.temperature.requires_grad:
        encoder.temperature.grad = found.temperature.clone()
    return found.loss


def embed_batch(
    encoder: Encoder,
    items_by_lane: dict[int, list[Item]],
    indices: Sequence[np.ndarray],
    *,
    strategy: Replicated,
    max_tokens: int,
    filler: Item | None = None,
) -> Tensor:
    """Embeddings of a global batch without a gradient, (N, D) on every worker. Arguments as above."""
    chunks = lane_chunks(items_by_lane, max_tokens, lanes=strategy.lanes, filled=filler is not None)
    parts = {}
    with torch.no_grad():
        for lane, own_chunks in chunks.items():
            items = items_by_lane[lane]
            rows = [_embed(encoder, [items[index] for index in c], strategy, filler) for c in own_chunks]
            parts[lane] = _in_order(encoder, len(items), own_chunks, rows)
    return strategy.lanes.gather(parts, indices)


def lane_chunks(
    pieces_by_lane: Mapping[int, Sequence[Item | Tree]], max_tokens: int, *, lanes: Lanes, filled: bool
) -> dict[int, list[list[int]]]:
    """Cut each lane's pieces into chunks; `filled`: as many on every worker, empty ones at the end."""
    chunks = {
        lane: micro_batches([piece.num_tokens for piece in pieces], max_tokens)
        for lane, pieces in pieces_by_lane.items()
    }
    if not filled:
        return chunks
    most = lanes.most(max(1, *(len(own) for own in chunks.values())))
    return {lane: own + [[]] * (most - len(own)) for lane, own in chunks.items()}


def lacks(pieces: Sequence[Item | Tree], filler: Item | Tree) -> bool:
    """Whether a chunk needs the filler: it is empty, or has no picture where others have."""
    return not pieces or (_shows(filler) and not any(map(_shows, pieces)))


def _shows(piece: Item | Tree) -> bool:
    return bool(piece.visuals if isinstance(piece, Item) else piece.shown)


def _embed(encoder: Encoder, items: list[Item], strategy: Replicated, filler: Item | None) -> Tensor:
    if filler is not None and lacks(items, filler):
        items = [*items, filler]
    return strategy.run(encoder, encoder.builder.pack(items))


def _in_order(encoder: Encoder, num: int, chunks: list[list[int]], embedded: list[Tensor]) -> Tensor:
    """Rows of chunks in the order of their items; a filler's row is left out."""
    rows_ND = torch.empty(num, encoder.dim, device=encoder.device)
    for chunk, rows in zip(chunks, embedded, strict=True):
        rows_ND[chunk] = rows.detach()[: len(chunk)]
    return rows_ND
