"""Lanes: how one step is spread over workers, and the only place where workers exchange tensors.

A step is always cut into the same lanes. Under Ray Train each worker computes one; in one process they are
computed one after the other. Sums are taken in lane order either way, so two workers and one process that
plays both give the same numbers. N items of a global batch, D width.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


class Lanes:
    """All lanes in this process.

    Attributes:
        count: How many lanes a step is cut into.
        mine: Those computed here.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.mine: Sequence[int] = range(count)

    @property
    def leads(self) -> bool:
        """Whether this process writes logs and checkpoints."""
        return 0 in self.mine

    def gather(self, parts: Mapping[int, Tensor], items: Sequence[np.ndarray]) -> Tensor:
        """Embeddings of all lanes in batch order.

        Args:
            parts: For each lane of `mine`, the rows of its items, in the order of `items`.
            items: For each of all lanes, the indices of its items.

        Returns:
            (N, D); no gradient passes, see `grad_cache`.
        """
        some = next(iter(parts.values()))
        gathered_ND = some.new_empty(sum(map(len, items)), some.shape[1])
        for lane, rows in parts.items():
            gathered_ND[torch.from_numpy(items[lane])] = rows.detach()
        return gathered_ND

    def sum(self, by_lane: Sequence[Tensor]) -> Tensor:
        """Sum over all lanes of one tensor each; `by_lane` holds those of `mine`, in order."""
        total = by_lane[0].clone()
        for tensor in by_lane[1:]:
            total += tensor
        return total


class WorkerLanes(Lanes):
    """One lane a process, in an initialised `torch.distributed` group."""

    def __init__(self) -> None:
        super().__init__(torch.distributed.get_world_size())
        self.mine = [torch.distributed.get_rank()]

    def gather(self, parts: Mapping[int, Tensor], items: Sequence[np.ndarray]) -> Tensor:
        """See `Lanes.gather`. Lanes of unequal size travel padded to the largest."""
        (mine,) = parts.values()
        most = max(map(len, items))
        padded = mine.new_zeros(most, mine.shape[1])
        padded[: len(mine)] = mine.detach()
        everyone = [torch.empty_like(padded) for _ in range(self.count)]
        torch.distributed.all_gather(everyone, padded)
        gathered_ND = mine.new_empty(sum(map(len, items)), mine.shape[1])
        for lane, indices in enumerate(items):
            gathered_ND[torch.from_numpy(indices)] = everyone[lane][: len(indices)]
        return gathered_ND

    def sum(self, by_lane: Sequence[Tensor]) -> Tensor:
        """See `Lanes.sum`."""
        total = super().sum(by_lane)
        torch.distributed.all_reduce(total)
        return total
