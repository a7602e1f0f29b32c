"""Metrics equal a ten-line reference, pytrec_eval where it has them, and cases counted by hand."""

import math
import random

import numpy as np
import pytest

from umarvel_ray.errors import ConfigError, DataError
from umarvel_ray.evaluate.metrics import first_positive_rank, judge, mean_scores, score_queries

NAMES = [f"{metric}@{k}" for metric in ("hit", "recall", "ndcg", "map", "mrr") for k in (1, 3, 10)]


def reference(metric: str, k: int, ranked: list[str], grades: dict[str, int]) -> float:
    """The definitions, word by word."""
    positives = {did: grade for did, grade in grades.items() if grade > 0}
    hits = [rank for rank, did in enumerate(ranked[:k], 1) if did in positives]
    if metric == "ndcg":
        best = sorted(positives.values(), reverse=True)[:k]
        ideal = sum(grade / math.log2(rank + 1) for rank, grade in enumerate(best, 1))
        return (
            sum(positives[ranked[rank - 1]] / math.log2(rank + 1) for rank in hits) / ideal if ideal else 0.0
        )
    if metric == "map":
        total = sum((place + 1) / rank for place, rank in enumerate(hits))
        return total / min(k, len(positives)) if positives else 0.0
    if metric == "recall":
        return len(hits) / len(positives) if positives else 0.0
    return float(bool(hits)) if metric == "hit" else (1 / hits[0] if hits else 0.0)


def random_world(seed: int, *, graded: bool) -> tuple[dict[str, dict[str, int]], dict[str, list[str]]]:
    """Several positives, foreign positives outside every ranking, relevance-0 lines, short rankings."""
    rng = random.Random(seed)
    pool = [f"9:{number}" for number in range(40)]
    qrels, ranking = {}, {}
    for number in range(60):
        judged = rng.sample(pool, rng.randint(1, 9)) + ["5:1"] * rng.randint(0, 1)
        qrels[f"9:{number}"] = {did: rng.randint(0, 3 if graded else 1) for did in judged}
        ranking[f"9:{number}"] = rng.sample(pool, rng.choice([2, 7, 12, 40]))
    return qrels, ranking


@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_the_ten_line_reference(seed):
    qrels, ranking = random_world(seed, graded=True)
    for name, values in score_queries(qrels, ranking, NAMES).items():
        metric, k = name.split("@")
        expected = [reference(metric, int(k), ranking[qid], qrels[qid]) for qid in ranking]
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("graded", [False, True])
def test_metrics_equal_pytrec_eval(graded):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    qrels, ranking = random_world(7, graded=graded)
    for k in (1, 5, 10):
        run = {
            qid: {did: 1.0 - rank / 100 for rank, did in enumerate(dids[:k])} for qid, dids in ranking.items()
        }
        measures = {f"success.{k}", f"recall.{k}", f"ndcg_cut.{k}", "recip_rank"}
        theirs = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
        ours = score_queries(qrels, ranking, [f"{metric}@{k}" for metric in ("hit", "recall", "ndcg", "mrr")])
        for our_name, their_name in (
            ("hit", f"success_{k}"),
            ("recall", f"recall_{k}"),
            ("ndcg", f"ndcg_cut_{k}"),
            ("mrr", "recip_rank"),
        ):
            expected = [theirs[qid][their_name] for qid in ranking]
            np.testing.assert_allclose(ours[f"{our_name}@{k}"], expected, rtol=0, atol=1e-9, err_msg=our_name)


def test_average_precision_divides_by_the_positives_that_fit():
    """CIRCO: three positives, the first two ranks right, k = 2: perfect. trec_eval would say 2/3."""
    scores = mean_scores({"q": {"a": 1, "b": 1, "c": 1}}, {"q": ["a", "b", "x"]}, ["map@2", "map@3"])
    assert scores == {"map@2": 1.0, "map@3": pytest.approx(2 / 3)}


def test_an_unreachable_positive_lowers_recall_but_not_hit():
    scores = mean_scores({"q": {"5:1": 1, "6:1": 1}}, {"q": ["5:1", "5:2"]}, ["hit@5", "recall@5"])
    assert scores == {"hit@5": 1.0, "recall@5": 0.5}


def test_a_query_without_positives_scores_zero_and_stays_in_the_mean():
    assert mean_scores({"q": {"a": 0}, "r": {"b": 1}}, {"q": ["a"], "r": ["b"]}, ["hit@1"]) == {"hit@1": 0.5}


def test_first_positive_rank_counts_from_one():
    judged = judge({"q": {"b": 1}, "r": {"z": 1}}, {"q": ["a", "b"], "r": ["a", "b"]}, depth=5)
    assert first_positive_rank(judged).tolist() == [2, 0]


def test_queries_without_qrels_are_named_with_their_count():
    with pytest.raises(DataError, match=r"2 of 3 queries have no judgement \(first: query 9:2\)"):
        mean_scores({"9:1": {"a": 1}}, {"9:1": ["a"], "9:2": ["a"], "9:3": ["a"]}, ["hit@1"])


def test_a_candidate_ranked_twice_is_refused():
    with pytest.raises(DataError, match=r"1 of 1 rankings name a candidate twice .*query q, candidate a"):
        mean_scores({"q": {"a": 1}}, {"q": ["a", "b", "a"]}, ["hit@1"])


@pytest.mark.parametrize("name", ["hit", "hit@0", "hits@5", "hit@x"])
def test_an_unknown_metric_is_refused(name):
    with pytest.raises(ConfigError, match="is not known"):
        mean_scores({"q": {"a": 1}}, {"q": ["a"]}, [name])


def test_no_query_at_all_is_refused():
    with pytest.raises(DataError, match="holds no query"):
        mean_scores({}, {}, ["hit@1"])
