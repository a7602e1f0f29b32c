"""M-BEIR's protocol: headline, pools, chance, and runs that must not score."""

import io
import math
import re

import numpy as np
import pytest
from rich.console import Console

from umarvel_ray.data.mbeir import TASK_BY_NAME, TASKS
from umarvel_ray.data.trec import Run
from umarvel_ray.errors import DataError
from umarvel_ray.evaluate.benchmark import (
    assemble_results,
    chance_of_hit,
    evaluate_run,
    print_results_table,
    results_table,
)
from umarvel_ray.evaluate.published import PUBLISHED

TASK = TASK_BY_NAME["mscoco_task0"]
POOL = [f"9:{number}" for number in range(400)]


def run_with_ranks(ranks: list[int], *, depth: int = 20) -> tuple[Run, dict[str, dict[str, int]]]:
    """One query per rank; candidate 9:0 is every query's positive and stands at that rank (0: not ranked)."""
    others = POOL[1 : depth + 1]
    dids = [[*others[: rank - 1], POOL[0], *others[rank - 1 :]][:depth] if rank else others for rank in ranks]
    qids = [f"9:{1000 + number}" for number in range(len(ranks))]
    scores = [[1 - place / 100 for place in range(depth)] for _ in ranks]
    return Run(qids, dids, scores), {qid: {POOL[0]: 1} for qid in qids}


def results(values: dict[str, dict[str, list[int]]], stage: str) -> dict:
    """A results document from the ranks of the first positive, by task and pool."""
    measured = {}
    for name, pools in values.items():
        measured[name] = {}
        for kind, ranks in pools.items():
            run, qrels = run_with_ranks(ranks)
            measured[name][kind] = evaluate_run(TASK_BY_NAME[name], run, qrels, pool_dids=POOL)
    return assemble_results(measured, stage=stage, checkpoint={}, settings={}, versions={})


def test_headline_and_counts_of_a_run():
    run, qrels = run_with_ranks([1, 4, 6, 12, 0])
    qrels["9:1000"]["5:7"] = 1  # a positive of another data set, which only the global pool holds
    result = evaluate_run(TASK, run, qrels, pool_dids=POOL)
    assert [result[f"hit@{k}"] for k in (1, 5, 10, 20)] == [0.2, 0.4, 0.6, 0.8]
    assert "hit@50" not in result  # the run is 20 deep
    assert result["recall@5"] == 0.4  # the unreachable positive does not count against the query
    assert result["mrr@10"] == pytest.approx((1 + 1 / 4 + 1 / 6) / 5)
    assert (result["pool_size"], result["positives_outside_pool"]) == (400, 1)
    assert result["queries_without_reachable_positive"] == 0
    assert result["at_chance"] is False


def test_unreachable_positives_leave_hit_as_it_is():
    run, qrels = run_with_ranks([1, 4, 6])
    alone = evaluate_run(TASK, run, qrels, pool_dids=POOL)
    foreign = {qid: {**grades, "5:7": 1} for qid, grades in qrels.items()}
    foreign["9:1002"] = {"5:7": 1}
    result = evaluate_run(TASK, run, foreign, pool_dids=POOL)
    assert result["hit@5"] == alone["hit@5"] and result["hit@1"] == alone["hit@1"]
    assert result["positives_outside_pool"] == 3
    assert result["queries_without_reachable_positive"] == 1


def test_ties_at_the_cut_are_counted():
    run, qrels = run_with_ranks([1, 1])
    scores = [list(row) for row in run.scores]
    scores[0][4] = scores[0][5]
    assert evaluate_run(TASK, Run(run.qids, run.dids, scores), qrels)["queries_tied_at_cut"] == 1


def test_chance_is_that_of_drawing_without_replacement():
    chance_Q = chance_of_hit(np.array([1, 3, 0, 10]), pool_size=10, k=4)
    expected = [1 - math.comb(10 - positives, 4) / math.comb(10, 4) for positives in (1, 3, 0, 10)]
    np.testing.assert_allclose(chance_Q, expected, atol=1e-12)
    assert chance_of_hit(np.array([1]), pool_size=3, k=5).tolist() == [1.0]


def test_a_result_at_chance_is_flagged_in_document_and_log(caplog):
    document = results({"mscoco_task0": {"local": [0] * 30, "global": [1] * 30}}, "1c")
    assert document["tasks"]["mscoco_task0"]["local"]["at_chance"] is True
    (flag,) = document["flags"]
    assert flag.startswith(
        "local pool: 1 of 1 tasks are not better than chance (first: mscoco_task0, hit@5 is 0.0000"
    )
    assert "not better than chance" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run, qrels: (Run([], [], []), qrels), "holds no query"),
        (lambda run, qrels: (run, {"9:1": {"9:0": 1}}), "have no judgement"),
        (lambda run, qrels: (run, {**qrels, "9:1": {"9:0": 1}}), "1 of 4 queries of the qrels are not in it"),
        (lambda run, qrels: (run, {qid: {"5:1": 1} for qid in qrels}), "no positive of any of 3 queries"),
        (
            lambda run, qrels: (Run(run.qids, [["x:1", *d[1:]] for d in run.dids], run.scores), qrels),
            "3 ranked cand",
        ),
        (
            lambda run, qrels: (Run(run.qids, run.dids, [[0.5] * 20] * 3), qrels),
            "in all 3 rankings every candidate",
        ),
        (lambda run, qrels: (Run(run.qids, run.dids, [[math.inf] * 20] * 3), qrels), "3 of 3 .* infinite"),
        (lambda run, qrels: (Run(run.qids, run.dids, [[math.nan] * 20] * 3), qrels), "NaN"),
        (
            lambda run, qrels: (Run(run.qids, [d[:9] for d in run.dids], [s[:9] for s in run.scores]), qrels),
            "holds 9 candidates per query",
        ),
    ],
)
def test_what_must_not_score_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        run, qrels = change(*run_with_ranks([1, 2, 3]))
        evaluate_run(TASK, run, qrels, pool_dids=POOL)


def test_a_pool_smaller_than_k_is_searched_whole():
    run = Run(["9:1"], [["9:3", "9:2", "9:1"]], [[0.9, 0.8, 0.7]])
    result = evaluate_run(TASK, run, {"9:1": {"9:1": 1}}, pool_dids=["9:1", "9:2", "9:3"])
    assert (result["hit@1"], result["hit@5"], result["pool_size"], result["chance"]) == (0.0, 1.0, 3, 1.0)


def test_the_mean_is_the_plain_mean_of_headlines_whatever_the_number_of_queries():
    document = results(
        {
            "mscoco_task0": {"local": [1, 1, 9, 9], "global": [1, 1, 9, 9]},
            "fashioniq_task7": {"local": [9, 9], "global": [12, 12]},
        },
        "1c",
    )
    assert document["tasks"]["fashioniq_task7"]["headline"] == "hit@10"
    assert document["mean"] == {"local": 0.75, "global": 0.25}
    assert list(document["tasks"]) == ["mscoco_task0", "fashioniq_task7"]  # the benchmark's order


def test_a_mean_over_only_some_tasks_is_not_given():
    document = results({"mscoco_task0": {"local": [1], "global": [1]}, "cirr_task7": {"local": [1]}}, "1c")
    assert document["mean"] == {"local": 1.0, "global": None}


def test_the_table_lays_stages_side_by_side():
    first = results({"mscoco_task0": {"local": [1, 9], "global": [9, 9]}}, "1c")
    second = results({"mscoco_task0": {"local": [1, 1]}, "cirr_task7": {"local": [1, 9]}}, "2")
    table = results_table([first, second])
    assert [row.task.name for row in table.rows] == ["mscoco_task0", "cirr_task7"]
    assert table.rows[0].values == {"local": (0.5, 1.0), "global": (0.0, None)}
    assert table.rows[1].values == {"local": (None, 0.5), "global": (None, None)}
    assert table.means == {"local": (0.5, 0.75), "global": (0.0, None)}
    assert table.same_tasks is False


def test_results_of_other_data_do_not_stand_side_by_side():
    first, second = (results({"mscoco_task0": {"local": ranks}}, "1c") for ranks in ([1, 9], [1, 9, 9]))
    with pytest.raises(DataError, match=r"mscoco_task0 was measured in 2 different ways"):
        results_table([first, second])


@pytest.mark.parametrize(("width", "num_tables"), [(140, 1), (60, 2)])
def test_the_printed_table_fits_the_terminal_and_marks_the_best(width, num_tables):
    documents = [
        results({"mscoco_task0": {"local": ranks, "global": ranks}}, stage)
        for stage, ranks in [("[bold]1b", [1, 9, 9]), ("1c", [1, 1, 9])]
    ]
    console = Console(width=width, record=True, force_terminal=True, file=io.StringIO())
    print_results_table(documents, console=console)
    styled = console.export_text(styles=True, clear=False)
    text = console.export_text()
    assert text.count("in percent") == num_tables
    assert max(map(len, text.splitlines())) <= width
    assert "[bold]1b" in text
    assert re.search(r"\x1b\[1m *66\.7", styled) and not re.search(r"\x1b\[1m *33\.3", styled)


def test_published_means_are_those_of_their_sixteen_figures():
    """The printed means were rounded from unrounded figures, so 0.1 is the room they need."""
    for result in PUBLISHED:
        assert len(result.values) == len(TASKS)
        assert sum(result.values) / len(TASKS) == pytest.approx(result.mean, abs=0.1), result
    ours = next(result for result in PUBLISHED if result.system == "U-MARVEL" and result.pool == "global")
    assert (ours.of_task("mscoco_task0"), ours.of_task("nights_task4")) == (72.8, 34.0)
