"""Mined negatives in other tools' files: there and back, and what does not fit is said."""

import json

import pytest

from umarvel_ray.data.mbeir import QuerySet
from umarvel_ray.data.trec import import_trec
from umarvel_ray.errors import DataError
from umarvel_ray.retrieve.exchange import (
    Exchanged,
    read_neg_cand_list,
    read_trec,
    read_tuples,
    write_neg_cand_list,
    write_trec,
    write_tuples,
)
from umarvel_ray.retrieve.negatives import MinedNegatives

LISTS = {"9:1": [("9:5", 0.75), ("9:6", 0.5)], "9:2": [("9:7", 0.25)]}
MINED = MinedNegatives.from_lists(LISTS)
POSITIVES = {"9:1": {"9:3": 1, "9:4": 1}, "9:2": {"9:3": 1}}


def dids(mined: MinedNegatives) -> dict[str, list[str]]:
    return {qid: [did for did, _ in hits] for qid, hits in mined.as_dict().items()}


def query_file(path, qids=("9:1", "9:2", "9:9")):
    lines = [
        {
            "qid": qid,
            "query_txt": "é",
            "query_img_path": None,
            "query_modality": "text",
            "pos_cand_list": ["9:3"],
            "neg_cand_list": ["9:8"],
            "task_id": 0,
            "more": [1],
        }
        for qid in qids
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def test_a_query_file_takes_the_mined_lists_and_keeps_the_rest(tmp_path):
    before = query_file(tmp_path / "queries.jsonl")
    done = write_neg_cand_list(MINED, tmp_path / "queries.jsonl", tmp_path / "filled.jsonl")
    assert done == Exchanged(queries=2, negatives=3, without=1)
    after = [json.loads(line) for line in (tmp_path / "filled.jsonl").read_text().splitlines()]
    assert [line.pop("neg_cand_list") for line in after] == [["9:5", "9:6"], ["9:7"], []]
    assert after == [{key: line[key] for key in line if key != "neg_cand_list"} for line in before]
    # M-BEIR's own reader sees them, and so do we.
    assert [r.negatives for r in QuerySet(tmp_path / "filled.jsonl", tmp_path)] == [
        ("9:5", "9:6"),
        ("9:7",),
        (),
    ]
    assert dids(read_neg_cand_list(tmp_path / "filled.jsonl")) == dids(MINED)


def test_a_query_file_of_other_queries_is_refused(tmp_path):
    query_file(tmp_path / "queries.jsonl", qids=("9:1",))
    with pytest.raises(DataError, match=r"1 of 2 mined queries are not in it \(first: 9:2\)"):
        write_neg_cand_list(MINED, tmp_path / "queries.jsonl", tmp_path / "filled.jsonl")
    assert not (tmp_path / "filled.jsonl").exists()
    query_file(tmp_path / "twice.jsonl", qids=("9:1", "9:1"))
    with pytest.raises(DataError, match=r"twice.jsonl:2: query 9:1 stands here twice"):
        read_neg_cand_list(tmp_path / "twice.jsonl")
    (tmp_path / "odd.jsonl").write_text('{"qid": "9:1", "neg_cand_list": [3]}\n')
    with pytest.raises(DataError, match=r"odd.jsonl:1: neg_cand_list is no list of ids"):
        read_neg_cand_list(tmp_path / "odd.jsonl")
    with pytest.raises(DataError, match=r"odd.jsonl:1: no object with a anchor"):
        read_tuples(tmp_path / "odd.jsonl")


@pytest.mark.parametrize("form", ["n-tuple", "triplet"])
def test_tuples_have_one_positive_a_line(tmp_path, form):
    path = tmp_path / "tuples.jsonl"
    done = write_tuples(MINED, path, query_text=str, candidate_text=str, positives=POSITIVES, form=form)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if form == "n-tuple":
        assert done == Exchanged(queries=1, negatives=2, without=1)
        assert lines == [
            {"anchor": "9:1", "positive": positive, "negative_1": "9:5", "negative_2": "9:6"}
            for positive in ("9:3", "9:4")
        ]
        assert dids(read_tuples(path)) == {"9:1": ["9:5", "9:6"]}
    else:
        assert done == Exchanged(queries=2, negatives=3, without=0)
        assert len(lines) == 5 and lines[0] == {"anchor": "9:1", "positive": "9:3", "negative": "9:5"}
        assert dids(read_tuples(path)) == dids(MINED)


def test_sentence_transformers_reads_the_tuples(tmp_path):
    datasets = pytest.importorskip("datasets")
    write_tuples(
        MINED,
        tmp_path / "tuples.jsonl",
        query_text=lambda qid: f"query {qid}",
        candidate_text=lambda did: f"text {did}",
        positives=POSITIVES,
        num_negatives=1,
    )
    table = datasets.Dataset.from_json(str(tmp_path / "tuples.jsonl"), cache_dir=str(tmp_path / "cache"))
    assert table.column_names == ["anchor", "positive", "negative_1"]
    assert table[2] == {"anchor": "query 9:2", "positive": "text 9:3", "negative_1": "text 9:7"}


def test_tuples_need_positives_and_a_known_form(tmp_path):
    def write(**changes):
        settings = {"query_text": str, "candidate_text": str, "positives": POSITIVES} | changes
        write_tuples(MINED, tmp_path / "tuples.jsonl", **settings)

    with pytest.raises(DataError, match=r"1 of 2 queries have no positive \(first: 9:2\)"):
        write(positives={"9:1": {"9:3": 1}})
    with pytest.raises(DataError, match="'pairs' is unknown"):
        write(form="pairs")


def test_a_trec_run_comes_back_with_its_scores(tmp_path):
    lists = {"9:1": [*LISTS["9:1"], ("9:8", float("-inf"))], "9:2": [("9:9", float("-inf"))]}
    done = write_trec(MinedNegatives.from_lists(lists), tmp_path / "run.trec", "tag")
    assert done == Exchanged(queries=1, negatives=2, without=1)
    assert import_trec(tmp_path / "run.trec").as_dict() == {"9:1": LISTS["9:1"]}
    assert read_trec(tmp_path / "run.trec").as_dict() == {"9:1": LISTS["9:1"]}


def test_negatives_of_others_are_written_as_ours(tmp_path):
    MINED.write(tmp_path / "negatives.arrow")
    again = MinedNegatives.read(tmp_path / "negatives.arrow")
    assert again.as_dict() == LISTS
    assert again.table.column("positive_score").null_count == 2
    assert len(MinedNegatives.from_lists({"a": []})) == 0
