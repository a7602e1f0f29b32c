"""The page of `umarvel mine --explain`: how positives and candidates score, what each filter would keep."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from umarvel_ray.artifacts import atomic_write, write_json
from umarvel_ray.evaluate.figures import histogram
from umarvel_ray.storage import at

PAGE, DATA = "explain.html", "explain.json"
_RANK_GROUPS = {"rank 1": "rank-1", "rank 10": "rank-10", "rank 100": "rank-100"}


def write_explanation(explanation: Mapping[str, Any], folder: str | os.PathLike, *, title: str) -> None:
    """Write `explain.json` and `explain.html` into `folder`.

    Args:
        explanation: As `retrieve.explain.explain_run` gives it.
        folder: Made where it is missing.
        title: Of the page.
    """
    import jinja2

    write_json(at(folder) / DATA, explanation)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "number": _number}
    tasks = {
        task: {**told, "plot": _plot(task, told["histograms"])} for task, told in explanation["tasks"].items()
    }
    page = environment.get_template("explanation.html.jinja").render(title=title, tasks=tasks)
    with atomic_write(at(folder) / PAGE) as file:
        file.write(page)


def explanation_rows(told: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One task's candidate settings for a table of text: rule, what it drops, catches, and keeps."""
    return [
        (
            item["rule"] if item["value"] is None else f"{item['rule']} {item['value']:g}",
            _percent(item["hits_dropped"]),
            _percent(item["other_positives_caught"]),
            _number(item["negatives_per_query"]),
            _percent(item["queries_short"]),
            _number(item["mean_rank_kept"]),
            _number(item["mean_score_kept"]),
        )
        for item in told["settings"]
    ]


ROW_TITLES = (
    "filter",
    "hits dropped",
    "known positives caught",
    "negatives a query",
    "queries short",
    "mean rank kept",
    "mean cosine kept",
)


def _plot(task: str, histograms: Mapping[str, Any]) -> Any:
    from markupsafe import Markup

    groups = {"positives": histograms.get("positives", [])}
    groups |= {style: histograms[name] for name, style in _RANK_GROUPS.items() if name in histograms}
    return Markup(
        histogram(
            histograms["bin_edges"],
            {name: values for name, values in groups.items() if len(values)},
            stacked=[],
            marks={},
            label=f"Cosines of known positives and of the candidates at ranks 1, 10 and 100 in {task}",
            x_label="cosine",
        )
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
