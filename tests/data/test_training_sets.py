"""What a visit of a training query shows: positive, instruction, list; and that nothing else decides it."""

import json
import shutil

import numpy as np
import pytest
from fixtures_model import write_nli

from umarvel_ray.data.batches import build_batch
from umarvel_ray.data.mbeir import Mbeir
from umarvel_ray.data.text_pairs import NliPairs
from umarvel_ray.data.training_sets import MbeirSet, PairSet
from umarvel_ray.data.trec import Run
from umarvel_ray.errors import DataError

PROMPTS = {"Find a photo.", "Show it.", "Get the picture.", "Which image?"}


@pytest.fixture
def mbeir(mbeir_root) -> Mbeir:
    return Mbeir(mbeir_root)


def run(lists: dict[str, list[tuple[str, float]]]) -> Run:
    return Run(
        qids=list(lists),
        dids=[[did for did, _ in hits] for hits in lists.values()],
        scores=[[score for _, score in hits] for hits in lists.values()],
    )


LISTS = run(
    {
        "9:103": [("9:3", 0.9), ("9:1", 0.8), ("9:2", 0.7)],
        "9:101": [("9:2", 0.9), ("9:1", 0.8), ("9:3", 0.75), ("6:2", 0.5)],
        "5:201": [("6:2", 0.25)],
    }
)


def test_pairs_look_the_same_at_each_visit(tmp_path):
    data = PairSet(NliPairs(write_nli(tmp_path), use_hard_negatives=True))
    assert len(data) == 12
    item = data.item(4, visit=0)
    assert item == data.item(4, visit=3)
    assert (item.query.txt, item.positive.txt) == ("a blue tower", "the tower is blue")
    assert [other.txt for other in item.others] == ["no tower"] and item.scores is None
    assert item.relevant == {data.content_key(item.positive)}
    assert data.fingerprint == PairSet(NliPairs(tmp_path / "nli.csv", use_hard_negatives=True)).fingerprint


def test_a_visit_is_a_pure_function_of_seed_row_and_visit(mbeir):
    first, second = MbeirSet(mbeir, seed=1), MbeirSet(mbeir, seed=1)
    visits = [(row, visit) for row in range(len(first)) for visit in range(8)]
    expected = {place: first.item(place[0], visit=place[1]) for place in visits}
    for row, visit in reversed(visits):
        assert second.item(row, visit=visit) == expected[row, visit]
    other = MbeirSet(mbeir, seed=2)
    assert any(other.item(row, visit=visit) != expected[row, visit] for row, visit in visits)


def test_visits_draw_positives_and_instructions(mbeir):
    data = MbeirSet(mbeir, seed=1)
    assert len(data) == 5
    photos = [data.item(0, visit=visit) for visit in range(40)]
    assert {item.query.instruction for item in photos} == PROMPTS
    assert {item.positive.did for item in photos} == {"9:1"}
    captions = [data.item(1, visit=visit) for visit in range(40)]
    assert {item.positive.did for item in captions} == {"9:11", "9:12"}
    assert {item.query.instruction for item in captions} == {"Find the caption."}
    for item in captions:
        assert len(item.relevant) == 2 and data.content_key(item.positive) in item.relevant
        assert item.others == () and item.scores is None
    assert data.item(3, visit=0).query.instruction == "Answer."
    assert data.item(4, visit=0).query.instruction == "Reply."


def test_listed_positives_and_their_copies_are_dropped_from_mined_lists(mbeir):
    """9:2 is 9:1 under another did; neither counts among the wanted number."""
    data = MbeirSet(mbeir, seed=1, lists=LISTS, only_listed=True, drop_positives=True)
    assert len(data) == 3
    shown = {(item := data.item(row, visit=0)).query.qid: [c.did for c in item.others] for row in range(3)}
    assert shown == {"9:101": ["9:3", "6:2"], "9:103": ["9:1", "9:2"], "5:201": ["6:2"]}
    one = MbeirSet(mbeir, seed=1, lists=LISTS, only_listed=True, drop_positives=True, num_others=1)
    shown = {(item := one.item(row, visit=0)).query.qid: [c.did for c in item.others] for row in range(3)}
    assert shown == {"9:101": ["9:3"], "9:103": ["9:1"], "5:201": ["6:2"]}


def test_a_teachers_list_is_shown_whole_with_its_scores(mbeir):
    """Joined by qid: the run's order is not the file's."""
    data = MbeirSet(mbeir, seed=1, lists=LISTS, only_listed=True, with_scores=True, num_others=3)
    item = data.item(0, visit=5)
    assert item.query.qid == "9:101"
    assert [other.did for other in item.others] == ["9:2", "9:1", "9:3"]
    assert item.scores == pytest.approx((0.9, 0.8, 0.75))
    assert data.item(2, visit=0).scores == pytest.approx((0.25,))


def test_tasks_can_be_held_out(mbeir):
    data = MbeirSet(mbeir, seed=1, tasks=["mscoco_task0", "infoseek_task6"])
    assert [data.item(row, visit=0).query.qid for row in range(len(data))] == ["9:101", "9:103", "6:301"]
    both = MbeirSet(mbeir, seed=1, tasks=["mscoco_task0"], lists=LISTS, only_listed=True)
    assert [both.item(row, visit=0).query.qid for row in range(len(both))] == ["9:101", "9:103"]
    with pytest.raises(DataError, match="none of 5 training queries has a list or a wanted task"):
        len(MbeirSet(mbeir, seed=1, tasks=["cirr_task7"]))


def test_no_positive_of_a_question_is_its_negative_in_any_batch(mbeir):
    """The whole set in one batch, visit by visit: two rows ask the same in other words of instruction."""
    data = MbeirSet(mbeir, seed=1, lists=None)
    relevant = {
        "9:101": {"9:1", "9:2", "9:3"},
        "9:103": {"9:1", "9:2", "9:3"},
        "9:102": {"9:11", "9:12"},
        "5:201": {"5:1", "6:1"},
        "6:301": {"6:2"},
    }
    asked_apart = 0
    for visit in range(12):
        batch = build_batch(data, np.arange(5), visit=visit)
        false = set(zip(*batch.false_pairs, strict=True))
        asked = {query.qid: query for query in batch.records[:5]}
        asked_apart += asked["9:101"].instruction != asked["9:103"].instruction
        for number, query in enumerate(batch.records[:5]):
            for column, candidate in enumerate(batch.records[5:]):
                is_own = column == batch.positive_Q[number]
                assert ((number, column) in false) == (candidate.did in relevant[query.qid] and not is_own)
    assert asked_apart > 0


def test_copies_under_two_dids_have_one_key(mbeir):
    data, pool = MbeirSet(mbeir, seed=1), mbeir.global_pool("train")
    key = {did: data.content_key(pool.get(did)) for did in pool.dids()}
    assert key["9:1"] == key["9:2"] != key["9:3"]
    assert key["5:1"] == key["6:1"] != key["6:2"]
    assert data.fingerprint == MbeirSet(mbeir, seed=9, lists=LISTS, only_listed=True).fingerprint


def test_queries_without_a_list_train_on_in_batch_negatives(mbeir):
    """A filter that leaves a query nothing must not take the query out of the training."""
    everything = MbeirSet(mbeir, seed=1)
    data = MbeirSet(mbeir, seed=1, lists=LISTS, drop_positives=True)
    assert len(data) == len(everything)
    without = [row for row in range(len(data)) if data.item(row, visit=0).query.qid not in LISTS.qids]
    assert without
    assert all(data.item(row, visit=0).others == () for row in without)


def test_lists_of_other_data_are_refused(mbeir):
    """Made for other queries, or over another pool."""
    MbeirSet(mbeir, seed=1, lists=LISTS).require_own_lists()
    other_queries = Run(qids=["9:101", "77:1"], dids=[["9:1"], ["9:1"]], scores=[[0.5], [0.5]])
    with pytest.raises(DataError, match=r"1 of 2 queries are not among the training queries .*first: 77:1"):
        MbeirSet(mbeir, seed=1, lists=other_queries).require_own_lists()
    other_pool = Run(qids=["9:101"], dids=[["9:1", "88:3"]], scores=[[0.5, 0.25]])
    with pytest.raises(DataError, match=r"1 of 2 candidates are not in the pool .*first: 88:3"):
        MbeirSet(mbeir, seed=1, lists=other_pool).require_own_lists()


def test_rows_know_their_task_and_their_question(mbeir):
    data = MbeirSet(mbeir, seed=1)
    assert len(data.tasks) == len(data.questions) == len(data) == 5
    asked = [data.item(row, visit=0).query.qid for row in range(5)]
    assert len(set(data.questions.tolist())) == len(set(asked))
    # 9:101 and 9:103 seek photos for words, 9:102 words for a photo, OVEN's and InfoSeek's are of two tasks.
    assert len(set(data.tasks.tolist())) == 4 and data.tasks[0] == data.tasks[asked.index("9:103")]


def test_given_negatives_come_before_mined_ones(tmp_path, mbeir_root):
    """9:101's line names a caption and, as files do, one of its own positives; OVEN's query has no list."""
    root = tmp_path / "M-BEIR"
    shutil.copytree(mbeir_root, root)
    path = Mbeir(root).union_training_queries_path()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["qid"] in ("9:101", "5:201"):
            line["neg_cand_list"] = ["9:11", "9:2"] if line["qid"] == "9:101" else ["6:2"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    mined = run({"9:101": [("6:2", 0.5), ("9:12", 0.4)]})

    def shown(**settings) -> dict[str, list[str]]:
        data = MbeirSet(Mbeir(root), seed=1, drop_positives=True, **settings)
        items = [data.item(row, visit=0) for row in range(len(data))]
        return {item.query.qid: [other.did for other in item.others] for item in items}

    both = shown(lists=mined, use_given=True)
    assert both["9:101"] == ["9:11", "6:2", "9:12"] and both["9:103"] == []
    assert shown(lists=mined, use_given=True, num_others=2)["9:101"] == ["9:11", "6:2"]
    assert shown(lists=mined)["9:101"] == ["6:2", "9:12"]
    assert set(shown(use_given=True, only_listed=True)) == {"9:101", "5:201"}
