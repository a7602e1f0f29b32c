"""One page that tells what each stage brought: report.html for people, report.md for a README, report.json
for programs.

The page is a single file without scripts: plots are inline SVG, pictures are data URIs, and a content policy
forbids everything else. Whatever comes from data files is escaped.
"""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, Self, TypeGuard

from pydantic import Field, PositiveInt, model_validator

from umarvel_ray.artifacts import atomic_write, read_json, write_json
from umarvel_ray.config import Config, PathSetting
from umarvel_ray.data.mbeir import TASKS, Mbeir
from umarvel_ray.data.trec import Run
from umarvel_ray.errors import DataError
from umarvel_ray.evaluate.benchmark import (
    PoolKind,
    ResultsTable,
    TableRow,
    best_of,
    percent,
    results_table,
)
from umarvel_ray.evaluate.examples import Album, TaskExamples, task_examples
from umarvel_ray.evaluate.figures import curve, histogram, short_number
from umarvel_ray.evaluate.published import PUBLISHED

logger = logging.getLogger(__name__)

MINUS = "\N{MINUS SIGN}"


class StageInput(Config):
    """A stage that was evaluated."""

    name: str
    """Names the stage in `baseline`, `before` and `after`."""
    title: str
    """Names it on the page."""
    results: PathSetting
    """Its results.json."""
    runs: PathSetting | None = None
    """Folder of its `{task}.{local|global}.arrow`; needed only to show examples."""
    baseline: str | None = None
    """Name of the stage its gains are counted from; the stage above it unless given."""


class TrainingInput(Config):
    """A training to draw."""

    title: str
    metrics: PathSetting
    """Its metrics.jsonl: an object per step with `step`, `loss`, maybe `temperature` and `queries_per_s`."""


class MiningInput(Config):
    """A mining to draw."""

    title: str
    report: PathSetting
    """Its JSON report: `histograms` of `positives`, `kept` and `dropped` over `bin_edges`, and `counts`."""


class ReportInputs(Config):
    """What the page is made of; every part but the stages may be left out."""

    title: str
    introduction: str = ""
    """A sentence or two under the headline."""
    stages: tuple[StageInput, ...] = Field(min_length=1)
    training: tuple[TrainingInput, ...] = ()
    mining: tuple[MiningInput, ...] = ()
    data: PathSetting | None = None
    """Root of the M-BEIR data that was searched; without it no examples are shown."""
    split: Literal["val", "test"] = "test"
    before: str | None = None
    """Stage to compare from; the first unless given."""
    after: str | None = None
    """Stage to compare to; the last unless given."""
    examples_per_outcome: PositiveInt = 1
    """Queries shown per task of each kind: rose most, fell most, missed by both."""
    published: bool = False
    """Show published figures too. They compare only with results on M-BEIR itself."""
    facts: dict[str, Any] = Field(default_factory=dict)
    """For the foot of the page: seed, machine, and groups such as `{"wall time": {"train 1a": "2 min"}}`."""

    @model_validator(mode="after")
    def _stages_exist(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names repeat: {', '.join(names)}. Give each its own")
        asked = [self.before, self.after, *(stage.baseline for stage in self.stages)]
        if unknown := [name for name in asked if name is not None and name not in names]:
            raise ValueError(f"no stage is called {unknown[0]!r}. Stages: {', '.join(names)}")
        return self

    def stage_index(self, name: str | None, *, default: int) -> int:
        """Place of a stage in `stages`."""
        return default if name is None else [stage.name for stage in self.stages].index(name)


@dataclass(frozen=True)
class Cell:
    """A figure of the table as it is printed.

    `change` is counted from the baseline, in points; `tone` is "up" or "down" where it exceeds one standard
    error of the difference and "flat" where not.
    """

    text: str
    change: str
    tone: Literal["up", "down", "flat", ""]
    best: bool


@dataclass(frozen=True)
class Curves:
    """One training: its plots, and its story in numbers."""

    title: str
    summary: str
    loss: str
    temperature: str | None
    steps: int


@dataclass(frozen=True)
class Mining:
    """One mining: its plot, the filter, and its counts in the order of its report."""

    title: str
    rule: str
    plot: str | None
    counts: tuple[tuple[str, str], ...]


def build_report(inputs: ReportInputs, output: Path) -> dict[str, Any]:
    """Write report.json, report.md and report.html into `output`.

    Args:
        inputs: What to tell.
        output: A folder; made where it is missing.

    Returns:
        What stands in report.json.

    Raises:
        DataError: An input is missing, broken, or of other data than the rest.
    """
    documents = [_read_object(stage.results) for stage in inputs.stages]
    table = results_table(
        [{**document, "stage": stage.title} for document, stage in _pairs(documents, inputs)]
    )
    first = inputs.stage_index(inputs.before, default=0)
    last = inputs.stage_index(inputs.after, default=len(inputs.stages) - 1)
    baselines = [
        inputs.stage_index(stage.baseline, default=index - 1) for index, stage in enumerate(inputs.stages)
    ]
    curves = [_curves(training) for training in inputs.training]
    minings = [_mining(mining) for mining in inputs.mining]
    album = Album()
    examples = _examples(inputs, documents, table, first, last, album)
    headline = _headline(table, first, last)
    flags = [
        f"{stage.title}: {flag}"
        for document, stage in _pairs(documents, inputs)
        for flag in document["flags"]
    ]
    summary = {
        "title": inputs.title,
        "headline": headline,
        "metric_definition": documents[0]["metric_definition"],
        "same_tasks": table.same_tasks,
        "stages": [
            {
                "name": stage.name,
                "title": stage.title,
                "baseline": inputs.stages[base].name if base >= 0 else None,
                "mean": document["mean"],
                "checkpoint": document["checkpoint"],
            }
            for (document, stage), base in zip(_pairs(documents, inputs), baselines, strict=True)
        ],
        "tasks": {
            row.task.name: {
                "kind": row.task.kind,
                "headline": row.metric,
                "num_queries": row.num_queries,
                **{kind: list(values) for kind, values in row.values.items()},
            }
            for row in table.rows
        },
        "flags": flags,
        "training": [{"title": item.title, "steps": item.steps, "summary": item.summary} for item in curves],
        "mining": [{"title": item.title, "rule": item.rule, "counts": dict(item.counts)} for item in minings],
        "compared": {"before": inputs.stages[first].name, "after": inputs.stages[last].name},
        "examples": [_example_record(task) for task in examples],
        "unreadable_pictures": album.unreadable,
        "facts": inputs.facts,
    }
    page = _render(
        inputs=inputs,
        headline=headline,
        definition=documents[0]["metric_definition"],
        table=table,
        groups=_groups(table, baselines),
        mean_cells=_mean_cells(table, baselines),
        baselines=baselines,
        tiles=_tiles(table, baselines),
        flags=flags,
        curves=curves,
        minings=minings,
        examples=examples,
        before=inputs.stages[first].title,
        after=inputs.stages[last].title,
        unreadable=len(album.unreadable),
        published=_published(table) if inputs.published else [],
        facts=_fact_groups(inputs.facts),
    )
    output = Path(output)
    write_json(output / "report.json", summary)
    with atomic_write(output / "report.md") as file:
        file.write(_markdown(inputs, table, headline, baselines, minings, flags))
    with atomic_write(output / "report.html") as file:
        file.write(page)
    return summary


def _pairs(
    documents: Sequence[Mapping[str, Any]], inputs: ReportInputs
) -> list[tuple[Mapping[str, Any], StageInput]]:
    return list(zip(documents, inputs.stages, strict=True))


def _read_object(path: str) -> dict[str, Any]:
    try:
        value = read_json(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Finish the job that writes it."
        ) from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds {type(value).__name__}, no object. Give the file that the job wrote.")
    return value


# Figures


def _standard_error(row: TableRow, one: float, other: float) -> float:
    """Of the difference of two shares over the same queries, as if they were drawn apart: an upper bound.

    One hit and one miss are added to each share, or a share of 0 or 1 would claim to be exact.
    """
    num = row.num_queries + 2
    smoothed = [(share * row.num_queries + 1) / num for share in (one, other)]
    return math.sqrt(sum(share * (1 - share) for share in smoothed) / num)


def _cells(
    values: Sequence[float | None], baselines: Sequence[int], standard_errors: Sequence[float | None]
) -> list[Cell]:
    best = best_of(values)
    cells = []
    for value, base, error in zip(values, baselines, standard_errors, strict=True):
        origin = values[base] if base >= 0 else None
        change, tone = "", ""
        if value is not None and origin is not None and error is not None:
            change = _signed(value - origin)
            tone = "flat" if abs(value - origin) <= error else "up" if value > origin else "down"
        is_best = value is not None and round(value * 100, 1) == best
        cells.append(Cell(percent(value), change, tone, is_best))
    return cells


def _row_cells(row: TableRow, kind: PoolKind, baselines: Sequence[int]) -> list[Cell]:
    values = row.values[kind]
    errors = [_row_error(row, kind, index, base) for index, base in enumerate(baselines)]
    return _cells(values, baselines, errors)


def _row_error(row: TableRow, kind: PoolKind, index: int, base: int) -> float | None:
    one, other = row.values[kind][index], row.values[kind][base] if base >= 0 else None
    return None if one is None or other is None else _standard_error(row, one, other)


def _mean_cells(table: ResultsTable, baselines: Sequence[int]) -> dict[PoolKind, list[Cell]]:
    cells: dict[PoolKind, list[Cell]] = {}
    for kind in table.pools:
        errors: list[float | None] = []
        for index, base in enumerate(baselines):
            of_rows = [_row_error(row, kind, index, base) for row in table.rows]
            known = [error for error in of_rows if error is not None]
            complete = len(known) == len(of_rows)
            errors.append(math.sqrt(sum(error**2 for error in known)) / len(known) if complete else None)
        cells[kind] = _cells(table.means[kind], baselines, errors)
    return cells


def _signed(difference: float) -> str:
    text = f"{abs(difference) * 100:.1f}"
    return "±0.0" if text == "0.0" else f"{'+' if difference > 0 else MINUS}{text}"


def _groups(table: ResultsTable, baselines: Sequence[int]) -> list[dict[str, Any]]:
    """Rows by kind of retrieval, as the paper groups them."""
    groups: list[dict[str, Any]] = []
    for row in table.rows:
        if not groups or groups[-1]["kind"] != row.task.kind:
            groups.append({"kind": row.task.kind, "rows": []})
        cells = {kind: _row_cells(row, kind, baselines) for kind in table.pools}
        groups[-1]["rows"].append({"row": row, "cells": cells})
    return groups


def _tiles(table: ResultsTable, baselines: Sequence[int]) -> list[dict[str, Any]]:
    cells = _mean_cells(table, baselines)
    return [
        {
            "title": title,
            "baseline": table.stages[baselines[index]] if baselines[index] >= 0 else None,
            "pools": [
                {"kind": kind, "cell": cells[kind][index], "share": table.means[kind][index] or 0.0}
                for kind in table.pools
            ],
        }
        for index, title in enumerate(table.stages)
    ]


def _headline(table: ResultsTable, first: int, last: int) -> str:
    """One sentence: where the last stage stands, and how far it came."""
    where = {"local": "in the pools of the tasks", "global": "in the pool of all tasks together"}
    parts = []
    for kind in table.pools:
        value, origin = table.means[kind][last], table.means[kind][first]
        if value is None:
            continue
        part = f"{value * 100:.1f} % of the queries {where[kind]}"
        if first != last and origin is not None and table.same_tasks:
            part += f" ({_signed(value - origin)} points)"
        parts.append(part)
    if not parts:
        return f"{table.stages[last]} was not measured on all tasks, so it has no mean."
    num = len(table.rows)
    over = "on one task" if num == 1 else f"on average over {num} tasks"
    since = f", counted from {table.stages[first]}" if first != last else ""
    return f"{table.stages[last]} finds a right answer for {' and '.join(parts)}, {over}{since}."


def _published(table: ResultsTable) -> list[dict[str, Any]]:
    measured = [row.task for row in table.rows]
    return [
        {
            "kind": kind,
            "systems": [result for result in PUBLISHED if result.pool == kind],
            "tasks": measured,
            "all_tasks": len(measured) == len(TASKS),
        }
        for kind in table.pools
    ]


# Training and mining


def _curves(training: TrainingInput) -> Curves:
    entries = _read_metrics(training.metrics)
    loss = _series(entries, "loss")
    if not loss:
        raise DataError(f"{training.metrics}: no step has a loss that is a number. Train first.")
    temperature = _series(entries, "temperature")
    rates = [rate for _, rate in _series(entries, "queries_per_s")]
    words = [
        f"loss {_tail(loss[:10]):#.3g} → {_tail(loss):#.3g}",
        f"{len(entries)} steps",
        *([f"{short_number(round(median(rates)))} queries/s"] if rates else []),
    ]
    learned = len({value for _, value in temperature}) > 1
    if temperature and not learned:
        words.append(f"temperature fixed at {short_number(temperature[0][1])}")
    return Curves(
        title=training.title,
        summary=" · ".join(words),
        loss=curve(*zip(*loss, strict=True), label=f"Loss of {training.title} over its steps"),
        temperature=curve(
            *zip(*temperature, strict=True),
            label=f"Temperature of {training.title} over its steps",
            height=120,
        )
        if learned
        else None,
        steps=len(entries),
    )


def _read_metrics(path: str) -> list[dict[str, Any]]:
    entries = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    entry = json.loads(line)
                    entries.append({**entry, "step": float(entry["step"])})
                except (ValueError, KeyError, TypeError):
                    raise DataError(
                        f"{path}:{number}: not an object with a step. Remove the line or resume the training."
                    ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Train first.") from None
    return sorted(entries, key=lambda entry: entry["step"])


def _series(entries: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the entries that have a finite one."""
    found = ((float(entry["step"]), entry.get(key)) for entry in entries)
    return [(step, float(value)) for step, value in found if _is_number(value)]


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _tail(series: Sequence[tuple[float, float]]) -> float:
    """Median of the last ten: a single batch's loss says little."""
    return median(value for _, value in series[-10:])


def _mining(mining: MiningInput) -> Mining:
    report = _read_object(mining.report)
    histograms, threshold = report.get("histograms"), report.get("threshold")
    plot = None
    if histograms:
        groups = {name: histograms[name] for name in ("positives", "kept", "dropped") if name in histograms}
        plot = histogram(
            histograms["bin_edges"],
            groups,
            stacked=[name for name in ("kept", "dropped") if name in groups],
            marks={f"filter {short_number(threshold)}": threshold} if _is_number(threshold) else {},
            label=f"Similarities of positives, kept and dropped candidates in {mining.title}",
            x_label="cosine",
        )
    return Mining(
        title=mining.title,
        rule=str(report.get("rule") or ""),
        plot=plot,
        counts=tuple(_flat(report.get("counts", {}))),
    )


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested counts as (words, number), in their order."""
    found: list[tuple[str, str]] = []
    for key, item in value.items():
        words = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(item, Mapping):
            found += _flat(item, f"{words}: ")
        else:
            found.append((words, _fact(item)))
    return found


def _fact(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_fact, value))
    return str(value)


def _fact_groups(facts: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Plain facts first, then one group per nested mapping."""
    plain = [(name, _fact(value)) for name, value in facts.items() if not isinstance(value, Mapping)]
    groups = [(name, _flat(value)) for name, value in facts.items() if isinstance(value, Mapping)]
    return [*([("This run", plain)] if plain else []), *groups]


# Examples


def _examples(
    inputs: ReportInputs,
    documents: Sequence[Mapping[str, Any]],
    table: ResultsTable,
    first: int,
    last: int,
    album: Album,
) -> list[TaskExamples]:
    runs_before, runs_after = inputs.stages[first].runs, inputs.stages[last].runs
    if inputs.data is None or runs_before is None or runs_after is None or first == last:
        return []
    mbeir = Mbeir(inputs.data)
    found = []
    for row in table.rows:
        measured = [documents[index]["tasks"].get(row.task.name, {}) for index in (first, last)]
        shared: list[PoolKind] = [kind for kind in table.pools if all(kind in entry for entry in measured)]
        if not shared:
            continue  # the table shows which of the two was not measured
        pool = shared[0]
        name = f"{row.task.name}.{pool}.arrow"
        found.append(
            task_examples(
                row.task,
                Run.read(Path(runs_before) / name),
                Run.read(Path(runs_after) / name),
                mbeir=mbeir,
                split=inputs.split,
                pool=pool,
                album=album,
                each=inputs.examples_per_outcome,
            )
        )
    if album.unreadable:
        logger.warning("report: pictures that could not be read and are left out: %d", len(album.unreadable))
    return found


def _example_record(task: TaskExamples) -> dict[str, Any]:
    return {
        "task": task.task.name,
        "rose": task.num_rose,
        "fell": task.num_fell,
        "same": task.num_same,
        "queries": [
            {
                **asdict(example.choice),
                "retrieved_before": [item.name for item in example.before],
                "retrieved_after": [item.name for item in example.after],
            }
            for example in task.examples
        ],
    }


# Writing


def _render(**context: Any) -> str:
    import jinja2
    from markupsafe import Markup

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["svg"] = Markup  # only for what figures.py drew, which escapes what it is given
    environment.globals["rank_word"] = lambda rank, depth: str(rank) if rank else f"past {depth}"
    return environment.get_template("report.html.jinja").render(context)


def _markdown(
    inputs: ReportInputs,
    table: ResultsTable,
    headline: str,
    baselines: Sequence[int],
    minings: Sequence[Mining],
    flags: Sequence[str],
) -> str:
    lines = [f"# {_cell(inputs.title)}", "", _cell(headline), ""]
    if inputs.introduction:
        lines += [_cell(inputs.introduction), ""]
    lines += [f"- **At chance:** {_cell(flag)}" for flag in flags] + [""] * bool(flags)
    columns = [(kind, index) for kind in table.pools for index in range(len(table.stages))]
    names = [_cell(f"{table.stages[index]}, {kind}") for kind, index in columns]
    lines += [_line(["kind", "task", "metric", *names]), _line(["---"] * 3 + ["---:"] * len(names))]

    def figures(cells: Mapping[PoolKind, Sequence[Cell]]) -> list[str]:
        shown = [cell for kind in table.pools for cell in cells[kind]]
        return [f"**{cell.text}**" if cell.best else cell.text for cell in shown]

    for group in _groups(table, baselines):
        for entry in group["rows"]:
            row = entry["row"]
            lines.append(_line([row.task.kind, row.task.name, row.metric, *figures(entry["cells"])]))
    means = figures(_mean_cells(table, baselines))
    lines += [_line([f"mean of {len(table.rows)}", "", "", *means]), ""]
    lines += [
        "Percent of queries with a right candidate among the first k; the best of each row in bold.",
        "",
    ]
    for mining in minings:
        lines += [f"## {_cell(mining.title)}", ""]
        lines += [f"Filter: {_cell(mining.rule)}.", ""] if mining.rule else []
        lines += [f"- {_cell(name)}: {_cell(value)}" for name, value in mining.counts] + [""]
    for title, facts in _fact_groups(inputs.facts):
        lines += [
            f"## {_cell(title)}",
            "",
            *(f"- {_cell(name)}: {_cell(value)}" for name, value in facts),
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(text: str) -> str:
    """Plain words inside Markdown: one line, nothing read as a table, a tag, a link or emphasis."""
    return re.sub(r"([\\|<>\[\]*`])", r"\\\1", " ".join(text.split()))
