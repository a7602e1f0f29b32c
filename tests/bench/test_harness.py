"""The harness judges equality before speed, and takes ratios within a round."""

import time

import numpy as np
import pytest

from umarvel_ray.bench import harness
from umarvel_ray.bench.harness import Benchmark, BenchmarkError, Prepared
from umarvel_ray.errors import ConfigError


def sums(case):
    return Prepared(run=lambda: {"sum": np.arange(case["size"]).sum()[None]}, work=case["size"])


def slow_sums(case):
    def run():
        time.sleep(0.02)
        return {"sum": np.array([case["size"] * (case["size"] - 1) // 2])}

    return Prepared(run=run, work=case["size"])


def wrong_sums(case):
    return Prepared(run=lambda: {"sum": np.array([0])})


def agree(case, ours, theirs):
    if not np.array_equal(ours["sum"], theirs["sum"]):
        raise BenchmarkError(f"sums: {ours['sum'][0]} and {theirs['sum'][0]}")
    return "equal"


def toy(*peers):
    return Benchmark(
        about="sums",
        unit="numbers",
        methods={"ours": sums, **{peer.__name__: peer for peer in peers}},
        cases={"ten": {"size": 10}, "thousand": {"size": 1000}},
        quick=("ten",),
        compare=agree,
    )


@pytest.fixture
def in_process(monkeypatch):
    """Methods run in this process: the harness under test is what happens around them."""

    def use(benchmark):
        monkeypatch.setattr(harness, "load", lambda name: benchmark)
        monkeypatch.setattr(
            harness,
            "_run_method",
            lambda name, case, method, answer, *, threads: harness._work(name, case, method, answer),
        )

    return use


def test_a_slower_peer_has_a_ratio_above_one_in_every_round(in_process):
    in_process(toy(slow_sums))
    lines = []
    results = harness.run_benchmark("toy", quick=False, rounds=2, cases=[], on_done=lines.append)
    peers = {result.case: result for result in results if result.method == "slow_sums"}
    assert set(peers) == {"ten", "thousand"}
    assert all(result.ratio_low > 1 and result.equality == "equal" for result in peers.values())
    assert all(len(result.rounds) == 2 for result in results)
    assert len(lines) == 2 * 2 * 2


def test_unequal_answers_are_never_timed_twice(in_process):
    in_process(toy(wrong_sums))
    lines = []
    with pytest.raises(BenchmarkError, match="45 and 0"):
        harness.run_benchmark("toy", quick=False, rounds=3, cases=["ten"], on_done=lines.append)
    assert len(lines) == 2


def test_quick_takes_the_small_cases_once(in_process):
    in_process(toy(slow_sums))
    results = harness.run_benchmark("toy", quick=True, rounds=3, cases=[], on_done=lambda line: None)
    assert {(result.case, len(result.rounds)) for result in results} == {("ten", 1)}


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="no such benchmark"):
        harness.run_benchmark("nothing", quick=True, rounds=1, cases=[], on_done=print)


def test_unknown_cases_are_refused(in_process):
    in_process(toy(slow_sums))
    with pytest.raises(ConfigError, match="first: million"):
        harness.run_benchmark("toy", quick=True, rounds=1, cases=["million"], on_done=print)
