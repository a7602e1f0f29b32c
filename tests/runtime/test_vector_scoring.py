"""One pass over the pools gives what a search per task and pool gives, ties and short pools included."""

import numpy as np
import pytest

from umarvel_ray.data.trec import Run
from umarvel_ray.errors import ShardError
from umarvel_ray.retrieve.store import finish_store, plan_shards, write_shard
from umarvel_ray.runtime.cluster import RuntimeSettings
from umarvel_ray.runtime.scoring import ScoringWorker, Wanted, plan_scoring, score_all
from umarvel_ray.runtime.searching import SearchTask, search

LOCAL = RuntimeSettings(kind="local")
QUERIES = {"queries/a": 7, "queries/b": 5}
POOLS = {"pools/a": 23, "pools/b": 4, "pools/c": 17}


@pytest.fixture
def stores(tmp_path):
    """Vectors of few values, so that many scores tie, within a pool and across pools."""
    rng = np.random.default_rng(3)
    for name, rows in {**QUERIES, **POOLS}.items():
        plan = plan_shards(rows, 6)
        for shard in plan:
            ids = [f"{name}:{row}" for row in range(shard.start, shard.stop)]
            vectors = rng.integers(-1, 2, size=(shard.num_rows, 4)).astype(np.float32)
            vectors[~vectors.any(axis=1)] = 1
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            write_shard(tmp_path / name, shard, ids, vectors, dtype="float16", fingerprint=name)
        finish_store(tmp_path / name, plan, fingerprint=name, settings={})
    return tmp_path


def wanted(folder, name) -> list[Wanted]:
    """Each query set against its own pool, a pair of pools, and all of them."""
    scopes = {"local": ("pools/a",), "pair": ("pools/b", "pools/c"), "global": tuple(POOLS)}
    return [
        Wanted(queries, pools, folder / name / f"{queries[-1]}.{scope}.arrow")
        for queries in QUERIES
        for scope, pools in scopes.items()
    ]


def test_one_pass_equals_a_search_per_task_and_pool(stores):
    runs = wanted(stores, "one-pass")
    score_all(stores, runs, LOCAL, k=9, scratch=stores / "scratch", segment_rows=5)
    tasks = [
        SearchTask(
            stores / run.queries,
            tuple(stores / pool for pool in run.pools),
            9,
            stores / "each" / run.output.name,
        )
        for run in runs
    ]
    search(tasks, LOCAL)
    for run, task in zip(runs, tasks, strict=True):
        ours, theirs = Run.read(run.output), Run.read(task.output)
        assert ours.as_dict() == theirs.as_dict(), run
    assert not (stores / "scratch").exists()


def test_a_killed_scoring_does_only_what_is_missing(stores, monkeypatch):
    plan = plan_scoring(stores, wanted(stores, "a"), k=9, scratch=stores / "scratch", segment_rows=5)
    for segment in plan.segments[:4]:
        ScoringWorker()(segment)
    seen = []
    plain = ScoringWorker.__call__
    monkeypatch.setattr(
        ScoringWorker, "__call__", lambda self, segment: seen.append(segment.part) or plain(self, segment)
    )
    score_all(stores, wanted(stores, "a"), LOCAL, k=9, scratch=stores / "scratch", segment_rows=5)
    assert len(seen) == len(plan.segments) - 4
    score_all(stores, wanted(stores, "b"), LOCAL, k=9, scratch=stores / "scratch", segment_rows=50)
    for run, other in zip(wanted(stores, "a"), wanted(stores, "b"), strict=True):
        assert Run.read(run.output).as_dict() == Run.read(other.output).as_dict()


def test_the_plan_counts_each_pool_once_and_only_the_queries_that_want_it(stores):
    plan = plan_scoring(stores, wanted(stores, "a"), k=3, scratch=stores / "scratch", segment_rows=10)
    assert (plan.num_queries, plan.num_candidates) == (12, 44)
    assert plan.products == 12 * 44 and plan.flops == 2 * plan.products * 4
    assert plan.pool_bytes == 44 * 4 * 2 and len(plan.segments) == 3 + 1 + 2
    only = [run for run in wanted(stores, "a") if run.output.name == "a.local.arrow"]
    assert plan_scoring(stores, only, k=3, scratch=stores / "s").products == 7 * 23


def test_widths_that_differ_are_refused(stores):
    write_shard(
        stores / "queries/odd",
        plan_shards(1, 1)[0],
        ["q"],
        np.ones((1, 3)) / 3**0.5,
        dtype="float32",
        fingerprint="x",
    )
    finish_store(stores / "queries/odd", plan_shards(1, 1), fingerprint="x", settings={})
    with pytest.raises(ShardError, match="width"):
        plan_scoring(
            stores,
            [*wanted(stores, "a"), Wanted("queries/odd", ("pools/a",), stores / "odd.arrow")],
            k=3,
            scratch=stores / "s",
        )


@pytest.mark.slow
def test_actors_give_the_same_runs(stores, ray_session):
    runtime = RuntimeSettings(kind="ray", num_actors=2)
    score_all(stores, wanted(stores, "ray"), runtime, k=9, scratch=stores / "scratch", segment_rows=5)
    score_all(stores, wanted(stores, "one"), LOCAL, k=9, scratch=stores / "scratch", segment_rows=23)
    for run, other in zip(wanted(stores, "ray"), wanted(stores, "one"), strict=True):
        assert Run.read(run.output).as_dict() == Run.read(other.output).as_dict()
