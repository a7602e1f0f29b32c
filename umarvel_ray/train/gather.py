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
        """Sum over all lanes of one tensor each, in lane order; `by_lane` holds those of `mine`, in order."""
        total = by_lane[0].clone()
        for tensor in by_lane[1:]:
            total += tensor
        return total

    def most(self, number: int) -> int:
        """The largest of what all processes give."""
        return number

    def any(self, flag: bool) -> bool:
        """Whether any process says so; then all of them hear it."""
        return bool(self.most(int(flag)))


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
        """See `Lanes.sum`.

        An all-reduce adds in an order of its own. Here each worker receives one piece of every lane's tensor,
        adds the pieces in lane order, and the sums are gathered: the bytes of an all-reduce, and one result
        whatever the number of workers and the network between them.
        """
        own = super().sum(by_lane)
        if self.count == 1:
            return own
        piece = -(-own.numel() // self.count)
        pieces = own.new_zeros(self.count * piece)
        pieces[: own.numel()] = own.flatten()
        received = torch.empty_like(pieces)
        torch.distributed.all_to_all_single(received, pieces)
        mine = super().sum(received.view(self.count, piece).unbind())
        torch.distributed.all_gather(list(pieces.view(self.count, piece).unbind()), mine)
        return pieces[: own.numel()].view_as(own)

    def most(self, number: int) -> int:
        """See `Lanes.most`."""
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        most = torch.tensor(number, device=device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return int(most)
