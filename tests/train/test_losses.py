"""The losses against float64 loops of ten lines, and their gradients against finite differences."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from umarvel_ray.train.losses import answer_loss, list_cross_entropy, list_distillation


def unit(*shape: int, seed: int) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("tau", [0.02, 0.05, 1.0])
def test_list_cross_entropy(tau):
    """The positive stands first; what does not count may hold anything."""
    query_QD, list_QGD = unit(3, 8, seed=0), unit(3, 4, 8, seed=1)
    counts_QG = torch.tensor([[True, True, False, True], [True, False, False, False], [True] * 4])
    loss_Q = list_cross_entropy(query_QD, list_QGD, counts_QG=counts_QG, temperature=torch.tensor(tau))
    expected_Q = []
    for query, own, counts in zip(query_QD.double(), list_QGD.double(), counts_QG, strict=True):
        exponents = [math.exp(float(query @ other) / tau) for other in own[counts]]
        expected_Q.append(-math.log(exponents[0] / math.fsum(exponents)))
    np.testing.assert_allclose(loss_Q, expected_Q, rtol=1e-4, atol=1e-5)
    assert loss_Q[1] == 0  # nothing is left to tell its positive from


def reference_distillation(
    query_QD: Tensor, lists: list[Tensor], teacher: list[list[float]], tau, teacher_tau
):
    losses = []
    for query, own, scores in zip(query_QD.double(), lists, teacher, strict=True):
        student = [math.exp(float(query @ candidate.double()) / tau) for candidate in own]
        target = [math.exp(score / teacher_tau) for score in scores]
        shares = [(t / sum(target), s / sum(student)) for t, s in zip(target, student, strict=True)]
        losses.append(math.fsum(p * (math.log(p) - math.log(q)) for p, q in shares))
    return losses


def distillation_case() -> tuple[Tensor, Tensor, Tensor, list[int], list[list[float]]]:
    """Three queries with lists of 4, 1 and 3; the places behind their ends hold what must not count."""
    query_QD, list_QKD = unit(3, 8, seed=2), unit(3, 4, 8, seed=3)
    lengths = [4, 1, 3]
    scores = [[0.9, 0.1, 0.5, 0.45], [0.3], [0.2, 0.8, 0.7]]
    teacher_QK = torch.full((3, 4), float("-inf"))
    for q, row in enumerate(scores):
        teacher_QK[q, : len(row)] = torch.tensor(row)
    return query_QD, list_QKD, teacher_QK, lengths, scores


def test_list_distillation():
    query_QD, list_QKD, teacher_QK, lengths, scores = distillation_case()
    loss_Q = list_distillation(
        query_QD,
        list_QKD,
        teacher_QK=teacher_QK,
        temperature=torch.tensor(0.1),
        teacher_temperature=torch.tensor(0.3),
    )
    lists = [rows[:length] for rows, length in zip(list_QKD, lengths, strict=True)]
    expected_Q = reference_distillation(query_QD, lists, scores, 0.1, 0.3)
    np.testing.assert_allclose(loss_Q, expected_Q, rtol=1e-4, atol=1e-6)
    assert loss_Q[1] == 0 and (loss_Q >= 0).all()


def test_a_student_that_agrees_loses_nothing():
    query_QD, list_QKD = unit(2, 8, seed=4), unit(2, 5, 8, seed=5)
    agreed_QK = torch.einsum("qd,qkd->qk", query_QD, list_QKD)
    tau = torch.tensor(0.05)
    loss_Q = list_distillation(
        query_QD, list_QKD, teacher_QK=agreed_QK, temperature=tau, teacher_temperature=tau
    )
    torch.testing.assert_close(loss_Q, torch.zeros(2), atol=1e-6, rtol=0)


def test_what_lies_behind_a_short_list_gets_no_gradient():
    query_QD, list_QKD, teacher_QK, lengths, _ = distillation_case()
    list_QKD.requires_grad_()
    tau = torch.tensor(0.1)
    list_distillation(
        query_QD, list_QKD, teacher_QK=teacher_QK, temperature=tau, teacher_temperature=tau
    ).sum().backward()
    gradient_QKD = list_QKD.grad
    assert gradient_QKD is not None and gradient_QKD.isfinite().all()
    for row, length in zip(gradient_QKD, lengths, strict=True):
        assert (row[length:] == 0).all()
    assert (gradient_QKD[0].abs().sum(1) > 0).all()


def test_the_gradient_of_tau():
    """Central differences of the float64 loop; as the teacher's temperature τ gets no gradient."""
    tau = torch.tensor(0.1, requires_grad=True)
    query_QD, list_QKD, teacher_QK, lengths, scores = distillation_case()
    loss_Q = list_distillation(
        query_QD, list_QKD, teacher_QK=teacher_QK, temperature=tau, teacher_temperature=tau
    )
    lists = [rows[:length] for rows, length in zip(list_QKD, lengths, strict=True)]

    def loss(value: float) -> float:
        return sum(reference_distillation(query_QD, lists, scores, value, 0.1))

    (gradient,) = torch.autograd.grad(loss_Q.sum(), tau)
    step = 1e-5
    assert gradient.item() == pytest.approx((loss(0.1 + step) - loss(0.1 - step)) / (2 * step), rel=1e-4)


def test_half_precision_is_computed_in_float32():
    query_QD, list_QGD = unit(3, 8, seed=0).bfloat16(), unit(3, 5, 8, seed=1).bfloat16()
    rest = {"temperature": torch.tensor(0.05), "counts_QG": torch.ones(3, 5, dtype=torch.bool)}
    loss_Q = list_cross_entropy(query_QD, list_QGD, **rest)
    assert loss_Q.dtype == torch.float32
    assert torch.equal(loss_Q, list_cross_entropy(query_QD.float(), list_QGD.float(), **rest))
    logits_TV = torch.randn(4, 9).bfloat16()
    target_T = torch.tensor([0, 8, 3, 3])
    expected_T = -logits_TV.float().log_softmax(1)[range(4), target_T]
    torch.testing.assert_close(answer_loss(logits_TV, target_T), expected_T)
