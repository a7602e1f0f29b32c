"""Panels that a stage's report and a comparison share: scores of right and wrong answers, kinds of error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from umarvel_ray.evaluate.analysis import BIN_WIDTH
from umarvel_ray.evaluate.figures import histogram

_MOST_BINS = 48
MODALITIES = ("text", "image", "image,text")


@dataclass(frozen=True)
class Scores:
    """Scores of one column's right and wrong answers, all tasks together."""

    title: str
    plot: str
    overlap: float
    """Share of queries whose best wrong candidate scores above the median of the right ones."""


@dataclass(frozen=True)
class Errors:
    """What one column's first candidates are in the pool of all tasks.

    Attributes:
        title: Of the column.
        rows: (asked modality, share of first candidates by modality, in the order of `MODALITIES`).
        kinds: Shares of the wrong first candidates: wrong modality, wrong domain, other.
        errors: Queries whose first candidate is wrong.
    """

    title: str
    rows: tuple[tuple[str, tuple[float, ...]], ...]
    kinds: tuple[float, float, float]
    errors: int


def score_panels(documents: Sequence[Mapping[str, Any]], titles: Sequence[str], pool: str) -> list[Scores]:
    """One plot per column that kept its histograms."""
    panels = []
    for document, title in zip(documents, titles, strict=True):
        kept = [h for entry in document["tasks"].values() if (h := entry.get(pool, {}).get("histograms"))]
        if not kept:
            continue
        edges, right, wrong = _joined(kept)
        middle = int(np.searchsorted(np.cumsum(right), right.sum() / 2))
        overlap = float(wrong[middle:].sum() / max(wrong.sum(), 1))
        plot = histogram(
            edges.tolist(),
            {"dropped": wrong.tolist(), "positives": right.tolist()},
            stacked=["dropped"],
            marks={},
            label=f"Scores of right and of the best wrong candidates, {title}",
            x_label="score",
        )
        panels.append(Scores(title, plot, overlap))
    return panels


def _joined(kept: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(edges, right, wrong) of several histograms together, in at most `_MOST_BINS` bins."""
    starts = [round(h["bin_edges"][0] / BIN_WIDTH) for h in kept]
    low = min(starts)
    num = max(start - low + len(h["wrong"]) for start, h in zip(starts, kept, strict=True))
    group = -(-num // _MOST_BINS)
    totals = np.zeros((2, -(-num // group) * group))
    for start, h in zip(starts, kept, strict=True):
        place = slice(start - low, start - low + len(h["wrong"]))
        totals[0, place] += h["positives"]
        totals[1, place] += h["wrong"]
    right, wrong = totals.reshape(2, -1, group).sum(axis=2)
    return (low + group * np.arange(len(right) + 1)) * BIN_WIDTH, right, wrong


def error_panels(documents: Sequence[Mapping[str, Any]], titles: Sequence[str]) -> list[Errors]:
    """One panel per column that was measured on the pool of all tasks, weighted by queries."""
    panels = []
    for document, title in zip(documents, titles, strict=True):
        found = [
            (
                entry["kind"].split(" → ")[-1].replace("+", ","),
                entry["num_queries"],
                entry["global"]["errors"],
            )
            for entry in document["tasks"].values()
            if entry.get("global", {}).get("errors")
        ]
        if not found:
            continue
        rows = []
        for modality in MODALITIES:
            mine = [(count, errors["modality_at_1"]) for asked, count, errors in found if asked == modality]
            total = sum(count for count, _ in mine)
            if total:
                rows.append(
                    (
                        modality.replace(",", "+"),
                        tuple(
                            sum(count * share.get(other, 0.0) for count, share in mine) / total
                            for other in MODALITIES
                        ),
                    )
                )
        number = sum(errors["errors"] for _, _, errors in found)
        kinds = tuple(
            sum(errors["errors"] * errors[kind] for _, _, errors in found) / max(number, 1)
            for kind in ("wrong_modality", "wrong_domain", "other")
        )
        panels.append(Errors(title, tuple(rows), (kinds[0], kinds[1], kinds[2]), number))
    return panels
