"""Rows and scores of a search → a run with ids, against names one by one and JSON.

Scores and rows are synthetic; rows lie anywhere in the pool, as those of a search do.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from umarvel_ray.bench.harness import Answer, Benchmark, BenchmarkError, Case, Prepared

_BLOCK_QUERIES = 8192
_COMPARED_QUERIES = 1000
_LOOP_QUERIES = 20_000


def _blocks(case: Case, num_queries: int) -> Iterator[Any]:
    from umarvel_ray.retrieve.search import TopK

    generator = np.random.default_rng(0)
    for start in range(0, num_queries, _BLOCK_QUERIES):
        shape = (min(_BLOCK_QUERIES, num_queries - start), case["k"])
        rows_QK = generator.integers(0, case["candidates"], shape)
        steps_QK = generator.random(shape, dtype=np.float32) / case["k"]
        yield TopK(1 - np.cumsum(steps_QK, axis=1, dtype=np.float32), rows_QK)


def _compared(dids: Any, scores: Any) -> Answer:
    return {"dids": np.array(dids[:_COMPARED_QUERIES]), "scores": np.array(scores[:_COMPARED_QUERIES])}


def _ours(case: Case) -> Prepared:
    import pyarrow as pa

    from umarvel_ray.data.trec import Run
    from umarvel_ray.retrieve.hits import write_run

    qids = pa.chunked_array([pa.array([f"9:{i}" for i in range(case["queries"])])])
    dids = pa.array([f"9:{i}" for i in range(case["candidates"])], pa.large_string())
    folder = tempfile.TemporaryDirectory()

    def run() -> Answer:
        path = Path(folder.name) / "run.arrow"
        write_run(path, _blocks(case, case["queries"]), qids=qids, dids=dids)
        with pa.memory_map(str(path)) as source:
            first = Run.from_table(pa.Table.from_batches([pa.ipc.open_file(source).get_batch(0)]))
        return _compared(first.dids[:_COMPARED_QUERIES], first.scores[:_COMPARED_QUERIES])

    return Prepared(run=run, work=case["queries"] * case["k"])


def _loop(case: Case) -> Prepared:
    """A name and a score for each hit in Python, and JSON of all, as the paper's authors write them."""
    num = min(case["queries"], _LOOP_QUERIES)
    qids = [f"9:{i}" for i in range(num)]

    def run() -> Answer:
        found: dict[str, list[str]] = {}
        scores: dict[str, list[float]] = {}
        place = 0
        for block in _blocks(case, num):
            for rows, values in zip(block.rows_QK.tolist(), block.scores_QK.tolist(), strict=True):
                found[qids[place]] = [f"9:{row}" for row in rows]
                scores[qids[place]] = values
                place += 1
        with tempfile.TemporaryFile("w") as file:
            json.dump({"dids": found, "scores": scores}, file)
        return _compared(list(found.values()), list(scores.values()))

    return Prepared(run=run, work=num * case["k"])


def _compare(case: Case, ours: Answer, other: Answer) -> str:
    if not np.array_equal(ours["dids"], other["dids"]):
        raise BenchmarkError("the names differ")
    if not np.array_equal(ours["scores"], other["scores"].astype(np.float32)):
        raise BenchmarkError("the scores differ")
    return f"names and scores of {len(ours['dids'])} queries"


BENCHMARK = Benchmark(
    about="Hits become a run with ids: 100 for each query, on disk.",
    unit="hits",
    methods={"ours": _ours, "names in a loop, JSON": _loop},
    cases={
        "mbeir": {"queries": 1_330_000, "candidates": 5_600_000, "k": 100},
        "small": {"queries": 20_000, "candidates": 100_000, "k": 100},
    },
    quick=("small",),
    compare=_compare,
    repeats=1,
)
