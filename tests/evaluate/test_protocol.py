"""The protocol whole: vectors as UniIR stores them, search, judgements with every oddity, against ten lines.

Vectors are float16 and not unit length, many candidates are copies, scores tie, a pool is shorter than k,
queries have several positives, positives of other pools, and judgements of grade 0.
"""

import math
import random

import numpy as np
import pytest

from umarvel_ray.data.mbeir import TASK_BY_NAME
from umarvel_ray.data.trec import Run, read_qrels
from umarvel_ray.evaluate.analysis import PoolIndex, error_kinds, score_histograms, tie_bounds, twin_counts
from umarvel_ray.evaluate.benchmark import evaluate_run
from umarvel_ray.retrieve.store import EmbeddingPool
from umarvel_ray.retrieve.vectors import import_vectors
from umarvel_ray.runtime.cluster import RuntimeSettings
from umarvel_ray.runtime.searching import SearchTask, search

TASK = TASK_BY_NAME["infoseek_task6"]


class World:
    """Queries, a pool with copies, judgements on disk, and the run that our search gives."""

    def __init__(self, folder, seed: int, pool_size: int) -> None:
        rng, draw = np.random.default_rng(seed), random.Random(seed)
        self.qids = [f"6:{number}" for number in range(1, 31)]
        self.dids = [f"6:{number}" for number in range(100, 100 + pool_size)]
        # Few distinct directions in a coarse lattice: exact ties and copies abound.
        lattice = rng.integers(-2, 3, size=(max(3, pool_size // 2), 4)) + 0.5
        self.content = rng.integers(len(lattice), size=pool_size)
        self.pool = (lattice[self.content] * 7).astype(np.float16)
        self.queries = (rng.integers(-2, 3, size=(30, 4)) + 0.25).astype(np.float16)
        lines = []
        for qid in self.qids:
            judged = draw.sample(self.dids, min(draw.randint(1, 4), pool_size))
            for place, did in enumerate(judged):
                lines.append(f"{qid} 0 {did} {1 if place == 0 else draw.randint(0, 1)} 6")
            lines += [f"{qid} 0 5:{draw.randint(1, 9)} 1 6"] * draw.randint(0, 1)
        path = folder / "qrels.txt"
        path.write_text("\n".join(lines) + "\n")
        self.qrels = read_qrels(path)
        for name, matrix, ids, factor in (
            ("queries", self.queries, self.qids, 500_000),
            ("pool", self.pool, self.dids, 10_000_000),
        ):
            np.save(folder / f"{name}_embed.npy", matrix)
            numbers = [6 * factor + int(name_of.split(":")[1]) for name_of in ids]
            np.save(folder / f"{name}_ids.npy", np.array(numbers))
            role = "query" if name == "queries" else "candidate"
            import_vectors(folder / f"{name}_embed.npy", folder / f"{name}_ids.npy", folder / name, role=role)
        task = SearchTask(folder / "queries", (folder / "pool",), 50, folder / "run.arrow")
        search([task], RuntimeSettings(kind="local"))
        self.run = Run.read(folder / "run.arrow")
        self.index = PoolIndex({"pool": ("text", self.dids)})
        assert len(EmbeddingPool([folder / "pool"])) == pool_size

    def brute_force(self) -> dict[str, list[str]]:
        """Every query's ranking from the stored float16, in float64, ties by row."""
        # Unit length is given in float32, as UniIR's faiss does it; near-ties hang on that.
        queries, pool = (m.astype(np.float32) for m in (self.queries, self.pool))
        queries, pool = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in (queries, pool))
        cosine = (queries.astype(np.float64) @ pool.astype(np.float64).T).astype(np.float32)
        order = np.argsort(-cosine, axis=1, kind="stable")
        return {qid: [self.dids[row] for row in order[place]] for place, qid in enumerate(self.qids)}


def reference(world: World, metric: str, k: int) -> float:
    """The definitions, over the positives that the pool holds."""
    total = 0.0
    for qid, ranked in world.brute_force().items():
        right = {did for did in world.qrels[qid] if did in set(world.dids)}
        hits = [rank for rank, did in enumerate(ranked[:k], 1) if did in right]
        best = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(right)) + 1))
        total += {
            "hit": float(bool(hits)),
            "recall": len(hits) / len(right) if right else 0,
            "ndcg": sum(1 / math.log2(rank + 1) for rank in hits) / best if best else 0,
            "map": sum((n + 1) / rank for n, rank in enumerate(hits)) / min(k, len(right)) if right else 0,
            "mrr": 1 / hits[0] if hits else 0,
        }[metric]
    return total / len(world.qids)


@pytest.mark.parametrize("pool_size", [7, 40])
@pytest.mark.parametrize("seed", range(4))
def test_every_metric_equals_ten_lines_after_the_float16_round_trip(seed, pool_size, tmp_path):
    world = World(tmp_path, seed, pool_size)
    result = evaluate_run(TASK, world.run, world.qrels, pool_dids=world.index)
    assert {qid: list(dids) for qid, dids in zip(world.run.qids, world.run.dids, strict=True)} == {
        qid: ranked[:50] for qid, ranked in world.brute_force().items()
    }
    for name in ("hit@1", "hit@5", "hit@10", "recall@5", "ndcg@10", "map@10", "mrr@10"):
        metric, k = name.split("@")
        assert result[name] == pytest.approx(reference(world, metric, int(k)), abs=1e-12), name
    assert result["positives_outside_pool"] == sum(
        did.startswith("5:") for judged in world.qrels.values() for did in judged
    )
    assert result["queries_tied_at_cut"] > 0


@pytest.mark.parametrize("seed", range(3))
def test_pytrec_eval_agrees_where_it_has_the_metric(seed, tmp_path):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    world = World(tmp_path, seed, 40)
    result = evaluate_run(TASK, world.run, world.qrels, pool_dids=world.index)
    ranked = {
        qid: {did: 1 - rank / 1000 for rank, did in enumerate(dids)}
        for qid, dids in zip(world.run.qids, world.run.dids, strict=True)
    }
    reachable = {
        qid: {did: grade for did, grade in judged.items() if did in set(world.dids)} or {"none": 0}
        for qid, judged in world.qrels.items()
    }
    measures = {"success_1,5,10", "recall_5", "ndcg_cut_10"}
    found = pytrec_eval.RelevanceEvaluator(reachable, measures).evaluate(ranked)
    for theirs, ours in (
        ("success_5", "hit@5"),
        ("success_1", "hit@1"),
        ("recall_5", "recall@5"),
        ("ndcg_cut_10", "ndcg@10"),
    ):
        assert result[ours] == pytest.approx(
            np.mean([values[theirs] for values in found.values()]), abs=1e-9
        ), ours


@pytest.mark.parametrize("seed", range(3))
def test_tie_bounds_are_the_worst_and_the_best_of_all_orders(seed, tmp_path):
    world = World(tmp_path, seed, 40)
    worst = best = 0
    for _, dids, scores in zip(world.run.qids, world.run.dids, world.run.scores, strict=True):
        right = [did in world.qrels[_] for did in dids]
        against = sorted(range(len(dids)), key=lambda row: (-scores[row], right[row]))
        in_favour = sorted(range(len(dids)), key=lambda row: (-scores[row], not right[row]))
        worst += any(right[row] for row in against[:5])
        best += any(right[row] for row in in_favour[:5])
    lost, won = tie_bounds(world.run, world.qrels, 5)
    assert (lost, won) == (worst / 30, best / 30)
    hit = evaluate_run(TASK, world.run, world.qrels, pool_dids=world.index)["hit@5"]
    assert lost <= hit <= won and lost < won


def test_a_copy_that_was_found_is_counted(tmp_path):
    world = World(tmp_path, 1, 40)
    content = {did: bytes([key]) for did, key in zip(world.dids, world.content, strict=True)}
    asked = []
    counts = twin_counts(world.run, world.qrels, 5, lambda did: asked.append(did) or content.get(did))
    missed = saved = 0
    for qid, dids in zip(world.run.qids, world.run.dids, strict=True):
        right = {did for did in world.qrels[qid] if did in content}
        if not right & set(dids[:5]):
            missed += 1
            saved += bool({content[did] for did in right} & {content[did] for did in dids[:5]})
    assert counts == {"queries_missed": missed, "queries_missed_but_copy_found": saved}
    assert saved > 0 and len(asked) < 30 * 40  # only what missing queries need is looked at
    num_asked = len(asked)
    asked.clear()
    rough = {did: key[0] % 2 for did, key in content.items()}
    again = twin_counts(
        world.run,
        world.qrels,
        5,
        lambda did: asked.append(did) or content.get(did),
        lambda did: rough.get(did),
    )
    assert again == counts and len(asked) < num_asked


def test_kinds_of_error_by_hand():
    """Wrong modality goes before wrong domain; a right first candidate is no error."""
    pool = PoolIndex({"passages": ("text", ["6:1", "6:2", "9:3"]), "pictures": ("image", ["9:4", "6:5"])})
    firsts = {"6:1001": "6:1", "6:1002": "6:5", "6:1003": "9:3", "6:1004": "6:2", "6:1005": "9:4"}
    run = Run(list(firsts), [[did] for did in firsts.values()], [[1.0]] * 5)
    qrels = {qid: {"6:1": 1} for qid in firsts}
    found = error_kinds(run, qrels, pool, modality="text", domain="wiki")
    assert found["errors"] == 4
    assert (found["wrong_modality"], found["wrong_domain"], found["other"]) == (0.5, 0.25, 0.25)
    assert found["modality_at_1"] == {"image": 0.4, "text": 0.6}


def test_a_pool_index_knows_its_own_and_refuses_a_did_twice():
    from umarvel_ray.errors import DataError

    pool = PoolIndex({"a": ("text", ["x", "y"]), "b": ("image", ["z"])})
    assert len(pool) == 3 and "x" in pool and "w" not in pool
    assert [pool.modality_of(did) for did in ("x", "z", "w")] == ["text", "image", None]
    with pytest.raises(DataError, match="1 of 3 candidates stand in it twice"):
        PoolIndex({"a": ("text", ["x", "y"]), "b": ("image", ["x"])})


def test_histograms_hold_each_querys_best_right_and_best_wrong():
    run = Run(["a", "b"], [["r", "w"], ["w", "v"]], [[0.9, 0.4], [0.9, 0.1]])
    found = score_histograms(run, {"a": {"r": 1}, "b": {"x": 1}})
    assert found is not None and sum(found["positives"]) == 1 and sum(found["wrong"]) == 2
    edges = np.array(found["bin_edges"])
    assert edges[np.flatnonzero(found["positives"])[0]] == pytest.approx(0.9, abs=0.0051)
    assert score_histograms(Run(["a"], [["r"]], [[7.0]]), {"a": {"r": 1}}) is None


def test_histograms_of_several_tasks_join_on_one_axis():
    from umarvel_ray.evaluate.panels import _joined

    kept = [
        score_histograms(Run(["a"], [["r", "w"]], [[high, low]]), {"a": {"r": 1}})
        for high, low in ((0.9, 0.4), (0.5, -0.2), (0.9, 0.4))
    ]
    edges, right, wrong = _joined([h for h in kept if h is not None])
    assert len(edges) <= 49 and (right.sum(), wrong.sum()) == (3, 3)
    for scores, counts in (([0.9, 0.5, 0.9], right), ([0.4, -0.2, 0.4], wrong)):
        expected = np.histogram(np.array(scores, dtype=np.float32), edges)[0]
        np.testing.assert_array_equal(counts, expected)
