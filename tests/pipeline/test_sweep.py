"""Sweeps: what rows share is one folder, what a row does not need is not done, and verdicts follow
intervals."""

from pathlib import Path

import pytest
import yaml
from fixtures_run import Lines

from umarvel_ray.artifacts import is_finished, read_json
from umarvel_ray.config import build_config
from umarvel_ray.demo.prepare import demo_places
from umarvel_ray.errors import ConfigError
from umarvel_ray.pipeline.sweep import SweepConfig, load_sweep, needed, plan_sweep, run_sweep, verdict

EXPERIMENTS = sorted((Path(__file__).parents[2] / "configs" / "experiments").glob("*.yaml"))


def sweep_of(tiny, output, **values) -> SweepConfig:
    """Two rows on the tiny run: stage 1c, and stage 2 on top of it."""
    base = {
        "title": "tiny sweep",
        "base": str(tiny.config),
        "output": str(output / "table"),
        "seeds": [0, 1],
        "seed_keys": ["stages.hard.seed_offset"],
        "set": {"data.tasks": ["mscoco_task0", "webqa_task1"]},
        "rows": [
            {"id": "a", "title": "1c", "column": "instruct", "paper": {"local": 60.6}},
            {"id": "b", "title": "hard", "column": "hard", "paper": {"local": 61.7}},
            {"id": "c", "title": "fewer", "column": "hard", "set": {"stages.hard.train.num_steps": 2}},
        ],
        "claims": [{"says": "hard negatives help", "better": "b", "than": "a"}],
    }
    return build_config(base | values, SweepConfig)


def kinds(jobs):
    return [job.name for job in jobs]


def test_a_row_does_only_what_its_column_needs(tiny, tmp_path):
    cells = plan_sweep(sweep_of(tiny, tmp_path))
    names = {(cell.row.id, cell.seed): kinds(cell.jobs) for cell in cells}
    assert names["a", 0] == [
        *(
            "train/text",
            "train/align",
            "train/instruct",
            "embed/instruct",
            "search/instruct",
            "evaluate/instruct",
        )
    ]
    assert names["b", 1][-1] == "evaluate/hard"
    assert not any("reranker" in name or "distil" in name for name in names["b", 1])


def test_what_rows_and_seeds_share_is_one_folder(tiny, tmp_path):
    cells = {(cell.row.id, cell.seed): cell for cell in plan_sweep(sweep_of(tiny, tmp_path))}

    def folder(row, seed, name):
        return next(job.config.output for job in cells[row, seed].jobs if job.name == name)

    assert (
        folder("a", 0, "train/instruct")
        == folder("b", 1, "train/instruct")
        == folder("c", 0, "train/instruct")
    )
    assert folder("b", 0, "train/hard") != folder("b", 1, "train/hard")  # the seed's
    assert folder("b", 0, "train/hard") != folder("c", 0, "train/hard")  # the row's
    assert folder("b", 0, "mine/negatives") == folder("c", 1, "mine/negatives")
    everything = {job.config.output for cell in cells.values() for job in cell.jobs}
    assert all(str(tmp_path / "jobs") in path for path in everything)
    # Every path a job reads is another job's folder in the same plan, or the world's.
    for cell in cells.values():
        for job in cell.jobs:
            assert str(tmp_path / "table") not in str(job.config.model_dump())


def test_a_change_of_an_early_stage_moves_everything_after_it(tiny, tmp_path):
    plain = plan_sweep(sweep_of(tiny, tmp_path))[0]
    other = plan_sweep(sweep_of(tiny, tmp_path, set={"stages.align.train.num_steps": 2}))[0]
    same = [a.config.output == b.config.output for a, b in zip(plain.jobs, other.jobs, strict=True)]
    assert same == [True, False, False, False, False, False]


def test_stages_may_be_left_out(tiny, tmp_path):
    cells = plan_sweep(sweep_of(tiny, tmp_path, set={"stages.text": None, "stages.align": None}))
    assert kinds(cells[0].jobs)[0] == "train/instruct"
    assert cells[0].jobs[0].config.start == str(tiny.home / "backbone")


def test_nonsense_is_named_with_its_row(tiny, tmp_path):
    rows = [{"id": "x", "title": "x", "set": {"stages.hard.nonsense": 1}}]
    with pytest.raises(ConfigError, match=r"row 'x' of tiny sweep: .*nonsense"):
        plan_sweep(sweep_of(tiny, tmp_path, rows=rows, claims=[]))
    with pytest.raises(ConfigError, match="no row has the id 'z'"):
        sweep_of(tiny, tmp_path, claims=[{"says": "s", "better": "a", "than": "z"}])
    with pytest.raises(ConfigError, match="has no job evaluate/nothing"):
        needed(plan_sweep(sweep_of(tiny, tmp_path))[0].jobs, "evaluate/nothing")


def test_verdicts_follow_the_interval():
    assert [verdict(0.1, 0.2), verdict(-0.2, -0.1), verdict(-0.1, 0.1)] == [
        "agrees",
        "disagrees",
        "not told apart",
    ]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_plans_on_the_demonstration(path, tmp_path):
    """Each table of the paper that the recipe covers; rows as the paper numbers them."""
    cells = plan_sweep(load_sweep(path, []), demo_places(tmp_path))
    assert all(cell.jobs[-1].kind == "evaluate" for cell in cells)
    raw = yaml.safe_load(path.read_text())
    assert raw["demo"] == "../../demo" and raw["claims"]
    trained = {job.config.output for cell in cells for job in cell.jobs if job.kind == "train"}
    asked = sum(job.kind == "train" for cell in cells for job in cell.jobs)
    assert len(trained) < asked  # something is shared in every table


def test_there_is_an_experiment_for_every_table():
    assert [path.stem for path in EXPERIMENTS] == [f"table{n}" for n in (1, 15, 2, 3, 4, 5, 6)]


@pytest.mark.slow
def test_a_sweep_ends_in_one_table_and_is_not_done_twice(tiny, tmp_path):
    sweep = sweep_of(tiny, tmp_path)
    document = run_sweep(sweep, Lines())
    rows = {row["id"]: row for row in document["rows"]}
    assert rows["a"]["local"]["deviation"] == 0.0  # one checkpoint for both seeds
    assert rows["b"]["local"]["seeds"] == 2
    claim = document["claims"][0]["pools"]["local"]
    assert claim["low"] <= claim["difference"] <= claim["high"] and claim["paper"] == 1.1
    text = (tmp_path / "table" / "sweep.md").read_text()
    assert "| a 1c |" in text and "hard negatives help" in text
    page = (tmp_path / "table" / "compare.html").read_text()
    assert "Where they differ" in page and "b hard" in page
    view = Lines()
    again = run_sweep(sweep, view)
    assert again["rows"] == document["rows"]
    jobs = {job.config.output for cell in plan_sweep(sweep) for job in cell.jobs}
    assert f"{len(jobs)} finished before" in view.lines[0]
    assert all(is_finished(folder) for folder in jobs)
    assert read_json(tmp_path / "table" / "sweep.json")["rows"] == document["rows"]
