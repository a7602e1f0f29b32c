"""A plan as tables."""

from rich.table import Table

from umarvel_ray.pipeline.view import View, short_time
from umarvel_ray.plan.estimate import Estimate
from umarvel_ray.plan.make import Plan
from umarvel_ray.plan.units import human_bytes

_KINDS = ("train", "embed", "search", "mine", "rerank", "evaluate")


def print_plan(plan: Plan, view: View) -> None:
    """Per job: work, memory, time, what holds it up; then what was assumed, and how it grows."""
    machine, crew = plan.machine, plan.crew
    table = Table(title=f"{plan.run.title}: {crew.workers} × {machine.name}, {crew.nodes} nodes")
    for name, justify in (("job", "left"), ("work", "right"), ("FLOP", "right"), ("read", "right"),
                          ("write", "right"), ("sent", "right"), ("memory", "right"), ("time", "right"),
                          ("held up by", "left")):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for one in plan.estimates:
        table.add_row(*_row(one))
    table.add_row("all", "", "", "", "", "", "", short_time(plan.seconds), "", style="bold")
    view.console.print(table)
    for one in plan.estimates:
        if one.work.note:
            view.line(f"[dim]{one.work.job}: {one.work.note}[/]")
    for one in plan.estimates:
        if one.short_of:
            view.line(
                f"[red]{one.work.job} lacks {human_bytes(one.short_of)} on each {machine.name}: lower "
                "max_tokens, or train fewer parameters[/]"
            )
    _print_assumptions(plan, view)
    _print_growth(plan, view)


def _row(one: Estimate) -> tuple[str, ...]:
    work = one.work
    return (
        work.job,
        f"{_count(work.amount)} {work.unit}",
        f"{work.flops + work.products:.2e}" if work.flops + work.products else "",
        human_bytes(work.read_bytes),
        human_bytes(work.write_bytes),
        human_bytes(work.network_bytes),
        human_bytes(one.memory_bytes),
        short_time(one.seconds),
        one.bottleneck,
    )


def _print_assumptions(plan: Plan, view: View) -> None:
    machine, world = plan.machine, plan.world
    lengths = "a sample of the data" if world.measured else "M-BEIR's published counts, assumed lengths"
    view.line(f"records and lengths: {lengths}; {plan.shape.name}, {plan.shape.params / 1e9:,.2f} B weights")
    view.line(
        f"assumed of each {machine.name}: {machine.model_share:.0%} of {machine.peak_flops / 1e12:,.4g} "
        f"TFLOP/s in a model and {machine.product_share:.0%} in a search, "
        f"{human_bytes(machine.network_bytes_per_s)}/s of network; "
        f"of a node {human_bytes(machine.storage_bytes_per_s)}/s of storage"
    )
    for kind, rate in sorted(plan.rates.items()):
        unit = "FLOP" if kind in ("train", "embed", "search", "rerank") else "hits"
        speed = "any number of" if rate.per_s == float("inf") else f"{rate.per_s:.3g}"
        view.line(
            f"measured of {kind}, {rate.jobs} jobs: {rate.start_s:.1f} s to start, {speed} {unit}/s a "
            f"worker; at worst {plan.rates_off[kind]:.2f} times off"
        )
    if not plan.rates:
        view.line("no earlier run was measured: times follow from the assumptions (--rates OUTPUT takes one)")


def _print_growth(plan: Plan, view: View) -> None:
    if not plan.growth:
        return
    table = Table(title="The same run before a larger pool")
    for name in ("candidates", "embeddings", "image files", *_KINDS, "all"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("longest job", no_wrap=True)
    for grown in plan.growth:
        table.add_row(
            _count(grown.candidates),
            human_bytes(grown.store_bytes),
            human_bytes(grown.image_bytes),
            *(short_time(grown.seconds.get(kind, 0.0)) for kind in _KINDS),
            short_time(sum(grown.seconds.values())),
            grown.bottleneck,
        )
    view.console.print(table)


def _count(amount: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if amount >= size:
            return f"{amount / size:,.2f} {unit}"
    return f"{amount:,.0f}"
