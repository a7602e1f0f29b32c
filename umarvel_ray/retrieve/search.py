"""Exact top-k of inner products: quick tiles pick who may be among the best, exact sums score them.

The first pass (int8, bfloat16 or float32, see `tiles.py`) carries a hard bound of its error. While it runs, a
guess of each query's k-th score decides who is kept; the exact scores of those kept then prove the guess, or
the block is looked at again for that query, under the bound alone. So a candidate is passed over only when
even its upper bound is below a proven lower bound of the k-th score, and blocks, tiles, threads, shards,
devices and the first pass move the time, never the result.

Axes: Q queries, C candidates of a block, D width, K results, G groups of columns.
"""

import math
import queue
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from umarvel_ray.errors import DataError
from umarvel_ray.retrieve.scoring import exact_scores, exact_scores_by_query
from umarvel_ray.retrieve.tiles import (
    PRODUCT_DTYPES,
    Bounds,
    Narrow,
    Precision,
    Tile,
    multiplies_bfloat16,
    multiplies_int8,
    plain_products,
)

FirstPass = Literal["auto", "float32", "bfloat16", "int8"]
"""How tiles are multiplied; `auto` takes what the device multiplies fastest, float32 where little is won."""

_BLOCK_BYTES = 1 << 29
"""float32 candidates held at a time; their survivors are scored together."""
_TILE_SHAPES = {"cpu": (512, 8_192), "cuda": (8_192, 32_768)}
"""(queries, candidates) of a tile by kind of device. 512 × 8192 products of 32 bits are 16 MB and stay in the
L3 cache until their survivors are out; a GPU wants products large enough to fill it, 0.5 GB in bfloat16."""
_MIN_GROUPS = 512
_MAX_SURVIVORS = 1 << 22
"""Survivors held before they are scored: bounds memory where a pool is full of equal scores."""
_MERGE_COLUMNS = 2_048
_PIECE_VALUES = 1 << 24
_SPAN_BYTES = 1 << 23
"""float32 candidates that are looked at together when survivors are scored: they stay in the cache."""
_LARGEST_PRODUCT = 1e30
_MIN_QUERIES_INT8 = 128
"""Below it, making candidates narrow costs more than narrow products save."""
_MOST_SURVIVORS_INT8 = 1 / 40
"""Share of a block's pairs; above it, scoring survivors costs more than the narrow product saves."""


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
    with torch.inference_mode(), plain_products(), _Crew(device) as crew:
        rows_each = min(query_rows, max(1, -(-len(queries) // crew.size)))
        parts = [_Part(part_QD, k) for part_QD in queries.split(rows_each)] if len(queries) else []
        choose = _Chooser(first_pass, device, len(queries), k)
        for block_CD in blocks_of(candidate_blocks, device):
            if block_CD.shape[1] != queries.shape[1]:
                raise DataError(
                    f"queries of width {queries.shape[1]}, candidates of width {block_CD.shape[1]} (from row "
                    f"{row} on). Embed both with the same checkpoint."
                )
            precision = choose(len(block_CD))
            tiles = crew.cut(block_CD, tile_columns, precision, groups)
            lengths = torch.cat([tile.length_G for tile in tiles])
            largest = largest_query * _largest_length(block_CD, lengths, "candidates", first_row=row)
            _refuse_overflow(largest, first_row=row)
            block = _Block(block_CD, tiles, row, precision, largest)
            crew.run([lambda part=part, block=block: part.add(block, crew) for part in parts])
            num_pairs = len(queries) * len(block_CD)
            choose.learn(sum(part.num_survivors for part in parts) / max(1, num_pairs))
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

    def __init__(self, first_pass: FirstPass, device: str, num_queries: int, k: int) -> None:
        self._fixed: Precision | None = None if first_pass == "auto" else first_pass
        self._k = k
        self._narrow: Precision = "float32"
        if first_pass == "int8" and not multiplies_int8(device):
            raise DataError(
                f"first pass int8: {device} has no 8-bit dot products that cannot overflow. Give auto."
            )
        if multiplies_bfloat16(device):
            self._narrow = "bfloat16"
        elif multiplies_int8(device) and num_queries >= _MIN_QUERIES_INT8:
            self._narrow = "int8"

    def __call__(self, num_candidates: int) -> Precision:
        if self._fixed is not None:
            return self._fixed
        # In a small block the K best alone are a large share.
        pays = self._narrow != "int8" or 4 * self._k <= _MOST_SURVIVORS_INT8 * num_candidates
        return self._narrow if pays else "float32"

    def learn(self, share: float) -> None:
        """How many of a block's pairs had to be scored."""
        if self._narrow == "int8" and share > _MOST_SURVIVORS_INT8:
            self._narrow = "float32"


class _Crew:
    """The threads of one search. On the CPU each works alone on whole pieces: no thread waits for another
    within a product, as Torch's own would at each of many small steps."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.size = torch.get_num_threads() if device == "cpu" else 1
        self._executor = ThreadPoolExecutor(self.size) if self.size > 1 else None
        self._buffers: queue.SimpleQueue[Tensor] = queue.SimpleQueue()

    def __enter__(self) -> "_Crew":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._executor is not None:
            self._executor.shutdown()

    def run(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Results of all calls, in order."""
        if self._executor is None or len(calls) < 2:
            return [call() for call in calls]
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return list(self._executor.map(_inferring, calls))
        finally:
            torch.set_num_threads(num_threads)

    def cut(self, block_CD: Tensor, columns: int, precision: Precision, groups: int) -> list[Tile]:
        """The tiles of a block."""
        calls = [
            lambda start=start: Tile.cut(
                block_CD, start, min(start + columns, len(block_CD)), precision, groups=groups
            )
            for start in range(0, len(block_CD), columns)
        ]
        return [tile for tiles in self.run(calls) for tile in tiles]

    @contextmanager
    def buffer(self, num_values: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """Memory for products; used again, since fresh pages cost more than the products' selection."""
        try:
            buffer = self._buffers.get_nowait()
        except queue.Empty:
            buffer = torch.empty(0, dtype=dtype, device=self._device)
        if buffer.dtype != dtype or len(buffer) < num_values:
            buffer = torch.empty(num_values, dtype=dtype, device=self._device)
        try:
            yield buffer
        finally:
            self._buffers.put(buffer)


def _inferring(call: Callable[[], Any]) -> Any:
    with torch.inference_mode():  # a property of each thread
        return call()


@dataclass(frozen=True, slots=True)
class _Block:
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


class _Part:
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

    def add(self, block: _Block, crew: _Crew) -> None:
        """Look at one more block; its rows are above all before."""
        if block.precision not in self._narrow:
            self._narrow = {block.precision: Narrow.of(self._queries_QD, block.precision)}
        self.num_survivors = 0
        before = self.scores_QK, self.rows_QK
        guess_Q = self._pass(block, crew, share=_guessed_share(self._queries_QD.shape[1]))
        # The true K-th scores are at least as good as guessed, or the guess may have cost a candidate.
        wrong = torch.nonzero(self.scores_QK[:, -1] < guess_Q)[:, 0]
        if len(wrong):
            again = _Part(self._queries_QD[wrong], self._k)
            again.scores_QK, again.rows_QK = (values[wrong] for values in before)
            again._narrow = {block.precision: Narrow(*(x[wrong] for x in self._narrow[block.precision]))}
            again._pass(block, crew, share=1.0)
            self.scores_QK[wrong], self.rows_QK[wrong] = again.scores_QK, again.rows_QK
            self.num_survivors += again.num_survivors

    def _pass(self, block: _Block, crew: _Crew, *, share: float) -> Tensor:
        """Merge in a block's best; returns what the K-th scores were taken to be at least, (Q,) float32.

        Args:
            share: Of the error bound, how much an estimate an estimate is taken to be off: 1 is proven.
        """
        queries = self._narrow[block.precision]
        floor_QK, floor_Q = self.scores_QK, self.scores_QK[:, -1]
        survivors: list[tuple[Tensor, ...]] = []
        held = 0
        size = len(self._queries_QD) * max(len(tile.low_CD) for tile in block.tiles)
        mask = torch.empty(size, dtype=torch.bool, device=self._queries_QD.device)
        with crew.buffer(size, PRODUCT_DTYPES[block.precision]) as out:
            for number, tile in enumerate(block.tiles):
                products_QC = tile.products(queries, out)
                bounds = Bounds.of(tile, queries)
                if _is_due(number):
                    maxima_QG = products_QC.view(len(products_QC), -1, tile.num_groups).amax(dim=1)
                    lower_QG = bounds.lower(maxima_QG, share=share)
                    floor_QK = _largest(torch.cat([floor_QK, lower_QG], dim=1), self._k)
                    floor_Q = torch.maximum(floor_Q, floor_QK.amin(dim=1))
                survivors.append(_survivors(products_QC, bounds, tile, floor_Q, mask))
                held += len(survivors[-1][0])
                if held > _MAX_SURVIVORS:
                    self._settle(block, survivors, floor_Q)
                    floor_Q = torch.maximum(floor_Q, self.scores_QK[:, -1])
                    survivors, held = [], 0
        if held:
            self._settle(block, survivors, floor_Q)
        return floor_Q

    def _settle(self, block: _Block, survivors: list[tuple[Tensor, ...]], floor_Q: Tensor) -> None:
        """Score what may still be among the best, and merge it in."""
        query, column, reach = (torch.cat(part) for part in zip(*survivors, strict=True))
        keep = reach >= floor_Q[query]
        # By query, then by row: the merge below keeps this order among equal scores.
        key = _sorted((query[keep] << 32) | column[keep])
        self.num_survivors += len(key)
        query, column = key >> 32, key & 0xFFFFFFFF
        if block.precision != "float32" and len(key):
            refined, error = self._refined(block, query, column), self._refined_error(block)
            floor_QK = self.scores_QK
            for inside, place in _columns(query, len(self._queries_QD)):
                lower_QN = _padded(query[inside], place, refined[inside] - error, len(self._queries_QD))
                floor_QK = _largest(torch.cat([floor_QK, lower_QN], dim=1), self._k)
            keep = refined + error >= floor_QK.amin(dim=1)[query]
            query, column = query[keep], column[keep]
        scores = self._exact(block, query, column)
        for inside, place in _columns(query, len(self._queries_QD)):
            self._merge(query[inside], place, scores[inside], column[inside] + block.row)

    def _refined(self, block: _Block, query: Tensor, column: Tensor) -> Tensor:
        """float32 inner products of survivors, which stand by query."""
        if query.is_cuda:
            step = max(1, _PIECE_VALUES // block.exact_CD.shape[1])
            pairs = zip(query.split(step), column.split(step), strict=True)
            return torch.cat([(self._queries_QD[q] * block.exact_CD[c]).sum(dim=1) for q, c in pairs])
        # Candidates some at a time: rows that several queries want come from memory once.
        refined = torch.empty(len(query))
        step = max(1, _SPAN_BYTES // (4 * block.exact_CD.shape[1]))
        span = torch.div(column, step, rounding_mode="floor")
        order = _stable_order(span)
        start = 0
        for number, count in enumerate(torch.bincount(span).tolist()):
            if not count:
                continue
            which = order[start : start + count]
            start += count
            rows = slice(number * step, (number + 1) * step)
            refined[which] = self._sampled(query[which], column[which] - rows.start, block.exact_CD[rows])
        return refined

    def _sampled(self, query: Tensor, column: Tensor, rows_CD: Tensor) -> Tensor:
        """float32 inner products of pairs that stand by query, read where they lie: sooner than gathered."""
        num_queries = len(self._queries_QD)
        ends_Q = torch.bincount(query, minlength=num_queries).cumsum(0)
        wanted = torch.sparse_csr_tensor(
            torch.cat([ends_Q.new_zeros(1), ends_Q]),
            column,
            torch.zeros(len(query)),
            size=(num_queries, len(rows_CD)),
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(wanted, self._queries_QD, rows_CD.T, beta=0).values()

    def _refined_error(self, block: _Block) -> float:
        """Bound of the error of `_refined`: D products and D sums are rounded."""
        return 1.01 * (block.exact_CD.shape[1] + 4) * 2.0**-24 * block.largest + 2.0**-100

    def _exact(self, block: _Block, query: Tensor, column: Tensor) -> Tensor:
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
        scores = torch.cat([self.scores_QK, _padded(query, place, score, num_queries)], dim=1)
        rows = torch.cat([self.rows_QK, _padded(query, place, row, num_queries, fill=-1)], dim=1)
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


def _survivors(
    products_QC: Tensor, bounds: Bounds, tile: Tile, floor_Q: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(query, column in the block, upper bound of the score) of all that may reach their query's floor."""
    num_columns, num_groups = products_QC.shape[1], tile.num_groups
    least_QG = bounds.least(floor_Q, products_QC.dtype)
    reaches = mask[: products_QC.numel()].view(len(products_QC), -1, num_groups)
    torch.ge(products_QC.view_as(reaches), least_QG[:, None], out=reaches)
    place_S = _places_of(reaches.view(-1))
    query_S = torch.div(place_S, num_columns, rounding_mode="floor")
    column_S = place_S - query_S * num_columns
    group_S = query_S * num_groups + column_S % num_groups
    upper_S = bounds.upper(products_QC.view(-1).index_select(0, place_S), group_S)
    return query_S, tile.column_C.index_select(0, column_S), upper_S


def _places_of(mask: Tensor) -> Tensor:
    if mask.is_cuda:
        return torch.nonzero(mask)[:, 0]
    return torch.from_numpy(np.flatnonzero(mask.numpy()))  # an order of magnitude sooner than Torch's own


def _guessed_share(width: int) -> float:
    """Of the error bound, what an estimate may be off before a guess fails: errors of D coordinates mostly
    cancel, and are one bound over √D or less; four of that is next to never exceeded."""
    return min(1.0, 4 / math.sqrt(width))


def _is_due(number: int) -> bool:
    """Whether the K-th scores are looked for after this tile: they move less and less."""
    return number & (number - 1) == 0 or (number % 3 == 0 and (number // 3) & (number // 3 - 1) == 0)


def _largest(values: Tensor, k: int) -> Tensor:
    """The K largest of each row, in any order; the caller's rows hold at least K."""
    if values.is_cuda:
        return torch.topk(values, k, dim=1, sorted=False).values
    kept = np.partition(values.numpy(), values.shape[1] - k, axis=1)[:, values.shape[1] - k :]
    return torch.from_numpy(np.ascontiguousarray(kept))


def _sorted(values: Tensor) -> Tensor:
    return torch.sort(values).values if values.is_cuda else torch.from_numpy(np.sort(values.numpy()))


def _stable_order(values: Tensor) -> Tensor:
    """Order of small non-negative numbers, equal ones as they stood."""
    return torch.from_numpy(np.argsort(values.numpy().astype(np.uint32), kind="stable"))


def _columns(query: Tensor, num_queries: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Items that stand by query, a bounded number of each at a time: (which, place of each in its row)."""
    if not len(query):
        return
    counts_Q = torch.bincount(query, minlength=num_queries)
    place = torch.arange(len(query), device=query.device) - (counts_Q.cumsum(0) - counts_Q)[query]
    for start in range(0, int(counts_Q.max()), _MERGE_COLUMNS):
        inside = torch.nonzero((place >= start) & (place < start + _MERGE_COLUMNS))[:, 0]
        yield inside, place[inside] - start


def _padded(
    query: Tensor, place: Tensor, values: Tensor, num_queries: int, fill: float = -torch.inf
) -> Tensor:
    """Values in a row per query."""
    shape = (num_queries, int(place.max()) + 1)
    padded = torch.full(shape, fill, dtype=values.dtype, device=values.device)  # type: ignore[arg-type]
    padded[query, place] = values
    return padded


with warnings.catch_warnings():
    # Torch says once that its sparse tensors are in beta; one product of them is all that is used here.
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1), check_invariants=False)
