"""Tiles for the first pass of a search, float32 or bfloat16: their products come with a hard bound of their
error.

A candidate is x = low + rest, where `low` is what the tile multiplies. |q·x − low_q·low_x| is at most
|rest_q|·|x| + |q|·|rest_x| (Cauchy-Schwarz on what rounding took), plus what the product itself rounds.

Axes: Q queries, C candidates of a tile, D width, G groups of candidates.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from umarvel_ray.retrieve.arrays import taken

TilePrecision = Literal["float32", "bfloat16"]
"""What tiles are made of."""

_PIECE_VALUES = 1 << 17
"""Values per piece that is made narrow, 512 KB: the passes over it find it in the cache."""
_TINY = 2.0**-100


class Narrow(NamedTuple):
    """Vectors as the first pass sees them.

    Attributes:
        low_ND: Their narrow form.
        length_N: Upper bounds of their lengths, before and after rounding; float32.
        rest_N: Upper bounds of the lengths of what rounding took; float32.
    """

    low_ND: Tensor
    length_N: Tensor
    rest_N: Tensor

    @classmethod
    def of(cls, vectors_ND: Tensor, precision: TilePrecision) -> "Narrow":
        """Narrow float32 vectors."""
        (num, width), device = vectors_ND.shape, vectors_ND.device
        length_N, rest_N = torch.empty(num, device=device), torch.zeros(num, device=device)
        if precision == "float32":
            torch.linalg.vector_norm(vectors_ND, dim=1, out=length_N)
            low_ND = vectors_ND
        else:
            low_ND = torch.empty((num, width), dtype=torch.bfloat16, device=device)
            step = max(1, num if device.type == "cuda" else _PIECE_VALUES // width)
            for start in range(0, num, step):
                piece = slice(start, start + step)
                exact = vectors_ND[piece]
                torch.linalg.vector_norm(exact, dim=1, out=length_N[piece])
                low_ND[piece] = exact
                torch.linalg.vector_norm(exact - low_ND[piece], dim=1, out=rest_N[piece])
        # Lengths were summed in float32.
        rest_N = rest_N * (1 + width * 2.0**-23)
        return cls(low_ND, length_N * (1 + width * 2.0**-23) + rest_N, rest_N)


@dataclass(frozen=True, slots=True)
class Tile:
    """Some candidates of a block in groups; group g is rows g, g + G, g + 2G, … of the tile.

    Attributes:
        low_CD: Their narrow form.
        first: Where the first stands in its block.
        length_C, rest_C: float32, upper bounds for each candidate.
        length_G, rest_G: The same for each group.
    """

    low_CD: Tensor
    first: int
    length_C: Tensor
    rest_C: Tensor
    length_G: Tensor
    rest_G: Tensor

    @property
    def num_groups(self) -> int:
        """Groups of the tile, each of as many candidates."""
        return len(self.length_G)

    @classmethod
    def cut(
        cls, block_CD: Tensor, start: int, stop: int, precision: TilePrecision, *, groups: int
    ) -> "list[Tile]":
        """Columns `start` to `stop` of a block: whole groups, and a tile of single rows for the rest."""
        narrow = Narrow.of(block_CD[start:stop], precision)
        whole = (stop - start) - (stop - start) % groups
        parts = ((slice(0, whole), groups), (slice(whole, None), stop - start - whole))
        return [
            cls._of(Narrow(*(values[part] for values in narrow)), start + part.start, num_groups)
            for part, num_groups in parts
            if len(narrow.low_ND[part])
        ]

    @classmethod
    def _of(cls, narrow: Narrow, first: int, groups: int) -> "Tile":
        length_G, rest_G = (
            values.view(-1, groups).amax(dim=0) for values in (narrow.length_N, narrow.rest_N)
        )
        return cls(narrow.low_ND, first, narrow.length_N, narrow.rest_N, length_G, rest_G)

    def products(self, queries: Narrow, out: Tensor) -> Tensor:
        """low_q · low_x of all pairs, (Q, C), in the memory of `out`."""
        shape = (len(queries.low_ND), len(self.low_CD))
        return torch.mm(queries.low_ND, self.low_CD.T, out=out[: shape[0] * shape[1]].view(shape))


@dataclass(frozen=True, slots=True)
class Bounds:
    """Between which limits the exact scores of a tile lie, given its products.

    |product − score| ≤ absolute + relative · |product|, for any member of the group; absolute is an outer
    product of what the query and what the group add to it. Of a single candidate more is known: its own
    length and rest.

    Attributes:
        queries: Their lengths and rests.
        tile: Its groups' and its candidates'.
        sums: What sums lose, as a share of the product of the lengths.
        relative: What products lose, as a share of themselves.
    """

    queries: Narrow
    tile: Tile
    sums: float
    relative: float

    @classmethod
    def of(cls, tile: Tile, queries: Narrow) -> "Bounds":
        """float32 sums in any order, and the rounding of the exact score: D + 4 roundings of at most the
        product of the lengths. A bfloat16 result has 8 bits: half a unit in the last place. Factors a little
        above 1 cover second-order terms and the rounding of the bounds themselves.
        """
        rounding = 1.01 * 2.0**-8 if tile.low_CD.dtype == torch.bfloat16 else 0.0
        return cls(queries, tile, (tile.low_CD.shape[1] + 4) * 2.0**-24, rounding + 2.0**-19)

    @property
    def absolute_QG(self) -> Tensor:
        """The part of the error that does not hang on the product."""
        tile, queries = self.tile, self.queries
        absolute_QG = torch.outer(queries.rest_N, 1.01 * tile.length_G)
        return absolute_QG.addr_(queries.length_N, self._rest(tile.rest_G, tile.length_G)).add_(_TINY)

    def _rest(self, rest: Tensor, length: Tensor) -> Tensor:
        return 1.01 * (rest + self.sums * length)

    def lower(self, products_QG: Tensor, *, share: float) -> Tensor:
        """Lower bounds of the scores, one product for each group, if `share` of what rounding took is all
        that an estimate is off by."""
        lower_QG = products_QG.sub(products_QG.abs(), alpha=self.relative)
        return _known(lower_QG.sub_(self.absolute_QG, alpha=share))

    def limits(
        self, products_S: Tensor, query_S: Tensor, place_S: Tensor, *, share: float
    ) -> tuple[Tensor, Tensor]:
        """(lower, upper) bounds of the scores of some pairs, float32; the lower one as that of `lower`.

        Args:
            query_S, place_S: Which query, and where in the tile the candidate stands.
        """
        tile, queries = self.tile, self.queries
        absolute_S = taken(queries.rest_N, query_S) * taken(1.01 * tile.length_C, place_S)
        rest_S = taken(self._rest(tile.rest_C, tile.length_C), place_S)
        absolute_S.addcmul_(taken(queries.length_N, query_S), rest_S)
        relative_S = products_S.abs().mul_(self.relative).add_(_TINY)
        upper_S = (products_S + relative_S).add_(absolute_S)
        return _known((products_S - relative_S).sub_(absolute_S, alpha=share)), upper_S

    def least(self, floor_Q: Tensor) -> Tensor:
        """(Q, G) float32: a product below it has an upper bound below the floor.

        The upper bound p + relative · |p| + absolute rises with p, so p has to reach x = floor − absolute
        but for 2 · relative · |x|; |x| is at most |floor| + absolute, which leaves a sum of outer products.
        """
        tile, queries, more = self.tile, self.queries, 1 + 2 * self.relative
        floor_Q = floor_Q - _TINY
        by_query = torch.stack(
            [floor_Q - 2 * self.relative * floor_Q.abs(), queries.rest_N, queries.length_N]
        )
        by_group = torch.stack(
            [
                torch.ones_like(tile.length_G),
                -1.01 * more * tile.length_G,
                -more * self._rest(tile.rest_G, tile.length_G),
            ]
        )
        return torch.mm(by_query.T, by_group)


def _known(lower: Tensor) -> Tensor:
    """Bounds that overflowed say nothing."""
    return lower.nan_to_num_(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)


def multiplies_bfloat16(device: str) -> bool:
    """Whether the device multiplies it natively; elsewhere it is emulated and slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported()
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


@contextmanager
def plain_products() -> Iterator[None]:
    """float32 products in float32, bfloat16 products summed in float32: what the error bound assumes."""
    precision = torch.get_float32_matmul_precision()
    reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced
