"""The distillation's loss and gradients against plain float64 arithmetic, in both forms of the teacher."""

import numpy as np
import pytest
import torch
from fixtures_model import ListSet, training_item

from umarvel_ray.data.batches import build_batch
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.retrieve.fusion import Fusion, teacher_table
from umarvel_ray.retrieve.scores import Scores
from umarvel_ray.train.losses import list_distillation

POOL = [Candidate(did=f"d{n}", txt=f"thing {n}") for n in range(8)]
LISTS = {
    "q0": ([0, 1, 2, 3, 4], [0.9, 0.6, 0.6, 0.2, 0.1], [0.1, 0.8, 0.8, 0.8, 0.0]),  # ties in both scores
    "q1": ([5, 1, 6], [0.7, 0.3, 0.1], [0.9, 0.5, 0.2]),  # shorter; its positive, 0, is not in it
    "q2": ([7], [0.4], [0.3]),  # alone: nothing to tell apart
}
TAU, DIM = 0.07, 6


def batch_of(fusion: Fusion):
    """The lists as the scoring job writes them and training reads them."""
    scores = Scores.of_lists(
        list(LISTS),
        [[POOL[n].did for n in numbers] for numbers, _, _ in LISTS.values()],
        [recall for _, recall, _ in LISTS.values()],
        [p_yes for _, _, p_yes in LISTS.values()],
        {},
    )
    table = teacher_table(scores, fusion.teacher_weights("mscoco_task0")).to_pylist()
    by_did = {candidate.did: candidate for candidate in POOL}
    items = tuple(
        training_item(
            Query(qid=row["qid"], txt=row["qid"]),
            POOL[0],
            others=[by_did[did] for did in row["did"]],
            scores=row["score"],
        )
        for row in table
    )
    return build_batch(ListSet(items), np.arange(len(items)), visit=0)


def by_hand(batch, query_QD, candidate_CD, fusion_of):
    """KL of each query, and gradients of the mean, in float64: d loss / d cosine = (Q − P) / (τ·queries)."""
    column_of = {record.did: n for n, record in enumerate(batch.records[batch.num_queries :])}
    losses, of_queries, of_candidates, of_tau = [], np.zeros_like(query_QD), np.zeros_like(candidate_CD), 0.0
    for row, (numbers, recall, p_yes) in enumerate(LISTS.values()):
        columns = [column_of[POOL[n].did] for n in numbers]
        cosine = candidate_CD[columns] @ query_QD[row]
        teacher = np.exp(np.array([fusion_of(s, p) for s, p in zip(recall, p_yes, strict=True)]) / TAU)
        student = np.exp(cosine / TAU)
        teacher, student = teacher / teacher.sum(), student / student.sum()
        losses.append(float((teacher * (np.log(teacher) - np.log(student))).sum()))
        push = (student - teacher) / TAU / len(LISTS)
        of_queries[row] += push @ candidate_CD[columns]
        np.add.at(of_candidates, columns, push[:, None] * query_QD[row])
        of_tau -= float((push * cosine).sum() / TAU)
    return np.array(losses), of_queries, of_candidates, of_tau


@pytest.mark.parametrize(
    ("fusion", "formula"),
    [
        (Fusion("alpha", 0.3), lambda s, p: 0.3 * s + 0.7 * p),
        (Fusion("sum", 1.0), lambda s, p: (s + p) / 2),
        (Fusion("sum", 1.0, {"mscoco_task0": 0.5}), lambda s, p: (s + 0.5 * p) / 2),
    ],
    ids=["paper", "released", "released-mscoco"],
)
def test_loss_and_gradients_are_those_of_float64(fusion, formula):
    rng = np.random.default_rng(3)
    batch = batch_of(fusion)
    embedding = rng.standard_normal((len(batch.records), DIM))
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    query_QD, candidate_CD = embedding[: batch.num_queries], embedding[batch.num_queries :]
    expected = by_hand(batch, query_QD, candidate_CD, formula)
    queries, candidates, tau = (
        torch.tensor(value, dtype=torch.float32, requires_grad=True)
        for value in (query_QD, candidate_CD, TAU)
    )
    lists = torch.from_numpy(batch.others_QK.clip(min=0))
    loss_Q = list_distillation(
        queries,
        candidates[lists],
        teacher_QK=torch.from_numpy(batch.teacher_QK),
        temperature=tau,
        teacher_temperature=tau,
    )
    np.testing.assert_allclose(loss_Q.detach(), expected[0], rtol=2e-5, atol=2e-6)
    loss_Q.mean().backward()
    for tensor, gradient in zip((queries, candidates, tau), expected[1:], strict=True):
        np.testing.assert_allclose(tensor.grad, gradient, rtol=1e-4, atol=1e-5)


def test_a_list_of_one_and_equal_teachers_say_what_they_can():
    """One candidate teaches nothing; equal scores ask for equal shares; beyond a list's end is nothing."""
    query_QD = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    list_QKD = torch.tensor([[[0.6, 0.8], [0.0, 1.0]], [[0.6, 0.8], [0.6, -0.8]]])
    teacher_QK = torch.tensor([[0.2, -torch.inf], [0.5, 0.5]])
    tau = torch.tensor(0.1)
    loss_Q = list_distillation(
        query_QD, list_QKD, teacher_QK=teacher_QK, temperature=tau, teacher_temperature=tau
    )
    assert loss_Q.tolist() == pytest.approx([0.0, 0.0], abs=1e-7)
