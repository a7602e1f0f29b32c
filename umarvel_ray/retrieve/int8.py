"""The first pass of a search in whole numbers, on a CPU that multiplies them (AVX512-VNNI).

A vector x is scale · low + rest, low of 8 bits; products of two lows are exact. So a score lies within
|rest_q|·|x| + |q|·|rest_x| of scale_q · scale_x · product (Cauchy-Schwarz). Candidates are compared with what
they have to reach while their products are in registers. Those that may reach it wait until the floor has
risen by all of them, and are multiplied again in 16 bits, which leaves little more than the K best. Axes: Q
queries, C candidates of a tile, D width, K results, N vectors.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from umarvel_ray.retrieve.first_pass import Survivors

_CACHED_BYTES = 1 << 20
"""Of queries, which every panel of candidates meets in turn: they stay in a core's L2 cache."""
_SPAN_BYTES = 1 << 19
"""Of candidates in 16 bits, which queries meet in turn; the same."""
_LINE_BYTES = 64
_HUGE_BYTES = 1 << 22
_MAX_WAITING = 1 << 21
"""Pairs that wait for the floor to rise, 12 bytes each."""


@lru_cache(maxsize=1)
def multiplies_int8() -> bool:
    """Whether the CPU has 8-bit dot products of 512 bits, and Numba is there to use them."""
    if not getattr(torch.cpu, "get_capabilities", dict)().get("avx512_vnni"):
        return False
    try:
        from numba.core import config

        _kernels()
    except (ImportError, RuntimeError):
        return False  # no Numba; or no folder where it may keep what it compiles
    # Compiled for no other processor than this.
    return not any(getattr(config, name) for name in ("DISABLE_JIT", "CPU_NAME", "CPU_FEATURES"))


def _memory(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory that begins where a line of the cache does; from 4 MB on NumPy asks for huge pages."""
    size = math.prod(shape) * np.dtype(dtype).itemsize + _LINE_BYTES
    memory = np.empty(_HUGE_BYTES if 3 * _HUGE_BYTES < 4 * size < 4 * _HUGE_BYTES else size, dtype=np.uint8)
    start = -memory.ctypes.data % _LINE_BYTES
    return memory[start : start + size - _LINE_BYTES].view(dtype).reshape(shape)


def _kernels() -> Any:
    from umarvel_ray.retrieve import kernels

    return kernels


class Rounded(NamedTuple):
    """Vectors in whole numbers.

    Attributes:
        low_ND: int8 or int16, filled up to the step of the loop that multiplies them.
        facts: float32 (N, 3), see `kernels.round_rows`.
    """

    low_ND: np.ndarray
    facts: np.ndarray

    @classmethod
    def empty(cls, num: int, width: int, dtype: Any) -> "Rounded":
        """Memory for `num` vectors."""
        step = _kernels().STEP_BYTES if dtype == np.int8 else _kernels().STEP_WORDS
        low_ND = _memory((num, -(-width // step) * step), dtype)
        low_ND[:, width:] = 0
        return cls(low_ND, np.empty((num, 3), dtype=np.float32))

    @classmethod
    def of(cls, vectors_ND: Tensor, dtype: Any) -> "Rounded":
        """Round float32 vectors to int8 or int16."""
        num, width = vectors_ND.shape
        rounded = cls.empty(num, width, dtype)
        _kernels().round_rows(vectors_ND.numpy(), *rounded)
        return rounded


class Queries(NamedTuple):
    """Queries as both passes see them.

    Attributes:
        by_8: What all candidates are multiplied with.
        by_16: What those are that 8 bits do not exclude.
    """

    by_8: Rounded
    by_16: Rounded

    @classmethod
    def of(cls, queries_QD: Tensor) -> "Queries":
        """Round float32 queries."""
        return cls(Rounded.of(queries_QD, np.int8), Rounded.of(queries_QD, np.int16))


@dataclass(frozen=True, slots=True)
class Panels:
    """Some candidates of a block, as the kernel wants them.

    Attributes:
        first: Where the first stands in its block.
        panels: uint32, see `kernels.scan`.
        known: float32, what is known of each; see there.
        by_16: The same candidates in 16 bits.
        length_C: float32 tensor, upper bounds of their lengths.
    """

    first: int
    panels: np.ndarray
    known: np.ndarray
    by_16: Rounded
    length_C: Tensor

    @classmethod
    def cut(cls, block_CD: Tensor, start: int, stop: int) -> "Panels":
        """Columns `start` to `stop` of a block."""
        kernels = _kernels()
        (num, width), num_panels = (stop - start, block_CD.shape[1]), -(-(stop - start) // kernels.LANES)
        num_steps = -(-width // kernels.STEP_BYTES) * kernels.STEP_BYTES // 4
        panels = _memory((num_panels, num_steps, kernels.LANES), np.uint32)
        facts = np.empty((num, 3), dtype=np.float32)
        by_16 = Rounded.empty(num, width, np.int16)
        kernels.round_panels(block_CD[start:stop].numpy(), panels, facts, *by_16)
        scale_C, rest_C, length_C = facts.T
        # Beside what rounding took: the rounding of the exact score, of the estimate and of the bounds.
        by_length_C = 1.01 * (rest_C + 2.0**-18 * length_C)
        known = np.zeros((3, num_panels * kernels.LANES), dtype=np.float32)
        known[:, :num] = scale_C, 1.01 * length_C, by_length_C
        known = np.ascontiguousarray(known.reshape(3, num_panels, kernels.LANES).transpose(1, 0, 2))
        return cls(start, panels, known, by_16, torch.from_numpy(length_C.copy()))


class Int8Pass:
    """The pass of some queries over a block.

    Args:
        queries: Q of them.
        scratch: As `memory` says.
        share: Of the error bound, how much an estimate is taken to be off: 1 is proven.
        scores_QK: float32, the best of the blocks before, falling.

    Attributes:
        num_undecided: Pairs that 8 bits did not decide.
    """

    def __init__(self, queries: Queries, scratch: Tensor, *, share: float, scores_QK: Tensor) -> None:
        kernels, (num, width) = _kernels(), queries.by_8.low_ND.shape
        filled = -(-num // kernels.ROWS) * kernels.ROWS
        self._low = np.zeros((filled, width), dtype=np.int8)
        self._low[:num] = queries.by_8.low_ND
        self._facts = np.zeros((filled, kernels.NUM_FACTS), dtype=np.float32)
        self._facts[:num, 0].view(np.int32)[:] = kernels.ZERO * queries.by_8.low_ND.sum(1, dtype=np.int32)
        self._facts[:num, 1:4] = queries.by_8.facts
        self._floor_Q = self._facts[:num, 4]
        self._by_16, self._share = queries.by_16, np.float32(share)
        keys_and_uppers = scratch.numpy().reshape(3, -1)
        self._keys, self._uppers = keys_and_uppers[:2].reshape(-1), keys_and_uppers[2].view(np.float32)
        self._rows = _queries_of_a_turn(width)
        self._waiting: list[_Waiting] = []
        self.num_undecided = 0
        self.rise(scores_QK[:, -1], scores_QK)

    @staticmethod
    def memory(num_queries: int, tiles: list[Panels]) -> tuple[int, torch.dtype]:
        """What it needs for survivors, which all pairs of a turn may be: how many, of which type."""
        num_queries = min(num_queries, _queries_of_a_turn(4 * tiles[0].panels.shape[1]))
        return 3 * -(-num_queries * max(len(tile.length_C) for tile in tiles) // 2), torch.int64

    @property
    def floor_Q(self) -> Tensor:
        """See `FirstPass`."""
        return torch.from_numpy(self._floor_Q.copy())

    def take(self, tile: Panels) -> Iterator[Survivors]:
        """Those that 8 bits do not exclude wait: the floor rises meanwhile."""
        scan, num_queries = _kernels().scan, len(self._heap)
        for start in range(0, num_queries, self._rows):
            some = slice(start, min(start + self._rows, num_queries))
            num = scan(
                self._low[start:], self._facts[start:], len(tile.length_C), tile.panels, tile.known,
                self._share, start << 32, self._heap[some], self._keys, self._uppers,
            )  # fmt: skip
            self._waiting.append(_Waiting(tile, self._keys[:num].copy(), self._uppers[:num].copy()))
        if self._num_waiting > _MAX_WAITING:
            self._waiting = [waiting.reaching(self._floor_Q) for waiting in self._waiting]
            if self._num_waiting > _MAX_WAITING // 2:
                yield from self.finish()

    def finish(self) -> Iterator[Survivors]:
        """See `FirstPass`."""
        for tile, keys, uppers in self._waiting:
            # Some candidates at a time, which stay in the cache while queries pass them by.
            span = (keys & 0xFFFFFFFF) // (_SPAN_BYTES // (2 * tile.by_16.low_ND.shape[1]) or 1)
            order = np.argsort(span.astype(np.uint16), kind="stable")
            keys, limits = keys[order], np.empty((2, len(keys)), dtype=np.float32)
            num, num_multiplied = _kernels().refine(
                *self._by_16, self._floor_Q, *tile.by_16, self._share, self._fine_heap,
                keys, uppers[order], limits,
            )  # fmt: skip
            self.num_undecided += num_multiplied
            yield Survivors(*map(torch.from_numpy, (keys[:num] + tile.first, *limits[:, :num])))
        self._waiting.clear()

    def rise(self, floor_Q: Tensor, scores_QK: Tensor) -> None:
        """See `FirstPass`."""
        # In ascending order they are a heap. What 8 and what 16 bits tell of a pair must not count twice.
        self._heap = np.ascontiguousarray(scores_QK.numpy()[:, ::-1])
        self._fine_heap = self._heap.copy()
        self._floor_Q[:] = torch.maximum(floor_Q, scores_QK[:, -1]).numpy()

    @property
    def _num_waiting(self) -> int:
        return sum(len(waiting.keys) for waiting in self._waiting)


def _queries_of_a_turn(num_bytes: int) -> int:
    rows = _kernels().ROWS
    return max(1, _CACHED_BYTES // num_bytes // rows) * rows


class _Waiting(NamedTuple):
    """Pairs of a tile: query · 2³² + column of the tile, and what their scores are at most."""

    tile: Panels
    keys: np.ndarray
    uppers: np.ndarray

    def reaching(self, floor_Q: np.ndarray) -> "_Waiting":
        still = np.flatnonzero(~(self.uppers < floor_Q[self.keys >> 32]))
        return _Waiting(self.tile, self.keys[still], self.uppers[still])
