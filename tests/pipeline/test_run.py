"""A run owns its folder, looks before it starts, and hands each job over once."""

import os
from pathlib import Path

import pytest
from fixtures_run import Lines, TinyRun

from umarvel_ray.artifacts import finish_folder, read_json
from umarvel_ray.errors import DataError, OutputError
from umarvel_ray.pipeline import run as run_module
from umarvel_ray.pipeline.run import load_job, run_recipe
from umarvel_ray.pipeline.stages import recipe


@pytest.fixture
def performed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Titles of the jobs in the order they were asked for; none does anything but finish."""
    titles: list[str] = []

    def perform(kind, config, runtime, view, *, title):
        titles.append(title)
        finish_folder(config.output, {"seconds": 1.5})

    monkeypatch.setattr(run_module, "perform", perform)
    monkeypatch.setattr(run_module, "print_results", lambda results, view: None)
    return titles


def test_jobs_are_done_in_the_recipes_order(tiny: TinyRun, tmp_path, performed):
    settings, view = tiny.settings(tmp_path / "run"), Lines()
    run_recipe(settings, view)
    assert performed == [job.title for job in recipe(settings)]
    assert view.lines[1].startswith("checked 6 tasks")
    assert view.lines[-1] == f"all jobs together: {len(performed) * 1.5:.1f} s"
    assert read_json(tmp_path / "run" / "run.json")["seed"] == 0


def test_data_is_looked_at_once(tiny: TinyRun, tmp_path, performed):
    """A run of days that goes on does not read millions of lines again."""
    settings = tiny.settings(tmp_path / "run")
    run_recipe(settings, Lines())
    view = Lines()
    run_recipe(settings, view)
    assert not any(line.startswith("checked") for line in view.lines)


def test_faulty_data_claims_no_folder(tiny: TinyRun, tmp_path, performed):
    settings = tiny.settings(tmp_path / "run", f"data.nli={tmp_path / 'nowhere.csv'}")
    with pytest.raises(DataError, match=r"nowhere\.csv"):
        run_recipe(settings, Lines())
    assert performed == [] and not (tmp_path / "run").exists()
    run_recipe(tiny.settings(tmp_path / "run"), Lines())  # mended, the same folder serves


def test_workers_and_title_may_change_and_nothing_else(tiny: TinyRun, tmp_path, performed):
    run_recipe(tiny.settings(tmp_path / "run"), Lines())
    run_recipe(tiny.settings(tmp_path / "run", "title=other", "runtime.num_workers=3"), Lines())
    with pytest.raises(OutputError, match=r"1 differ \(first: retrieval\.depth was 10, is 11\)"):
        run_recipe(tiny.settings(tmp_path / "run", "retrieval.depth=11"), Lines())


def test_a_folder_with_files_of_others_is_not_touched(tiny: TinyRun, tmp_path, performed):
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(OutputError, match=r"holds 1 files that are not ours"):
        run_recipe(tiny.settings(tmp_path), Lines())
    assert os.listdir(tmp_path) == ["thesis.tex"] and performed == []


def test_what_a_folder_is_called_is_printed_as_it_is(tiny: TinyRun, tmp_path, performed):
    """Brackets are no markup."""
    output = tmp_path / "run [bold]"
    view = Lines()
    run_recipe(tiny.settings(output), view)
    assert view.lines[0].endswith(f"output {output}")
    [report] = [line for line in view.lines if line.startswith("report: ")]
    assert Path(report.removeprefix("report: ")).parent.is_relative_to(output)


def test_a_single_job_has_its_own_workers(tmp_path):
    config = tmp_path / "evaluate.yaml"
    config.write_text(
        "stage: a\ncheckpoint: c\nruns: r\noutput: o\nroot: d\nruntime: {kind: local, cpus: 3}\n"
    )
    settings, runtime = load_job("evaluate", config, ["split=val"])
    assert (settings.split, settings.runs) == ("val", str(tmp_path / "r"))
    assert (runtime.kind, runtime.cpus) == ("local", 3)
    assert not hasattr(settings, "runtime")
