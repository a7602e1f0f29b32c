"""The first pass of a search in whole numbers of 8 bits, on a CPU that multiplies them (AVX512-VNNI).

A vector x is scale · low + rest with low in −127 … 127; products of two lows are exact. So a score lies
within |rest_q|·|x| + |q|·|rest_x| of scale_q · scale_x · product (Cauchy-Schwarz). Candidates are compared
with what they have to reach while their products are in registers; those that may reach it are multiplied
in float32 at once, and raise the floor if they are among the K best. Axes: Q queries, C candidates of a tile,
D width, K results, N vectors.
"""

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


def _kernels() -> Any:
    from umarvel_ray.retrieve import kernels

    return kernels


class Rounded(NamedTuple):
    """Vectors as the first pass sees them.

    Attributes:
        low_ND: int8, filled up to the bytes of a step.
        scale_N: float32.
        length_N: Upper bounds of their lengths, before and after rounding; float32.
        rest_N: Upper bounds of the lengths of what rounding took; float32.
    """

    low_ND: np.ndarray
    scale_N: np.ndarray
    length_N: np.ndarray
    rest_N: np.ndarray

    @classmethod
    def of(cls, vectors_ND: np.ndarray) -> "Rounded":
        """Round float32 vectors; the largest value of each becomes 127."""
        kernels, (num, width) = _kernels(), vectors_ND.shape
        low_ND = np.zeros((num, -(-width // kernels.STEP_BYTES) * kernels.STEP_BYTES), dtype=np.int8)
        scale_N, square_N, rest_N = np.empty((3, num), dtype=np.float32)
        kernels.round_rows(vectors_ND, low_ND, scale_N, square_N, rest_N)
        # Squares were summed in float32; a scale, its inverse and each product with it were rounded.
        more = np.float32(1 + width * 2.0**-23)
        length_N = np.sqrt(square_N)
        rest_N = np.sqrt(rest_N) * scale_N * more + np.float32(2.0**-21) * length_N
        return cls(low_ND, scale_N, length_N * more + rest_N, rest_N)


@dataclass(frozen=True, slots=True)
class Panels:
    """Some candidates of a block, as the kernel wants them.

    Attributes:
        first: Where the first stands in its block.
        exact_CD: float32.
        panels: uint32, see `kernels.scan`.
        known: float32, what is known of each; see there.
        length_C: float32 tensor, upper bounds of their lengths.
    """

    first: int
    exact_CD: np.ndarray
    panels: np.ndarray
    known: np.ndarray
    length_C: Tensor

    @classmethod
    def cut(cls, block_CD: Tensor, start: int, stop: int) -> "Panels":
        """Columns `start` to `stop` of a block."""
        kernels = _kernels()
        exact_CD = block_CD[start:stop].numpy()
        rounded = Rounded.of(exact_CD)
        groups = rounded.low_ND.view(np.uint32)
        num, num_panels = len(groups), -(-len(groups) // kernels.LANES)
        panels = np.empty((num_panels, groups.shape[1], kernels.LANES), dtype=np.uint32)
        kernels.pack(groups, panels)
        # Beside what rounding took: the rounding of the exact score, of the estimate and of the bounds.
        by_length_C = 1.01 * (rounded.rest_N + 2.0**-18 * rounded.length_N)
        known = np.zeros((3, num_panels * kernels.LANES), dtype=np.float32)
        known[:, :num] = rounded.scale_N, 1.01 * rounded.length_N, by_length_C
        known = np.ascontiguousarray(known.reshape(3, num_panels, kernels.LANES).transpose(1, 0, 2))
        return cls(start, exact_CD, panels, known, torch.from_numpy(rounded.length_N))


class Int8Pass:
    """The pass of some queries over a block's `Panels`.

    Args:
        queries_QD: float32.
        rounded: The same.
        scratch: As `memory` says.
        scores_QK: float32, the best of the blocks before, falling.

    Attributes:
        num_multiplied: Pairs that 8 bits did not decide.
    """

    def __init__(self, queries_QD: Tensor, rounded: Rounded, scratch: Tensor, *, scores_QK: Tensor) -> None:
        kernels = _kernels()
        self._queries = queries_QD.numpy()
        num, width = self._queries.shape
        filled = -(-num // kernels.ROWS) * kernels.ROWS
        self._low = np.zeros((filled, rounded.low_ND.shape[1]), dtype=np.int8)
        self._low[:num] = rounded.low_ND
        self._facts = np.zeros((filled, kernels.NUM_FACTS), dtype=np.float32)
        self._facts[:num, 0].view(np.int32)[:] = kernels.ZERO * rounded.low_ND.sum(axis=1, dtype=np.int32)
        self._facts[:num, 1:4] = np.stack([rounded.scale_N, rounded.rest_N, rounded.length_N], axis=1)
        # Sums in any order, as many products, and the rounding of the exact score.
        self._share = np.float32((width + 4) * 2.0**-24)
        keys_and_limits = scratch.numpy().reshape(2, -1)
        self._keys, self._limits = keys_and_limits[0], keys_and_limits[1].view(np.float32).reshape(2, -1)
        self._rows = max(1, _CACHED_BYTES // self._low.shape[1] // kernels.ROWS) * kernels.ROWS
        self.num_multiplied = 0
        self.rise(scores_QK[:, -1], scores_QK)

    @staticmethod
    def memory(num_queries: int, tiles: list[Panels]) -> tuple[int, torch.dtype]:
        """What it needs for survivors, which all pairs of a tile may be: how many, of which type."""
        return 2 * num_queries * max(len(tile.length_C) for tile in tiles), torch.int64

    @property
    def floor_Q(self) -> Tensor:
        """See `FirstPass`."""
        return torch.from_numpy(self._facts[: len(self._heap), 4].copy())

    def take(self, tile: Panels) -> Iterator[Survivors]:
        """See `FirstPass`."""
        scan, num_queries = _kernels().scan, len(self._heap)
        for start in range(0, num_queries, self._rows):
            some = slice(start, min(start + self._rows, num_queries))
            num, num_multiplied = scan(
                self._queries[some], self._low[start:], self._facts[start:],
                tile.exact_CD, tile.panels, tile.known, self._share, (start << 32) + tile.first,
                self._heap[some], self._keys, self._limits,
            )  # fmt: skip
            self.num_multiplied += num_multiplied
            key_S, limits = self._keys[:num].copy(), self._limits[:, :num].copy()
            yield Survivors(*map(torch.from_numpy, (key_S, *limits)))

    def rise(self, floor_Q: Tensor, scores_QK: Tensor) -> None:
        """See `FirstPass`."""
        # In ascending order they are a heap.
        self._heap = np.ascontiguousarray(scores_QK.numpy()[:, ::-1])
        self._facts[: len(self._heap), 4] = torch.maximum(floor_Q, scores_QK[:, -1]).numpy()
