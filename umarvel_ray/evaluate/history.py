"""How training and mining went: from their logs to plots and counts for the report."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeGuard

from umarvel_ray.artifacts import read_json
from umarvel_ray.config import Config, PathSetting
from umarvel_ray.errors import DataError
from umarvel_ray.evaluate.figures import curve, histogram, short_number
from umarvel_ray.storage import at


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


class FusionInput(Config):
    """A scoring job whose alpha was tuned, to draw."""

    title: str
    alpha: PathSetting
    """Its alpha.json: `alpha`, and `curve`, pairs of alpha and quality on validation data."""


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


@dataclass(frozen=True)
class Sensitivity:
    """How much hangs on alpha: the plot, and the same in words."""

    title: str
    summary: str
    plot: str


def draw_fusion(fusion: FusionInput) -> Sensitivity:
    """Read one scoring job's curve.

    Raises:
        DataError: It cannot be read, or alpha was not tuned there.
    """
    found = read_object(fusion.alpha)
    points = [(float(alpha), float(quality)) for alpha, quality in found.get("curve", [])]
    if not points:
        raise DataError(f"{fusion.alpha}: alpha was not tuned there. Leave it out of the report.")
    quality_of = dict(points)
    taken = found["alpha"]
    words = [
        f"alpha {short_number(taken)}: {quality_of[taken]:.4f}",
        f"best of the curve: {max(quality_of.values()):.4f}",
        f"P(Yes) alone: {quality_of[min(quality_of)]:.4f}",
        f"recall alone: {quality_of[max(quality_of)]:.4f}",
    ]
    alphas, qualities = zip(*points, strict=True)
    return Sensitivity(
        title=fusion.title,
        summary=" · ".join(words),
        plot=curve(
            alphas,
            qualities,
            label=f"Mean reciprocal rank on validation data over alpha, {fusion.title}",
            x_label="alpha",
        ),
    )


def draw_training(training: TrainingInput) -> Curves:
    """Read one training's log.

    Raises:
        DataError: It cannot be read, a line is no step, or no loss is a number.
    """
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
        with at(path).open(encoding="utf-8") as file:
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


def draw_mining(mining: MiningInput) -> Mining:
    """Read one mining's report; DataError where it cannot be read."""
    report = read_object(mining.report)
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
        rule=_rule_words(report.get("rule")),
        plot=plot,
        counts=tuple(flat_facts(report.get("counts", {}))),
    )


def _rule_words(rule: Any) -> str:
    """The filter for people: its name, or its name and numbers where the report gives a mapping."""
    if isinstance(rule, Mapping):
        return ", ".join(f"{name} {value}" for name, value in flat_facts(rule) if value != "–")
    return "" if rule is None else str(rule).replace("_", " ")


def flat_facts(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested counts as (words, number), in their order."""
    found: list[tuple[str, str]] = []
    for key, item in value.items():
        words = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(item, Mapping):
            found += flat_facts(item, f"{words}: ")
        else:
            found.append((words, fact_text(item)))
    return found


def fact_text(value: Any) -> str:
    """A value of JSON for people."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(fact_text, value))
    return str(value)


def fact_groups(facts: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Plain facts first, then one group per nested mapping."""
    plain = [(name, fact_text(value)) for name, value in facts.items() if not isinstance(value, Mapping)]
    groups = [(name, flat_facts(value)) for name, value in facts.items() if isinstance(value, Mapping)]
    return [*([("This run", plain)] if plain else []), *groups]


def read_object(path: str) -> dict[str, Any]:
    """A JSON file that holds an object; DataError where it is missing or holds something else."""
    try:
        value = read_json(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Finish the job that writes it."
        ) from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds {type(value).__name__}, no object. Give the file that the job wrote.")
    return value
