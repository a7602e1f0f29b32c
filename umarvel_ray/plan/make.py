"""From a run's settings to its plan: work, rates of earlier runs, times, and how they grow."""

from dataclasses import dataclass, replace
from typing import Any

from umarvel_ray.artifacts import is_finished, read_json
from umarvel_ray.config import build_config
from umarvel_ray.errors import ConfigError, UmarvelError
from umarvel_ray.pipeline.check import RUN_FILE
from umarvel_ray.pipeline.settings import RunConfig
from umarvel_ray.pipeline.stages import recipe
from umarvel_ray.plan.costs import ModelShape, shape_of
from umarvel_ray.plan.estimate import Estimate, crew_for, estimate, load_of
from umarvel_ray.plan.items import World, world_of
from umarvel_ray.plan.machines import Machine, machine_named
from umarvel_ray.plan.rates import Rate, Sample, errors, fit_rates
from umarvel_ray.plan.work import Crew, with_larger_pool, work_of
from umarvel_ray.storage import at

GROWTH = (10.0, 100.0)
BILLION = 1e9


@dataclass(frozen=True)
class Request:
    """What a user asks of a plan.

    Attributes:
        gpus: How many; None for what `runtime` says.
        gpu: Their kind; None for what `runtime` says: CPUs where a worker has no GPU.
        share: Of the peak that a model reaches; None for the machine's own.
        image_tokens: Of every image, where the data is not here.
        rates_from: Outputs of earlier runs.
    """

    gpus: int | None = None
    gpu: str | None = None
    share: float | None = None
    image_tokens: float = 117.0
    rates_from: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grown:
    """The run before a larger pool.

    Attributes:
        factor: Times the candidates.
        candidates: Of the test split's global pool.
        seconds: By kind of job.
        store_bytes: Embeddings of that pool.
        image_bytes: Files of its images.
        bottleneck: Of the longest job.
    """

    factor: float
    candidates: float
    seconds: dict[str, float]
    store_bytes: float
    image_bytes: float
    bottleneck: str


@dataclass(frozen=True)
class Plan:
    """Everything `umarvel plan` prints."""

    run: RunConfig
    shape: ModelShape
    machine: Machine
    crew: Crew
    world: World
    estimates: tuple[Estimate, ...]
    rates: dict[str, Rate]
    rates_off: dict[str, float]
    growth: tuple[Grown, ...]

    @property
    def seconds(self) -> float:
        """All jobs, one after the other."""
        return sum(one.seconds for one in self.estimates)


def make_plan(run: RunConfig, request: Request) -> Plan:
    """See `umarvel plan --help`.

    Raises:
        UmarvelError: The backbone's sizes, the GPU, or the runs to learn from are unknown.
    """
    machine, crew = _machine_and_crew(run, request)
    shape = shape_of(run.backbone)
    world = world_of(run, image_tokens=request.image_tokens)
    samples = [sample for output in request.rates_from for sample in samples_of(output)]
    rates = fit_rates(samples, start_s=machine.start_s)
    estimates = estimate(work_of(run, world, shape, crew), machine, crew, rates)
    candidates = sum(pool.rows for pool in world.distinct_pools(["test"]))
    factors = (*GROWTH, BILLION / candidates) if candidates else ()
    return Plan(
        run=run,
        shape=shape,
        machine=machine,
        crew=crew,
        world=world,
        estimates=tuple(estimates),
        rates=rates,
        rates_off=errors(rates, samples),
        growth=tuple(_grown(run, world, shape, machine, crew, rates, f) for f in (1.0, *factors)),
    )


def samples_of(output: str) -> list[Sample]:
    """Load and time of every job that an earlier run finished in one go.

    Raises:
        ConfigError: There is no run in the folder.
    """
    claimed = at(output) / RUN_FILE
    if not claimed.exists():
        raise ConfigError(f"{output}: no {RUN_FILE}, so no run to learn from. Give the output of a run.")
    claim: dict[str, Any] = read_json(claimed)
    run = build_config({"title": "", **claim, "output": output}, RunConfig, where=str(claimed))
    try:
        world, shape = world_of(run, image_tokens=0), shape_of(run.backbone)
    except UmarvelError as error:
        raise ConfigError(
            f"{output}: its rates cannot be read, because its inputs are gone: {error}"
        ) from None
    if not world.measured:
        raise ConfigError(
            f"{output}: its data ({run.data.root}) is not here, so how much it did is unknown. "
            "Plan where the data is."
        )
    found = []
    for job in recipe(run):
        folder = at(job.config.output)  # type: ignore[attr-defined]
        if not is_finished(folder):
            continue
        done = read_json(folder / "done.json")
        if done.get("resumed"):
            continue  # its seconds are those of its last start alone
        crew = _crew_that_did(done, run)
        [work] = [work for work in work_of(run, world, shape, crew) if work.job == job.name]
        found.append(Sample(job.kind, load_of(work, crew), done["seconds"]))
    return found


def _crew_that_did(done: dict[str, Any], run: RunConfig) -> Crew:
    ran = done.get("runtime") or run.runtime.model_dump()
    return Crew(workers=ran["num_workers"], actors=ran["num_actors"], nodes=1)


def _machine_and_crew(run: RunConfig, request: Request) -> tuple[Machine, Crew]:
    runtime = run.runtime
    machine = machine_named(request.gpu or ("h200" if runtime.gpus else "cpu"))
    if request.share is not None:
        machine = machine.model_copy(update={"model_share": request.share})
    if request.gpus is not None:
        return machine, crew_for(machine, request.gpus)
    most = max(runtime.num_workers, runtime.num_actors)
    return machine, replace(crew_for(machine, most), workers=runtime.num_workers, actors=runtime.num_actors)


def _grown(
    run: RunConfig,
    world: World,
    shape: ModelShape,
    machine: Machine,
    crew: Crew,
    rates: dict[str, Rate],
    factor: float,
) -> Grown:
    larger = with_larger_pool(world, factor)
    found = estimate(work_of(run, larger, shape, crew), machine, crew, rates)
    pools = larger.distinct_pools(["test"])
    candidates = sum(pool.rows for pool in pools)
    seconds: dict[str, float] = {}
    for one in found:
        seconds[one.work.kind] = seconds.get(one.work.kind, 0.0) + one.seconds
    longest = max(found, key=lambda one: one.seconds)
    width = 4 if run.retrieval.dtype == "float32" else 2
    return Grown(
        factor=factor,
        candidates=candidates,
        seconds=seconds,
        store_bytes=candidates * shape.hidden * width,
        image_bytes=sum(pool.rows * pool.images * pool.image_bytes for pool in pools),
        bottleneck=f"{longest.work.job}: {longest.bottleneck}",
    )
