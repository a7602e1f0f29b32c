"""A pair's score is one number: the exact inner product, rounded, in whatever company it is computed."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from umarvel_ray.retrieve.scoring import exact_scores, exact_scores_by_query


def pairs(kind: str, num: int = 60, width: int = 129) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(3)
    left, right = rng.standard_normal((2, num, width)).astype(np.float32)
    if kind == "cancelling":
        right[:, 1::2], left[:, 1::2] = -right[:, :-1:2], left[:, :-1:2]
        left[:, 0] *= np.float32(1 + 2**-20)
    if kind == "scales":
        left *= np.float32(10.0) ** rng.integers(-9, 10, (num, width)).astype(np.float32)
    if kind == "orthogonal":
        left[:, ::2] = 0
        right[:, 1::2] = 0
    if kind == "midway":
        # 1 + 2⁻²⁴ lies midway between two float32, and the last product decides.
        left[:], right[:] = 0, 1
        left[:, 0], left[:, 1] = 1, 2**-24
        left[:, 2] = np.float32(2.0**-90) * rng.choice([-1, 1], num)
    return torch.from_numpy(left), torch.from_numpy(right)


def rounded(left: np.ndarray, right: np.ndarray) -> np.float32:
    exact = sum(
        (Fraction(float(a)) * Fraction(float(b)) for a, b in zip(left, right, strict=True)), Fraction(0)
    )
    return np.float32(float(exact))


@pytest.mark.parametrize("kind", ["normal", "cancelling", "scales", "orthogonal", "midway"])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_score_is_the_exact_sum_rounded(kind, compiled):
    left, right = pairs(kind)
    expected = np.array([rounded(a, b) for a, b in zip(left.numpy(), right.numpy(), strict=True)])
    assert exact_scores(left, right).numpy().tobytes() == expected.tobytes()
    largest = float(left.double().norm(dim=1).max() * right.double().norm(dim=1).max()) * 1.001
    query, column = (
        torch.arange(len(left)).repeat_interleave(2),
        torch.arange(len(right)).repeat_interleave(2),
    )
    by_query = exact_scores_by_query(left, right, query, column, largest=largest, compiled=compiled)
    assert by_query.numpy().tobytes() == expected.repeat(2).tobytes()


def test_company_does_not_move_a_bit():
    left, right = pairs("normal", num=300)
    together = exact_scores(left, right)
    alone = torch.cat([exact_scores(left[i : i + 1], right[i : i + 1]) for i in range(len(left))])
    assert together.numpy().tobytes() == alone.numpy().tobytes()
    assert exact_scores(left[:0], right[:0]).shape == (0,)


def test_exact_sums_are_rarely_needed(monkeypatch):
    calls = []
    monkeypatch.setattr(math, "fsum", lambda values: calls.append(1) or sum(values))
    left, right = pairs("orthogonal", num=500)
    assert not exact_scores(left, right).any()
    exact_scores(*pairs("normal", num=500))
    assert len(calls) <= 1
