"""Lists of candidates: ties never win, whatever the order; judgements that match nothing are refused."""

import itertools

import numpy as np
import pytest

from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.errors import DataError
from umarvel_ray.evaluate.parts import Part, hit_in_list, judged_lists, ranked_values


def by_orders(scores, right, k):
    """The share of all orders of the list in which a stable sort puts a right one among the first k."""
    hits = []
    for order in itertools.permutations(range(len(scores))):
        ranked = sorted(order, key=lambda row: -scores[row])[:k]
        hits.append(any(right[row] for row in ranked))
    return np.mean(hits)


@pytest.mark.parametrize("seed", range(12))
def test_averaged_ties_are_the_share_of_orders(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, size=5).astype(np.float32)
    right = rng.integers(0, 2, size=5).astype(bool)
    for k in (1, 2, 3, 6):
        assert hit_in_list(scores, right, k, ties="averaged") == pytest.approx(by_orders(scores, right, k))


def test_a_lost_tie_is_wrong_and_a_collapsed_encoder_scores_nothing_or_chance():
    right = np.array([True, False, False, False])
    flat = np.ones(4, dtype=np.float32)
    assert hit_in_list(flat, right, 1, ties="lost") == 0.0
    assert hit_in_list(flat, right, 1, ties="averaged") == pytest.approx(0.25)
    above = np.array([1.0, 0.5, 0.5, 0.5], dtype=np.float32)
    assert hit_in_list(above, right, 1, ties="lost") == 1.0
    assert hit_in_list(above, ~right, 1, ties="lost") == 0.0


def part(**values):
    base = {
        "name": "set",
        "kind": "text → text",
        "queries": [Query("q1", txt="a"), Query("q2", txt="b")],
        "candidates": [Candidate("r", txt="r"), Candidate("w", txt="w"), Candidate("v", txt="v")],
        "qrels": {"q1": {"r": 1}, "q2": {"w": 1}},
        "lists": {"q1": ("r", "w"), "q2": ("w", "r", "v")},
        "metrics": ("hit@1",),
        "ties": "lost",
    }
    return Part(**(base | values))


def test_lists_are_scored_by_id_and_the_order_of_a_list_carries_nothing():
    table = {("q1", "r"): 0.9, ("q1", "w"): 0.1, ("q2", "w"): 0.5, ("q2", "r"): 0.5, ("q2", "v"): 0.2}

    def scores(qid, dids):
        return np.array([table[qid, did] for did in dids])

    for lists in ({"q1": ("r", "w"), "q2": ("w", "r", "v")}, {"q1": ("w", "r"), "q2": ("v", "r", "w")}):
        assert judged_lists(part(lists=lists), scores)["hit@1"].tolist() == [1.0, 0.0]
        assert judged_lists(part(lists=lists, ties="averaged"), scores)["hit@1"].tolist() == [1.0, 0.5]


@pytest.mark.parametrize(
    ("score", "message"), [(1.0, "every candidate has the same score"), (np.nan, "2 of 2 .*not finite")]
)
def test_lists_that_rank_nothing_are_refused(score, message):
    with pytest.raises(DataError, match=message):
        judged_lists(part(), lambda qid, dids: np.full(len(dids), score))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"qrels": {"q1": {"R": 1}, "q2": {"W": 1}}, "lists": None}, "Ids never match"),
        ({"qrels": {"q9": {"r": 1}}}, "1 judged queries are not asked"),
        ({"queries": []}, "has no queries"),
        ({"candidates": [Candidate("r", txt="r")] * 2}, "1 of 2 candidates repeat an id"),
        ({"lists": {"q1": ("r", "x"), "q2": ("w",)}}, "1 candidates of lists have no record"),
    ],
)
def test_a_part_that_cannot_be_scored_is_refused(values, message):
    with pytest.raises(DataError, match=message):
        part(**values)


def test_circos_metric_by_hand():
    """Ranks 1 and 3 of two right ones: (1/1 + 2/3) / min(5, 2); its recall counts the target alone."""
    circo = part(
        lists=None,
        qrels={"q1": {"r": 1, "v": 1}, "q2": {"w": 1}},
        targets={"q1": "v", "q2": "w"},
        metrics=("map@5", "map@1"),
    )
    values = ranked_values(circo, {"q1": ["r", "w", "v"], "q2": ["r", "v", "w"]})
    assert values["map@5"] == pytest.approx([(1 + 2 / 3) / 2, 1 / 3])
    assert values["map@1"].tolist() == [1.0, 0.0]
    assert values["target_hit@5"].tolist() == [1.0, 1.0] and values["target_hit@1"].tolist() == [0.0, 0.0]
    with pytest.raises(DataError, match="1 of 2 queries are not in the run"):
        ranked_values(circo, {"q1": ["r"]})
