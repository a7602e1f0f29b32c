"""Evaluated systems side by side: paired differences with intervals, which queries changed, and what differs
in how they were made. One self-contained page, compare.html, and compare.json for programs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from umarvel_ray.artifacts import atomic_write, changed_settings, write_json
from umarvel_ray.config import Config, PathSetting
from umarvel_ray.data.mbeir import TASK_BY_NAME, Mbeir
from umarvel_ray.data.trec import Run
from umarvel_ray.errors import DataError
from umarvel_ray.evaluate.benchmark import ResultsTable, percent, results_table
from umarvel_ray.evaluate.changes import signed
from umarvel_ray.evaluate.examples import Album, TaskExamples, task_examples
from umarvel_ray.evaluate.figures import ticks
from umarvel_ray.evaluate.history import fact_text, read_object
from umarvel_ray.evaluate.panels import error_panels, score_panels
from umarvel_ray.evaluate.published import PUBLISHED, PUBLISHED_SETS, PublishedResult
from umarvel_ray.storage import Place

QueryTable = dict[tuple[str, str], dict[str, tuple[float, int]]]
"""{(task, pool): {qid: (headline, rank of the first right candidate)}}."""
_RESAMPLES = 1000
_CONFIDENCE = 0.95
_SHOWN_CHANGES = 60
"""Changed queries listed per task and side, those that moved most."""


class Side(Config):
    """One evaluated system."""

    title: str | None = None
    """By default the stage's name in its results."""
    folder: PathSetting
    """Of an evaluation job."""


class CompareInputs(Config):
    """What is compared."""

    title: str = "Comparison"
    introduction: str = ""
    sides: tuple[Side, ...] = Field(min_length=2)
    baseline: NonNegativeInt = 0
    """Place of the side that differences are counted from."""
    pictures: bool = True
    """Show what was retrieved where the data is still where it was evaluated."""
    examples_per_outcome: PositiveInt = 1
    published: bool = False
    """Show published figures too. They compare only with results on the same public data."""


@dataclass(frozen=True)
class Difference:
    """Of one row against the baseline.

    `significant` where the interval leaves out 0.
    """

    text: str
    value: float
    low: float
    high: float
    up: int
    down: int

    @property
    def tone(self) -> str:
        """For the page."""
        return "up" if self.low > 0 else "down" if self.high < 0 else "flat"


def query_table(folder: str | Path) -> QueryTable:
    """Each query's figures, as the evaluation wrote them.

    Raises:
        DataError: The file is missing or no such table.
    """
    import pyarrow as pa

    path = Path(folder) / "queries.arrow"
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        columns = [table.column(name).to_pylist() for name in ("task", "pool", "qid", "value", "rank")]
    except (OSError, KeyError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: no table of queries ({reason}). Run the evaluation again.") from None
    found: QueryTable = {}
    for task, pool, qid, value, rank in zip(*columns, strict=True):
        found.setdefault((task, pool), {})[qid] = (value, rank)
    return found


def paired_difference(
    left: Sequence[QueryTable],
    right: Sequence[QueryTable],
    pool: str,
    *,
    tasks: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Difference of the means over tasks, with a bootstrap interval over seeds and queries.

    Queries are drawn within each task, the same for both sides; seeds, where there are several, are drawn in
    pairs. The interval holds the middle 95 % of 1,000 draws.

    Args:
        left: One table per seed.
        right: As many, or one.
        pool: `"local"`, `"pair"` or `"global"`.
        tasks: Those of the mean; all that both sides have by default.
        seed: Of the draws.

    Raises:
        DataError: The sides have no task in common, or other queries.
    """
    names = [task for task, scope in left[0] if scope == pool and (task, pool) in right[0]]
    names = [task for task in names if tasks is None or task in tasks]
    if not names:
        raise DataError(
            f"comparison: no task was measured by both sides in the {pool} pool. Evaluate the same."
        )
    num_seeds = max(len(left), len(right))
    pairs = [(left[n % len(left)], right[n % len(right)]) for n in range(num_seeds)]
    differences = []
    for task in names:
        qids = list(pairs[0][0][task, pool])
        for one, other in pairs:
            if set(one[task, pool]) != set(qids) or set(other[task, pool]) != set(qids):
                raise DataError(
                    f"comparison: {task}, {pool} pool: the sides were measured on other queries. Evaluate "
                    "both on the same data."
                )
        differences.append(
            np.array(
                [
                    [one[task, pool][qid][0] - other[task, pool][qid][0] for qid in qids]
                    for one, other in pairs
                ]
            )
        )
    rng = np.random.default_rng(seed)
    draws = np.empty(_RESAMPLES)
    for number in range(_RESAMPLES):
        drawn = rng.integers(num_seeds, size=num_seeds)
        means = []
        for difference_SQ in differences:
            mean_Q = difference_SQ[drawn].mean(axis=0) if num_seeds > 1 else difference_SQ[0]
            means.append(mean_Q[rng.integers(len(mean_Q), size=len(mean_Q))].mean())
        draws[number] = np.mean(means)
    tail = (1 - _CONFIDENCE) / 2
    return {
        "difference": float(np.mean([difference_SQ.mean() for difference_SQ in differences])),
        "low": float(np.quantile(draws, tail)),
        "high": float(np.quantile(draws, 1 - tail)),
        "tasks": len(names),
        "queries": int(sum(difference_SQ.shape[1] for difference_SQ in differences)),
    }


def build_comparison(inputs: CompareInputs, output: Place) -> dict[str, Any]:
    """Write compare.json and compare.html into `output`.

    Raises:
        DataError: A side is missing, or was measured on other data.
    """
    documents = [read_object(str(Path(side.folder) / "results.json")) for side in inputs.sides]
    titles = [side.title or document["stage"] for side, document in zip(inputs.sides, documents, strict=True)]
    if inputs.baseline >= len(titles):
        raise DataError(f"comparison: baseline {inputs.baseline} of {len(titles)} sides. Count from 0.")
    _same_data(documents, titles)
    table = results_table(
        [{**document, "stage": title} for document, title in zip(documents, titles, strict=True)]
    )
    tables = [query_table(side.folder) for side in inputs.sides]
    base = inputs.baseline
    differences = {
        (row.name, pool, place): _row_difference(tables[place], tables[base], row.name, pool)
        for row in table.rows
        for pool in table.pools
        for place in range(len(titles))
        if place != base and (row.name, pool) in tables[place] and (row.name, pool) in tables[base]
    }
    means = {
        (pool, place): paired_difference([tables[place]], [tables[base]], pool)
        for pool in table.pools
        for place in range(len(titles))
        if place != base and any((row.name, pool, place) in differences for row in table.rows)
    }
    album = Album()
    changed = _changed(table, tables, titles, base)
    examples = _examples(inputs, documents, table, album) if inputs.pictures else {}
    settings = _setting_differences(documents)
    summary = {
        "title": inputs.title,
        "sides": [
            {
                "title": title,
                "folder": side.folder,
                "checkpoint": document["checkpoint"],
                "mean": document["mean"],
            }
            for title, side, document in zip(titles, inputs.sides, documents, strict=True)
        ],
        "baseline": titles[base],
        "metric_definition": documents[0]["metric_definition"],
        "interval": f"paired bootstrap over queries, {_RESAMPLES} draws, {_CONFIDENCE:.0%}",
        "means": [{"pool": pool, "side": titles[place], **found} for (pool, place), found in means.items()],
        "tasks": [
            {
                "task": task,
                "pool": pool,
                "side": titles[place],
                "difference": found.value,
                "low": found.low,
                "high": found.high,
                "queries_up": found.up,
                "queries_down": found.down,
            }
            for (task, pool, place), found in differences.items()
        ],
        "settings_that_differ": settings,
        "unreadable_pictures": album.unreadable,
    }
    from umarvel_ray.evaluate.report import render

    page = render(
        "compare.html.jinja",
        inputs=inputs,
        titles=titles,
        base=base,
        documents=documents,
        table=table,
        headline=_headline(table, titles, base, means),
        definition=documents[0]["metric_definition"],
        differences=differences,
        means=means,
        mean_texts={key: _interval(found) for key, found in means.items()},
        forests=_forests(table, titles, base, differences, means),
        published=_published(table) if inputs.published else {},
        panels={pool: score_panels(documents, titles, pool) for pool in table.pools},
        errors=error_panels(documents, titles),
        changed=changed,
        examples=examples,
        flags=[f"{title}: {flag}" for title, d in zip(titles, documents, strict=True) for flag in d["flags"]],
        settings=settings,
        percent=percent,
        checks=_checks(table, documents, titles),
    )
    output = Path(output)
    write_json(output / "compare.json", summary)
    with atomic_write(output / "compare.html") as file:
        file.write(page)
    return summary


def _same_data(documents: Sequence[Mapping[str, Any]], titles: Sequence[str]) -> None:
    """Refuse pools and judgements of another content under the same name."""
    first = documents[0]["settings"].get("data", {})
    for document, title in zip(documents[1:], titles[1:], strict=True):
        data = document["settings"].get("data", {})
        for key in ("pools", "qrels", "parts"):
            known, here = first.get(key) or {}, data.get(key) or {}
            if odd := [name for name in known if name in here and known[name] != here[name]]:
                raise DataError(
                    f"comparison: {len(odd)} {key} differ in content between {titles[0]} and {title} (first: "
                    f"{odd[0]}). Evaluate both on the same version of the data."
                )


def _row_difference(left: QueryTable, right: QueryTable, task: str, pool: str) -> Difference:
    found = paired_difference([left], [right], pool, tasks=[task])
    moves = [left[task, pool][qid][0] - value for qid, (value, _) in right[task, pool].items()]
    return Difference(
        text=signed(found["difference"]),
        value=found["difference"],
        low=found["low"],
        high=found["high"],
        up=sum(move > 0 for move in moves),
        down=sum(move < 0 for move in moves),
    )


def _interval(found: Mapping[str, float]) -> str:
    return f"{signed(found['difference'])} ({signed(found['low'])} … {signed(found['high'])})"


def _headline(
    table: ResultsTable, titles: Sequence[str], base: int, means: Mapping[tuple[str, int], Mapping[str, Any]]
) -> str:
    parts = []
    for (pool, place), found in means.items():
        clear = found["low"] > 0 or found["high"] < 0
        words = "ahead of" if found["difference"] > 0 else "behind"
        told = f"{abs(found['difference']) * 100:.1f} points {words}" if clear else "not told apart from"
        parts.append(
            (abs(found["difference"]), f"{titles[place]} is {told} {titles[base]} in the {pool} pool")
        )
    parts.sort(key=lambda part: -part[0])
    more = f"; {len(parts) - 3} more below" if len(parts) > 3 else ""
    return "; ".join(words for _, words in parts[:3]) + more + "."


def _forests(
    table: ResultsTable,
    titles: Sequence[str],
    base: int,
    differences: Mapping[tuple[str, str, int], Difference],
    means: Mapping[tuple[str, int], Mapping[str, Any]],
) -> list[dict[str, str]]:
    """Per side and pool: each task's difference with its interval, the mean last."""
    found = []
    for (pool, place), mean in means.items():
        rows = [
            (row.name, differences[row.name, pool, place].value, differences[row.name, pool, place].low,
             differences[row.name, pool, place].high)
            for row in table.rows
            if (row.name, pool, place) in differences
        ]  # fmt: skip
        rows.append(("mean", mean["difference"], mean["low"], mean["high"]))
        title = f"{titles[place]} against {titles[base]}, {pool} pool"
        found.append({"title": title, "plot": forest(rows, label=title)})
    return found


def forest(rows: Sequence[tuple[str, float, float, float]], *, label: str) -> str:
    """Differences in points with intervals, one line each, as inline SVG; the last row is set apart."""
    left, right, line, top = 138, 14, 17, 8
    width, height = 360, top + line * len(rows) + 24
    reach = max(0.01, *(abs(value) for _, *values in rows for value in values)) * 1.08

    def x(value: float) -> float:
        return left + (value + reach) / (2 * reach) * (width - left - right)

    parts = [f'<line class="axis" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{top}" y2="{height - 20}"/>']
    for number, (name, value, low, high) in enumerate(rows):
        y = top + line * (number + 0.5)
        tone = "up" if low > 0 else "down" if high < 0 else "flat"
        weight = ' font-weight="600"' if number == len(rows) - 1 else ""
        parts.append(
            f'<text class="tick" x="{left - 8}" y="{y + 3.5:.1f}" '
            f'text-anchor="end"{weight}>{escape(name[:24])}</text>'
            f'<line class="whisker {tone}" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<circle class="dot {tone}" cx="{x(value):.1f}" cy="{y:.1f}" r="3.2"/>'
        )
    for value in ticks(-reach, reach, count=4):
        parts.append(
            f'<text class="tick" x="{x(value):.1f}" y="{height - 5}" text-anchor="middle">'
            f"{signed(value) if value else '0'}</text>"
        )
    return (
        f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def _published(table: ResultsTable) -> dict[str, Any]:
    """Published columns for the measured rows: M-BEIR's by pool, and the zero-shot sets'."""
    measured = {row.name for row in table.rows}
    systems: dict[str, list[PublishedResult]] = {
        pool: [result for result in PUBLISHED if result.pool == pool] if measured & set(TASK_BY_NAME) else []
        for pool in table.pools
    }
    rows = [entry for entry in PUBLISHED_SETS if entry.part in measured]
    return {"mbeir": systems, "sets": rows}


def _changed(
    table: ResultsTable, tables: Sequence[QueryTable], titles: Sequence[str], base: int
) -> list[dict[str, Any]]:
    """Queries whose first right candidate moved across the headline's k, those that moved most first."""
    found = []
    for row in table.rows:
        pool = table.pools[0]
        for place, title in enumerate(titles):
            if place == base or (row.name, pool) not in tables[place] or (row.name, pool) not in tables[base]:
                continue
            before, after = tables[base][row.name, pool], tables[place][row.name, pool]
            moves = [
                (after[qid][0] - value, rank, after[qid][1], qid)
                for qid, (value, rank) in before.items()
                if after[qid][0] != value
            ]
            moves.sort(key=lambda move: (-abs(move[0]), -abs((move[1] or 1000) - (move[2] or 1000)), move[3]))
            for change, rank_before, rank_after, qid in moves[:_SHOWN_CHANGES]:
                found.append(
                    {
                        "task": row.name,
                        "side": title,
                        "qid": qid,
                        "outcome": "found" if change > 0 else "lost",
                        "before": rank_before,
                        "after": rank_after,
                        "of": len(moves),
                    }
                )
    return found


def _examples(
    inputs: CompareInputs, documents: Sequence[Mapping[str, Any]], table: ResultsTable, album: Album
) -> dict[str, list[TaskExamples]]:
    """What the baseline and each other side retrieved, where data and runs still stand."""
    found: dict[str, list[TaskExamples]] = {}
    base = documents[inputs.baseline]
    data = base["settings"].get("data", {})
    root = data.get("root")
    if data.get("kind") != "mbeir" or root is None or not Path(root).is_dir():
        return {}
    for place, document in enumerate(documents):
        if place == inputs.baseline:
            continue
        examples = []
        for row in table.rows:
            if row.task is None:
                continue
            pool = table.pools[0]
            paths = [
                Path(d["settings"]["runs_folder"]) / data["split"] / f"{row.name}.{pool}.arrow"
                for d in (base, document)
            ]
            if not all(path.is_file() for path in paths):
                continue
            before, after = (Run.read(path) for path in paths)
            examples.append(
                task_examples(
                    row.task,
                    before,
                    after,
                    mbeir=Mbeir(root),
                    split=data["split"],
                    pool=pool,
                    album=album,
                    each=inputs.examples_per_outcome,
                )
            )
        if examples:
            found[inputs.sides[place].title or document["stage"]] = examples
    return found


def _setting_differences(documents: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Keys of settings, checkpoint and versions that are not the same for all sides."""
    views = [
        {
            "checkpoint": document["checkpoint"],
            "versions": document["versions"],
            "settings": {
                key: value
                for key, value in document["settings"].items()
                if key not in ("runs", "runs_folder", "stores")
            },
        }
        for document in documents
    ]
    keys = dict.fromkeys(
        key
        for view in views[1:]
        for key, _, _ in changed_settings(views[0], view)
        if ".data.files." not in key
    )

    def look_up(view: Any, key: str) -> str:
        for part in key.split("."):
            view = view.get(part) if isinstance(view, Mapping) else None
        return fact_text(view) if not isinstance(view, Mapping) else "…"

    return [{"key": key, "values": [look_up(view, key) for view in views]} for key in keys]


def _checks(
    table: ResultsTable, documents: Sequence[Mapping[str, Any]], titles: Sequence[str]
) -> list[dict[str, Any]]:
    """Ties, copies, unreachable positives and the spread over prompts, summed over the tasks."""
    found = []
    for title, document in zip(titles, documents, strict=True):
        for pool in table.pools:
            entries = [entry[pool] for entry in document["tasks"].values() if pool in entry]
            if not entries or "ties_lost" not in entries[0]:
                continue
            headlines = [entry["headline"] for entry in document["tasks"].values() if pool in entry]
            spread = [entry["prompts"]["deviation"] for entry in entries if "prompts" in entry]
            copies = [
                entry["copies"]["queries_missed_but_copy_found"] for entry in entries if "copies" in entry
            ]
            found.append(
                {
                    "title": title,
                    "pool": pool,
                    "tied": sum(entry["queries_tied_at_cut"] for entry in entries),
                    "ties": f"{percent(float(np.mean([e['ties_lost'] for e in entries])))} … "
                    f"{percent(float(np.mean([e['ties_won'] for e in entries])))}",
                    "copies": sum(copies) if copies else None,
                    "outside": sum(entry["positives_outside_pool"] or 0 for entry in entries),
                    "unreachable": sum(entry["queries_without_reachable_positive"] or 0 for entry in entries),
                    "prompts": f"{np.mean(spread) * 100:.1f}" if spread else None,
                    "headlines": headlines[0],
                }
            )
    return found
