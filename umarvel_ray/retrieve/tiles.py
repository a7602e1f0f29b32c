"""The first pass of a search: tiles of narrow numbers whose products come with a hard bound of their error.

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

Precision = Literal["float32", "bfloat16", "int8"]
"""What tiles are made of. int8 carries one scale per vector; its products are exact integers."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
PRODUCT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int32}
"""Of what `Tile.products` gives."""
_PIECE_VALUES = 1 << 17
"""Values per piece that is made narrow, 512 KB: the passes over it find it in the cache."""
_TINY = 2.0**-100


class Narrow(NamedTuple):
    """Vectors as the first pass sees them.

    Attributes:
        low_ND: Their narrow form; int8 stands for low · scale.
        scale_N: float32, 1 but for int8.
        length_N: Upper bounds of their lengths, before and after rounding; float32.
        rest_N: Upper bounds of the lengths of what rounding took; float32.
    """

    low_ND: Tensor
    scale_N: Tensor
    length_N: Tensor
    rest_N: Tensor

    @classmethod
    def of(cls, vectors_ND: Tensor, precision: Precision) -> "Narrow":
        """Narrow float32 vectors; int8 takes the largest value of each row for 127."""
        (num, width), device = vectors_ND.shape, vectors_ND.device
        low_ND = vectors_ND
        if precision != "float32":
            low_ND = torch.empty((num, width), dtype=_DTYPES[precision], device=device)
        scale_N, length_N = torch.ones(num, device=device), torch.empty(num, device=device)
        rest_N = torch.zeros(num, device=device)
        step = max(1, num if device.type == "cuda" else _PIECE_VALUES // width)
        num_held = 0 if precision == "float32" else min(step, num)
        scaled_BD, whole_BD = torch.empty(2, num_held, width, device=device).unbind()
        for start in range(0, num, step):
            piece = slice(start, start + step)
            exact = vectors_ND[piece]
            scaled, whole = scaled_BD[: len(exact)], whole_BD[: len(exact)]
            torch.linalg.vector_norm(exact, dim=1, out=length_N[piece])
            if precision == "int8":
                largest = torch.abs(exact, out=scaled).amax(dim=1).clamp_(min=_TINY)
                torch.div(largest, 127, out=scale_N[piece])
                torch.mul(exact, (127 / largest)[:, None], out=scaled)
                torch.round(scaled, out=whole)
                low_ND[piece] = whole
                torch.linalg.vector_norm(scaled.sub_(whole), dim=1, out=rest_N[piece])
            elif precision == "bfloat16":
                low_ND[piece] = exact
                torch.sub(exact, low_ND[piece], out=scaled)
                torch.linalg.vector_norm(scaled, dim=1, out=rest_N[piece])
        # Lengths were summed in float32; a scale, its inverse and each product with it were rounded.
        rest_N = rest_N * scale_N * (1 + width * 2.0**-23)
        if precision == "int8":
            rest_N += 2.0**-21 * length_N
        return cls(low_ND, scale_N, length_N * (1 + width * 2.0**-23) + rest_N, rest_N)


@dataclass(frozen=True, slots=True)
class Tile:
    """Some candidates of a block in groups; group g is rows g, g + G, g + 2G, … of the tile.

    Attributes:
        low_CD: Their narrow form.
        column_C: Where each stands in its block.
        scale_G: float32, the middle of the group's scales.
        spread_G: float32, how far from the middle they lie at most, as a share of it.
        length_G, rest_G: float32, upper bounds over the group.
        scale_C, length_C, rest_C: float32, each candidate's own.
    """

    low_CD: Tensor
    column_C: Tensor
    scale_C: Tensor
    length_C: Tensor
    rest_C: Tensor
    scale_G: Tensor
    spread_G: Tensor
    length_G: Tensor
    rest_G: Tensor

    @property
    def num_groups(self) -> int:
        """Groups of the tile, each of as many candidates."""
        return len(self.scale_G)

    @classmethod
    def cut(
        cls, block_CD: Tensor, start: int, stop: int, precision: Precision, *, groups: int
    ) -> "list[Tile]":
        """Columns `start` to `stop` of a block: whole groups, and a tile of single rows for the rest."""
        narrow = Narrow.of(block_CD[start:stop], precision)
        rows_C = torch.arange(stop - start, device=block_CD.device)
        whole = len(rows_C) - len(rows_C) % groups
        if precision == "int8":
            # Neighbours in scale make a group, so that one scale does for all of it.
            order_C = torch.argsort(narrow.scale_N)
            rows_C = torch.cat([order_C[:whole].view(groups, -1).T.reshape(-1), order_C[whole:]])
            narrow = Narrow(*(values.index_select(0, rows_C) for values in narrow))
        parts = ((slice(0, whole), groups), (slice(whole, None), len(rows_C) - whole))
        return [
            cls._of(Narrow(*(values[part] for values in narrow)), rows_C[part] + start, num_groups)
            for part, num_groups in parts
            if len(rows_C[part])
        ]

    @classmethod
    def _of(cls, narrow: Narrow, column_C: Tensor, groups: int) -> "Tile":
        scale_MG, length_MG, rest_MG = (
            values.view(-1, groups) for values in (narrow.scale_N, narrow.length_N, narrow.rest_N)
        )
        middle_G = (scale_MG.amin(dim=0) + scale_MG.amax(dim=0)) / 2
        return cls(
            narrow.low_ND,
            column_C,
            narrow.scale_N,
            narrow.length_N,
            narrow.rest_N,
            middle_G,
            (scale_MG.amax(dim=0) - middle_G) / middle_G,
            length_MG.amax(dim=0),
            rest_MG.amax(dim=0),
        )

    def products(self, queries: Narrow, out: Tensor) -> Tensor:
        """low_q · low_x of all pairs, (Q, C), in the memory of `out`."""
        shape = (len(queries.low_ND), len(self.low_CD))
        out_QC = out[: shape[0] * shape[1]].view(shape)
        if self.low_CD.dtype == torch.int8:
            multiply = torch._int_mm  # pyright: ignore[reportPrivateImportUsage]
            return multiply(queries.low_ND, self.low_CD.T, out=out_QC)
        return torch.mm(queries.low_ND, self.low_CD.T, out=out_QC)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Between which limits the exact scores of a tile lie, given its products.

    |scale · product − score| ≤ absolute + relative · |scale · product|, for any member of the group; scale
    and absolute are outer products of what the query and what the group add to them. Of a single candidate
    more is known: its own scale, length and rest.

    Attributes:
        queries: Their scales, lengths and rests.
        tile: Its groups' and its candidates'.
        sums: What sums lose, as a share of the product of the lengths.
        rounding: What products lose, as a share of themselves.
    """

    queries: Narrow
    tile: Tile
    sums: float
    rounding: float

    @classmethod
    def of(cls, tile: Tile, queries: Narrow) -> "Bounds":
        """float32 sums in any order, and the rounding of the exact score: D + 4 roundings of at most the
        product of the lengths; integer sums are exact. A bfloat16 result has 8 bits: half a unit in the last
        place. Factors a little above 1 cover second-order terms and the rounding of the bounds themselves.
        """
        width, dtype = tile.low_CD.shape[1], tile.low_CD.dtype
        sums = 2.0**-22 if dtype == torch.int8 else (width + 4) * 2.0**-24
        rounding = 1.01 * 2.0**-8 if dtype == torch.bfloat16 else 0.0
        return cls(queries, tile, sums, rounding + 2.0**-19)

    @property
    def relative_G(self) -> Tensor:
        """The part of the error that hangs on the product."""
        return 1.01 * self.tile.spread_G + self.rounding

    @property
    def scale_QG(self) -> Tensor:
        """What a product stands for."""
        return torch.outer(self.queries.scale_N, self.tile.scale_G)

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
        estimate_QG = self.scale_QG.mul_(products_QG)
        lower_QG = estimate_QG.addcmul(self.relative_G, estimate_QG.abs(), value=-1)
        return _known(lower_QG.sub_(self.absolute_QG, alpha=share))

    def limits(
        self, products_S: Tensor, query_S: Tensor, place_S: Tensor, *, share: float
    ) -> tuple[Tensor, Tensor]:
        """(lower, upper) bounds of the scores of some pairs, float32; the lower one as that of `lower`.

        Args:
            query_S, place_S: Which query, and where in the tile the candidate stands.
        """
        tile, queries = self.tile, self.queries
        estimate_S = (taken(queries.scale_N, query_S) * taken(tile.scale_C, place_S)).mul_(products_S)
        absolute_S = taken(queries.rest_N, query_S) * taken(1.01 * tile.length_C, place_S)
        rest_S = taken(self._rest(tile.rest_C, tile.length_C), place_S)
        absolute_S.addcmul_(taken(queries.length_N, query_S), rest_S)
        relative_S = estimate_S.abs().mul_(self.rounding).add_(_TINY)
        upper_S = (estimate_S + relative_S).add_(absolute_S)
        return _known(estimate_S.sub_(relative_S).sub_(absolute_S, alpha=share)), upper_S

    def least(self, floor_Q: Tensor) -> Tensor:
        """(Q, G) float32: a product below it has an upper bound below the floor.

        The upper bound s + relative · |s| + absolute rises with s while relative is below 1, so s has to
        reach x = floor − absolute but for 2 · relative · |x|, if relative is below a half; |x| is at most
        |floor| + absolute, which leaves a sum of outer products. From a half on, all may reach the floor.
        """
        tile, queries = self.tile, self.queries
        relative_G = self.relative_G
        more_G = 1 + 2 * relative_G
        floor_Q = floor_Q - _TINY
        by_query = torch.stack([floor_Q, floor_Q.abs(), queries.rest_N, queries.length_N]) / queries.scale_N
        by_group = torch.stack(
            [
                torch.ones_like(relative_G),
                -2 * relative_G,
                -1.01 * more_G * tile.length_G,
                -more_G * self._rest(tile.rest_G, tile.length_G),
            ]
        )
        least_QG = torch.mm(by_query.T, by_group / tile.scale_G)
        if len(wild := torch.nonzero(relative_G >= 0.5)):
            least_QG[:, wild[:, 0]] = -torch.inf
        return least_QG


def _known(lower: Tensor) -> Tensor:
    """Bounds that overflowed say nothing."""
    return lower.nan_to_num_(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)


def multiplies_bfloat16(device: str) -> bool:
    """Whether the device multiplies it natively; elsewhere it is emulated and slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported()
    return _cpu_has("avx512_bf16", "amx_bf16")


def multiplies_int8(device: str) -> bool:
    """Whether the CPU has 8-bit dot products; without, sums of two products can overflow their 16 bits."""
    return device == "cpu" and _cpu_has("avx512_vnni", "avx_vnni", "amx_int8")


def _cpu_has(*names: str) -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in names)


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
