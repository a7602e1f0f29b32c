"""Search over stores: four actors on Ray against one process with as many threads as the machine has cores.

Stores of float16 lie on disk; what is timed goes from stores to a run with ids, starting actors included, Ray
itself not. The runs have to be identical to the last bit.
"""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from umarvel_ray.bench.harness import Answer, Benchmark, BenchmarkError, Case, Prepared

_SHARD_ROWS = 8192


def _store(folder: Path, num: int, dim: int, seed: int) -> Path:
    from umarvel_ray.retrieve.store import finish_store, plan_shards, write_shard

    plan = plan_shards(num, _SHARD_ROWS)
    for shard in plan:
        vectors = np.random.default_rng([seed, shard.index]).standard_normal(
            (shard.num_rows, dim), np.float32
        )
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        ids = [f"{seed}:{row}" for row in range(shard.start, shard.stop)]
        write_shard(folder, shard, ids, vectors, dtype="float16", fingerprint=f"{num} {dim} {seed}")
    finish_store(folder, plan, fingerprint=f"{num} {dim} {seed}", settings={})
    return folder


def _prepare(case: Case, runtime: Any) -> Prepared:
    from umarvel_ray.runtime.cluster import connect
    from umarvel_ray.runtime.searching import SearchTask, search

    folder = tempfile.TemporaryDirectory()
    home = Path(folder.name)
    queries = _store(home / "queries", case["queries"], case["dim"], seed=1)
    pool = _store(home / "pool", case["candidates"], case["dim"], seed=2)
    connect(runtime)
    facts: dict[str, float] = {}

    def run() -> Answer:
        task = SearchTask(queries, (pool,), case["k"], Path(folder.name) / "run.arrow")
        task.output.unlink(missing_ok=True)
        done = search([task], runtime, query_block_rows=case["query_block_rows"])
        facts.update(
            actor_seconds=done.actor_seconds,
            wall_seconds=done.wall_seconds,
            first_seconds=done.first_seconds,
            actor_bytes=done.actor_bytes,
            cells=done.num_cells,
        )
        digest = hashlib.sha256(task.output.read_bytes()).digest()
        return {"run": np.frombuffer(digest, dtype=np.uint8)}

    return Prepared(run=run, work=case["queries"], facts=facts)


def _actors(case: Case) -> Prepared:
    from umarvel_ray.runtime.cluster import RuntimeSettings

    return _prepare(case, RuntimeSettings(kind="ray", num_actors=4, threads=1))


def _one_process(case: Case) -> Prepared:
    import os

    from umarvel_ray.runtime.cluster import RuntimeSettings

    return _prepare(case, RuntimeSettings(kind="local", threads=os.cpu_count() or 1))


def _compare(case: Case, ours: Answer, other: Answer) -> str:
    if not np.array_equal(ours["run"], other["run"]):
        raise BenchmarkError("the runs differ")
    return "the same run to the last byte"


BENCHMARK = Benchmark(
    about="Stores to a run with ids: four actors against one process.",
    unit="queries",
    methods={"four actors": _actors, "one process": _one_process},
    cases={
        "d1024": {"queries": 20_000, "candidates": 200_000, "dim": 1024, "k": 100, "query_block_rows": 2048},
        "small": {"queries": 2_000, "candidates": 20_000, "dim": 64, "k": 10, "query_block_rows": 512},
    },
    quick=("small",),
    compare=_compare,
    repeats=1,
)
