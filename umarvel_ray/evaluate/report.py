"""One page that tells what each stage brought: report.html for people, report.md for a README, report.json
for programs.

The page is a single file: plots are inline SVG, pictures are data URIs, one short script filters the
examples,
and a content policy forbids everything else. Whatever comes from data files is escaped.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from umarvel_ray.artifacts import atomic_write, write_json
from umarvel_ray.config import Config, PathSetting
from umarvel_ray.data.mbeir import TASKS, Mbeir
from umarvel_ray.data.trec import Run
from umarvel_ray.evaluate.benchmark import PoolKind, ResultsTable, results_table
from umarvel_ray.evaluate.changes import Cell, mean_cells, row_cells, signed
from umarvel_ray.evaluate.examples import Album, TaskExamples, task_examples
from umarvel_ray.evaluate.history import (
    FusionInput,
    Mining,
    MiningInput,
    Sensitivity,
    TrainingInput,
    draw_fusion,
    draw_mining,
    draw_training,
    fact_groups,
    read_object,
)
from umarvel_ray.evaluate.panels import error_panels, score_panels
from umarvel_ray.evaluate.published import PUBLISHED
from umarvel_ray.storage import Place, at

logger = logging.getLogger(__name__)


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


class ReportInputs(Config):
    """What the page is made of; every part but the stages may be left out."""

    title: str
    introduction: str = ""
    """A sentence or two under the headline."""
    stages: tuple[StageInput, ...] = Field(min_length=1)
    training: tuple[TrainingInput, ...] = ()
    mining: tuple[MiningInput, ...] = ()
    fusion: tuple[FusionInput, ...] = ()
    """Scoring jobs whose alpha was tuned."""
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


def build_report(inputs: ReportInputs, output: Place) -> dict[str, Any]:
    """Write report.json, report.md and report.html into `output`.

    Args:
        inputs: What to tell.
        output: A folder; made where it is missing.

    Returns:
        What stands in report.json.

    Raises:
        DataError: An input is missing, broken, or of other data than the rest.
    """
    documents = [read_object(stage.results) for stage in inputs.stages]
    table = results_table(
        [{**document, "stage": stage.title} for document, stage in _pairs(documents, inputs)]
    )
    first = inputs.stage_index(inputs.before, default=0)
    last = inputs.stage_index(inputs.after, default=len(inputs.stages) - 1)
    baselines = [
        inputs.stage_index(stage.baseline, default=index - 1) for index, stage in enumerate(inputs.stages)
    ]
    curves = [draw_training(training) for training in inputs.training]
    minings = [draw_mining(mining) for mining in inputs.mining]
    fusions = [draw_fusion(fusion) for fusion in inputs.fusion]
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
            row.name: {
                "kind": row.kind,
                "headline": row.metric,
                "num_queries": row.num_queries,
                **{kind: list(values) for kind, values in row.values.items()},
            }
            for row in table.rows
        },
        "flags": flags,
        "training": [{"title": item.title, "steps": item.steps, "summary": item.summary} for item in curves],
        "mining": [{"title": item.title, "rule": item.rule, "counts": dict(item.counts)} for item in minings],
        "fusion": [{"title": item.title, "summary": item.summary} for item in fusions],
        "compared": {"before": inputs.stages[first].name, "after": inputs.stages[last].name},
        "examples": [_example_record(task) for task in examples],
        "unreadable_pictures": album.unreadable,
        "facts": inputs.facts,
    }
    page = render(
        "report.html.jinja",
        inputs=inputs,
        headline=headline,
        definition=documents[0]["metric_definition"],
        table=table,
        groups=_groups(table, baselines),
        mean_cells=mean_cells(table, baselines),
        baselines=baselines,
        tiles=_tiles(table, baselines),
        flags=flags,
        curves=curves,
        minings=minings,
        fusions=fusions,
        examples=examples,
        before=inputs.stages[first].title,
        after=inputs.stages[last].title,
        unreadable=len(album.unreadable),
        published=_published(table) if inputs.published else [],
        facts=fact_groups(inputs.facts),
        scores=score_panels(documents, table.stages, table.pools[0]),
        errors=error_panels(documents, table.stages),
    )
    output = at(output)
    write_json(output / "report.json", summary)
    with atomic_write(output / "report.md") as file:
        file.write(_markdown(inputs, table, headline, baselines, minings, fusions, flags))
    with atomic_write(output / "report.html") as file:
        file.write(page)
    return summary


def _pairs(
    documents: Sequence[Mapping[str, Any]], inputs: ReportInputs
) -> list[tuple[Mapping[str, Any], StageInput]]:
    return list(zip(documents, inputs.stages, strict=True))


def _groups(table: ResultsTable, baselines: Sequence[int]) -> list[dict[str, Any]]:
    """Rows by kind of retrieval, as the paper groups them."""
    groups: list[dict[str, Any]] = []
    for row in table.rows:
        if not groups or groups[-1]["kind"] != row.kind:
            groups.append({"kind": row.kind, "rows": []})
        cells = {kind: row_cells(row, kind, baselines) for kind in table.pools}
        groups[-1]["rows"].append({"row": row, "cells": cells})
    return groups


def _tiles(table: ResultsTable, baselines: Sequence[int]) -> list[dict[str, Any]]:
    cells = mean_cells(table, baselines)
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
    where = {
        "local": "in the pools of the tasks",
        "pair": "in the pool of a pair of data sets",
        "global": "in the pool of all tasks together",
    }
    parts = []
    for kind in table.pools:
        value, origin = table.means[kind][last], table.means[kind][first]
        if value is None:
            continue
        part = f"{value * 100:.1f} % of the queries {where[kind]}"
        if first != last and origin is not None and table.same_tasks:
            part += f" ({signed(value - origin)} points)"
        parts.append(part)
    if not parts:
        return f"{table.stages[last]} was not measured on all tasks, so it has no mean."
    num = len(table.rows)
    over = "on one task" if num == 1 else f"on average over {num} tasks"
    since = f", counted from {table.stages[first]}" if first != last else ""
    return f"{table.stages[last]} finds a right answer for {' and '.join(parts)}, {over}{since}."


def _published(table: ResultsTable) -> list[dict[str, Any]]:
    measured = [row.task for row in table.rows if row.task is not None]
    return [
        {
            "kind": kind,
            "systems": [result for result in PUBLISHED if result.pool == kind],
            "tasks": measured,
            "all_tasks": len(measured) == len(TASKS),
        }
        for kind in table.pools
    ]


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
        if row.task is None:
            continue
        measured = [documents[index]["tasks"].get(row.name, {}) for index in (first, last)]
        shared: list[PoolKind] = [kind for kind in table.pools if all(kind in entry for entry in measured)]
        if not shared:
            continue  # the table shows which of the two was not measured
        pool = shared[0]
        name = f"{row.name}.{pool}.arrow"
        found.append(
            task_examples(
                row.task,
                Run.read(at(runs_before) / name),
                Run.read(at(runs_after) / name),
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


def render(template: str, **context: Any) -> str:
    """A page of this room. Its one script filters what is shown; the content policy names it by its hash."""
    import base64
    import hashlib

    import jinja2
    from markupsafe import Markup

    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (folder / "filter.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.filters["svg"] = Markup  # only for what figures.py drew, which escapes what it is given
    environment.globals["rank_word"] = lambda rank, depth: str(rank) if rank else f"past {depth}"
    environment.globals["script"] = Markup(script)
    environment.globals["script_hash"] = f"sha256-{digest}"
    return environment.get_template(template).render(context)


def _markdown(
    inputs: ReportInputs,
    table: ResultsTable,
    headline: str,
    baselines: Sequence[int],
    minings: Sequence[Mining],
    fusions: Sequence[Sensitivity],
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
            lines.append(_line([row.kind, row.name, row.metric, *figures(entry["cells"])]))
    means = figures(mean_cells(table, baselines))
    lines += [_line([f"mean of {len(table.rows)}", "", "", *means]), ""]
    lines += [
        "Percent of queries with a right candidate among the first k; the best of each row in bold.",
        "",
    ]
    for mining in minings:
        lines += [f"## {_cell(mining.title)}", ""]
        lines += [f"Filter: {_cell(mining.rule)}.", ""] if mining.rule else []
        lines += [f"- {_cell(name)}: {_cell(value)}" for name, value in mining.counts] + [""]
    for fusion in fusions:
        lines += [f"## Weight of the recall, {_cell(fusion.title)}", "", f"{_cell(fusion.summary)}.", ""]
    for title, facts in fact_groups(inputs.facts):
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
