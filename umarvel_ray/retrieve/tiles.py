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

Precision = Literal["float32", "bfloat16", "int8"]
"""What tiles are made of. int8 carries one scale per vector; its products are exact integers."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
PRODUCT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int32}
"""Of what `Tile.products` gives."""
_PIECE_VALUES = 1 << 17
"""Values per piece that is made narrow, 512 KB: it stays in the cache for the passes over it."""
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
        step = num if device.type == "cuda" else max(1, _PIECE_VALUES // width)
        for start in range(0, num, max(step, 1)):
            piece = slice(start, start + step)
            exact = vectors_ND[piece]
            length_N[piece] = torch.linalg.vector_norm(exact, dim=1)
            if precision == "float32":
                continue
            if precision == "int8":
                scale_N[piece] = exact.abs().amax(dim=1).clamp_(min=_TINY).div_(127)
            scale = scale_N[piece, None]
            narrow = torch.div(exact, scale).round_() if precision == "int8" else exact.to(torch.bfloat16)
            low_ND[piece] = narrow
            rest = torch.addcmul(exact, narrow.float(), scale, value=-1)
            rest_N[piece] = torch.linalg.vector_norm(rest, dim=1)
        # Lengths were summed in float32; low · scale, and the difference, were rounded once each.
        rest_N = rest_N * (1 + width * 2.0**-23)
        if precision == "int8":
            rest_N += 2.0**-22 * length_N
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
    """

    low_CD: Tensor
    column_C: Tensor
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

    |scale · product − score| ≤ absolute + relative · |scale · product|, for any member of the group.

    Attributes:
        scale_QG, absolute_QG: float32.
        relative_G: float32, below 1.
    """

    scale_QG: Tensor
    absolute_QG: Tensor
    relative_G: Tensor

    @classmethod
    def of(cls, tile: Tile, queries: Narrow) -> "Bounds":
        """float32 sums in any order, and the rounding of the exact score: D + 4 roundings of at most the
        product of the lengths; integer sums are exact. A bfloat16 result has 8 bits: half a unit in the last
        place. Factors a little above 1 cover second-order terms and the rounding of the bounds themselves.
        """
        width, dtype = tile.low_CD.shape[1], tile.low_CD.dtype
        sums = 2.0**-22 if dtype == torch.int8 else (width + 4) * 2.0**-24
        absolute_QG = torch.outer(queries.rest_N, tile.length_G)
        absolute_QG.addr_(queries.length_N, tile.rest_G + sums * tile.length_G)
        relative_G = 1.01 * tile.spread_G + 2.0**-19
        if dtype == torch.bfloat16:
            relative_G += 1.01 * 2.0**-8
        scale_QG = torch.outer(queries.scale_N, tile.scale_G)
        return cls(scale_QG, absolute_QG.mul_(1.01).add_(_TINY), relative_G)

    def lower(self, products_QG: Tensor, *, share: float) -> Tensor:
        """Lower bounds of the scores, one product for each group, if `share` of the error is all there is."""
        estimate_QG = self.scale_QG * products_QG
        error_QG = torch.addcmul(self.absolute_QG, self.relative_G, estimate_QG.abs())
        return estimate_QG.sub_(error_QG, alpha=share)

    def upper(self, products_S: Tensor, group_S: Tensor) -> Tensor:
        """Upper bounds of some scores, given the places of their groups in (Q, G)."""
        estimate_S = self.scale_QG.view(-1).index_select(0, group_S) * products_S
        relative_S = self.relative_G.index_select(0, group_S % len(self.relative_G))
        error_S = self.absolute_QG.view(-1).index_select(0, group_S)
        return torch.addcmul(error_S, relative_S, estimate_S.abs()).add_(estimate_S)

    def least(self, floor_Q: Tensor, dtype: torch.dtype) -> Tensor:
        """(Q, G): a product below it has an upper bound below the floor; whole numbers for whole products.

        The upper bound s + relative · |s| + absolute rises with s, so this solves it for s.
        """
        rest_QG = floor_Q[:, None] - self.absolute_QG
        widened_QG = torch.where(
            rest_QG > 0, rest_QG * (1 - self.relative_G), rest_QG * (1 + 2 * self.relative_G)
        )
        least_QG = widened_QG.div_(self.scale_QG)
        if dtype != torch.int32:
            return least_QG
        return least_QG.ceil_().clamp_(-(2.0**31), 2.0**31 - 128).to(torch.int32)


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
