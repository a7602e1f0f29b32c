"""Small plots as inline SVG, drawn by hand so that they follow the page's colours, light or dark.

Every plot is one `<svg>` element whose shapes carry classes; the page's style sheet colours them. Text that
comes from outside is escaped. Plots are 360 units wide so that their letters stay readable on a phone.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 12, 26
MAX_BINS = 90
"""A longer curve is drawn as the mean and the range of this many pieces."""


def curve(
    steps: Sequence[float],
    values: Sequence[float],
    *,
    label: str,
    height: int = HEIGHT,
    x_label: str = "step",
) -> str:
    """One quantity over steps: a line for the mean, a band for the range of each piece of the curve.

    Args:
        steps: Increasing.
        values: As many, finite.
        label: What is drawn, for those who hear the page.
        height: In the units of the drawing.
        x_label: What is stepped over.
    """
    steps_N, values_N = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    pieces = np.array_split(np.arange(len(steps_N)), min(MAX_BINS, len(steps_N)))
    x_B = np.array([steps_N[piece].mean() for piece in pieces])
    mean_B = np.array([values_N[piece].mean() for piece in pieces])
    low_B = np.array([values_N[piece].min() for piece in pieces])
    high_B = np.array([values_N[piece].max() for piece in pieces])

    x_range = _range(float(steps_N.min()), float(steps_N.max()))
    y_range = _range(float(low_B.min()), float(high_B.max()), pad=0.06)
    x_B, mean_B = _scale(x_B, x_range, LEFT, WIDTH - RIGHT), _scale(mean_B, y_range, height - BOTTOM, TOP)
    low_B, high_B = (
        _scale(low_B, y_range, height - BOTTOM, TOP),
        _scale(high_B, y_range, height - BOTTOM, TOP),
    )
    parts = _axes(x_range, y_range, height=height, x_label=x_label)
    if len(steps_N) > MAX_BINS:
        band = _points(x_B, high_B) + " " + _points(x_B[::-1], low_B[::-1])
        parts.append(f'<polygon class="band" points="{band}"/>')
    parts.append(f'<polyline class="line" points="{_points(x_B, mean_B)}"/>')
    return _svg(parts, label=label, height=height)


def histogram(
    edges: Sequence[float],
    groups: Mapping[str, Sequence[float]],
    *,
    stacked: Sequence[str],
    marks: Mapping[str, float],
    label: str,
    x_label: str,
) -> str:
    """Distributions over one axis, each as a share of its own total so that small groups stay visible.

    Args:
        edges: B + 1 edges of the bins, increasing.
        groups: Counts per bin, (B,) each. A group's name is its class: `g-kept`, …
        stacked: Groups drawn as bars on one another, as shares of their joint total; the others are outlines.
        marks: Vertical lines, by their caption.
        label: What is drawn, for those who hear the page.
        x_label: What the axis measures.
    """
    edges_E = np.asarray(edges, dtype=np.float64)
    counts = {name: np.asarray(values, dtype=np.float64) for name, values in groups.items()}
    shares: dict[str, np.ndarray] = {}
    joint = sum(counts[name].sum() for name in stacked)
    for name, counts_B in counts.items():
        total = joint if name in stacked else counts_B.sum()
        shares[name] = counts_B / total if total else counts_B
    used_B = sum(counts.values(), np.zeros(len(edges_E) - 1)) > 0
    inside = [*edges_E[:-1][used_B], *edges_E[1:][used_B], *marks.values()] or [edges_E[0], edges_E[-1]]
    x_range = _range(float(min(inside)), float(max(inside)))
    stack_B = sum((shares[name] for name in stacked), np.zeros(len(edges_E) - 1))
    tallest = max([float(stack_B.max()), *(float(shares[name].max()) for name in shares)])
    y_range = (0.0, (tallest or 1.0) * 1.12)

    x_E = _scale(edges_E, x_range, LEFT, WIDTH - RIGHT)
    parts = _axes(x_range, y_range, height=HEIGHT, x_label=x_label, percent=True)
    base_B = np.zeros(len(edges_E) - 1)
    for name in stacked:
        for index in np.flatnonzero(shares[name] * used_B):
            bottom, top = _scale(
                np.array([base_B[index], base_B[index] + shares[name][index]]), y_range, HEIGHT - BOTTOM, TOP
            )
            parts.append(
                f'<rect class="bar g-{escape(name)}" x="{x_E[index]:.1f}" y="{top:.1f}" '
                f'width="{max(x_E[index + 1] - x_E[index] - 0.6, 0.4):.1f}" height="{bottom - top:.1f}"/>'
            )
        base_B = base_B + shares[name]
    for name in (name for name in shares if name not in stacked):
        places = np.flatnonzero(used_B)
        if not len(places) or not shares[name].any():
            continue
        low, high = places[0], places[-1] + 1
        y_B = _scale(shares[name][low:high], y_range, HEIGHT - BOTTOM, TOP)
        outline = _points(np.repeat(x_E[low : high + 1], 2)[1:-1], np.repeat(y_B, 2))
        parts.append(f'<polyline class="outline g-{escape(name)}" points="{outline}"/>')
    for caption, value in marks.items():
        x = float(_scale(np.array([value]), x_range, LEFT, WIDTH - RIGHT)[0])
        right_half = x > WIDTH * 0.6
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text class="mark-text" x="{x + (-4 if right_half else 4):.1f}" y="{TOP + 9}" '
            f'text-anchor="{"end" if right_half else "start"}">{escape(caption)}</text>'
        )
    return _svg(parts, label=label, height=HEIGHT)


def ticks(low: float, high: float, *, count: int = 4) -> list[float]:
    """About `count` round numbers inside [low, high]: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def short_number(value: float) -> str:
    """`12000` → `"12k"`, `0.05` → `"0.05"`: as few letters as an axis needs."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:.4g}"


def _range(low: float, high: float, *, pad: float = 0.0) -> tuple[float, float]:
    if high - low <= 1e-12 * max(abs(low), abs(high), 1.0):
        room = abs(low) * 0.1 or 1.0
        return low - room, high + room
    room = (high - low) * pad
    return low - room, high + room


def _scale(values: np.ndarray, source: tuple[float, float], start: float, end: float) -> np.ndarray:
    return start + (values - source[0]) / (source[1] - source[0]) * (end - start)


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def _axes(
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    *,
    height: int,
    x_label: str,
    percent: bool = False,
) -> list[str]:
    parts = []
    for value in ticks(*y_range, count=max(3, height // 32)):
        y = float(_scale(np.array([value]), y_range, height - BOTTOM, TOP)[0])
        text = f"{value * 100:g}%" if percent else short_number(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_tick(LEFT - 6, y + 3.5, text, anchor="end"))
    below = height - BOTTOM + 16
    for value in ticks(*x_range, count=6):
        x = float(_scale(np.array([value]), x_range, LEFT, WIDTH - RIGHT)[0])
        if x > WIDTH - RIGHT - 7 * len(x_label):
            continue  # the axis' name stands there
        parts.append(_tick(x, below, short_number(value), anchor="middle"))
    parts.append(_tick(WIDTH - RIGHT, below, escape(x_label), anchor="end"))
    return parts


def _tick(x: float, y: float, text: str, *, anchor: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _svg(parts: Sequence[str], *, label: str, height: int) -> str:
    head = f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
    return head + "".join(parts) + "</svg>"
