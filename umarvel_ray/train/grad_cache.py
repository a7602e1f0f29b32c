"""A large batch in small chunks, with the gradient of the whole batch.

First every item is embedded without a graph, then the loss of the whole batch gives each embedding its
gradient, then every chunk is embedded again and takes its part backward. A lane whose items fit one chunk
keeps its graph and is embedded once. Source: Gao et al. 2021, arXiv:2101.06983.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from umarvel_ray.model.encoder import Encoder
from umarvel_ray.model.inputs import Item, micro_batches
from umarvel_ray.train.gather import Lanes

LaneLoss = Callable[[Tensor, Tensor, int], Tensor]
"""(all embeddings (N, D), temperature, lane) → the lane's part of the loss; all parts add up to the mean."""


def cached_backward(
    encoder: Encoder,
    items_by_lane: dict[int, list[Item]],
    indices: Sequence[np.ndarray],
    lane_loss: LaneLoss,
    *,
    lanes: Lanes,
    max_tokens: int,
    seed: int,
) -> Tensor:
    """Leave in `.grad` the gradient of the mean loss over the global batch.

    Args:
        encoder: What is trained.
        items_by_lane: Prepared items of the lanes computed here.
        indices: For each of all lanes, where its items stand in the global batch.
        lane_loss: A lane's part of the loss.
        lanes: Who computes what.
        max_tokens: Token budget of a chunk.
        seed: Of this step; a chunk's dropout follows from (seed, lane, chunk), so its second pass repeats
            its first.

    Returns:
        The loss of the global batch, a scalar.
    """
    chunks = {
        lane: micro_batches([item.num_tokens for item in items], max_tokens)
        for lane, items in items_by_lane.items()
    }

    def embed(lane: int, number: int) -> Tensor:
        torch.manual_seed(hash((seed, lane, number)) % 2**63)
        return encoder(encoder.builder.pack([items_by_lane[lane][index] for index in chunks[lane][number]]))

    kept: dict[int, Tensor] = {}
    parts: dict[int, Tensor] = {}
    for lane, lane_chunks in chunks.items():
        with torch.set_grad_enabled(len(lane_chunks) == 1):
            embedded = [embed(lane, number) for number in range(len(lane_chunks))]
        if len(lane_chunks) == 1:
            kept[lane] = embedded[0]
        parts[lane] = torch.empty(len(items_by_lane[lane]), encoder.dim, device=encoder.device)
        for chunk, rows in zip(lane_chunks, embedded, strict=True):
            parts[lane][chunk] = rows.detach()

    gathered_ND = lanes.gather(parts, indices).requires_grad_()
    losses, embedding_gradients, temperature_gradients = [], [], []
    for lane in lanes.mine:
        temperature = encoder.temperature.detach().clone().requires_grad_()
        loss = lane_loss(gathered_ND, temperature, lane)
        gradient_ND, temperature_gradient = torch.autograd.grad(loss, (gathered_ND, temperature))
        losses.append(loss.detach())
        embedding_gradients.append(gradient_ND)
        temperature_gradients.append(temperature_gradient)
    gradient_ND = lanes.sum(embedding_gradients)
    both = lanes.sum([torch.stack(pair) for pair in zip(losses, temperature_gradients, strict=True)])

    def backward(lane: int) -> None:
        for number, chunk in enumerate(chunks[lane]):
            rows = kept.pop(lane) if lane in kept else embed(lane, number)
            rows.backward(gradient_ND[torch.from_numpy(indices[lane][chunk]).to(rows.device)])

    sum_gradients(encoder, backward, lanes=lanes)
    if encoder.temperature.requires_grad:
        encoder.temperature.grad = both[1]
    return both[0]


def sum_gradients(model: nn.Module, backward: Callable[[int], None], *, lanes: Lanes) -> None:
    """Run `backward(lane)` for each lane computed here and leave in `.grad` the sum over all lanes.

    One tensor travels, whatever a lane's items were: a lane that had only texts sends zeros for the vision
    tower, and nobody waits for it.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    by_lane = []
    for lane in lanes.mine:
        for parameter in trained:
            parameter.grad = None
        backward(lane)
        by_lane.append(_flat(trained))
    total = lanes.sum(by_lane)
    place = 0
    for parameter in trained:
        parameter.grad = total[place : place + parameter.numel()].view_as(parameter).to(parameter.dtype)
        place += parameter.numel()


def _flat(parameters: Iterable[nn.Parameter]) -> Tensor:
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters]
    )
