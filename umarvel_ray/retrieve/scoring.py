"""The score of a pair: the inner product of two float32 vectors without rounding error, rounded to float32.

One number for a pair, whoever computes it: in any order, with any library, on any device. Axes: N pairs,
Q queries, C candidates, D width.
"""

import math
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_PIECE_VALUES = 1 << 17
"""float64 values per piece, 1 MB: larger ones fall out of the cache."""
_UNIT = 2.0**-53
_DEVICE_PIECE_VALUES = 1 << 26


def exact_scores(left_ND: Tensor, right_ND: Tensor) -> Tensor:
    """Inner products of the rows of two float32 matrices, (N,) float32.

    Products of float32 are exact in float64. Their sum there errs by at most D·2⁻⁵³·|left|·|right|, in any
    order; where two float32 lie within that of it, which is once in some hundred thousand pairs, the exact
    sum decides.
    """
    num, width = left_ND.shape
    scores_N = torch.empty(num, device=left_ND.device)
    step = max(1, (_DEVICE_PIECE_VALUES if left_ND.is_cuda else _PIECE_VALUES) // max(width, 1))
    for start in range(0, num, step):
        left, right = left_ND[start : start + step], right_ND[start : start + step]
        sums_N, bounds_N = _sums(left, right)
        scores_N[start : start + step] = _rounded(
            sums_N, bounds_N, lambda odd, left=left, right=right: (left[odd], right[odd])
        )
    return scores_N


def exact_scores_by_query(
    queries_QD: Tensor,
    candidates_CD: Tensor,
    query_N: Tensor,
    column_N: Tensor,
    *,
    largest: float,
    compiled: bool = False,
) -> Tensor:
    """`exact_scores` of pairs that stand by query, (N,) float32.

    Args:
        queries_QD, candidates_CD: float32.
        query_N, column_N: Which query and which candidate make each pair.
        largest: No product of a query's and a candidate's length exceeds this.
        compiled: By the loop of `kernels.py`, which takes Numba.
    """
    sums_N = torch.empty(len(query_N), dtype=torch.float64)
    if compiled:
        from umarvel_ray.retrieve.kernels import inner_products

        # Candidates in turn: most come from memory, where a row is read once for all who want it.
        order = np.argsort(column_N.numpy())
        left, right, rows, columns = (
            values.numpy() for values in (queries_QD, candidates_CD, query_N, column_N)
        )
        inner_products(left, right, rows, columns, order, sums_N.numpy())
    else:
        _sum_by_query(queries_QD, candidates_CD, query_N, column_N, sums_N)
    return _rounded(
        sums_N,
        _bound(queries_QD.shape[1]) * largest,
        lambda odd: (queries_QD[query_N[odd]], candidates_CD[column_N[odd]]),
    )


def _sum_by_query(
    queries_QD: Tensor, candidates_CD: Tensor, query_N: Tensor, column_N: Tensor, sums_N: Tensor
) -> None:
    numbers, counts = torch.unique_consecutive(query_N, return_counts=True)
    width = queries_QD.shape[1]
    step = max(1, _PIECE_VALUES // width)
    # Memory that is used again: fresh pages would cost more than the sums.
    single_PD, double_PD = torch.empty(step, width), torch.empty(step, width, dtype=torch.float64)
    start = 0
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        query_D = queries_QD[number].double()
        for first in range(start, start + count, step):
            columns = column_N[first : min(first + step, start + count)]
            rows_PD = torch.index_select(candidates_CD, 0, columns, out=single_PD[: len(columns)])
            exact_PD = double_PD[: len(columns)].copy_(rows_PD)
            torch.mv(exact_PD, query_D, out=sums_N[first : first + len(columns)])
        start += count


def sampled_products(left_ND: Tensor, right_MD: Tensor, row_P: Tensor, column_P: Tensor) -> Tensor:
    """float32 inner products of pairs that stand by row, (P,), read where they lie: sooner than gathered."""
    ends_N = torch.bincount(row_P, minlength=len(left_ND)).cumsum(0)
    wanted = torch.sparse_csr_tensor(
        torch.cat([ends_N.new_zeros(1), ends_N]),
        column_P,
        torch.zeros(len(row_P)),
        size=(len(left_ND), len(right_MD)),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(wanted, left_ND, right_MD.T, beta=0).values()


def _bound(width: int) -> float:
    """Of the error of a float64 sum of `width` products, relative to the sum of their magnitudes."""
    return 1.01 * (width + 1) * _UNIT


def _sums(left_ND: Tensor, right_ND: Tensor) -> tuple[Tensor, Tensor]:
    """(sums of products, bounds of their errors), (N,) float64 each."""
    if left_ND.is_cuda:
        products_ND = left_ND.double() * right_ND
        return products_ND.sum(dim=1), _bound(left_ND.shape[1]) * products_ND.abs().sum(dim=1)
    # On the CPU NumPy is through short rows before Torch has woken its threads.
    products = np.multiply(left_ND.numpy(), right_ND.numpy(), dtype=np.float64)
    sums_N = products.sum(axis=1)
    bounds_N = _bound(left_ND.shape[1]) * np.abs(products, out=products).sum(axis=1)
    return torch.from_numpy(sums_N), torch.from_numpy(bounds_N)


def _rounded(
    sums_N: Tensor, bounds_N: Tensor | float, pairs: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Tensor:
    """float32 nearest to the exact sums, given approximations and the pairs that they are of."""
    scores_N = sums_N.float()
    odd = torch.nonzero((sums_N - bounds_N).float() != (sums_N + bounds_N).float())[:, 0]
    if not len(odd):
        return scores_N
    left, right = pairs(odd)
    # A bound by the products themselves settles most of these: sparse vectors, and all that is orthogonal.
    sums, bounds = _sums(left, right)
    scores_N[odd] = sums.float()
    hard = torch.nonzero((sums - bounds).float() != (sums + bounds).float())[:, 0]
    for place in hard.tolist():
        products_D = left[place].double() * right[place]
        scores_N[odd[place]] = math.fsum(products_D.tolist())
    return scores_N


with warnings.catch_warnings():
    # Torch says once that its sparse tensors are in beta; one product of them is all that is used here.
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1), check_invariants=False)
