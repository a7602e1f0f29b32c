"""Experiments: rows that differ in a few settings of one run, over seeds; what rows share is computed once.

A row is the recipe with other settings, cut down to the jobs that one column needs. Every job goes to a
folder named by all that decides its content, so rows, seeds and tables that agree on a stage find it done.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, NonNegativeInt, model_validator

from umarvel_ray.artifacts import atomic_write, fingerprint, is_finished, read_json, write_json
from umarvel_ray.config import Config, PathSetting, load_config
from umarvel_ray.errors import ConfigError
from umarvel_ray.pipeline.jobs import perform, seconds_of
from umarvel_ray.pipeline.settings import RunConfig
from umarvel_ray.pipeline.stages import Job, recipe
from umarvel_ray.pipeline.view import View, short_time
from umarvel_ray.runtime.cluster import RuntimeSettings, connected

Column = Literal[
    "instruct",
    "hard",
    "reranked",
    "distil",
    "distil_reranked",
    "in_batch",
    "unfiltered",
    "own_negatives",
    "continue_hard",
]
_CONTROLS = ("in_batch", "unfiltered", "own_negatives", "continue_hard")
Verdict = Literal["agrees", "disagrees", "not told apart"]


class SweepRow(Config):
    """One row of a table."""

    id: str
    title: str
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys of the run in place of the base's."""
    column: Column = "instruct"
    """Which of the recipe's results is the row's."""
    paper: dict[Literal["local", "global"], float] = Field(default_factory=dict)
    """What the paper prints, in percent."""


class SweepClaim(Config):
    """A direction that the paper reports."""

    says: str
    better: str
    """Id of a row."""
    than: str
    """Id of another."""


class SweepConfig(Config):
    """An experiment: a table of the paper, or one's own."""

    title: str
    base: PathSetting
    """Settings of a run (`umarvel run`): what all rows have in common."""
    output: PathSetting
    """Folder of the table; jobs lie in `jobs` beside it, for other tables to find."""
    demo: PathSetting | None = None
    """Folder of the demonstration's world and backbone, made where they are missing; the base's paths then
    point there."""
    seeds: tuple[NonNegativeInt, ...] = (0, 1, 2)
    seed_keys: tuple[str, ...] = ("seed",)
    """What a seed sets. `stages.instruct.seed_offset` leaves the stages before it the same for all seeds."""
    set: dict[str, Any] = Field(default_factory=dict)
    """For all rows."""
    rows: tuple[SweepRow, ...] = Field(min_length=1)
    claims: tuple[SweepClaim, ...] = ()
    runtime: RuntimeSettings | None = None
    """Who does the work; the base's by default. Where jobs are small, starting workers for each takes
    longer than the work."""
    mean_over: tuple[str, ...] | None = None
    """Tasks whose mean is printed; all that were evaluated by default."""

    @model_validator(mode="after")
    def _rows_exist(self) -> Self:
        ids = [row.id for row in self.rows]
        if len(set(ids)) != len(ids):
            raise ValueError(f"row ids repeat: {', '.join(ids)}. Give each its own")
        named = [name for claim in self.claims for name in (claim.better, claim.than)]
        if unknown := [name for name in named if name not in ids]:
            raise ValueError(f"no row has the id {unknown[0]!r}. Rows: {', '.join(ids)}")
        return self


@dataclass(frozen=True)
class Cell:
    """One row under one seed: its jobs in order, the last of which evaluates."""

    row: SweepRow
    seed: int
    jobs: tuple[Job, ...]

    @property
    def results(self) -> Path:
        """Folder of its evaluation."""
        return Path(self.jobs[-1].config.output)  # type: ignore[attr-defined]


def load_sweep(path: Path, overrides: Sequence[str]) -> SweepConfig:
    """Settings of an experiment."""
    return load_config(path, SweepConfig, overrides)


def plan_sweep(sweep: SweepConfig, places: Sequence[str] = ()) -> list[Cell]:
    """Every row under every seed, with shared folders; a pure function of the settings.

    Args:
        sweep: The experiment.
        places: Overrides that point the base at the demonstration's folder.

    Raises:
        ConfigError: A row's settings are nonsense.
    """
    jobs_folder = Path(sweep.output).parent / "jobs"
    cells = []
    for row in sweep.rows:
        for seed in sweep.seeds:
            settings = {**sweep.set, **row.set, **dict.fromkeys(sweep.seed_keys, seed)}
            control = row.column in _CONTROLS
            settings |= {
                "columns": [] if control else [row.column],
                "controls": [row.column] if control else [],
            }
            settings["output"] = str(Path(sweep.output) / "plan")
            overrides = [*places, *(f"{key}={json.dumps(value)}" for key, value in settings.items())]
            try:
                run = load_config(sweep.base, RunConfig, overrides)
            except ConfigError as error:
                raise ConfigError(f"row {row.id!r} of {sweep.title}: {error}") from None
            cells.append(
                Cell(row, seed, tuple(shared(needed(recipe(run), f"evaluate/{row.column}"), jobs_folder)))
            )
    return cells


def needed(jobs: Sequence[Job], target: str) -> list[Job]:
    """The jobs that `target` reads from, directly or not, and itself, in order."""
    by_name = {job.name: job for job in jobs}
    if target not in by_name:
        raise ConfigError(f"the recipe has no job {target}. It has: {', '.join(by_name)}.")
    wanted = {target}
    for job in reversed(jobs):
        if job.name in wanted:
            read = _strings(_settings(job))
            wanted |= {other.name for other in jobs if any(_inside(path, output_of(other)) for path in read)}
    return [job for job in jobs if job.name in wanted]


def shared(jobs: Sequence[Job], folder: Path) -> list[Job]:
    """The same jobs in folders named by their content: equal jobs of other rows are equal folders."""
    moved: dict[str, str] = {}
    found = []
    for job in jobs:
        settings = _replace(_settings(job), moved)
        key = fingerprint([job.kind, settings])
        output = str(folder / job.kind / f"{job.name.partition('/')[2]}-{key[:12]}")
        moved[output_of(job)] = output
        config = type(job.config).model_validate({**settings, "output": output})
        found.append(Job(name=job.name, kind=job.kind, title=job.title, config=config))
    return found


def output_of(job: Job) -> str:
    """A job's folder."""
    return job.config.output  # type: ignore[attr-defined]


def _settings(job: Job) -> dict[str, Any]:
    """A job's settings without its output; an evaluation's column title is the row's, not the content's."""
    settings = job.config.model_dump(mode="json", exclude={"output"})
    return settings | {"stage": job.name.partition("/")[2]} if job.kind == "evaluate" else settings


def _strings(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in _strings(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def _replace(value: Any, moved: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _replace(item, moved) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace(item, moved) for item in value]
    if isinstance(value, str):
        for old, new in moved.items():
            if _inside(value, old):
                return new + value[len(old) :]
    return value


def run_sweep(sweep: SweepConfig, view: View, *, places: Sequence[str] = ()) -> dict[str, Any]:
    """Do every job once, then write the table; finished jobs are passed over.

    Returns:
        What stands in `sweep.json`.
    """
    cells = plan_sweep(sweep, places)
    jobs = {output_of(job): job for cell in cells for job in cell.jobs}
    todo = [job for job in jobs.values() if not is_finished(output_of(job))]
    asked = sum(len(cell.jobs) for cell in cells)
    view.line(
        f"[bold]{sweep.title}[/]: {len(sweep.rows)} rows × {len(sweep.seeds)} seeds, {asked} jobs, "
        f"{len(jobs)} of them different, {len(jobs) - len(todo)} finished before"
    )
    settings = sweep.runtime or load_config(sweep.base, RunConfig, list(places)).runtime
    if todo:
        with connected(settings):
            for number, job in enumerate(todo, 1):
                perform(job.kind, job.config, settings, view, title=f"{number}/{len(todo)} {job.title}")
    seconds = sum(seconds_of(folder) or 0 for folder in jobs)
    return write_table(sweep, cells, view, seconds=seconds)


def write_table(sweep: SweepConfig, cells: Sequence[Cell], view: View, *, seconds: float) -> dict[str, Any]:
    """`sweep.json`, `sweep.md` and a page that compares the rows."""
    from umarvel_ray.evaluate.compare import (
        CompareInputs,
        Side,
        build_comparison,
        paired_difference,
        query_table,
    )

    scopes = ("local", "global")
    rows = []
    tables: dict[str, Any] = {}
    for row in sweep.rows:
        mine = [cell for cell in cells if cell.row.id == row.id]
        documents = [read_json(cell.results / "results.json") for cell in mine]
        values = {
            scope: [_mean(document, scope, sweep.mean_over) for document in documents] for scope in scopes
        }
        tables[row.id] = [query_table(cell.results) for cell in mine]
        rows.append(
            {
                "id": row.id,
                "title": row.title,
                "column": row.column,
                "set": row.set,
                "values": values,
                **{scope: _summary(found) for scope, found in values.items()},
                "paper": row.paper,
                "results": [str(cell.results) for cell in mine],
            }
        )
    by_id = {row["id"]: row for row in rows}
    claims = []
    for claim in sweep.claims:
        outcome = {"says": claim.says, "better": claim.better, "than": claim.than, "pools": {}}
        for scope in scopes:
            left, right = by_id[claim.better], by_id[claim.than]
            if left[scope] is None or right[scope] is None:
                continue
            found = paired_difference(tables[claim.better], tables[claim.than], scope, tasks=sweep.mean_over)
            printed = [by_id[name]["paper"].get(scope) for name in (claim.better, claim.than)]
            known = None not in printed
            outcome["pools"][scope] = found | {
                "paper": round(printed[0] - printed[1], 1) if known else None,
                "verdict": verdict(found["low"], found["high"]),
            }
        claims.append(outcome)
    document = {
        "title": sweep.title,
        "seeds": list(sweep.seeds),
        "seed_keys": list(sweep.seed_keys),
        "mean_over": list(sweep.mean_over) if sweep.mean_over else None,
        "seconds": round(seconds, 1),
        "rows": rows,
        "claims": claims,
    }
    output = Path(sweep.output)
    write_json(output / "sweep.json", document)
    text = _markdown(document)
    with atomic_write(output / "sweep.md") as file:
        file.write(text)
    first = [next(cell for cell in cells if cell.row.id == row.id) for row in sweep.rows]
    if len(first) > 1:
        sides = tuple(
            Side(title=f"{cell.row.id} {cell.row.title}", folder=str(cell.results)) for cell in first
        )
        build_comparison(CompareInputs(title=sweep.title, sides=sides), output)
    view.console.print(text, markup=False, soft_wrap=True)
    view.line(
        f"table: {output}/sweep.md, rows compared: {output}/compare.html, jobs together {short_time(seconds)}"
    )
    return document


def verdict(low: float, high: float) -> Verdict:
    """From the interval of the difference that the paper says is above 0."""
    return "agrees" if low > 0 else "disagrees" if high < 0 else "not told apart"


def _mean(document: Mapping[str, Any], scope: str, tasks: Sequence[str] | None) -> float | None:
    entries = [entry for name, entry in document["tasks"].items() if tasks is None or name in tasks]
    if not entries or not all(scope in entry for entry in entries):
        return None
    return float(np.mean([entry[scope][entry["headline"]] for entry in entries]))


def _summary(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if len(known) != len(values):
        return None
    spread = float(np.std(known, ddof=1)) if len(known) > 1 else 0.0
    return {"mean": float(np.mean(known)), "deviation": spread, "seeds": len(known)}


def _markdown(document: Mapping[str, Any]) -> str:
    def figure(summary: Mapping[str, float] | None) -> str:
        if summary is None:
            return "–"
        spread = f" ± {summary['deviation'] * 100:.1f}" if summary["seeds"] > 1 else ""
        return f"{summary['mean'] * 100:.1f}{spread}"

    seeds = len(document["seeds"])
    over = f"mean of {', '.join(document['mean_over'])}" if document["mean_over"] else "mean over the tasks"
    lines = [
        f"### {document['title']}",
        "",
        f"Headline hit@k in percent, {over}; ± is the deviation over {seeds} seeds of "
        f"`{', '.join(document['seed_keys'])}`.",
        "",
        "| row | local | global | paper, local | paper, global |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in document["rows"]:
        paper = [
            f"{row['paper'][scope]:g}" if scope in row["paper"] else "–" for scope in ("local", "global")
        ]
        cells = [f"{row['id']} {row['title']}", figure(row["local"]), figure(row["global"]), *paper]
        lines.append("| " + " | ".join(cells) + " |")
    if document["claims"]:
        lines += [
            "",
            "| the paper says | pool | difference here (95 %) | paper | here |",
            "| --- | --- | --- | ---: | --- |",
        ]
    for claim in document["claims"]:
        for scope, found in claim["pools"].items():
            paper = "–" if found["paper"] is None else f"{found['paper']:+g}"
            here = (
                f"{found['difference'] * 100:+.1f} ({found['low'] * 100:+.1f} … {found['high'] * 100:+.1f})"
            )
            lines.append(f"| {claim['says']} | {scope} | {here} | {paper} | {found['verdict']} |")
    return "\n".join(lines) + "\n"
