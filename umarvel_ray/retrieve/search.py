"""Exact top-k of inner products: quick tiles pick who may be among the best, exact sums score them.

The first pass (int8, see `int8.py`; bfloat16 or float32, see `tiles.py`) carries a hard bound of its error.
A guess of each query's k-th score, from estimates, decides who is kept; the exact scores of those kept then
prove the guess, or the block is looked at again for that query, under the bound alone. So a candidate is
passed over only when even its upper bound is below a proven lower bound of the k-th score, and blocks, tiles,
threads, shards, devices and the first pass move the time, never the result.

Axes: Q queries, C candidates of a block, D width, K results, G groups of columns.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from umarvel_ray.errors import DataError
from umarvel_ray.retrieve.best import Best, Block, Precision
from umarvel_ray.retrieve.crew import Crew
from umarvel_ray.retrieve.int8 import Panels, multiplies_int8
from umarvel_ray.retrieve.tiles import Tile, multiplies_bfloat16, plain_products

FirstPass = Literal["auto", "float32", "bfloat16", "int8"]
"""How tiles are multiplied; `auto` takes what the device multiplies fastest, float32 where little is won."""

_BLOCK_BYTES = 1 << 30
"""float32 candidates held at a time; their survivors are scored together."""
_TILE_SHAPES = {"cpu": (512, 4_096), "cuda": (8_192, 32_768)}
"""(queries, candidates) of a tile by kind of device. 512 × 4096 products of 32 bits are 8 MB and stay in the
L3 cache until their survivors are out; a GPU wants products large enough to fill it, 0.5 GB in bfloat16."""
_MIN_GROUPS = 512
_LARGEST_PRODUCT = 1e30
_MIN_QUERIES_INT8 = 128
"""Below it, making candidates narrow costs more than narrow products save."""
_LEAST_INT8 = 1 << 33
"""Multiplications and additions of a block; below, loading what is compiled costs more."""
_MOST_UNDECIDED_INT8 = 1 / 10
"""Share of a block's pairs; above it, multiplying them once more costs more than the narrow product saves."""


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
    query_rows: int | None = None,
    tile_columns: int | None = None,
) -> TopK:
    """The k largest inner products of each query, exact.

    Args:
        queries_QD: float32, NumPy or Torch.
        candidate_blocks: One (C, D) matrix, or an iterable of them that laid end to end are the pool; read
            once, one at a time.
        k: How many.
        first_row: Row of the first candidate, where this is a slice of a pool.
        device: Torch device that multiplies. On the CPU Torch's threads each take queries of their own.
        first_pass: Precision of the tiles.
        query_rows: Queries per tile, at most; by default what suits the device.
        tile_columns: Candidates per tile; the same.

    Returns:
        Scores as `exact_scores` gives them, score descending, then row ascending.

    Raises:
        DataError: A value is NaN or infinite, products could overflow, or widths differ.
    """
    shape = _TILE_SHAPES["cuda" if device.startswith("cuda") else "cpu"]
    query_rows = shape[0] if query_rows is None else query_rows
    tile_columns = shape[1] if tile_columns is None else tile_columns
    if k < 1 or query_rows < 1 or tile_columns < 1:
        raise DataError(
            f"top_k of k={k}, query_rows={query_rows}, tile_columns={tile_columns}. Give at least 1 each."
        )
    queries = _as_matrix(queries_QD, device)
    largest_query = _largest_length(queries, _lengths(queries), "queries", first_row=0)
    groups = max(_MIN_GROUPS, 1 << (2 * k - 1).bit_length())
    row = first_row
    with torch.inference_mode(), plain_products(), Crew(device) as crew:
        rows_each = min(query_rows, max(1, -(-len(queries) // crew.size)))
        parts = [Best(part_QD, k) for part_QD in queries.split(rows_each)] if len(queries) else []
        choose = _Chooser(first_pass, device, queries)
        for block_CD in blocks_of(candidate_blocks, device):
            if block_CD.shape[1] != queries.shape[1]:
                raise DataError(
                    f"queries of width {queries.shape[1]}, candidates of width {block_CD.shape[1]} (from row "
                    f"{row} on). Embed both with the same checkpoint."
                )
            precision = choose(len(block_CD))
            tiles = _tiles(block_CD, tile_columns, precision, groups, crew)
            lengths = torch.cat([tile.length_C for tile in tiles])
            largest = largest_query * _largest_length(block_CD, lengths, "candidates", first_row=row)
            _refuse_overflow(largest, first_row=row)
            block = Block(block_CD, tiles, row, precision, largest)
            crew.run([lambda part=part, block=block: part.add(block, crew) for part in parts])
            num_pairs = len(queries) * len(block_CD)
            choose.learn(sum(part.num_undecided for part in parts) / max(1, num_pairs))
            row += len(block_CD)
    num = min(k, row - first_row)
    if not parts:
        return TopK(np.empty((0, num), dtype=np.float32), np.empty((0, num), dtype=np.int64))
    return TopK(
        scores_QK=torch.cat([part.scores_QK[:, :num] for part in parts]).cpu().numpy(),
        rows_QK=torch.cat([part.rows_QK[:, :num] for part in parts]).cpu().numpy(),
    )


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


class _Chooser:
    """Which precision the next block is searched in."""

    def __init__(self, first_pass: FirstPass, device: str, queries_QD: Tensor) -> None:
        self._fixed: Precision | None = None if first_pass == "auto" else first_pass
        self._device, self._shape = device, queries_QD.shape
        self._takes_int8 = device == "cpu" and len(queries_QD) >= _MIN_QUERIES_INT8
        if first_pass == "int8" and not (device == "cpu" and multiplies_int8()):
            raise DataError(
                "first pass int8: it takes a CPU with AVX512-VNNI and the extra `compiled`; the device is "
                f"{device}. Give auto."
            )

    def __call__(self, num_candidates: int) -> Precision:
        if self._fixed is not None:
            return self._fixed
        if multiplies_bfloat16(self._device):
            return "bfloat16"
        pays = self._takes_int8 and math.prod(self._shape) * num_candidates >= _LEAST_INT8
        return "int8" if pays and multiplies_int8() else "float32"

    def learn(self, share: float) -> None:
        """How many of a block's pairs int8 did not decide."""
        self._takes_int8 = self._takes_int8 and share <= _MOST_UNDECIDED_INT8


def _tiles(block_CD: Tensor, columns: int, precision: Precision, groups: int, crew: Crew) -> list[Any]:
    def cut(start: int, stop: int) -> Sequence[Any]:
        if precision == "int8":
            return [Panels.cut(block_CD, start, stop)]
        return Tile.cut(block_CD, start, stop, precision, groups=groups)

    starts = range(0, len(block_CD), columns)
    cuts = crew.run([lambda at=at: cut(at, min(at + columns, len(block_CD))) for at in starts])
    return [tile for tiles in cuts for tile in tiles]


def _as_matrix(values: Any, device: str) -> Tensor:
    if not isinstance(values, Tensor):
        array = np.asarray(values, dtype=np.float32)
        values = torch.from_numpy(array if array.flags.writeable else array.copy())
    if values.ndim != 2 or not values.shape[1]:
        raise DataError(f"vectors of shape {tuple(values.shape)}. Give a matrix, one vector per row.")
    return values.detach().to(device=device, dtype=torch.float32).contiguous()


def blocks_of(blocks: Any, device: str) -> Iterator[Tensor]:
    """The candidates in pieces of at most `_BLOCK_BYTES`, none empty."""
    whole = isinstance(blocks, np.ndarray | Tensor)
    matrices: Iterable[Any] = [blocks] if whole else blocks
    for matrix in matrices:
        rows = max(1, _BLOCK_BYTES // (4 * max(1, matrix.shape[-1])))
        for start in range(0, len(matrix), rows):
            yield _as_matrix(matrix[start : start + rows], device)


def largest_product(queries_QD: Tensor, candidates_CD: Tensor, *, first_row: int) -> float:
    """No product of a query's and a candidate's length exceeds this.

    Raises:
        DataError: A value is not finite, or products could overflow.
    """
    largest = _largest_length(queries_QD, _lengths(queries_QD), "queries", first_row=0)
    largest *= _largest_length(candidates_CD, _lengths(candidates_CD), "candidates", first_row=first_row)
    _refuse_overflow(largest, first_row=first_row)
    return largest


def _refuse_overflow(largest: float, *, first_row: int) -> None:
    if largest > _LARGEST_PRODUCT:
        raise DataError(
            f"products of queries and candidates overflow (from row {first_row} on). Normalise the vectors."
        )


def _lengths(vectors_ND: Tensor) -> Tensor:
    """Upper bounds of the lengths of the rows."""
    return torch.linalg.vector_norm(vectors_ND, dim=1) * (1 + vectors_ND.shape[1] * 2.0**-23)


def _largest_length(vectors: Tensor, lengths: Tensor, name: str, *, first_row: int) -> float:
    """The largest of upper bounds of the rows' lengths; refuses what is not finite."""
    largest = float(lengths.max()) if len(lengths) else 0.0
    if math.isfinite(largest):
        return largest
    exact = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)  # does not overflow
    if len(odd := torch.nonzero(~torch.isfinite(exact))[:, 0]):
        raise DataError(
            f"{len(odd)} of {len(vectors)} {name} are NaN or infinite (first: row "
            f"{first_row + int(odd[0])}). Verify the store, or embed again."
        )
    return float(exact.max())
