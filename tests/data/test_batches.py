"""Global batches: who stands in which, what may serve as a negative, and who computes what."""

import numpy as np
import pytest
from fixtures_model import ListSet, training_item

from umarvel_ray.data.batches import (
    BatchPlan,
    ContrastiveBatch,
    build_batch,
    deal,
    filler_record,
    token_cost,
)
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.errors import ConfigError


@pytest.mark.parametrize(("num_rows", "batch_size"), [(12, 4), (13, 4), (7, 7), (5, 1)])
def test_an_epoch_visits_every_row_at_most_once(num_rows, batch_size):
    plan = BatchPlan(num_rows=num_rows, batch_size=batch_size, seed=3)
    missed = []
    for epoch in range(6):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        batches = [plan.rows(step) for step in steps]
        assert {found for _, found in batches} == {epoch}
        assert all(len(rows) == batch_size for rows, _ in batches)
        rows = np.concatenate([rows for rows, _ in batches])
        assert len(set(rows.tolist())) == len(rows) and set(rows.tolist()) <= set(range(num_rows))
        missed.append(set(range(num_rows)) - set(rows.tolist()))
    assert all(len(rest) == num_rows % batch_size for rest in missed)
    if num_rows % batch_size:
        assert len(set(map(frozenset, missed))) > 1  # another row each time: none is left out for good


def test_a_batch_is_a_pure_function_of_seed_and_step():
    plan = BatchPlan(num_rows=20, batch_size=4, seed=3)
    forward = [plan.rows(step)[0].tolist() for step in range(15)]
    backward = [
        BatchPlan(num_rows=20, batch_size=4, seed=3).rows(step)[0].tolist() for step in range(14, -1, -1)
    ]
    assert forward == backward[::-1]
    assert forward[:5] != forward[5:10]
    assert forward != [
        BatchPlan(num_rows=20, batch_size=4, seed=4).rows(step)[0].tolist() for step in range(15)
    ]


def test_too_few_rows_for_a_batch_are_refused():
    with pytest.raises(ConfigError, match="batch_size is 5 but there are only 4 training queries"):
        BatchPlan(num_rows=4, batch_size=5, seed=0)


def words(did: str, txt: str) -> Candidate:
    return Candidate(did=did, txt=txt)


def ask(qid: str, txt: str, instruction: str | None = None) -> Query:
    return Query(qid=qid, txt=txt, instruction=instruction)


def batch_of(*items) -> ContrastiveBatch:
    return build_batch(ListSet(items), np.arange(len(items)), visit=0)


def column_words(batch: ContrastiveBatch) -> list[str | None]:
    return [record.txt for record in batch.records[batch.num_queries :]]


def false_words(batch: ContrastiveBatch, query: int) -> set[str | None]:
    """Texts that are no negatives of a query."""
    pairs = zip(*batch.false_pairs, strict=True)
    return {column_words(batch)[column] for row, column in pairs if row == query}


def test_identical_content_shares_a_column():
    """As positives of two queries, as positive and negative, twice in a list."""
    kite, twin = words("9:1", "kite"), words("9:2", "kite")
    sea = words("9:3", "sea")
    batch = batch_of(
        training_item(ask("9:1", "a"), kite, others=[sea, words("9:9", "sea")]),
        training_item(ask("9:2", "b"), twin),
        training_item(ask("9:3", "c"), sea, others=[kite]),
    )
    assert [record.qid for record in batch.records[:3]] == ["9:1", "9:2", "9:3"]
    assert column_words(batch) == ["kite", "sea"] and batch.num_candidates == 2
    assert batch.positive_Q.tolist() == [0, 0, 1]
    assert batch.others_QK.tolist() == [[1, 1], [-1, -1], [0, -1]]
    columns, counts = batch.listed()
    assert columns.tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 0]]
    assert counts.tolist() == [[True, True, False], [True, False, False], [True, True, False]]
    assert len(batch.false_pairs[0]) == 0 and batch.teacher_QK is None


def test_other_positives_and_their_twins_are_no_negatives():
    batch = batch_of(
        training_item(
            ask("9:1", "a"), words("9:1", "kite"), words("9:2", "boat"), others=[words("9:7", "boat")]
        ),
        training_item(
            ask("9:2", "b"), words("9:3", "boat"), others=[words("9:4", "sea"), words("9:5", "kite")]
        ),
    )
    assert false_words(batch, 0) == {"boat"}
    assert false_words(batch, 1) == set()


@pytest.mark.parametrize("same", ["qid", "words"])
@pytest.mark.parametrize("instructions", [(None, None), ("Find it.", "Find it."), ("Find it.", "Get it.")])
def test_two_rows_of_one_question_share_what_is_relevant(same, instructions):
    """However the visits word their instructions."""
    first, second = (
        ask("9:1", "a", instructions[0]),
        ask("9:1" if same == "qid" else "9:8", "a", instructions[1]),
    )
    batch = batch_of(
        training_item(first, words("9:1", "kite"), words("9:2", "boat")),
        training_item(second, words("9:3", "sea"), others=[words("9:2", "boat"), words("9:4", "hill")]),
        training_item(ask("9:9", "z"), words("9:5", "moon")),
    )
    assert false_words(batch, 0) == {"boat", "sea"}
    assert false_words(batch, 1) == {"kite", "boat"}
    assert false_words(batch, 2) == set()


def test_the_own_positive_is_never_masked():
    rng = np.random.default_rng(0)
    texts = ["kite", "boat", "sea", "hill"]
    for _ in range(30):
        items = []
        for number in range(5):
            drawn = [words(f"9:{n}", texts[n]) for n in rng.permutation(4)]
            question = ask(f"9:{number}", "ab"[int(rng.integers(2))])
            items.append(training_item(question, *drawn[: int(rng.integers(1, 4))], others=drawn[2:]))
        batch = batch_of(*items)
        assert not set(enumerate(batch.positive_Q)) & set(zip(*batch.false_pairs, strict=True))
        for query, item in enumerate(items):
            assert batch.records[5 + batch.positive_Q[query]].txt == item.positive.txt
            same = [other for other in items if other.query.txt == item.query.txt]
            relevant = {txt for other in same for txt, _ in other.relevant}
            assert false_words(batch, query) == (relevant & set(column_words(batch))) - {item.positive.txt}


def test_a_teachers_scores_stand_beside_their_columns():
    sea, hill = words("9:3", "sea"), words("9:4", "hill")
    batch = batch_of(
        training_item(ask("9:1", "a"), words("9:1", "kite"), others=[sea, hill], scores=[0.9, 0.25]),
        training_item(ask("9:2", "b"), sea, others=[hill], scores=[0.5]),
    )
    assert batch.teacher_QK is not None and batch.teacher_QK.dtype == np.float32
    assert batch.teacher_QK.tolist() == [[pytest.approx(0.9), 0.25], [0.5, -np.inf]]
    listed = [[column_words(batch)[c] for c in row if c >= 0] for row in batch.others_QK]
    assert listed == [["sea", "hill"], ["hill"]]


def test_cost_grows_with_words_and_pictures():
    text = Candidate(did="9:1", txt="x" * 40)
    assert token_cost(text) == 16 + 10
    assert token_cost(Candidate(did="9:1", txt="x" * 40, img_path="absent.png")) == 16 + 10 + 128
    assert token_cost(Query(qid="9:1", txt="x" * 40, instruction="y" * 20)) == 16 + 15


@pytest.mark.parametrize("num_lanes", [1, 2, 3, 8])
@pytest.mark.parametrize("num_items", [0, 1, 5, 40])
def test_lanes_cover_all_items_once_and_weigh_alike(num_lanes, num_items):
    """No lane weighs more than the lightest by more than the dearest item."""
    costs = np.random.default_rng(num_items).integers(16, 300, num_items).tolist()
    lanes = deal(costs, num_lanes)
    assert len(lanes) == num_lanes
    assert sorted(np.concatenate(lanes).tolist()) == list(range(num_items))
    assert all(lane.dtype == np.int64 and lane.tolist() == sorted(lane.tolist()) for lane in lanes)
    loads = [sum(costs[index] for index in lane) for lane in lanes]
    assert max(loads) - min(loads) <= max(costs, default=0)
    assert all(map(np.array_equal, lanes, deal(costs, num_lanes)))


@pytest.mark.parametrize("batch_size", [2, 3])
def test_a_batch_of_one_task_holds_no_other(batch_size):
    """Tasks of 5, 7 and 2 rows; every task gives what it can in each epoch, in an order of its own."""
    tasks = np.array([0] * 5 + [1] * 7 + [2] * 2)
    plan = BatchPlan(num_rows=14, batch_size=batch_size, seed=3, tasks=tasks)
    per_epoch = [5 // batch_size, 7 // batch_size, 2 // batch_size]
    assert plan.steps_per_epoch == sum(per_epoch)
    orders = set()
    for epoch in range(4):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        batches = [plan.rows(step)[0] for step in steps]
        of_batch = [set(tasks[rows].tolist()) for rows in batches]
        assert all(len(found) == 1 for found in of_batch)
        order = [found.pop() for found in of_batch]
        assert [order.count(task) for task in range(3)] == per_epoch
        assert len(set(np.concatenate(batches).tolist())) == batch_size * len(batches)
        orders.add(tuple(order))
    assert len(orders) > 1


def test_all_rows_of_a_held_out_question_stay_out_of_training():
    """Question 0 stands in three rows."""
    questions = np.array([0, 1, 2, 0, 3, 0, 4, 5])
    held = set()
    for seed in range(8):
        plan = BatchPlan(num_rows=8, batch_size=1, seed=seed, questions=questions, num_held_out=2)
        out = questions[plan.held_out].tolist()
        assert len(out) == len(set(out)) == 2
        trained = np.concatenate([plan.rows(step)[0] for step in range(plan.steps_per_epoch)])
        assert set(questions[trained]) == set(range(6)) - set(out)
        assert len(trained) == 8 - sum(np.count_nonzero(questions == question) for question in out)
        held |= set(out)
    assert len(held) > 3
    with pytest.raises(ConfigError, match="only 5 training queries after 3 are held out"):
        BatchPlan(num_rows=8, batch_size=6, seed=0, num_held_out=3)


def test_without_masks_every_item_has_a_column_of_its_own():
    kite, twin = words("9:1", "kite"), words("9:2", "kite")
    items = (training_item(ask("9:1", "a"), kite, twin, others=[kite]), training_item(ask("9:2", "a"), twin))
    batch = build_batch(ListSet(items), np.arange(2), visit=0, mask_false_negatives=False)
    assert column_words(batch) == ["kite", "kite", "kite"]
    assert batch.positive_Q.tolist() == [0, 1] and len(batch.false_pairs[0]) == 0


def test_on_the_way_back_a_positive_is_not_pushed_from_whom_it_answers():
    """The boat is drawn for queries 0 and 2 and answers query 1 too."""
    boat, kite = words("9:1", "boat"), words("9:2", "kite")
    batch = batch_of(
        training_item(ask("9:1", "a"), boat),
        training_item(ask("9:2", "b"), kite, boat),
        training_item(ask("9:3", "c"), boat),
    )
    assert sorted(zip(*map(np.ndarray.tolist, batch.answered_pairs()), strict=True)) == [
        (0, 1),
        (0, 2),
        (2, 0),
        (2, 1),
    ]


def test_the_filler_has_a_picture_where_any_record_has():
    text, photo = words("9:1", "x"), Candidate(did="9:2", img_path="a.png")
    both = Candidate(did="9:3", txt="long " * 9, img_path="a.png")
    assert filler_record([text, both, photo]) == photo
    assert filler_record([words("9:4", "y" * 40), text]) == text
