"""Work and machines → time, memory and what holds a job up; and how that grows with the pool."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from umarvel_ray.plan.machines import Machine
from umarvel_ray.plan.rates import Rate
from umarvel_ray.plan.work import Crew, Work

DRIVER_HITS_PER_S = {"mine": 250e3, "evaluate": 700e3}
"""Hits that one core of the driver filters or scores in a second, as the demonstration did."""
_REPORT_S = 2.0


@dataclass(frozen=True)
class Estimate:
    """A job's time and why.

    Attributes:
        work: What it does.
        parts_s: Seconds that each resource would need alone; they overlap, the longest decides.
        start_s: Before the first work.
        seconds: All in all.
        bottleneck: Name of the longest part.
        memory_bytes: On each worker's device, or in its process without one.
        measured: Whether the rate comes from earlier jobs.
        short_of: Bytes of device memory that a worker lacks; 0 where it fits.
    """

    work: Work
    parts_s: Mapping[str, float]
    start_s: float
    seconds: float
    bottleneck: str
    memory_bytes: float
    measured: bool
    short_of: float


def crew_for(machine: Machine, gpus: int) -> Crew:
    """Every GPU has a worker and an actor."""
    return Crew(workers=gpus, actors=gpus, nodes=math.ceil(gpus / machine.gpus_per_node))


def load_of(work: Work, crew: Crew) -> float:
    """What one worker does of it, in FLOP, or in hits where there is nothing to multiply."""
    if work.kind in ("train", "embed", "search", "rerank"):
        return (work.flops + work.products) / _hands(work, crew)
    return work.amount


def _hands(work: Work, crew: Crew) -> int:
    """Workers that find something to do."""
    return crew.workers if work.kind == "train" else max(1, min(crew.actors, work.parts))


def estimate(
    works: Sequence[Work], machine: Machine, crew: Crew, rates: Mapping[str, Rate] | None = None
) -> list[Estimate]:
    """Time of every job; rates of earlier runs take the place of assumed ones where they exist."""
    return [_estimate(work, machine, crew, (rates or {}).get(work.kind)) for work in works]


def _estimate(work: Work, machine: Machine, crew: Crew, rate: Rate | None) -> Estimate:
    hands = _hands(work, crew)
    parts: dict[str, float] = {}
    start = machine.start_s
    if work.kind in ("train", "embed", "rerank", "search"):
        share = machine.product_share if work.products else machine.model_share
        parts["compute"] = (work.flops + work.products) / (hands * machine.peak_flops * share)
        parts["decode images"] = work.images * machine.image_core_s / (hands * machine.cores_per_gpu)
        parts["storage"] = (work.read_bytes + work.write_bytes) / (machine.storage_bytes_per_s * crew.nodes)
        parts["network"] = work.network_bytes / machine.network_bytes_per_s
        parts["host to device"] = work.fed_bytes / (hands * machine.host_bytes_per_s)
    else:
        start = 0.0
        parts["driver"] = work.amount / DRIVER_HITS_PER_S.get(work.kind, 1 / _REPORT_S)
        parts["storage"] = work.read_bytes / machine.storage_bytes_per_s
    measured = rate is not None
    if rate is not None:
        start, parts["compute" if "compute" in parts else "driver"] = (
            rate.start_s,
            load_of(work, crew) / rate.per_s,
        )
        # What was measured holds the decoding, reading and sending that went beside it.
        seconds = start + parts["compute" if "compute" in parts else "driver"]
        bottleneck = "start-up" if start > seconds / 2 else "as measured"
    else:
        bottleneck = max(parts, key=lambda name: parts[name])
        seconds = start + parts[bottleneck]
        if start > parts[bottleneck]:
            bottleneck = "start-up"
    memory = work.weights_bytes + work.trained_bytes + work.chunk_bytes
    return Estimate(
        work=work,
        parts_s=parts,
        start_s=start,
        seconds=seconds,
        bottleneck=bottleneck,
        memory_bytes=memory,
        measured=measured,
        short_of=max(0.0, memory - machine.memory_bytes) if "compute" in parts else 0.0,
    )
