"""Exact search against faiss, Torch, and a loop over the queries.

Candidates are drawn around 2,000 centres, queries beside candidates: each query has some near candidates, and
all others are about orthogonal. Directions are drawn evenly, the hardest case for a narrow first pass since
cosines lie closest together, or (`directions`) from fewer, with variances that fall as 1/√i, as embeddings
that a model was trained to make have them: 256 of these are worth 152 even ones. Times are of the search
alone, as of a warm index: faiss and Torch hold the candidates as float32; ours makes its narrow copy anew.
"""

import os
from typing import Any

import numpy as np

from umarvel_ray.bench.harness import Answer, Benchmark, BenchmarkError, Case, Prepared

_LOOP_QUERIES = 40
_CENTRES = 2_000
_SCORE_TOLERANCE = 1e-5
"""Of float32 sums of unit vectors in any order."""


def clustered_vectors(case: Case) -> tuple[Any, Any]:
    """(queries, candidates), unit float32, the same in every process."""
    import torch

    generator = torch.Generator().manual_seed(0)
    num, dim, directions = case["candidates"], case["dim"], case.get("directions")
    basis = None
    if directions is not None:
        spread = torch.arange(1, directions + 1) ** -0.25
        basis = spread[:, None] * torch.randn(directions, dim, generator=generator) / directions**0.5

    def draw(count: int) -> Any:
        drawn = torch.randn(count, directions or dim, generator=generator)
        return drawn if basis is None else drawn @ basis

    centres = draw(_CENTRES)
    pool_CD = torch.empty(num, dim)
    for start in range(0, num, 8192):
        rows = torch.randint(0, _CENTRES, (min(8192, num - start),), generator=generator)
        near = centres[rows].add_(draw(len(rows)), alpha=0.8)
        pool_CD[start : start + len(rows)] = torch.nn.functional.normalize(near, dim=1)
    rows = torch.randint(0, num, (case["queries"],), generator=generator)
    noise = torch.nn.functional.normalize(draw(case["queries"]), dim=1) * 0.6
    return torch.nn.functional.normalize(pool_CD[rows] + noise, dim=1), pool_CD


def _answer(scores_QK: Any, rows_QK: Any) -> Answer:
    return {"scores": np.asarray(scores_QK, dtype=np.float32), "rows": np.asarray(rows_QK, dtype=np.int64)}


def _ours(case: Case, first_pass: Any = "auto") -> Prepared:
    import torch

    from umarvel_ray.retrieve.search import top_k

    device = "cuda" if torch.cuda.is_available() else "cpu"
    queries, pool = (vectors.to(device) for vectors in clustered_vectors(case))

    def run() -> Answer:
        found = top_k(queries, pool, case["k"], device=device, first_pass=first_pass)
        return _answer(found.scores_QK, found.rows_QK)

    return Prepared(run=run, work=case["queries"], facts=_facts(case))


def _facts(case: Case) -> dict[str, float]:
    return {"flop": 2.0 * case["queries"] * case["candidates"] * case["dim"]}


def _faiss(case: Case) -> Prepared:
    import torch

    if torch.cpu.get_capabilities().get("avx512_f"):
        # Its wheel brings a BLAS that does not know every processor, and then multiplies four times slower.
        os.environ.setdefault("OPENBLAS_CORETYPE", "SKYLAKEX")
    import faiss

    queries, pool = clustered_vectors(case)
    faiss.omp_set_num_threads(torch.get_num_threads())
    # Below so many queries · width faiss multiplies pair by pair, ten times slower; every case lies above.
    if hasattr(faiss.cvar, "distance_compute_blas_threshold"):
        faiss.cvar.distance_compute_blas_threshold = 20
    index: Any = faiss.IndexFlatIP(case["dim"])
    index.add(pool.numpy())
    del pool

    def run() -> Answer:
        return _answer(*index.search(queries.numpy(), case["k"]))

    return Prepared(run=run, work=case["queries"], facts=_facts(case))


def _torch_rows(case: Case) -> Prepared:
    """Product and top-k, in chunks of queries."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    queries, pool = (vectors.to(device) for vectors in clustered_vectors(case))

    def run() -> Answer:
        best = [torch.topk(part @ pool.T, case["k"], dim=1) for part in queries.split(512)]
        return _answer(
            torch.cat([part.values for part in best]).cpu(), torch.cat([part.indices for part in best]).cpu()
        )

    return Prepared(run=run, work=case["queries"], facts=_facts(case))


def _loop(case: Case) -> Prepared:
    """A product and a top-k for each query, as the paper's authors mine; some queries stand for all."""
    import torch

    queries, pool = clustered_vectors(case)

    def run() -> Answer:
        best = [torch.topk(queries[i : i + 1] @ pool.T, case["k"], dim=1) for i in range(_LOOP_QUERIES)]
        return _answer(torch.cat([part.values for part in best]), torch.cat([part.indices for part in best]))

    return Prepared(run=run, work=_LOOP_QUERIES, facts=_facts(case))


def _compare(case: Case, ours: Answer, other: Answer) -> str:
    """Rows may differ only where scores are equal up to float32 sums; ours are exact."""
    num = len(other["scores"])
    own_scores, own_rows = ours["scores"][:num], ours["rows"][:num]
    worst = float(np.abs(own_scores - other["scores"]).max())
    if worst > _SCORE_TOLERANCE:
        raise BenchmarkError(f"scores differ by up to {worst:.2g}")
    shared = sum(len(np.intersect1d(a, b)) for a, b in zip(own_rows, other["rows"], strict=True))
    recall = shared / own_rows.size
    # A candidate that only one of them has must tie with the last one.
    for query in range(num):
        only = ~np.isin(other["rows"][query], own_rows[query])
        gap = own_scores[query, -1] - other["scores"][query][only]
        if only.any() and float(np.abs(gap).max()) > _SCORE_TOLERANCE:
            raise BenchmarkError(f"query {query}: {only.sum()} candidates are not ours, {gap.max():.2g} off")
    return f"recall {recall:.6f}, scores to {worst:.1g}"


_SEARCH = {"k": 100}
BENCHMARK = Benchmark(
    about="Exact top-100: 2,000 queries against pools of unit vectors; seconds of the search alone.",
    unit="queries",
    methods={
        "ours": _ours,
        "faiss IndexFlatIP": _faiss,
        "torch product + topk": _torch_rows,
        "loop over queries": _loop,
    },
    cases={
        "d256": {**_SEARCH, "queries": 2_000, "candidates": 200_000, "dim": 256},
        "d1024": {**_SEARCH, "queries": 2_000, "candidates": 200_000, "dim": 1024},
        "d3584": {**_SEARCH, "queries": 2_000, "candidates": 50_000, "dim": 3584},
        "d3584_200k": {**_SEARCH, "queries": 2_000, "candidates": 200_000, "dim": 3584},
        "d1024_low": {**_SEARCH, "queries": 2_000, "candidates": 200_000, "dim": 1024, "directions": 256},
        "d3584_low": {**_SEARCH, "queries": 2_000, "candidates": 50_000, "dim": 3584, "directions": 256},
        "small": {**_SEARCH, "queries": 512, "candidates": 20_000, "dim": 256},
        "h200": {**_SEARCH, "queries": 65_536, "candidates": 1_000_000, "dim": 3584},
    },
    quick=("small",),
    compare=_compare,
    repeats=1,
)
