"""faiss as the first pass of a search: the same results, where its products are faster on some machine.

faiss sums in float32, in an order of its own. So a few more hits than wanted are taken, scored exactly, and
the K-th exact score has to lie above all that faiss left out, by the bound of its error; queries for which it
does not are searched again by our own tiles.
"""

from typing import Any

import numpy as np
import torch

from umarvel_ray.errors import ConfigError
from umarvel_ray.retrieve.scoring import exact_scores_by_query
from umarvel_ray.retrieve.search import TopK, blocks_of, largest_product, merge_top_k, top_k

_SPARE_HITS = 32
_BLAS_THRESHOLD = 20
"""Queries from which faiss multiplies matrices. Its own, 128,000 of queries times width, makes few queries
ten times slower."""


def faiss_top_k(queries_QD: Any, blocks: Any, k: int, *, first_row: int = 0, device: str = "cpu") -> TopK:
    """`top_k` with faiss; arguments, results and errors are the same.

    Raises:
        ConfigError: faiss is not installed, or cannot use the GPU.
    """
    queries_QD = np.ascontiguousarray(queries_QD, dtype=np.float32)
    found = [TopK(np.empty((len(queries_QD), 0), np.float32), np.empty((len(queries_QD), 0), np.int64))]
    row = first_row
    for block_CD in blocks_of(blocks, "cpu"):
        found = [merge_top_k([*found, _search_block(queries_QD, block_CD.numpy(), k, row, device)], k)]
        row += len(block_CD)
    return found[0]


def _search_block(queries_QD: np.ndarray, block_CD: np.ndarray, k: int, row: int, device: str) -> TopK:
    largest = largest_product(torch.from_numpy(queries_QD), torch.from_numpy(block_CD), first_row=row)
    wanted = min(k + _SPARE_HITS, len(block_CD))
    if not len(queries_QD):
        return TopK(np.empty((0, min(k, wanted)), np.float32), np.empty((0, min(k, wanted)), np.int64))
    scores_QN, rows_QN = _knn(queries_QD, block_CD, wanted, device)
    # By row, so that equal exact scores stand in that order after a stable sort.
    rows_QN = np.sort(rows_QN, axis=1)
    query_N = torch.arange(len(queries_QD)).repeat_interleave(wanted)
    exact_N = exact_scores_by_query(
        torch.from_numpy(queries_QD),
        torch.from_numpy(block_CD),
        query_N,
        torch.from_numpy(rows_QN.reshape(-1)),
        largest=largest,
    )
    exact_QN = exact_N.numpy().reshape(rows_QN.shape)
    order = np.argsort(-exact_QN, axis=1, kind="stable")[:, :k]
    scores_QK = np.take_along_axis(exact_QN, order, axis=1)
    rows_QK = np.take_along_axis(rows_QN, order, axis=1) + row
    if wanted < len(block_CD):
        error = 1.01 * (block_CD.shape[1] + 4) * 2.0**-24 * largest
        doubtful = np.flatnonzero(~(scores_QK[:, -1] > scores_QN.min(axis=1) + error))
        if len(doubtful):
            again = top_k(queries_QD[doubtful], block_CD, k, first_row=row, first_pass="float32")
            scores_QK[doubtful], rows_QK[doubtful] = again.scores_QK, again.rows_QK
    return TopK(scores_QK, rows_QK)


def _knn(queries_QD: np.ndarray, block_CD: np.ndarray, k: int, device: str) -> tuple[np.ndarray, np.ndarray]:
    """(scores, rows) of faiss, (Q, k)."""
    try:
        import faiss
    except ImportError:
        raise ConfigError(
            "backend faiss: not installed. Run `pip install 'umarvel-ray[faiss]'`, or leave backend out."
        ) from None
    if hasattr(faiss.cvar, "distance_compute_blas_threshold"):
        faiss.cvar.distance_compute_blas_threshold = _BLAS_THRESHOLD
    if device.startswith("cuda"):
        if not hasattr(faiss, "StandardGpuResources"):
            raise ConfigError("backend faiss: this faiss has no GPU code. Run `pip install faiss-gpu`.")
        resources = faiss.StandardGpuResources()
        return faiss.knn_gpu(resources, queries_QD, block_CD, k, metric=faiss.METRIC_INNER_PRODUCT)
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss.knn(queries_QD, block_CD, k, metric=faiss.METRIC_INNER_PRODUCT)
