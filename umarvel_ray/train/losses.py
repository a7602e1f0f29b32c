"""The losses: pure functions on tensors, computed in float32 whatever comes in, one value per query.

Q queries here, C candidates of all lanes, D width, K candidates in a query's list, T tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    query_QD: Tensor, candidate_CD: Tensor, *, positive_Q: Tensor, temperature: Tensor, ignore_QC: Tensor
) -> Tensor:
    """Cross-entropy of each query's positive against all candidates of the global batch.

    Args:
        query_QD: Unit-norm embeddings of this lane's queries.
        candidate_CD: Unit-norm embeddings of all lanes' candidates.
        positive_Q: int64, the column of each query's positive.
        temperature: Scalar τ > 0.
        ignore_QC: bool, true for columns that are no negatives of the query; never for its positive.

    Returns:
        (Q,) float32, in nats.

    Source: van den Oord et al. 2018, eq. 4, arXiv:1807.03748.
    """
    logits_QC = query_QD.float() @ candidate_CD.float().T / temperature.float()
    return F.cross_entropy(logits_QC.masked_fill(ignore_QC, float("-inf")), positive_Q, reduction="none")


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
