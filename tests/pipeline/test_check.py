"""A look before the start: faults of every split are found, and the plan is told, with nothing started."""

import json
import sys

import pytest
from fixtures_run import Lines, TinyRun, rewrite

from umarvel_ray.data.mbeir import TASK_BY_NAME, Mbeir
from umarvel_ray.errors import DataError, UmarvelError
from umarvel_ray.pipeline.check import check_run, find_faults, print_plan, require_sound


def test_nothing_is_found_where_nothing_is(tiny: TinyRun, tmp_path):
    view = Lines()
    assert check_run(tiny.settings(tmp_path / "run"), view, images="decode") == []
    assert view.lines == ["6 tasks, 40 sentence pairs, 40 captions: no faults found"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_fault_is_found_in_every_split(tiny: TinyRun, tmp_path, split):
    run = tiny.copy(tmp_path / "spoiled")
    mbeir, task = Mbeir(run.root), TASK_BY_NAME["cirr_task7"]
    path = mbeir.training_queries_path(task.dataset) if split == "train" else mbeir.queries_path(task, split)
    lines = path.read_text().splitlines()
    record = json.loads(lines[1])
    record["pos_cand_list"] = ["8:424242"]
    rewrite(path, "\n".join([lines[0], json.dumps(record), *lines[2:]]) + "\n")
    faults = check_run(run.settings(tmp_path / "run"), Lines())
    found = [fault for fault in faults if fault.startswith(f"{path}:2: a positive outside the")]
    # Val and test have a pool of the task and one of all tasks; training has the one.
    assert len(found) == (1 if split == "train" else 2)
    assert all("8:424242" in fault for fault in found)
    assert all("\n" not in fault for fault in faults)


def test_data_that_is_trained_on_but_not_evaluated_is_looked_at(tiny: TinyRun, tmp_path):
    """`data.tasks` chooses what is measured; training reads all."""
    run = tiny.copy(tmp_path / "spoiled")
    path = Mbeir(run.root).training_queries_path("fashioniq")
    rewrite(path, path.read_text().replace("{", "", 1))
    faults = check_run(run.settings(tmp_path / "run", "data.tasks=[mscoco_task0]"), Lines())
    assert any(fault.startswith(f"{path}:1: not valid JSON") for fault in faults)


def test_a_fault_is_told_once(tiny: TinyRun, tmp_path):
    run = tiny.copy(tmp_path / "spoiled")
    Mbeir(run.root).instructions_path().unlink()
    faults = [str(fault) for fault in find_faults(run.settings(tmp_path / "run")).faults]
    assert len(faults) == len(set(faults)) > 0


def test_a_run_is_refused_by_its_first_fault_and_the_number_of_all(tiny: TinyRun, tmp_path):
    run = tiny.copy(tmp_path / "spoiled")
    rewrite(run.home / "world/nli/nli_for_simcse.csv", "sent0,sent1\na,\n")
    with pytest.raises(DataError, match=r"nli_for_simcse\.csv:2: 1 of 1 rows lack one of") as error:
        require_sound(run.settings(tmp_path / "run"), Lines())
    assert "faults in all" not in str(error.value)
    (run.home / "world/cc3m/chat.json").unlink()
    with pytest.raises(UmarvelError, match=r"\(2 faults in all; `umarvel check` lists them\.\)$"):
        require_sound(run.settings(tmp_path / "run"), Lines())


def test_the_plan_tells_every_job_and_starts_none(tiny: TinyRun, tmp_path):
    view = Lines()
    heavy = {"ray"} & set(sys.modules)
    print_plan(tiny.settings(tmp_path / "run", "runtime.kind=ray"), view)
    assert heavy == {"ray"} & set(sys.modules)
    assert not (tmp_path / "run").exists()
    text = "\n".join(view.lines)
    for said in (
        "title: tiny run",
        "train/text",
        "4 steps of 8 queries, up to 7 negatives each, full",
        "embed/hard",
        "mine/negatives",
        "evaluate/distil_reranked",
        "to do",
        "needs at once: 2 × (1 CPUs, 0 GPUs) and one reader; training is cut into 2 lanes",
    ):
        assert said in text, said


def test_the_plan_counts_what_the_jobs_will_embed(tiny: TinyRun, tmp_path):
    """Queries of six tasks and their pools, as the files have them."""
    from umarvel_ray.data.sources import chosen_tasks, pool_sources, query_source

    mbeir, view = Mbeir(tiny.root), Lines()
    settings = tiny.settings(tmp_path / "run")
    print_plan(settings, view)
    tasks = chosen_tasks(mbeir, "test", settings.data.tasks)
    rows = sum(len(query_source(mbeir, task, "test")) for task in tasks)
    rows += sum(len(source) for source in pool_sources(mbeir, "test", tasks))
    [line] = [line for line in view.lines if "embed/distil" in line]
    assert f"{rows} records in" in line


def test_the_plan_counts_a_pool_once_though_two_splits_search_it(tiny: TinyRun, tmp_path):
    """As the embedding job does."""
    from umarvel_ray.pipeline.stages import recipe
    from umarvel_ray.retrieve.embed import embedding_sources

    view, settings = Lines(), tiny.settings(tmp_path / "run")
    print_plan(settings, view)
    [job] = [job for job in recipe(settings) if job.name == "embed/hard"]
    rows = sum(len(source) for source in embedding_sources(job.config))  # type: ignore[arg-type]
    [line] = [line for line in view.lines if "embed/hard" in line]
    assert f"{rows} records in" in line
