"""From a settings file to a run: load, order, and do the recipe's jobs one after the other."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from umarvel_ray import logs
from umarvel_ray.artifacts import claim_folder, is_claimed, is_finished, read_json
from umarvel_ray.config import load_config
from umarvel_ray.errors import ConfigError
from umarvel_ray.pipeline.check import RUN_FILE, require_sound, run_claim
from umarvel_ray.pipeline.jobs import JOBS, perform, seconds_of
from umarvel_ray.pipeline.lock import only_one
from umarvel_ray.pipeline.only import EVERYTHING, Only
from umarvel_ray.pipeline.parts import do_part
from umarvel_ray.pipeline.settings import ReportConfig, RunConfig
from umarvel_ray.pipeline.stages import Job, recipe
from umarvel_ray.pipeline.versions import library_versions
from umarvel_ray.pipeline.view import View, short_time
from umarvel_ray.runtime.cluster import RuntimeSettings, connected
from umarvel_ray.storage import Place, at


def load_run(config: Path, overrides: Sequence[str]) -> RunConfig:
    """Settings of a whole run."""
    return load_config(config, RunConfig, overrides)


def load_job(kind: str, config: Path, overrides: Sequence[str]) -> tuple[Any, RuntimeSettings]:
    """Settings of one job, and its `runtime` section."""
    schema = JOBS[kind][0]

    class JobFile(schema):  # type: ignore[misc, valid-type]
        runtime: RuntimeSettings = RuntimeSettings()

    loaded = load_config(config, JobFile, overrides)
    values = {name: getattr(loaded, name) for name in schema.model_fields}
    return schema.model_construct(**values), loaded.runtime


def run_recipe(run: RunConfig, view: View, only: Only = EVERYTHING) -> None:
    """Do all jobs of a run, or a part of it; the finished ones are passed over.

    Settings and data are looked at before the first job starts, and before Ray does; see `check.find_faults`.

    Raises:
        OutputError: The output folder belongs to a run with other settings.
        UmarvelError: Settings or data are faulty, or a job fails.
    """
    output = at(run.output)
    os.environ.setdefault(logs.RUN_VARIABLE, run.output)
    jobs = chosen_jobs(recipe(run), only)
    finished = sum(is_finished(job.config.output) for job in jobs)  # type: ignore[attr-defined]
    place = escape(str(output))
    view.line(f"[bold]{escape(run.title)}[/]: {len(jobs)} jobs, {finished} finished before, output {place}")
    if not finished and only.job is None:
        require_sound(run, view)
    is_claimed(output, run_claim(run), claim=RUN_FILE)
    if not only.is_everything:
        [job] = jobs
        do_part(job.kind, job.config, run.runtime, view, only)
        return
    if finished < len(jobs):
        with only_one(output), connected(run.runtime, view.line):
            claim_folder(output, run_claim(run), claim=RUN_FILE)
            _perform_all(run, jobs, view)
    else:
        _perform_all(run, jobs, view)
    _print_end(jobs, view)


def chosen_jobs(jobs: Sequence[Job], only: Only) -> Sequence[Job]:
    """All jobs, or the one that is asked for.

    Raises:
        ConfigError: There is none of that name, or a part of a job is asked for and not of which.
    """
    if only.job is None:
        if only.is_everything:
            return jobs
        raise ConfigError(
            "only.shard, only.part and only.batch are parts of one job. Name it by only.job=KIND/NAME."
        )
    if found := [job for job in jobs if job.name == only.job]:
        return found
    raise ConfigError(
        f"only.job={only.job}: this run has no such job. There are: {', '.join(job.name for job in jobs)}."
    )


def _perform_all(run: RunConfig, jobs: Sequence[Job], view: View) -> None:
    for job in jobs:
        config = _with_facts(job.config, run, jobs) if isinstance(job.config, ReportConfig) else job.config
        perform(job.kind, config, run.runtime, view, title=job.title)


def _with_facts(config: ReportConfig, run: RunConfig, jobs: Sequence[Job]) -> ReportConfig:
    """The report's foot: how the run was made."""
    times = {job.title: seconds for job in jobs if (seconds := seconds_of(job.config.output)) is not None}  # type: ignore[attr-defined]
    facts = {
        "seed": run.seed,
        "runtime": f"{run.runtime.kind}, {run.runtime.num_workers} workers, {run.runtime.num_actors} actors",
        "machine": f"{os.cpu_count()} CPUs",
        "versions": library_versions(),
        "wall time": {title: short_time(seconds) for title, seconds in times.items()},
    }
    return config.model_copy(update={"facts": facts})


def print_results(results: Sequence[Place], view: View) -> None:
    """The table of results: tasks × stages, local and global."""
    from umarvel_ray.evaluate.benchmark import print_results_table

    print_results_table([read_json(path) for path in results], console=view.console)


def _print_end(jobs: Sequence[Job], view: View) -> None:
    results = [at(job.config.output) / "results.json" for job in jobs if job.kind == "evaluate"]  # type: ignore[attr-defined]
    if results:
        print_results(results, view)
    for job in jobs:
        if job.kind == "report":
            view.line(f"report: {escape(job.config.output)}/report.html")  # type: ignore[attr-defined]
    seconds = [seconds_of(job.config.output) or 0 for job in jobs]  # type: ignore[attr-defined]
    view.line(f"all jobs together: {short_time(sum(seconds))}")
