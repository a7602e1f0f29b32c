"""A benchmark's table on the console."""

from rich.table import Table

from umarvel_ray.bench.harness import Benchmark, Comparison, machine
from umarvel_ray.pipeline.view import View


def print_comparisons(benchmark: Benchmark, results: list[Comparison], view: View) -> None:
    """One row per case and method; ratios are a peer's time over ours, with the range over the rounds."""
    facts = machine()
    table = Table(title=benchmark.about, title_justify="left", pad_edge=False)
    for head in ("case", "method"):
        table.add_column(head)
    for head in (f"{benchmark.unit}/s", "its time / ours", "range", "memory", "its / ours"):
        table.add_column(head, justify="right")
    table.add_column("equality")
    for result in results:
        ours = not result.equality
        peak = max(timing.peak_bytes for timing in result.rounds)
        table.add_row(
            result.case,
            result.method,
            f"{result.rate:,.4g}",
            "1" if ours else f"{result.ratio:.2f}",
            "" if ours else f"{result.ratio_low:.2f}–{result.ratio_high:.2f}",
            f"{peak / 2**20:,.0f} MiB",
            "1" if ours else f"{result.memory_ratio:.2f}",
            result.equality,
        )
    view.console.print(table)
    view.line(", ".join(str(value) for value in facts.values()))
