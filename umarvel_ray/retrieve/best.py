"""The best candidates of some queries: what the first pass leaves over is scored exactly and merged in.

Axes: Q queries, C candidates of a block or tile, D width, K results, G groups of columns, S survivors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from umarvel_ray.retrieve.arrays import (
    columns,
    divided,
    largest,
    order_of,
    padded,
    places_of,
    reaches,
    stable_order,
    taken,
)
from umarvel_ray.retrieve.crew import Crew
from umarvel_ray.retrieve.scoring import exact_scores, exact_scores_by_query, sampled_products
from umarvel_ray.retrieve.tiles import PRODUCT_DTYPES, Bounds, Narrow, Precision, Tile

_MAX_SURVIVORS = 1 << 22
"""Survivors held before they are scored: bounds memory where a pool is full of equal scores."""
_PIECE_VALUES = 1 << 24
_SPAN_BYTES = 1 << 23
"""float32 candidates that are looked at together when survivors are scored: they stay in the cache."""
_NUM_WAITING = 6
"""Tiles whose products are kept until the floor is known from all of them: 50 MB for each thread."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some candidates: as they are, and in tiles.

    Attributes:
        row: Row of the first in the pool.
        precision: Of the tiles.
        largest: No product of a query's and a candidate's length exceeds this.
    """

    exact_CD: Tensor
    tiles: Sequence[Tile]
    row: int
    precision: Precision
    largest: float


class Best:
    """Some queries and their best candidates so far.

    Attributes:
        scores_QK: float32; minus infinity where fewer than K candidates were seen.
        rows_QK: int64.
        num_survivors: Pairs of the last block that the first pass could not decide.
    """

    def __init__(self, queries_QD: Tensor, k: int) -> None:
        self._queries_QD = queries_QD
        self._k = k
        self._narrow: dict[Precision, Narrow] = {}
        shape = (len(queries_QD), k)
        self.scores_QK = torch.full(shape, -torch.inf, device=queries_QD.device)
        self.rows_QK = torch.full(shape, -1, dtype=torch.int64, device=queries_QD.device)
        self.num_survivors = 0

    def add(self, block: Block, crew: Crew) -> None:
        """Look at one more block; its rows are above all before."""
        if block.precision not in self._narrow:
            self._narrow = {block.precision: Narrow.of(self._queries_QD, block.precision)}
        self.num_survivors = 0
        before = self.scores_QK, self.rows_QK
        guess_Q = self._pass(block, crew, share=_guessed_share(self._queries_QD.shape[1]))
        # The true K-th scores are at least as good as guessed, or the guess may have cost a candidate.
        wrong = torch.nonzero(self.scores_QK[:, -1] < guess_Q)[:, 0]
        if len(wrong):
            again = Best(self._queries_QD[wrong], self._k)
            again.scores_QK, again.rows_QK = (values[wrong] for values in before)
            again._narrow = {block.precision: Narrow(*(x[wrong] for x in self._narrow[block.precision]))}
            again._pass(block, crew, share=1.0)
            self.scores_QK[wrong], self.rows_QK[wrong] = again.scores_QK, again.rows_QK
            self.num_survivors += again.num_survivors

    def _pass(self, block: Block, crew: Crew, *, share: float) -> Tensor:
        """Merge in a block's best; returns what the K-th scores were taken to be at least, (Q,) float32.

        Args:
            share: Of the error bound, how much an estimate an estimate is taken to be off: 1 is proven.
        """
        queries = self._narrow[block.precision]
        floor_QK, floor_Q = self.scores_QK, self.scores_QK[:, -1]
        survivors: list[_Survivors] = []
        size = len(self._queries_QD) * max(len(tile.low_CD) for tile in block.tiles)
        waiting: list[tuple[Tensor, Tensor, Bounds]] = []
        num_waiting = min(_NUM_WAITING, len(block.tiles))
        with crew.buffer(num_waiting * size, PRODUCT_DTYPES[block.precision]) as out:
            for number, tile in enumerate(block.tiles):
                products_QC = tile.products(queries, out[len(waiting) * size :])
                maxima_QG = products_QC.view(len(products_QC), -1, tile.num_groups).amax(dim=1).float()
                waiting.append((products_QC, maxima_QG, Bounds.of(tile, queries)))
                if _is_due(number):
                    lower_QG = waiting[-1][2].lower(maxima_QG, share=share)
                    floor_QK = largest(torch.cat([floor_QK, lower_QG], dim=1), self._k)
                    floor_Q = torch.maximum(floor_Q, floor_QK.amin(dim=1))
                # Of the first tiles nearly all would survive: they wait until the floor has risen.
                if number + 1 < num_waiting:
                    continue
                for products in waiting:
                    survivors.append(_survivors(*products, floor_Q, share=share))
                    if sum(len(found.key_S) for found in survivors) > _MAX_SURVIVORS:
                        floor_Q = self._settle(block, survivors, floor_Q)
                        floor_QK = self.scores_QK
                        survivors = []
                waiting.clear()
        return self._settle(block, survivors, floor_Q) if survivors else floor_Q

    def _settle(self, block: Block, survivors: list["_Survivors"], floor_Q: Tensor) -> Tensor:
        """Score what may still be among the best, and merge it in; returns the floor that it had to reach."""
        found = _Survivors(*(torch.cat(part) for part in zip(*survivors, strict=True)))
        found = found.reaching(floor_Q)
        # By query, then by row: the merge below keeps this order among equal scores.
        found = found.at(order_of(found.key_S))
        floor_Q = torch.maximum(floor_Q, self._floor(found.key_S >> 32, found.lower_S))
        found = found.reaching(floor_Q)
        self.num_survivors += len(found.key_S)
        query, column = found.key_S >> 32, found.key_S & 0xFFFFFFFF
        if block.precision != "float32" and len(query):
            refined, error = self._refined(block, query, column), self._refined_error(block)
            keep = places_of(refined + error >= taken(self._floor(query, refined - error), query))
            query, column = query[keep], column[keep]
        scores = self._exact(block, query, column)
        for inside, place in columns(query, len(self._queries_QD)):
            self._merge(query[inside], place, scores[inside], column[inside] + block.row)
        return torch.maximum(floor_Q, self.scores_QK[:, -1])

    def _floor(self, query: Tensor, lower: Tensor) -> Tensor:
        """The K-th scores at least, (Q,), given lower bounds of more; those stand by query."""
        floor_QK = self.scores_QK
        for inside, place in columns(query, len(self._queries_QD)):
            lower_QN = padded(query[inside], place, lower[inside], len(self._queries_QD))
            floor_QK = largest(torch.cat([floor_QK, lower_QN], dim=1), self._k)
        return floor_QK.amin(dim=1)

    def _refined(self, block: Block, query: Tensor, column: Tensor) -> Tensor:
        """float32 inner products of survivors, which stand by query."""
        if query.is_cuda:
            step = max(1, _PIECE_VALUES // block.exact_CD.shape[1])
            pairs = zip(query.split(step), column.split(step), strict=True)
            return torch.cat([(self._queries_QD[q] * block.exact_CD[c]).sum(dim=1) for q, c in pairs])
        # Candidates some at a time: rows that several queries want come from memory once.
        refined, start = torch.empty(len(query)), 0
        step = max(1, _SPAN_BYTES // (4 * block.exact_CD.shape[1]))
        span, row = divided(column, step)
        order = stable_order(span)
        for number, count in enumerate(torch.bincount(span).tolist()):
            if not count:
                continue
            which = order[start : start + count]
            start += count
            rows_CD = block.exact_CD[number * step : (number + 1) * step]
            products = sampled_products(self._queries_QD, rows_CD, taken(query, which), taken(row, which))
            refined.numpy()[which.numpy()] = products.numpy()
        return refined

    def _refined_error(self, block: Block) -> float:
        """Bound of the error of `_refined`: D products and D sums are rounded."""
        return 1.01 * (block.exact_CD.shape[1] + 4) * 2.0**-24 * block.largest + 2.0**-100

    def _exact(self, block: Block, query: Tensor, column: Tensor) -> Tensor:
        """Scores of survivors, which stand by query."""
        if not query.is_cuda:
            return exact_scores_by_query(
                self._queries_QD, block.exact_CD, query, column, largest=block.largest
            )
        step = max(1, _PIECE_VALUES // block.exact_CD.shape[1])
        pairs = zip(query.split(step), column.split(step), strict=True)
        scores = [exact_scores(self._queries_QD[q], block.exact_CD[c]) for q, c in pairs]
        return torch.cat([self.scores_QK.new_empty(0), *scores])

    def _merge(self, query: Tensor, place: Tensor, score: Tensor, row: Tensor) -> None:
        """New rows are above all old ones, and ascend with `place`: a stable sort settles ties by row."""
        num_queries = len(self._queries_QD)
        scores = torch.cat([self.scores_QK, padded(query, place, score, num_queries)], dim=1)
        rows = torch.cat([self.rows_QK, padded(query, place, row, num_queries, fill=-1)], dim=1)
        scores, order = torch.sort(scores, dim=1, descending=True, stable=True)
        self.scores_QK = scores[:, : self._k].contiguous()
        self.rows_QK = rows.gather(1, order[:, : self._k])


class _Survivors(NamedTuple):
    """Pairs of a query and a candidate that may be among the best, and between which limits their scores lie.

    Attributes:
        key_S: int64, the query times 2³², and the candidate's place in its block.
        lower_S, upper_S: float32; the lower one as far as the error is taken for what it is.
    """

    key_S: Tensor
    lower_S: Tensor
    upper_S: Tensor

    def at(self, places: Tensor) -> "_Survivors":
        """Some of them, or in another order."""
        return _Survivors(*(taken(values, places) for values in self))

    def reaching(self, floor_Q: Tensor) -> "_Survivors":
        """Those that may reach their query's floor."""
        return self.at(places_of(reaches(self.upper_S, taken(floor_Q, self.key_S >> 32))))


def _survivors(
    products_QC: Tensor, maxima_QG: Tensor, bounds: Bounds, floor_Q: Tensor, *, share: float
) -> _Survivors:
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
    return _Survivors((query_S << 32) + taken(tile.column_C, column_S), lower_S, upper_S)


def _guessed_share(width: int) -> float:
    """Of the error bound, what an estimate may be off before a guess fails: errors of D coordinates mostly
    cancel, and are one bound over √D or less; three of that are next to never exceeded."""
    return min(1.0, 3 / math.sqrt(width))


def _is_due(number: int) -> bool:
    """Whether the K-th scores are looked for after this tile: they move less and less."""
    return number & (number - 1) == 0 or (number % 3 == 0 and (number // 3) & (number // 3 - 1) == 0)
