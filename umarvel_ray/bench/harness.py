"""How a benchmark is run: equality first, then speed, every method in a process of its own.

A module of this package is a benchmark if it holds `BENCHMARK`, a `Benchmark`. For each case and round, each
method gets a fresh process: it prepares, runs once untimed (the answer of that run is what is compared), then
runs `repeats` times against the clock. Methods take turns within a round, so that a machine that slows down
slows all of them; the ratio is taken within a round, and its spread is that over the rounds.
"""

import importlib
import json
import os
import pkgutil
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from umarvel_ray.errors import ConfigError, UmarvelError

Answer = Mapping[str, np.ndarray]
"""What a method computed, by name; what equality is judged on."""
Case = Mapping[str, Any]
"""Sizes and settings of one row of the table."""


class BenchmarkError(UmarvelError, RuntimeError):
    """Two methods do not give the same answer, or one of them failed: there is nothing to time."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A method with its data laid out; what happens in `run` is what is timed."""

    run: Callable[[], Answer]
    work: float = 1.0
    """Units of `Benchmark.unit` that one run gets through."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """More figures of this method: FLOPs a run, share of padding, …"""
    simulated_s: float | None = None
    """Of a simulation: how long a run takes by its own count; the clock is not asked."""
    synchronize: Callable[[], None] | None = None
    """Waits for the device, where `run` returns before it is done."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is compared with what."""

    about: str
    """One line for the head of the table."""
    unit: str
    """What `Prepared.work` counts: "items", "queries", …"""
    methods: Mapping[str, Callable[[Case], Prepared]]
    """Ours first, then the peers. Each is called in its own process."""
    cases: Mapping[str, Case]
    quick: tuple[str, ...]
    """The cases of `--quick`."""
    compare: Callable[[Case, Answer, Answer], str]
    """Says in words how ours (first) and a peer's answer agree; raises `BenchmarkError` where they do not."""
    repeats: int = 3
    threads: int | None = None
    """CPU threads of every method; None: as many as the machine has cores."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One method in one round."""

    seconds: float
    """Median over the repeats, of one run."""
    work: float
    peak_bytes: int
    """Most resident memory of the process, all included."""
    device_peak_bytes: int
    facts: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One method on one case over all rounds. Ratios: its time for a unit over ours."""

    case: str
    method: str
    rate: float
    """Units a second, median over rounds."""
    ratio: float
    ratio_low: float
    ratio_high: float
    memory_ratio: float
    """Its peak resident memory over ours."""
    equality: str
    rounds: list[Timing]


def names() -> list[str]:
    """All benchmarks, in alphabetical order."""
    package = importlib.import_module("umarvel_ray.bench")
    found = {module.name for module in pkgutil.iter_modules(package.__path__)}
    return sorted(found - {"harness", "view"})


def load(name: str) -> Benchmark:
    """The benchmark called `name`.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in names():
        raise ConfigError(f"bench {name}: there is no such benchmark. There are: {', '.join(names())}.")
    return importlib.import_module(f"umarvel_ray.bench.{name}").BENCHMARK


def run_benchmark(
    name: str, *, quick: bool, rounds: int, cases: list[str], on_done: Callable[[str], None]
) -> list[Comparison]:
    """Run every method of `name` on its cases; see the module's docstring.

    Args:
        quick: Only the small cases, one round.
        cases: These only; empty: all.
        on_done: Called with one line after each process.

    Raises:
        BenchmarkError: Answers differ, or a method failed.
        ConfigError: An unknown case.
    """
    benchmark = load(name)
    unknown = [case for case in cases if case not in benchmark.cases]
    if unknown:
        raise ConfigError(
            f"bench {name}: {len(unknown)} unknown case(s) (first: {unknown[0]}). "
            f"There are: {', '.join(benchmark.cases)}."
        )
    chosen = cases or (list(benchmark.quick) if quick else list(benchmark.cases))
    return [
        comparison
        for case in chosen
        for comparison in _run_case(name, benchmark, case, rounds=1 if quick else rounds, on_done=on_done)
    ]


def _run_case(
    name: str, benchmark: Benchmark, case: str, *, rounds: int, on_done: Callable[[str], None]
) -> list[Comparison]:
    ours = next(iter(benchmark.methods))
    timings: dict[str, list[Timing]] = {method: [] for method in benchmark.methods}
    equality: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="umarvel-bench-") as folder:
        for turn in range(rounds):
            for method in benchmark.methods:
                answer = Path(folder) / f"{method}.npz"
                timing = _run_method(
                    name, case, method, answer, threads=benchmark.threads or os.cpu_count() or 1
                )
                timings[method].append(timing)
                on_done(f"{case}: {method}, round {turn + 1} of {rounds}: {timing.seconds:.3f} s")
                if turn == 0:
                    with np.load(Path(folder) / f"{ours}.npz") as own, np.load(answer) as other:
                        equality[method] = (
                            "" if method == ours else benchmark.compare(benchmark.cases[case], own, other)
                        )
    return [_summarise(case, method, timings[method], timings[ours], equality[method]) for method in timings]


def _summarise(case: str, method: str, own: list[Timing], ours: list[Timing], equality: str) -> Comparison:
    ratios = [
        (theirs.seconds / theirs.work) / (base.seconds / base.work)
        for theirs, base in zip(own, ours, strict=True)
    ]
    return Comparison(
        case=case,
        method=method,
        rate=statistics.median(timing.work / timing.seconds for timing in own),
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        memory_ratio=max(t.peak_bytes for t in own) / max(t.peak_bytes for t in ours),
        equality=equality,
        rounds=own,
    )


def _run_method(name: str, case: str, method: str, answer: Path, *, threads: int) -> Timing:
    limits = {key: str(threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    ended = subprocess.run(
        [sys.executable, "-m", "umarvel_ray.bench.harness", name, case, method, str(answer)],
        env={**os.environ, **limits},
        stdout=subprocess.PIPE,
        text=True,
    )
    if ended.returncode:
        raise BenchmarkError(
            f"bench {name}, {case}: {method} ended with code {ended.returncode}; its own words stand above."
        )
    return Timing(**json.loads(ended.stdout.splitlines()[-1]))


def _work(name: str, case: str, method: str, answer: Path) -> Timing:
    """What the process of one method does."""
    benchmark = load(name)
    prepared = benchmark.methods[method](benchmark.cases[case])
    wait = prepared.synchronize or (lambda: None)
    np.savez(answer, allow_pickle=False, **prepared.run())
    wait()
    seconds = []
    for _ in range(benchmark.repeats if prepared.simulated_s is None else 0):
        start = time.perf_counter()
        prepared.run()
        wait()
        seconds.append(time.perf_counter() - start)
    return Timing(
        seconds=statistics.median(seconds) if prepared.simulated_s is None else prepared.simulated_s,
        work=prepared.work,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        device_peak_bytes=_device_peak_bytes(),
        facts=dict(prepared.facts),
    )


def _device_peak_bytes() -> int:
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_allocated() if torch is not None and torch.cuda.is_available() else 0


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    processor = platform.processor()
    with open("/proc/cpuinfo") if Path("/proc/cpuinfo").exists() else open(os.devnull) as file:
        processor = next(
            (line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), processor
        )
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": processor,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    import torch

    facts["torch"] = torch.__version__
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
    return facts


def save(results: list[Comparison], output: Path, *, name: str, command: str) -> None:
    """Everything that was measured, as JSON."""
    document = {
        "benchmark": name,
        "command": command,
        "machine": machine(),
        "results": [asdict(result) for result in results],
    }
    output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    print(json.dumps(asdict(_work(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])))))
