"""Judgements and runs: what is written is read back, and what does not fit together is refused."""

import logging
import pickle

import numpy as np
import pyarrow as pa
import pytest

from umarvel_ray.data.trec import Run, check_join, import_trec, read_qrels, write_qrels
from umarvel_ray.errors import DataError

QRELS = {"9:1": {"9:10": 1, "9:11": 2}, "9:2": {"9:12": 1}}


def small_run():
    return Run(
        qids=["9:1", "9:2", "9:3"],
        dids=[["9:10", "9:4"], ["9:12"], []],
        scores=[np.array([0.1, -0.30000001], np.float32), [1 / 3], []],
    )


@pytest.mark.parametrize("task_ids", [None, {"9:1": 0, "9:2": 3}])
def test_qrels_are_read_as_written(tmp_path, task_ids):
    path = tmp_path / "qrels.txt"
    write_qrels(path, QRELS, task_ids=task_ids)
    assert read_qrels(path) == QRELS
    assert {len(line.split()) for line in path.read_text().splitlines()} == {4 if task_ids is None else 5}


def test_grades_of_zero_are_no_judgement(tmp_path):
    path = tmp_path / "qrels.txt"
    path.write_text("a 0 x 1\n\na\t0\ty 0\nb 0 x -1\na 0 x 1\n")
    assert read_qrels(path) == {"a": {"x": 1}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a 0 x", "3 fields"),
        ("a 0 x 1 0 z", "6 fields"),
        ("a 0 x 1.5", "no whole number"),
        ("a 0 y 2", "grade 2"),
    ],
)
def test_a_broken_judgement_is_named(tmp_path, line, message):
    path = tmp_path / "qrels.txt"
    path.write_text(f"a 0 y 1\n\n{line}\n")
    with pytest.raises(DataError, match=f"qrels.txt:3: .*{message}"):
        read_qrels(path)


def test_a_query_without_task_cannot_be_written(tmp_path):
    with pytest.raises(DataError, match="9:2 has no task"):
        write_qrels(tmp_path / "qrels.txt", QRELS, task_ids={"9:1": 0})
    assert not (tmp_path / "qrels.txt").exists()


def test_a_run_is_read_as_written(tmp_path):
    run = small_run()
    run.write(tmp_path / "run.arrow")
    read = Run.read(tmp_path / "run.arrow")
    for copy in (run, read, Run.from_table(read.table()), pickle.loads(pickle.dumps(read))):
        assert copy.qids == ["9:1", "9:2", "9:3"]
        assert list(copy.dids) == [copy.dids[i] for i in range(3)] == [["9:10", "9:4"], ["9:12"], []]
        assert [scores.dtype for scores in copy.scores] == [np.float32] * 3
        assert [scores.tolist() for scores in copy.scores] == [copy.scores[i].tolist() for i in range(3)]
        assert copy.as_dict()["9:1"] == [("9:10", float(np.float32(0.1))), ("9:4", float(np.float32(-0.3)))]
    schema = pa.ipc.open_file(str(tmp_path / "run.arrow")).schema
    assert schema == pa.schema(
        [("qid", pa.string()), ("did", pa.list_(pa.string())), ("score", pa.list_(pa.float32()))]
    )


def test_a_run_of_many_batches_and_its_slices(tmp_path):
    """Rows beyond one record batch, from a matrix; the independent answer is the matrix."""
    scores_QK = -np.sort(-np.random.default_rng(0).normal(size=(9000, 2)), axis=1)
    qids = [str(n) for n in range(9000)]
    run = Run(qids=qids, dids=[(f"a:{q}", f"b:{q}") for q in qids], scores=scores_QK)
    run.write(tmp_path / "run.arrow")
    read = Run.read(tmp_path / "run.arrow")
    np.testing.assert_array_equal(np.stack(list(read.scores)), scores_QK.astype(np.float32))
    assert read.dids[8999] == read.dids[-1] == ["a:8999", "b:8999"]
    part = Run.from_table(read.table().slice(4000, 200))
    assert (part.qids[0], part.dids[150:151], len(part)) == ("4000", [["a:4150", "b:4150"]], 200)
    np.testing.assert_array_equal(np.stack(list(part.scores)), scores_QK[4000:4200].astype(np.float32))
    np.testing.assert_array_equal(part.scores[150], scores_QK[4150].astype(np.float32))


def test_an_empty_run(tmp_path):
    Run(qids=[], dids=[], scores=[]).write(tmp_path / "run.arrow")
    assert Run.read(tmp_path / "run.arrow").as_dict() == {}


@pytest.mark.parametrize(
    ("qids", "dids", "scores", "message"),
    [
        (["a"], [["x"], ["y"]], [[1.0]], "a run of 1 queries has 2 lists"),
        (["a", "a"], [["x"], ["y"]], [[1.0], [1.0]], r"a query twice \(first: a\)"),
        (["a", "b"], [["x"], ["y"]], [[1.0], [1.0, 0.5]], r"1 of 2 queries .* \(first: b, 1 and 2\)"),
        (["a", "b"], [["x"], ["y"]], [[1.0], [float("nan")]], r"1 of 2 queries .* NaN \(first: b\)"),
        (
            ["a", "b"],
            [["x"], ["y", "z"]],
            [[1.0], [0.1, 0.2]],
            r"1 of 2 queries have a score above .* \(first: b\)",
        ),
        (["a"], [[None]], [[1.0]], "1 nulls"),
    ],
)
def test_a_broken_run_is_refused(qids, dids, scores, message):
    with pytest.raises(DataError, match=message):
        Run(qids=qids, dids=dids, scores=scores)


@pytest.mark.parametrize("content", [None, b"", b"not arrow at all", "other columns"])
def test_a_file_that_is_no_run_is_named(tmp_path, content):
    path = tmp_path / "run.arrow"
    if content == "other columns":
        table = pa.table({"qid": ["a"]})
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"run.arrow: not a run") as error:
        Run.read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("task_ids", "num_fields"), [(None, 6), ({"9:1": 0, "9:2": 3, "9:3": 0}, 7)])
def test_trec_files_are_read_as_written(tmp_path, task_ids, num_fields):
    """Scores come back to the bit; a query that found nothing has no line, so it is lost."""
    path = tmp_path / "run.txt"
    small_run().export_trec(path, "ours", task_ids=task_ids)
    fields = [line.split() for line in path.read_text().splitlines()]
    assert {len(line) for line in fields} == {num_fields}
    assert [line[:4] for line in fields] == [
        ["9:1", "Q0", "9:10", "1"], ["9:1", "Q0", "9:4", "2"], ["9:2", "Q0", "9:12", "1"],
    ]  # fmt: skip
    assert fields[0][5:] == (["ours"] if task_ids is None else ["ours", "0"])
    expected = small_run().as_dict()
    del expected["9:3"]
    assert import_trec(path).as_dict() == expected


def test_import_sorts_by_rank_and_drops_padding_aloud(tmp_path, caplog):
    path = tmp_path / "run.txt"
    path.write_text("a Q0 y 2 0.5 t 0\na Q0 x 1 0.9 t 0\na Q0 -1:9999999 3 -3.4e38 t 0\n")
    with caplog.at_level(logging.WARNING):
        run = import_trec(path)
    assert run.dids[0] == ["x", "y"]
    assert "left out 1 empty ranks" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a Q0 x 1 0.9\n", "run.txt:1: 5 fields"),
        ("a Q0 x one 0.9 t\n", "run.txt:1: rank 'one'"),
        ("a Q0 x 1 0.1 t\na Q0 y 2 0.2 t\n", "run.txt: 1 of 1 queries have a score above .* negated"),
    ],
)
def test_a_broken_trec_file_is_named(tmp_path, text, message):
    path = tmp_path / "run.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        import_trec(path)


def test_names_with_spaces_cannot_be_exported(tmp_path):
    run = Run(qids=["a"], dids=[["x y"]], scores=[[1.0]])
    with pytest.raises(DataError, match="'x y' holds white space"):
        run.export_trec(tmp_path / "run.txt", "tag")
    with pytest.raises(DataError, match="must be one word"):
        run.export_trec(tmp_path / "run.txt", "two words")


def test_a_run_and_qrels_must_belong_together():
    run = small_run()
    check_join(run, {**QRELS, "9:3": {"9:1": 1}})
    with pytest.raises(DataError, match=r"1 of 3 queries have no judgement in the qrels \(first: 9:3\)"):
        check_join(run, QRELS)
    with pytest.raises(DataError, match=r"r.arrow: 1 of 4 queries of q.txt are not in it \(first: 9:4\)"):
        check_join(run, {**QRELS, "9:3": {}, "9:4": {}}, run_name="r.arrow", qrels_name="q.txt")
    twice = Run(qids=["a"], dids=[["x", "y", "x"]], scores=[[1, 1, 1]])
    with pytest.raises(DataError, match="query a, candidate x"):
        check_join(twice, {"a": {"x": 1}})
