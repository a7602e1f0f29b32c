"""Who of a block may be among the best of some queries: the first pass of a search, tile by tile.

Axes: Q queries, C candidates of a tile, K results, G groups of columns, S survivors.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from umarvel_ray.retrieve.arrays import divided, largest, places_of, reaches, taken
from umarvel_ray.retrieve.tiles import Bounds, Narrow, Tile

_NUM_WAITING = 6
"""Tiles whose products are kept until the floor is known from all of them: 50 MB for each thread."""


class Survivors(NamedTuple):
    """Pairs of a query and a candidate that may be among the best, and between which limits their scores lie.

    Attributes:
        key_S: int64, the query times 2³², and the candidate's place in its block.
        lower_S, upper_S: float32; the lower one as far as the error is taken for what it is.
    """

    key_S: Tensor
    lower_S: Tensor
    upper_S: Tensor

    def at(self, places: Tensor) -> "Survivors":
        """Some of them, or in another order."""
        return Survivors(*(taken(values, places) for values in self))

    def reaching(self, floor_Q: Tensor) -> "Survivors":
        """Those that may reach their query's floor."""
        return self.at(places_of(reaches(self.upper_S, taken(floor_Q, self.key_S >> 32))))


class FirstPass(Protocol):
    """What looks at a block for some queries."""

    @property
    def floor_Q(self) -> Tensor:
        """float32, which scores candidates have to reach: the K-th at least, as far as is known."""
        ...

    def take(self, tile: Any) -> Iterator[Survivors]:
        """Look at one more tile; tells who survived, of it or of earlier ones."""
        ...

    def finish(self) -> Iterator[Survivors]:
        """Those that have been waiting."""
        ...

    def rise(self, floor_Q: Tensor, scores_QK: Tensor) -> None:
        """The K best scores are known to be these, float32 (Q, K), and the floor to be at least this."""
        ...


class TilePass:
    """Products by Torch: the largest of each group of columns first, members where that tells too little.

    Args:
        queries: Q of them.
        out: As `memory` says.
        share: Of the error bound, how much an estimate is taken to be off: 1 is proven.
        scores_QK: float32, the best of the blocks before.
    """

    def __init__(self, queries: Narrow, out: Tensor, *, share: float, scores_QK: Tensor) -> None:
        self._queries, self._out, self._share = queries, out, share
        self._waiting: list[tuple[Tensor, Tensor, Bounds]] = []
        self._number = self._used = 0
        self._best_QK, self._floor_Q = scores_QK, scores_QK[:, -1]

    @staticmethod
    def memory(num_queries: int, tiles: list[Tile]) -> tuple[int, torch.dtype]:
        """What it needs for products: how many, of which type."""
        columns = sum(sorted(len(tile.low_CD) for tile in tiles)[-_NUM_WAITING:])
        return num_queries * columns, tiles[0].low_CD.dtype

    @property
    def floor_Q(self) -> Tensor:
        """See `FirstPass`."""
        return self._floor_Q

    def take(self, tile: Tile) -> Iterator[Survivors]:
        """Of the first tiles nearly all would survive: they wait until the floor has risen."""
        products_QC = tile.products(self._queries, self._out[self._used :])
        self._used += products_QC.numel()
        maxima_QG = products_QC.view(len(products_QC), -1, tile.num_groups).amax(dim=1).float()
        self._waiting.append((products_QC, maxima_QG, Bounds.of(tile, self._queries)))
        if _is_due(self._number):
            lower_QG = self._waiting[-1][2].lower(maxima_QG, share=self._share)
            best_QN = torch.cat([self._best_QK, lower_QG], dim=1)
            self.rise(self._floor_Q, largest(best_QN, self._best_QK.shape[1]))
        self._number += 1
        if self._number >= _NUM_WAITING:
            yield from self.finish()

    def finish(self) -> Iterator[Survivors]:
        """See `FirstPass`."""
        for products in self._waiting:
            yield _survivors(*products, self._floor_Q, share=self._share)
        self._waiting.clear()
        self._used = 0

    def rise(self, floor_Q: Tensor, scores_QK: Tensor) -> None:
        """See `FirstPass`."""
        self._best_QK = scores_QK
        self._floor_Q = torch.maximum(floor_Q, scores_QK.amin(dim=1))


def _survivors(
    products_QC: Tensor, maxima_QG: Tensor, bounds: Bounds, floor_Q: Tensor, *, share: float
) -> Survivors:
    """All pairs of a tile that may reach their query's floor."""
    (num_columns, num_groups), tile = (products_QC.shape[1], maxima_QG.shape[1]), bounds.tile
    least_QG = bounds.least(floor_Q)
    # Most groups have no member that does, and their largest tells.
    group_M = places_of(reaches(maxima_QG, least_QG))
    query_M, in_row_M = divided(group_M, num_groups)
    members_N = torch.arange(0, num_columns, num_groups, device=group_M.device)
    place_NM = query_M * num_columns + in_row_M + members_N[:, None]
    products_NM = taken(products_QC, place_NM).float()
    which_S = places_of(reaches(products_NM, taken(least_QG, group_M)))
    query_S, column_S = divided(taken(place_NM, which_S), num_columns)
    lower_S, upper_S = bounds.limits(taken(products_NM, which_S), query_S, column_S, share=share)
    return Survivors((query_S << 32) + tile.first + column_S, lower_S, upper_S)


def _is_due(number: int) -> bool:
    """Whether the K-th scores are looked for after this tile: they move less and less."""
    return number & (number - 1) == 0 or (number % 3 == 0 and (number // 3) & (number // 3 - 1) == 0)
