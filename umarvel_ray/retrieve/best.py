"""The best candidates of some queries: what the first pass leaves over is scored exactly and merged in.

Axes: Q queries, C candidates of a block or tile, D width, K results, S survivors.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from umarvel_ray.retrieve.arrays import (
    columns,
    divided,
    largest,
    order_of,
    padded,
    places_of,
    stable_order,
    taken,
)
from umarvel_ray.retrieve.crew import Crew
from umarvel_ray.retrieve.first_pass import FirstPass, Survivors, TilePass
from umarvel_ray.retrieve.int8 import Int8Pass, Queries
from umarvel_ray.retrieve.scoring import exact_scores, exact_scores_by_query, sampled_products
from umarvel_ray.retrieve.tiles import Narrow, TilePrecision

Precision = TilePrecision | Literal["int8"]
"""Of the first pass."""

_MAX_SURVIVORS = 1 << 22
"""Survivors held before they are scored: bounds memory where a pool is full of equal scores."""
_PIECE_VALUES = 1 << 24
_SPAN_BYTES = 1 << 23
"""float32 candidates that are looked at together when survivors are scored: they stay in the cache."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some candidates: as they are, and in tiles.

    Attributes:
        tiles: `Tile`s, or `Panels` of int8.
        row: Row of the first in the pool.
        precision: Of the tiles.
        largest: No product of a query's and a candidate's length exceeds this.
    """

    exact_CD: Tensor
    tiles: list[Any]
    row: int
    precision: Precision
    largest: float


class Best:
    """Some queries and their best candidates so far.

    Attributes:
        scores_QK: float32; minus infinity where fewer than K candidates were seen.
        rows_QK: int64.
        num_undecided: Pairs of the last block that int8 could not decide.
    """

    def __init__(self, queries_QD: Tensor, k: int) -> None:
        self._queries_QD = queries_QD
        self._k = k
        self._narrow: dict[Precision, Narrow | Queries] = {}
        shape = (len(queries_QD), k)
        self.scores_QK = torch.full(shape, -torch.inf, device=queries_QD.device)
        self.rows_QK = torch.full(shape, -1, dtype=torch.int64, device=queries_QD.device)
        self.num_undecided = 0

    def add(self, block: Block, crew: Crew) -> None:
        """Look at one more block; its rows are above all before."""
        if block.precision not in self._narrow:
            self._narrow = {block.precision: self._narrowed(block.precision)}
        self.num_undecided = 0
        before = self.scores_QK, self.rows_QK
        guess_Q = self._pass(block, crew, share=_guessed_share(self._queries_QD.shape[1]))
        # The true K-th scores are at least as good as guessed, or the guess may have cost a candidate.
        wrong = torch.nonzero(self.scores_QK[:, -1] < guess_Q)[:, 0]
        if len(wrong):
            again = Best(self._queries_QD[wrong], self._k)
            again.scores_QK, again.rows_QK = (values[wrong] for values in before)
            again._narrow = {block.precision: again._narrowed(block.precision)}
            again._pass(block, crew, share=1.0)
            self.scores_QK[wrong], self.rows_QK[wrong] = again.scores_QK, again.rows_QK
            self.num_undecided += again.num_undecided

    def _narrowed(self, precision: Precision) -> Narrow | Queries:
        if precision == "int8":
            return Queries.of(self._queries_QD)
        return Narrow.of(self._queries_QD, precision)

    def _pass(self, block: Block, crew: Crew, *, share: float) -> Tensor:
        """Merge in a block's best; returns what the K-th scores were taken to be at least, (Q,) float32.

        Args:
            share: Of the error bound, how much an estimate is taken to be off: 1 is proven.
        """
        survivors: list[Survivors] = []
        with self._first_pass(block, crew, share) as first:
            for found in chain(chain.from_iterable(map(first.take, block.tiles)), first.finish()):
                survivors.append(found)
                if sum(len(found.key_S) for found in survivors) > _MAX_SURVIVORS:
                    floor_Q = self._settle(block, survivors, first.floor_Q)
                    first.rise(floor_Q, self.scores_QK)
                    survivors = []
            return self._settle(block, survivors, first.floor_Q) if survivors else first.floor_Q

    @contextmanager
    def _first_pass(self, block: Block, crew: Crew, share: float) -> Iterator[FirstPass]:
        queries, num = self._narrow[block.precision], len(self._queries_QD)
        if isinstance(queries, Queries):
            with crew.buffer(*Int8Pass.memory(num, block.tiles)) as memory:
                first = Int8Pass(queries, memory, share=share, scores_QK=self.scores_QK)
                yield first
            self.num_undecided += first.num_undecided
        else:
            with crew.buffer(*TilePass.memory(num, block.tiles)) as memory:
                yield TilePass(queries, memory, share=share, scores_QK=self.scores_QK)

    def _settle(self, block: Block, survivors: list[Survivors], floor_Q: Tensor) -> Tensor:
        """Score what may still be among the best, and merge it in; returns the floor that it had to reach."""
        found = Survivors(*(torch.cat(part) for part in zip(*survivors, strict=True)))
        found = found.reaching(floor_Q)
        # By query, then by row: the merge below keeps this order among equal scores.
        found = found.at(order_of(found.key_S))
        floor_Q = torch.maximum(floor_Q, self._floor(found.key_S >> 32, found.lower_S))
        found = found.reaching(floor_Q)
        query, column = found.key_S >> 32, found.key_S & 0xFFFFFFFF
        if block.precision == "bfloat16" and len(query):
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
                self._queries_QD,
                block.exact_CD,
                query,
                column,
                largest=block.largest,
                compiled=block.precision == "int8",
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


def _guessed_share(width: int) -> float:
    """Of the error bound, what an estimate may be off before a guess fails: errors of D coordinates mostly
    cancel, and are one bound over √D or less; three of that are next to never exceeded."""
    return min(1.0, 3 / math.sqrt(width))
