"""How a run stands, read from its files alone: no cluster, no data, while it runs or after."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from umarvel_ray.artifacts import DONE_FILE, JOB_FILE, read_json
from umarvel_ray.config import build_config
from umarvel_ray.errors import OutputError
from umarvel_ray.pipeline.check import RUN_FILE
from umarvel_ray.pipeline.lock import holder, is_dead_here, name_of
from umarvel_ray.pipeline.progress import PROGRESS_FILE, short_time
from umarvel_ray.pipeline.settings import RunConfig
from umarvel_ray.pipeline.stages import recipe
from umarvel_ray.pipeline.view import View
from umarvel_ray.storage import at

State = Literal["finished", "running", "interrupted", "waiting"]
_SILENT_S = 90.0
"""After so long without a sign who works there is taken for dead."""


@dataclass(frozen=True)
class JobStatus:
    """One job of a run.

    Attributes:
        name: `embed/hard`.
        title: For people.
        state: What it is doing.
        seconds: It took, where it is finished.
        progress: How far it is, where that is known: see `progress.Tally`.
        done: Its summary, where it is finished.
    """

    name: str
    title: str
    state: State
    seconds: float | None
    progress: dict[str, Any]
    done: dict[str, Any]


@dataclass(frozen=True)
class RunStatus:
    """A run, or a single job in a folder of its own.

    Attributes:
        output: Its folder.
        jobs: In order.
        worker: Who works there, in words; empty where nobody does.
        silent_s: Since the last sign of life; None where nobody works there.
    """

    output: str
    jobs: tuple[JobStatus, ...]
    worker: str
    silent_s: float | None


def status_of(output: str) -> RunStatus:
    """Read the files of a run.

    Raises:
        OutputError: Neither a run nor a job is in the folder.
    """
    where = at(output)
    found = holder(output)
    silent = max(0.0, time.time() - found["seen"]) if "seen" in found else None
    alive = silent is not None and silent < _SILENT_S and not is_dead_here(found)
    if (where / RUN_FILE).exists():
        claim = {"title": "", **read_json(where / RUN_FILE), "output": str(output)}
        run = build_config(claim, RunConfig, where=str(where / RUN_FILE))
        places = [(job.name, job.title, job.config.output) for job in recipe(run)]  # type: ignore[attr-defined]
    elif (where / JOB_FILE).exists():
        kind = read_json(where / JOB_FILE).get("job", "job")
        places = [(kind, kind, str(output))]
    else:
        raise OutputError(f"{output}: neither {RUN_FILE} nor {JOB_FILE} is there. Give the output of a run.")
    jobs = tuple(_job(name, title, folder, alive=alive) for name, title, folder in places)
    return RunStatus(str(output), jobs, name_of(found) if found else "", silent if found else None)


def _job(name: str, title: str, folder: str, *, alive: bool) -> JobStatus:
    where = at(folder)
    done = _read(where / DONE_FILE)
    if done:
        return JobStatus(name, title, "finished", done.get("seconds"), {}, done)
    progress = _read(where / PROGRESS_FILE)
    if not progress and not (where / JOB_FILE).exists():
        return JobStatus(name, title, "waiting", None, {}, {})
    return JobStatus(name, title, "running" if alive else "interrupted", None, progress, {})


def _read(path: Any) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, OutputError):
        return {}


def print_status(status: RunStatus, view: View) -> None:
    """A table of all jobs, and who works there."""
    finished = sum(job.state == "finished" for job in status.jobs)
    table = Table(title=f"{status.output}: {finished} of {len(status.jobs)} jobs finished")
    for name in ("job", "state", "done", "rate", "time", "left"):
        table.add_column(name, no_wrap=name != "rate")
    for job in status.jobs:
        table.add_row(*_row(job), style="dim" if job.state == "waiting" else "")
    view.console.print(table)
    if not status.worker:
        over = finished == len(status.jobs)
        view.line("nothing works there now" + ("" if over else "; the same command goes on from here"))
    elif status.silent_s is not None and status.silent_s < _SILENT_S:
        view.line(f"{status.worker} works there, last sign {short_time(status.silent_s)} ago")
    else:
        view.line(
            f"{status.worker} worked there, silent for {short_time(status.silent_s or 0)}: dead, or its "
            "storage is away; the same command goes on from here"
        )


def _row(job: JobStatus) -> tuple[str, ...]:
    if job.state == "finished":
        amount = next(
            (f"{job.done[k]:,} {k}" for k in ("rows", "pairs", "steps", "runs") if k in job.done), ""
        )
        return job.name, job.state, amount, "", short_time(job.seconds or 0.0), ""
    if not job.progress:
        return job.name, job.state, "", "", "", ""
    p = job.progress
    amount = f"{p['done']:,.0f} of {p['total']:,.0f} {p['unit']}"
    share = f" ({p['done'] / p['total']:.0%})" if p["total"] else ""
    rate = f"{p['per_s']:,.3g}/s" + (f", {p['note']}" if p["note"] else "")
    spent = short_time(max(0.0, p["updated"] - p["started"]))
    left = short_time(p["left_s"]) if p["left_s"] is not None and job.state == "running" else ""
    return job.name, job.state, amount + share, rate, spent, left


def output_of(given: str, overrides: list[str]) -> str:
    """The folder that a person means: an output, or the settings file of a run that names one."""
    from umarvel_ray.config import load_config

    if given.endswith((".yaml", ".yml")) and Path(given).is_file():
        return load_config(Path(given), RunConfig, overrides).output
    return given
