"""Rates read from finished jobs give their times back, and predict jobs that were left out."""

import pytest

from umarvel_ray.plan.rates import Sample, errors, fit_rates

# The demonstration on two quiet cores, 2026-11-21: kind, GFLOP of one of two workers (hits where there are
# none), and the seconds that it printed.
DEMO = [
    ("train", 388.9, 37.2), ("train", 1361.0, 98.0), ("train", 2159.0, 149.0), ("train", 639.0, 61.0),
    ("train", 1000.5, 103.0), ("train", 426.5, 49.4),
    ("embed", 305.0, 33.8), ("embed", 311.2, 36.9), ("embed", 78.9, 13.4),
    ("search", 8.37, 3.2), ("search", 1.63, 3.0), ("search", 0.77, 3.5),
    ("rerank", 438.5, 56.1), ("rerank", 235.5, 30.8),
    ("mine", 300e3, 1.4), ("mine", 300e3, 0.9),
]  # fmt: skip
SAMPLES = [Sample(kind, load * (1 if kind == "mine" else 1e9), seconds) for kind, load, seconds in DEMO]


def test_measured_jobs_are_given_back_within_a_factor():
    """Six trainings of three forms and two sizes of trained weights share two numbers."""
    off = errors(fit_rates(SAMPLES, start_s=12), SAMPLES)
    assert max(off.values()) < 1.3, off


def test_a_job_that_was_left_out_is_predicted_within_one_and_a_half():
    for left_out in SAMPLES:
        rest = [sample for sample in SAMPLES if sample is not left_out]
        rate = fit_rates(rest, start_s=12)[left_out.kind]
        predicted = rate.seconds(left_out.load)
        assert 1 / 1.57 < predicted / left_out.seconds < 1.57, left_out
        if left_out.kind != "mine":  # seconds printed with one digit
            assert 1 / 1.5 < predicted / left_out.seconds < 1.5, left_out


def test_exact_times_are_read_exactly():
    made = [Sample("embed", load, 5 + load / 2e9) for load in (1e9, 4e9, 9e9)]
    rate = fit_rates(made, start_s=0)["embed"]
    assert (rate.start_s, rate.per_s, rate.jobs) == (pytest.approx(5), pytest.approx(2e9), 3)


def test_neither_start_up_nor_time_for_work_is_negative():
    faster_with_more = [Sample("search", 1e9, 4.0), Sample("search", 9e9, 3.0)]
    rate = fit_rates(faster_with_more, start_s=1)["search"]
    assert rate.per_s == float("inf") and 3 <= rate.start_s <= 4
    proportional_or_less = [Sample("embed", 1e9, 1.0), Sample("embed", 2e9, 4.0)]
    assert fit_rates(proportional_or_less, start_s=1)["embed"].start_s == 0


def test_one_job_gives_a_rate_beside_the_assumed_start():
    rate = fit_rates([Sample("train", 6e9, 16.0)], start_s=10)["train"]
    assert (rate.start_s, rate.per_s) == (
        8.0,
        pytest.approx(6e9 / 8),
    )  # never more than half of what was seen
    assert fit_rates([Sample("report", 0.0, 2.0)], start_s=10)["report"].seconds(0.0) == 1.0
