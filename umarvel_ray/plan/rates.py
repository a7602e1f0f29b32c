"""Speeds that earlier runs reached here: a start-up time and a rate for every kind of job."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sample:
    """One finished job.

    Attributes:
        kind: Of the job.
        load: Its work for one worker: FLOP, or hits where it computes none.
        seconds: It took.
    """

    kind: str
    load: float
    seconds: float


@dataclass(frozen=True)
class Rate:
    """What jobs of one kind take: `start_s + load / per_s`.

    Attributes:
        start_s: Before the first work is done.
        per_s: Load a worker does in a second; infinite where more load took no more time.
        jobs: Finished jobs it was read from.
    """

    start_s: float
    per_s: float
    jobs: int

    def seconds(self, load: float) -> float:
        """Of a job with this load for each worker."""
        return self.start_s + load / self.per_s


def fit_rates(samples: Iterable[Sample], *, start_s: float) -> dict[str, Rate]:
    """Start-up and rate of every kind that has a sample, by least squares of the relative error.

    Args:
        samples: Finished jobs.
        start_s: Assumed where all jobs of a kind have one load and cannot tell start-up from work; half
            their time at most.
    """
    by_kind: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.seconds > 0:
            by_kind.setdefault(sample.kind, []).append(sample)
    return {kind: _fit(some, start_s=start_s) for kind, some in by_kind.items()}


def _fit(samples: list[Sample], *, start_s: float) -> Rate:
    load = np.array([sample.load for sample in samples])
    seconds = np.array([sample.seconds for sample in samples])
    # Divided by what was measured, one as many times too long weighs like one as many times too short.
    start, slope = 1 / seconds, load / seconds
    if np.ptp(load) <= 0.05 * load.max():
        fixed = min(start_s, 0.5 * float(seconds.min()))
        rest = float((seconds - fixed).mean())
        return Rate(fixed, float(load.mean()) / rest if load.max() else float("inf"), len(samples))
    design = np.stack([start, slope], axis=1)
    (a, b), *_ = np.linalg.lstsq(design, np.ones(len(samples)), rcond=None)
    if a < 0:  # neither may be negative: the best of those on the edge
        a, b = 0.0, slope.sum() / (slope**2).sum()
    elif b < 0:
        a, b = start.sum() / (start**2).sum(), 0.0
    return Rate(float(a), float(1 / b) if b > 0 else float("inf"), len(samples))


def errors(rates: Mapping[str, Rate], samples: Iterable[Sample]) -> dict[str, float]:
    """How many times off the worst prediction of each kind is, at least 1."""
    worst: dict[str, float] = {}
    for sample in samples:
        predicted = rates[sample.kind].seconds(sample.load)
        factor = max(predicted / sample.seconds, sample.seconds / predicted)
        worst[sample.kind] = max(worst.get(sample.kind, 1.0), factor)
    return worst
