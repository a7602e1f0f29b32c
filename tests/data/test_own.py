"""Anyone's data: two JSONL files, a folder of pictures, ids of any string."""

import json

import pytest

from umarvel_ray.data.own import read_own
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.errors import DataError


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_two_files_and_a_folder_are_enough(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "kite.jpg").write_bytes(b"x")
    queries = write(
        tmp_path / "q.jsonl",
        {"qid": "who? ü", "txt": "a kite", "positives": ["the kite"]},
        {"qid": "2", "query_txt": "b", "positives": {"the kite": 2, "b": 0}, "instruction": "Look."},
    )
    pool = write(
        tmp_path / "c.jsonl", {"did": "the kite", "img_path": "kite.jpg"}, {"did": "b", "txt": "words"}
    )
    asked, candidates, qrels = read_own(queries, pool, tmp_path / "pictures", instruction="Find.")
    assert asked == [
        Query("who? ü", txt="a kite", instruction="Find."),
        Query("2", txt="b", instruction="Look."),
    ]
    kite = str(tmp_path / "pictures" / "kite.jpg")
    assert candidates == [Candidate("the kite", img_path=kite), Candidate("b", txt="words")]
    assert qrels == {"who? ü": {"the kite": 1}, "2": {"the kite": 2}}


@pytest.mark.parametrize(
    ("query", "candidate", "message"),
    [
        (
            {"qid": 7, "txt": "a", "positives": ["c"]},
            {"did": "c", "txt": "x"},
            r"q.jsonl:1: qid is no name: 7",
        ),
        (
            {"qid": "q", "txt": "a", "positives": []},
            {"did": "c", "txt": "x"},
            r"q.jsonl:1: positives name no right",
        ),
        (
            {"qid": "q", "txt": "a", "positives": {"c": 0}},
            {"did": "c", "txt": "x"},
            "positives name no right",
        ),
        ({"qid": "q", "positives": ["c"]}, {"did": "c", "txt": "x"}, r"q.jsonl:1: query q: has neither"),
        (
            {"qid": "q", "txt": "a", "positives": ["c"]},
            {"did": "c", "img_path": "no.jpg"},
            "c.jsonl:1: the picture",
        ),
        (
            {"qid": "q", "txt": 3, "positives": ["c"]},
            {"did": "c", "txt": "x"},
            "txt is neither text nor null",
        ),
    ],
)
def test_a_fault_is_named_by_file_and_line(query, candidate, message, tmp_path):
    queries, pool = write(tmp_path / "q.jsonl", query), write(tmp_path / "c.jsonl", candidate)
    with pytest.raises(DataError, match=message):
        read_own(queries, pool, None, instruction=None)


def test_a_repeated_id_is_refused(tmp_path):
    row = {"qid": "q", "txt": "a", "positives": ["c"]}
    queries = write(tmp_path / "q.jsonl", row, row)
    with pytest.raises(DataError, match=r"q.jsonl:2: a second line has this qid: q"):
        read_own(queries, write(tmp_path / "c.jsonl", {"did": "c", "txt": "x"}), None, instruction=None)
