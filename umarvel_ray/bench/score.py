"""`umarvel bench score`: M-BEIR's sixteen tasks, local and global, from stored vectors.

Sizes are the benchmark's own, scaled: 190,573 test queries and 5,609,079 candidates. Peers: our search, task
by task and pool by pool, and faiss's exact index as UniIR uses it. Vectors are random, of the stored dtype.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from umarvel_ray.bench.harness import Answer, Benchmark, BenchmarkError, Case, Prepared
from umarvel_ray.data.mbeir import TASKS
from umarvel_ray.data.trec import Run
from umarvel_ray.retrieve.store import EmbeddingPool, EmbeddingStore, finish_store, plan_shards, write_shard
from umarvel_ray.runtime.cluster import RuntimeSettings
from umarvel_ray.runtime.scoring import Wanted, score_all
from umarvel_ray.runtime.searching import SearchTask, search

_QUERIES = (
    19_995, 24_809, 1_719, 2_455, 3_241, 2_511, 20_000, 5_000, 4_889, 2_120, 50_004, 11_323, 6_003, 4_170,
    14_741, 17_593,
)  # fmt: skip
_POOLS = (
    542_246, 5_000, 201_824, 544_457, 1_047_067, 403_196, 537_568, 24_809, 61_707, 40_038, 676_667, 611_651,
    74_381, 21_551, 335_135, 481_782,
)  # fmt: skip
"""Test queries and local pools of the tasks, in their order."""
_LOCAL = RuntimeSettings(kind="local", threads=2)


def _stores(case: Case, folder: Path) -> list[tuple[str, str]]:
    """(query store, pool store) of each task."""
    rng = np.random.default_rng(0)
    names = []
    for task, num_queries, num_candidates in zip(TASKS, _QUERIES, _POOLS, strict=True):
        pair = (f"queries/{task.name}", f"pools/{task.name}")
        for name, full in zip(pair, (num_queries, num_candidates), strict=True):
            plan = plan_shards(max(60, round(full / case["scale"])), 16_384)
            for shard in plan:
                vectors = rng.standard_normal((shard.num_rows, case["dim"]), dtype=np.float32)
                vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
                ids = [f"{name}:{row}" for row in range(shard.start, shard.stop)]
                write_shard(folder / name, shard, ids, vectors, dtype="float16", fingerprint=name)
            finish_store(folder / name, plan, fingerprint=name, settings={}, unique_ids=True)
        names.append(pair)
    return names


def _work(folder: Path, names: list[tuple[str, str]]) -> float:
    candidates = sum(len(EmbeddingStore.open(folder / pool)) for _, pool in names)
    return float(candidates * sum(len(EmbeddingStore.open(folder / queries)) for queries, _ in names))


def _answer(output: Path) -> Answer:
    """Scores of every run; ids are left out, since faiss orders equal scores otherwise."""
    return {
        path.name: np.stack([np.asarray(row) for row in Run.read(path).scores])
        for path in sorted(output.glob("*.arrow"))
    }


def _one_pass(case: Case) -> Prepared:
    folder = Path(tempfile.mkdtemp(prefix="umarvel-bench-score-"))
    names = _stores(case, folder)
    output = folder / "runs"

    def run() -> Answer:
        shutil.rmtree(output, ignore_errors=True)
        wanted = [
            Wanted(queries, pools, output / f"{Path(queries).name}.{scope}.arrow")
            for queries, pool in names
            for scope, pools in (("local", (pool,)), ("global", tuple(name for _, name in names)))
        ]
        score_all(folder, wanted, _LOCAL, k=case["k"], scratch=folder / "scratch")
        return _answer(output)

    return Prepared(run=run, work=_work(folder, names))


def _task_by_task(case: Case) -> Prepared:
    folder = Path(tempfile.mkdtemp(prefix="umarvel-bench-score-"))
    names = _stores(case, folder)
    output = folder / "runs"

    def run() -> Answer:
        shutil.rmtree(output, ignore_errors=True)
        everything = tuple(folder / pool for _, pool in names)
        tasks = [
            SearchTask(folder / queries, pools, case["k"], output / f"{Path(queries).name}.{scope}.arrow")
            for queries, pool in names
            for scope, pools in (("local", (folder / pool,)), ("global", everything))
        ]
        search(tasks, _LOCAL)
        return _answer(output)

    return Prepared(run=run, work=_work(folder, names))


def _faiss(case: Case) -> Prepared:
    import faiss

    folder = Path(tempfile.mkdtemp(prefix="umarvel-bench-score-"))
    names = _stores(case, folder)
    faiss.omp_set_num_threads(2)

    def run() -> Answer:
        answer = {}
        index_of: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {}
        for pools in [*([pool] for _, pool in names), [pool for _, pool in names]]:
            index = faiss.IndexFlatIP(case["dim"])
            for block in EmbeddingPool([folder / pool for pool in pools]).blocks(65_536):
                index.add(block)
            index_of["global" if len(pools) > 1 else pools[0]] = index.search
        for queries, pool in names:
            store = EmbeddingStore.open(folder / queries)
            vectors = store.vectors(0, len(store))
            for scope, key in (("local", pool), ("global", "global")):
                answer[f"{Path(queries).name}.{scope}.arrow"] = index_of[key](vectors, case["k"])[0]
        return answer

    return Prepared(run=run, work=_work(folder, names))


def _compare(case: Case, ours: Answer, other: Answer) -> str:
    if set(ours) != set(other):
        raise BenchmarkError(f"{len(ours)} runs and {len(other)} runs: not the same tasks were scored.")
    largest = max(float(np.abs(ours[name] - other[name]).max()) for name in ours)
    # A float32 product of unit vectors is off by at most about width · 2⁻²⁴.
    if largest > case["dim"] * 2.0**-24 + 1e-6:
        raise BenchmarkError(f"scores differ by up to {largest:.2e}, more than rounding explains.")
    return f"{len(ours)} runs, scores within {largest:.1e}"


BENCHMARK = Benchmark(
    about="sixteen tasks, local and global, from stored vectors",
    unit="inner products",
    methods={"one pass": _one_pass, "search, task by task": _task_by_task, "faiss, task by task": _faiss},
    cases={
        "small": {"scale": 400, "dim": 256, "k": 50},
        "twentieth, d 256": {"scale": 20, "dim": 256, "k": 50},
        "twentieth, d 1024": {"scale": 20, "dim": 1024, "k": 50},
    },
    quick=("small",),
    compare=_compare,
    repeats=1,
    threads=2,
)
