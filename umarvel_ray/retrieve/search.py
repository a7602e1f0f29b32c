"""Exact top-k of inner products: quick tiles pick who may be among the best, one formula scores them.

The first pass (bfloat16 or float32) carries a hard bound of its error. A candidate is passed over only when
even its upper bound is below a proven lower bound of the query's k-th score; the others are scored by
`exact_scores`, whose bits depend on the two vectors alone. So blocks, tiles, threads, shards, devices and the
first pass move the time, never the result.

Axes: Q queries, C candidates of a block, D width, K results, G groups of columns.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from umarvel_ray.errors import DataError

FirstPass = Literal["auto", "float32", "bfloat16"]
"""How tiles are multiplied; `auto` takes bfloat16 where the device multiplies it natively."""

_BLOCK_ROWS = 65_536
"""Candidates held at a time; their survivors are scored together."""
_QUERY_ROWS = 512
_TILE_COLUMNS = 8_192
"""512 × 8192 bfloat16 scores are 8 MB: a tile stays in the L3 cache until its survivors are out."""
_MIN_GROUPS = 256
_MAX_SURVIVORS = 1 << 22
"""Survivors held before they are scored: bounds memory where a pool is full of equal scores."""
_PIECE_VALUES = 1 << 17
"""float64 values per scoring piece, 1 MB: larger ones fall out of the cache."""
_MERGE_COLUMNS = 2_048
_LARGEST_PRODUCT = 1e30


@dataclass(frozen=True, eq=False)
class TopK:
    """The best candidates of each query; equal scores stand in the order of their rows.

    Attributes:
        scores_QK: float32, never rising along a row; K is the smaller of k and the number of candidates.
        rows_QK: int64, rows of the pool.
    """

    scores_QK: np.ndarray
    rows_QK: np.ndarray


def top_k(
    queries_QD: Any,
    candidate_blocks: Any,
    k: int,
    *,
    first_row: int = 0,
    device: str = "cpu",
    first_pass: FirstPass = "auto",
    query_rows: int = _QUERY_ROWS,
    tile_columns: int = _TILE_COLUMNS,
) -> TopK:
    """The k largest inner products of each query, exact.

    Args:
        queries_QD: float32, NumPy or Torch.
        candidate_blocks: One (C, D) matrix, or an iterable of them that laid end to end are the pool; read
            once, one at a time.
        k: How many.
        first_row: Row of the first candidate, where this is a slice of a pool.
        device: Torch device that multiplies.
        first_pass: Precision of the tiles.
        query_rows: Queries per tile.
        tile_columns: Candidates per tile.

    Returns:
        Scores as `exact_scores` gives them, score descending, then row ascending.

    Raises:
        DataError: A value is NaN or infinite, products could overflow, or widths differ.
    """
    if k < 1 or query_rows < 1 or tile_columns < 1:
        raise DataError(
            f"top_k of k={k}, query_rows={query_rows}, tile_columns={tile_columns}. Give at least 1 each."
        )
    queries = _as_matrix(queries_QD, device)
    dtype = _tile_dtype(first_pass, device)
    groups = max(_MIN_GROUPS, 1 << (2 * k - 1).bit_length())
    parts = [_Part(part_QD, k, dtype) for part_QD in queries.split(query_rows)] if len(queries) else []
    largest_query = _largest_length(queries, "queries", first_row=0)
    row = first_row
    with torch.inference_mode(), _plain_products():
        for block_CD in _blocks(candidate_blocks, device):
            if block_CD.shape[1] != queries.shape[1]:
                raise DataError(
                    f"queries of width {queries.shape[1]}, candidates of width {block_CD.shape[1]} (from row "
                    f"{row} on). Embed both with the same checkpoint."
                )
            if largest_query * _largest_length(block_CD, "candidates", first_row=row) > _LARGEST_PRODUCT:
                raise DataError(
                    f"products of queries and candidates overflow (from row {row} on). Normalise the vectors."
                )
            tiles = [
                _Tile.of(block_CD, start, tile_columns, dtype)
                for start in range(0, len(block_CD), tile_columns)
            ]
            for part in parts:
                part.add(block_CD, tiles, row=row, groups=groups)
            row += len(block_CD)
    num = min(k, row - first_row)
    if not parts:
        return TopK(np.empty((0, num), dtype=np.float32), np.empty((0, num), dtype=np.int64))
    return TopK(
        scores_QK=torch.cat([part.scores_QK[:, :num] for part in parts]).cpu().numpy(),
        rows_QK=torch.cat([part.rows_QK[:, :num] for part in parts]).cpu().numpy(),
    )


def exact_scores(left_ND: Tensor, right_ND: Tensor) -> Tensor:
    """Inner products of the rows of two float32 matrices, (N,) float32.

    Products of float32 are exact in float64; they are summed there by folding the row in halves, which are
    elementwise additions only, and rounded once. So the bits depend on the two rows alone: not on N, threads,
    or the device.
    """
    if left_ND.is_cuda:
        return _fold(left_ND.double() * right_ND).float()
    # The same sums; on the CPU NumPy adds short strided rows sooner than Torch wakes its threads.
    products_ND = np.multiply(left_ND.numpy(), right_ND.numpy(), dtype=np.float64)
    return torch.from_numpy(_fold(products_ND).astype(np.float32))


def _fold(values_ND: Any) -> Any:
    """Sum of each row, (N,); uses up `values_ND`."""
    width = values_ND.shape[1]
    while width > 1:
        half = (width + 1) // 2
        values_ND[:, : width - half] += values_ND[:, half:width]
        width = half
    return values_ND[:, 0]


def merge_top_k(parts: Sequence[TopK], k: int) -> TopK:
    """Join the results of the same queries over slices of one pool; the order of the parts does not matter.

    Raises:
        DataError: There is no part, or parts hold different numbers of queries.
    """
    if not parts or len({len(part.scores_QK) for part in parts}) != 1:
        raise DataError(
            f"{len(parts)} parts of a search do not hold the same queries. Give at least one, of one block."
        )
    scores = np.concatenate([part.scores_QK for part in parts], axis=1)
    rows = np.concatenate([part.rows_QK for part in parts], axis=1)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return TopK(np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1))


@dataclass(frozen=True, slots=True)
class _Tile:
    """Some columns of a block, as the first pass sees them.

    Attributes:
        start: First column in the block.
        low_CD: The candidates in the dtype of the first pass.
        length: Upper bound of their lengths, before and after rounding.
        residual: Upper bound of the lengths of what rounding took.
    """

    start: int
    low_CD: Tensor
    length: float
    residual: float

    @classmethod
    def of(cls, block_CD: Tensor, start: int, columns: int, dtype: torch.dtype) -> "_Tile":
        exact_CD = block_CD[start : start + columns]
        low_CD, lengths, residuals = _rounded(exact_CD, dtype)
        return cls(start, low_CD, float(lengths.max()), float(residuals.max()))


class _Part:
    """Some queries and their best candidates so far.

    Attributes:
        scores_QK: float32; minus infinity where fewer than K candidates were seen.
        rows_QK: int64.
    """

    def __init__(self, queries_QD: Tensor, k: int, dtype: torch.dtype) -> None:
        self._queries_QD = queries_QD
        self._k = k
        self._low_QD, self._lengths_Q, self._residuals_Q = _rounded(queries_QD, dtype)
        shape = (len(queries_QD), k)
        self.scores_QK = torch.full(shape, -torch.inf, device=queries_QD.device)
        self.rows_QK = torch.full(shape, -1, dtype=torch.int64, device=queries_QD.device)

    def add(self, block_CD: Tensor, tiles: Sequence[_Tile], *, row: int, groups: int) -> None:
        """Look at one more block, whose first candidate is row `row` of the pool."""
        # Lower bounds of the K best scores so far: exact ones, and the best of this block's tiles.
        floor_QK = self.scores_QK
        survivors: list[tuple[Tensor, Tensor, Tensor]] = []
        held = 0
        for tile in tiles:
            scores_QC = self._low_QD @ tile.low_CD.T
            slack_Q, relative = self._error(tile, scores_QC.dtype)
            maxima_QG, stride, scores_QC = _group_maxima(scores_QC, groups)
            lower_QG = maxima_QG.double()
            lower_QG -= relative * lower_QG.abs() + slack_Q[:, None]
            # Each group holds a candidate that scores at least this: the K-th largest bounds the K-th score.
            floor_QK = _largest(torch.cat([floor_QK, _below(lower_QG)], dim=1), self._k)
            threshold_Q = _threshold(floor_QK[:, -1].double(), slack_Q, relative)
            query, column, score = _above(scores_QC, maxima_QG, threshold_Q, stride, len(tile.low_CD))
            upper = score.double()
            upper += relative * upper.abs() + slack_Q[query]
            survivors.append((query, column + tile.start, upper))
            held += len(query)
            if held > _MAX_SURVIVORS:
                self._score(block_CD, survivors, floor_QK[:, -1], row=row)
                floor_QK = self.scores_QK
                survivors, held = [], 0
        self._score(block_CD, survivors, floor_QK[:, -1], row=row)

    def _error(self, tile: _Tile, dtype: torch.dtype) -> tuple[Tensor, float]:
        """Bounds of |tile score − exact score|: (absolute, float64 per query; relative to the tile score).

        Rounded inputs: Cauchy-Schwarz on the residuals. float32 sums in any order, and the rounding of the
        exact score: D + 4 roundings of at most the product of the lengths. A bfloat16 result has 8 bits:
        half a unit in the last place. The factor 1.01 covers second-order terms and the rounding of the
        bounds themselves.
        """
        width = self._queries_QD.shape[1]
        inputs_Q = self._residuals_Q * tile.length + self._lengths_Q * tile.residual
        sums_Q = (width + 4) * 2.0**-24 * self._lengths_Q * tile.length
        relative = 1.01 * 2.0**-8 if dtype == torch.bfloat16 else 0.0
        return 1.01 * (inputs_Q + sums_Q) + 2.0**-100, relative

    def _score(
        self, block_CD: Tensor, survivors: list[tuple[Tensor, Tensor, Tensor]], floor_Q: Tensor, *, row: int
    ) -> None:
        """Score exactly what may still be among the best, and merge it in."""
        if not survivors:
            return
        query, column, upper = (torch.cat(part) for part in zip(*survivors, strict=True))
        keep = upper >= floor_Q[query]
        query, column = query[keep], column[keep]
        # By query, then by row: the merge below keeps this order among equal scores.
        order = torch.argsort(query * len(block_CD) + column)
        query, column = query[order], column[order]
        score = torch.empty(len(query), device=block_CD.device)
        step = max(1, _PIECE_VALUES // block_CD.shape[1])
        for start in range(0, len(query), step):
            piece = slice(start, start + step)
            score[piece] = exact_scores(self._queries_QD[query[piece]], block_CD[column[piece]])

        counts_Q = torch.bincount(query, minlength=len(self._queries_QD))
        place = torch.arange(len(query), device=query.device) - (counts_Q.cumsum(0) - counts_Q)[query]
        for start in range(0, int(counts_Q.max()), _MERGE_COLUMNS):
            inside = (place >= start) & (place < start + _MERGE_COLUMNS)
            self._merge(query[inside], place[inside] - start, score[inside], column[inside] + row)

    def _merge(self, query: Tensor, place: Tensor, score: Tensor, row: Tensor) -> None:
        """New rows are above all old ones, and ascend with `place`: a stable sort settles ties by row."""
        width = int(place.max()) + 1
        new_QN = torch.full((len(self._queries_QD), width), -torch.inf, device=score.device)
        rows_QN = torch.full(new_QN.shape, -1, dtype=torch.int64, device=score.device)
        new_QN[query, place] = score
        rows_QN[query, place] = row
        scores = torch.cat([self.scores_QK, new_QN], dim=1)
        rows = torch.cat([self.rows_QK, rows_QN], dim=1)
        scores, order = torch.sort(scores, dim=1, descending=True, stable=True)
        self.scores_QK = scores[:, : self._k].contiguous()
        self.rows_QK = rows.gather(1, order[:, : self._k])


def _as_matrix(values: Any, device: str) -> Tensor:
    if not isinstance(values, Tensor):
        array = np.asarray(values, dtype=np.float32)
        values = torch.from_numpy(array if array.flags.writeable else array.copy())
    if values.ndim != 2 or not values.shape[1]:
        raise DataError(f"vectors of shape {tuple(values.shape)}. Give a matrix, one vector per row.")
    return values.detach().to(device=device, dtype=torch.float32).contiguous()


def _blocks(blocks: Any, device: str) -> Iterator[Tensor]:
    """The candidates in pieces of at most `_BLOCK_ROWS`, none empty."""
    whole = isinstance(blocks, np.ndarray | Tensor)
    matrices: Iterable[Any] = [blocks] if whole else blocks
    for matrix in matrices:
        for start in range(0, len(matrix), _BLOCK_ROWS):
            yield _as_matrix(matrix[start : start + _BLOCK_ROWS], device)


def _largest_length(vectors: Tensor, name: str, *, first_row: int) -> float:
    """Length of the longest row, in float64; refuses what is not finite."""
    if not len(vectors):
        return 0.0
    lengths = _lengths(vectors)
    if not bool(torch.isfinite(lengths).all()):
        odd = torch.nonzero(~torch.isfinite(lengths))[:, 0]
        raise DataError(
            f"{len(odd)} of {len(vectors)} {name} are NaN or infinite (first: row "
            f"{first_row + int(odd[0])}). Verify the store, or embed again."
        )
    return float(lengths.max())


def _lengths(vectors: Tensor) -> Tensor:
    """Lengths of the rows in float64, a little too large."""
    return torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64) * (1 + 2.0**-30)


def _rounded(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(rows in `dtype`, bounds of their lengths before and after, lengths of what rounding took), float64."""
    low = exact.to(dtype)
    lengths = _lengths(exact)
    if low.dtype == exact.dtype:
        return low, lengths, torch.zeros_like(lengths)
    residuals = _lengths(exact - low.float())
    return low, lengths + residuals, residuals


def _tile_dtype(first_pass: FirstPass, device: str) -> torch.dtype:
    if first_pass == "auto":
        native = torch.cuda.is_bf16_supported() if device.startswith("cuda") else _cpu_multiplies_bfloat16()
        first_pass = "bfloat16" if native else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[first_pass]


def _cpu_multiplies_bfloat16() -> bool:
    """AVX512_BF16 or AMX; elsewhere bfloat16 is emulated and slower than float32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@contextmanager
def _plain_products() -> Iterator[None]:
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


def _group_maxima(scores_QC: Tensor, groups: int) -> tuple[Tensor, int, Tensor]:
    """(best score of each group, stride, the tile padded to whole groups); group g is g, g + stride, …"""
    num_columns = scores_QC.shape[1]
    groups = min(groups, num_columns)
    if rest := num_columns % groups:
        scores_QC = torch.nn.functional.pad(scores_QC, (0, groups - rest), value=-torch.inf)
    maxima_QG = scores_QC.view(len(scores_QC), -1, groups).amax(dim=1)
    return maxima_QG, groups, scores_QC


def _largest(values: Tensor, k: int) -> Tensor:
    """The K largest of each row, falling; the caller's rows hold at least K."""
    return torch.topk(values, k, dim=1).values


def _below(values: Tensor) -> Tensor:
    """float32 that are not above the given float64."""
    rounded = values.float()
    return torch.where(
        rounded.double() > values, torch.nextafter(rounded, torch.full_like(rounded, -torch.inf)), rounded
    )


def _threshold(floor_Q: Tensor, slack_Q: Tensor, relative: float) -> Tensor:
    """float32 (Q,): a tile score below it has an upper bound below the floor.

    The upper bound s + relative·|s| + slack rises with s, so this solves it for s.
    """
    rest_Q = floor_Q - slack_Q
    return _below(torch.where(rest_Q > 0, rest_Q / (1 + relative), rest_Q / (1 - relative)) - 2.0**-100)


def _above(
    scores_QC: Tensor, maxima_QG: Tensor, threshold_Q: Tensor, stride: int, num_columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(query, column, tile score) of the scores at or above their query's threshold."""
    query, group = torch.nonzero(maxima_QG.float() >= threshold_Q[:, None], as_tuple=True)
    columns = group[:, None] + torch.arange(0, scores_QC.shape[1], stride, device=group.device)
    scores = scores_QC.view(-1)[query[:, None] * scores_QC.shape[1] + columns].float()
    hits = (scores >= threshold_Q[query][:, None]) & (columns < num_columns)
    which, member = torch.nonzero(hits, as_tuple=True)
    return query[which], columns[which, member], scores[which, member]
