"""What a stage changed: the cells of the report's table, with their distance from a baseline stage."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from umarvel_ray.evaluate.benchmark import PoolKind, ResultsTable, TableRow, best_of, percent

MINUS = "\N{MINUS SIGN}"


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
            change = signed(value - origin)
            tone = "flat" if abs(value - origin) <= error else "up" if value > origin else "down"
        is_best = value is not None and round(value * 100, 1) == best
        cells.append(Cell(percent(value), change, tone, is_best))
    return cells


def row_cells(row: TableRow, kind: PoolKind, baselines: Sequence[int]) -> list[Cell]:
    """One task's figures in one pool, a cell per stage; `baselines` are places of stages, -1 for none."""
    values = row.values[kind]
    errors = [_row_error(row, kind, index, base) for index, base in enumerate(baselines)]
    return _cells(values, baselines, errors)


def _row_error(row: TableRow, kind: PoolKind, index: int, base: int) -> float | None:
    one, other = row.values[kind][index], row.values[kind][base] if base >= 0 else None
    return None if one is None or other is None else _standard_error(row, one, other)


def mean_cells(table: ResultsTable, baselines: Sequence[int]) -> dict[PoolKind, list[Cell]]:
    """The means of all stages, by pool; no change is coloured where a task lacks either figure."""
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


def signed(difference: float) -> str:
    """A difference of shares in points: `"+1.3"`, `"−0.4"`, `"±0.0"`."""
    text = f"{abs(difference) * 100:.1f}"
    return "±0.0" if text == "0.0" else f"{'+' if difference > 0 else MINUS}{text}"
