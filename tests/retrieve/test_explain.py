"""The explanation of filters, on a run where every figure can be told by hand."""

import numpy as np
import pytest

from umarvel_ray.data.trec import Run
from umarvel_ray.evaluate.explanation import explanation_rows, write_explanation
from umarvel_ray.retrieve import explain
from umarvel_ray.retrieve.explain import explain_task
from umarvel_ray.retrieve.mine import mine_negatives
from umarvel_ray.retrieve.settings import MiningConfig

# p0 is the best positive of both queries; q's other positive scores 0.8, r's 0.5. "copy" has p0's content.
HITS = {
    "q": [("x1", 0.95), ("p0", 0.9), ("copy", 0.9), ("p1", 0.8), ("x2", 0.75), ("x3", 0.6)],
    "r": [("p0", 0.7), ("x1", 0.65), ("x4", 0.55), ("p2", 0.5), ("x5", 0.4)],
}
POSITIVES = {"q": {"p0": 1, "p1": 1}, "r": {"p0": 1, "p2": 1, "nowhere": 1}}
CONTENT = {"p0": "same", "copy": "same"}
CONFIG = MiningConfig(rule="none", num_negatives=2, depth=10)


def explained():
    run = Run(
        qids=list(HITS),
        dids=[[did for did, _ in hits] for hits in HITS.values()],
        scores=[[score for _, score in hits] for hits in HITS.values()],
    )
    place, score = np.array([0, 1, 0, 1]), np.float32([0.9, 0.5, 0.8, 0.7])
    return run, explain_task(run, POSITIVES, place, score, CONTENT, CONFIG)


def setting(told, rule, value):
    (found,) = [item for item in told["settings"] if (item["rule"], item["value"]) == (rule, value)]
    return found


def test_scores_and_ranks_leave_positives_and_copies_out():
    _, told = explained()
    assert (told["queries"], told["known_positives"], told["known_positives_besides_the_best"]) == (2, 4, 2)
    assert told["scores"]["best positive"]["50%"] == pytest.approx(0.8)
    assert told["scores"]["rank 1"]["50%"] == pytest.approx((0.95 + 0.65) / 2)
    assert "rank 5" not in told["scores"]
    assert sum(told["histograms"]["rank 1"]) == 2 and sum(told["histograms"]["positives"]) == 4
    above = {row["threshold"]: row for row in told["positives_above"]}
    assert above[0.7]["positives"] == 0.5 and above[0.7]["rank 1"] == 0.5


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        ("none", None),
        ("margin", 0.1),
        ("margin", 0.2),
        ("relative", 0.9),
        ("skip_top", 1),
        ("skip_top", 3),
        ("max_score", 0.6),
    ],
)
def test_what_each_filter_would_keep(rule, value):
    run, told = explained()
    item = setting(told, rule, value)
    config = MiningConfig(rule=rule, value=value, num_negatives=2, depth=10)
    mined, report = mine_negatives(run, POSITIVES, {"q": 0.9, "r": 0.7}, CONTENT, config, seed=0)
    # What mining then does is what was foretold.
    assert item["hits_dropped"] == report.counts["hits_filtered"] / 6
    assert item["negatives_per_query"] == report.counts["negatives_kept"] / 2
    assert item["queries_short"] == report.counts["queries_short"] / 2
    assert item["queries_without_negatives"] == report.counts["queries_without_negatives"] / 2
    scores = [score for hits in mined.as_dict().values() for _, score in hits]
    assert item["mean_score_kept"] == (pytest.approx(np.mean(scores)) if scores else None)


def test_other_positives_count_as_false_negatives():
    _, told = explained()
    # q's other positive lies 0.1 below the best, behind one candidate; r's 0.2 below, behind two.
    caught = {
        ("none", None): 0,
        ("margin", 0.05): 0,
        ("margin", 0.15): 0.5,
        ("relative", 0.8): 0.5,
        ("relative", 1.0): 0,
        ("skip_top", 1): 0,
        ("skip_top", 3): 1,
    }
    assert {key: setting(told, *key)["other_positives_caught"] for key in caught} == caught
    assert setting(told, "max_score", 0.7)["other_positives_caught"] == 0.5


def test_chunks_do_not_matter(monkeypatch):
    _, whole = explained()
    monkeypatch.setattr(explain, "_CHUNK_QUERIES", 1)
    _, parts = explained()
    for item in (whole, parts):
        item["scores"] = {name: {k: round(v, 6) for k, v in x.items()} for name, x in item["scores"].items()}
        item["settings"] = [
            {k: round(v, 9) if isinstance(v, float) else v for k, v in x.items()} for x in item["settings"]
        ]
    assert parts == whole


def test_the_page_shows_every_setting(tmp_path):
    _, told = explained()
    write_explanation({"tasks": {"a <task>": told}}, tmp_path / "explain", title="Filters")
    page = (tmp_path / "explain" / "explain.html").read_text()
    assert "a &lt;task&gt;" in page and "<svg" in page and page.count("<tr>") > len(told["settings"])
    rows = explanation_rows(told)
    assert len(rows) == len(told["settings"]) and rows[0][:5] == ("none", "0.0%", "0.0%", "2", "0.0%")
