"""Small steps of a search on arrays of any device; on the CPU NumPy takes most of them several times sooner.

Axes: Q queries, N pairs that stand by query, K results.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_MOST_COLUMNS = 2_048


def taken(values: Tensor, places: Tensor) -> Tensor:
    """Values at places of the flattened tensor."""
    if values.is_cuda or values.dtype == torch.bfloat16:
        return values.reshape(-1)[places]
    return torch.from_numpy(values.numpy().reshape(-1).take(places.numpy()))


def places_of(mask: Tensor) -> Tensor:
    """Places of what is true in the flattened mask, ascending."""
    if mask.is_cuda:
        return torch.nonzero(mask.view(-1))[:, 0]
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def reaches(values: Tensor, least: Tensor) -> Tensor:
    """Which float32 values are not below what they have to be; what overflowed to NaN is not."""
    if values.is_cuda:
        return ~(values < least)
    below = values.numpy() < least.numpy()
    return torch.from_numpy(np.logical_not(below, out=below))


def divided(values: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """(whole part, what remains) of numbers that are not negative."""
    if values.is_cuda:
        whole = torch.div(values, by, rounding_mode="floor")
    else:
        whole = torch.from_numpy(values.numpy() // by)
    return whole, values - whole * by


def order_of(keys: Tensor) -> Tensor:
    """What sorts keys that all differ."""
    return torch.argsort(keys) if keys.is_cuda else torch.from_numpy(np.argsort(keys.numpy()))


def stable_order(values: Tensor) -> Tensor:
    """Order of numbers below 65,536 that are not negative, equal ones as they stood; on the CPU."""
    return torch.from_numpy(np.argsort(values.numpy().astype(np.uint16), kind="stable"))


def largest(values_QN: Tensor, k: int) -> Tensor:
    """The K largest of each row, in any order; rows hold at least K."""
    if values_QN.is_cuda:
        return torch.topk(values_QN, k, dim=1, sorted=False).values
    first = values_QN.shape[1] - k
    return torch.from_numpy(np.ascontiguousarray(np.partition(values_QN.numpy(), first, axis=1)[:, first:]))


def columns(query_N: Tensor, num_queries: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A bounded number of pairs of each query at a time: (which, place of each in its query's row)."""
    if not len(query_N):
        return
    counts_Q = torch.bincount(query_N, minlength=num_queries)
    which = torch.arange(len(query_N), device=query_N.device)
    place = which - taken(counts_Q.cumsum(0) - counts_Q, query_N)
    most = int(counts_Q.max())
    if most <= _MOST_COLUMNS:
        yield which, place
        return
    for start in range(0, most, _MOST_COLUMNS):
        inside = places_of((place >= start) & (place < start + _MOST_COLUMNS))
        yield inside, place[inside] - start


def padded(
    query_N: Tensor, place_N: Tensor, values_N: Tensor, num_queries: int, fill: float = -torch.inf
) -> Tensor:
    """Values in a row per query."""
    width = int(place_N.max()) + 1
    rows = torch.full((num_queries * width,), fill, dtype=values_N.dtype, device=values_N.device)  # type: ignore[arg-type]
    at_N = query_N * width + place_N
    if values_N.is_cuda:
        rows[at_N] = values_N
    else:
        rows.numpy()[at_N.numpy()] = values_N.numpy()
    return rows.view(num_queries, width)
