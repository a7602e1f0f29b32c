"""Recall and P(Yes) weigh as the formulas say; alpha is found where a brute search finds it."""

import numpy as np
import pyarrow as pa
import pytest

from umarvel_ray.config import build_config
from umarvel_ray.data.trec import Run
from umarvel_ray.errors import ConfigError, ShardError
from umarvel_ray.retrieve.fusion import Fusion, fuse, teacher_table, tune_alpha
from umarvel_ray.retrieve.scores import Scores, write_table
from umarvel_ray.retrieve.settings import RerankConfig
from umarvel_ray.retrieve.teacher import require_teacher
from umarvel_ray.train.settings import MbeirData

SCORES = Scores.of_lists(
    ["9:1", "9:2", "9:3"],
    [["a", "b", "c"], ["d", "e"], []],
    [[0.9, 0.5, 0.5], [0.4, 0.3], []],
    [[0.0, 0.8, 0.8], [0.5, 0.5], []],
    {"checkpoint": "0123"},
)


def ranked(run: Run) -> dict[str, list[str]]:
    return dict(zip(run.qids, run.dids, strict=True))


@pytest.mark.parametrize(
    ("weights", "first", "second"),
    [
        ((1.0, 0.0), ["a", "b", "c"], ["d", "e"]),
        ((0.0, 1.0), ["b", "c", "a"], ["d", "e"]),  # ties keep the order of the recall
        ((0.5, 0.5), ["b", "c", "a"], ["d", "e"]),
        ((1.0, 0.1), ["a", "b", "c"], ["d", "e"]),
    ],
)
def test_lists_are_ranked_by_the_weighted_sum(weights, first, second):
    run = fuse(SCORES, weights)
    assert ranked(run) == {"9:1": first, "9:2": second, "9:3": []}
    given = {"a": (0.9, 0.0), "b": (0.5, 0.8), "c": (0.5, 0.8)}
    expected = [weights[0] * given[did][0] + weights[1] * given[did][1] for did in first]
    np.testing.assert_allclose(run.scores[0], expected, rtol=1e-6)


def test_the_papers_form_and_the_released_one():
    paper = Fusion("alpha", 0.3, {"mscoco_task0": 0.9})
    assert paper.weights("oven_task6") == pytest.approx((0.3, 0.7))
    assert paper.weights("mscoco_task0") == paper.teacher_weights("mscoco_task0") == pytest.approx((0.9, 0.1))
    released = Fusion("sum", 1.0, {"mscoco_task0": 0.5, "mscoco_task3": 0.1})
    assert released.weights("oven_task6") == (1.0, 1.0)
    assert released.weights("mscoco_task3") == (1.0, 0.1)
    assert released.teacher_weights("mscoco_task0") == (0.5, 0.25)
    settings = {"checkpoint": "/c", "output": "/o", "root": "/r", "runs": "/s", "seed": 0, "fusion": "sum"}
    config = build_config(settings | {"requests": [{"split": "test"}]}, RerankConfig)
    assert config.weight == 1.0 and config.weights_by_task == released.by_task


def test_alpha_is_the_best_of_the_curve_and_the_largest_among_equals():
    wanted = {"one": "b", "two": "d"}

    def quality(task: str):
        return lambda run: np.array([dids[0] == wanted[task] for dids in run.dids], float)

    one = Scores.of_lists(["1"], [["a", "b"]], [[0.9, 0.5]], [[0.1, 0.7]], {})
    two = Scores.of_lists(["2"], [["c", "d"]], [[0.9, 0.8]], [[0.1, 0.7]], {})
    tuned = tune_alpha({"one": one, "two": two}, {task: quality(task) for task in wanted})
    expected = {
        alpha: np.mean([0.9 * alpha + 0.1 * (1 - alpha) < 0.5 * alpha + 0.7 * (1 - alpha), alpha < 0.857])
        for alpha, _ in tuned["curve"]
    }
    assert dict(map(tuple, tuned["curve"])) == expected
    assert tuned["alpha"] == max(alpha for alpha, share in expected.items() if share == 1) == 0.55
    assert tuned["tasks"]["two"] == [float(alpha < 0.857) for alpha, _ in tuned["curve"]]


@pytest.mark.parametrize("mended, spoiled, alpha", [(4, 3, 1.0), (4, 0, 0.55)])
def test_alpha_leaves_the_recall_for_no_less_than_a_standard_error(mended, spoiled, alpha):
    """Of 12 queries an alpha below 0.57 mends and spoils some: one more mended than spoiled is noise."""
    p_yes = [[0.1, 0.5] if query < mended + spoiled else [0.5, 0.1] for query in range(12)]
    qids = [str(query) for query in range(12)]
    scores = Scores.of_lists(qids, [["a", "b"]] * 12, [[0.8, 0.5]] * 12, p_yes, {})

    def quality(run):
        right = ["b" if query < mended else "a" for query in range(12)]
        return np.array([dids[0] == did for dids, did in zip(run.dids, right, strict=True)], float)

    tuned = tune_alpha({"one": scores}, {"one": quality})
    gain = (mended - spoiled) / 12
    error = np.sqrt(((mended + spoiled) / 12 - gain**2) / 12)
    assert (gain > error) == (alpha < 1)
    assert tuned["alpha"] == alpha and tuned["best"] == 0.55
    curve = dict(tuned["curve"])
    assert curve[0.55] - curve[1.0] == pytest.approx(gain)


def test_a_teachers_table_is_a_run_and_keeps_what_it_was_made_of(tmp_path):
    table = teacher_table(SCORES, (0.5, 0.5))
    run = Run.from_table(table)
    assert ranked(run) == ranked(fuse(SCORES, (0.5, 0.5)))
    for dids, recall, p_yes, score in zip(
        *(table.column(name).to_pylist() for name in ("did", "recall", "p_yes", "score")), strict=True
    ):
        np.testing.assert_allclose(score, (np.array(recall) + np.array(p_yes)) / 2, rtol=1e-6)
        assert len(dids) == len(score)


def test_missing_and_foreign_teachers_are_refused(tmp_path, backbone):
    data = MbeirData(
        kind="mbeir", root="/m", lists=str(tmp_path / "teacher.arrow"), list_role="teacher", teacher=backbone
    )
    with pytest.raises(ShardError, match=r"teacher\.arrow: no such file: these scores are missing"):
        require_teacher(data)
    table = teacher_table(SCORES, (0.5, 0.5))
    write_table(table, {"checkpoint": "of another"}, tmp_path / "teacher.arrow")
    with pytest.raises(ShardError, match="these are scores of another checkpoint"):
        require_teacher(data)
    require_teacher(data.model_copy(update={"teacher": None}))
    write_table(table.slice(0, 0), {"checkpoint": "of another"}, tmp_path / "teacher.arrow")
    with pytest.raises(ShardError, match="holds no query"):
        require_teacher(data)
    with pa.ipc.new_file(str(tmp_path / "plain.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ShardError, match=r"plain\.arrow: no reranker's scores"):
        require_teacher(data.model_copy(update={"lists": str(tmp_path / "plain.arrow")}))


BASE = {"checkpoint": "/c", "output": "/o", "root": "/r", "runs": "/s", "seed": 0}
LIST = {"name": "x", "run": "/x", "queries": "/q", "pools": ["/p"], "root": "/r"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"requests": [{"split": "val"}, {"split": "test"}], "tune_only": True}, "never on test: 1 of 2"),
        ({"requests": [{"split": "test"}]}, "no request is of the val split"),
        ({"requests": [{"split": "val"}], "tune_only": True, "alpha": 0.5}, "nothing to tune"),
        ({"requests": [{"split": "test"}], "alpha": None}, "alpha is null and alpha_from names no job"),
        ({"requests": [{"split": "val"}], "fusion": "sum", "alpha": 0.5}, "'sum' weighs by `weight`"),
        ({"requests": [{"split": "val"}], "by_task": {"oven_task6": 1.5}}, "an alpha is at most 1"),
        ({"alpha": 0.5}, "nothing to score"),
        ({"lists": [LIST | {"split": "val"}]}, r"lists\.x: alpha is tuned on it, so it needs qrels"),
        ({"requests": [{"split": "test"}], "root": None, "alpha": 0.5}, "give root and runs"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_config(BASE | settings, RerankConfig)
