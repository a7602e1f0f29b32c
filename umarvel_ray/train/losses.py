"""Losses over a query's own list, and over answers: pure functions on tensors, computed in float32 whatever
comes in, one value per query. The loss over the global batch is `slab`'s.

Q queries here, D width, K candidates in a query's list, G = 1 + K, T tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def list_cross_entropy(
    query_QD: Tensor, list_QGD: Tensor, *, counts_QG: Tensor, temperature: Tensor
) -> Tensor:
    """Cross-entropy of each query's positive against its own list alone.

    Args:
        query_QD: Unit-norm embeddings of this lane's queries.
        list_QGD: Unit-norm embeddings of each query's positive, which stands first, and its list.
        counts_QG: bool, false beyond the end of a shorter list and for what is no negative.
        temperature: Scalar τ > 0.

    Returns:
        (Q,) float32, in nats.
    """
    logits_QG = torch.einsum("qd,qgd->qg", query_QD.float(), list_QGD.float()) / temperature.float()
    logits_QG = logits_QG.masked_fill(~counts_QG, float("-inf"))
    return logits_QG.logsumexp(1) - logits_QG[:, 0]


def list_distillation(
    query_QD: Tensor,
    list_QKD: Tensor,
    *,
    teacher_QK: Tensor,
    temperature: Tensor,
    teacher_temperature: Tensor,
) -> Tensor:
    """KL(teacher ‖ student) over each query's own list.

    Args:
        query_QD: Unit-norm embeddings of this lane's queries.
        list_QKD: Unit-norm embeddings of each query's list.
        teacher_QK: The teacher's scores; -inf beyond the end of a shorter list.
        temperature: Scalar τ of the student.
        teacher_temperature: Scalar; the teacher's scores are divided by it. It gets no gradient.

    Returns:
        (Q,) float32, in nats; 0 where the student's distribution is the teacher's.

    Source: U-MARVEL, eq. 1.
    """
    absent_QK = torch.isneginf(teacher_QK)
    student_QK = torch.einsum("qd,qkd->qk", query_QD.float(), list_QKD.float()) / temperature.float()
    student_QK = F.log_softmax(student_QK.masked_fill(absent_QK, float("-inf")), dim=1).masked_fill(
        absent_QK, 0.0
    )
    teacher_QK = F.log_softmax(teacher_QK.float() / teacher_temperature.detach().float(), dim=1)
    share_QK = teacher_QK.exp()
    return (share_QK * (teacher_QK.masked_fill(absent_QK, 0.0) - student_QK)).sum(1)


def answer_loss(logits_TV: Tensor, target_T: Tensor) -> Tensor:
    """Next-token cross-entropy of answer tokens, (T,) float32 in nats."""
    return F.cross_entropy(logits_TV.float(), target_T, reduction="none")
