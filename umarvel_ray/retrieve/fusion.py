"""Recall scores and P(Yes) as one score: for ranking, for the teacher of the distillation, and how to weigh.

Source: U-MARVEL, section 3.3 and appendix C, arXiv:2507.14902; the sum is what its released code does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from umarvel_ray.data.trec import Run
from umarvel_ray.retrieve.scores import Scores

if TYPE_CHECKING:
    import pyarrow as pa

ALPHAS = tuple(step / 20 for step in range(21))
"""Tried when alpha is tuned."""


@dataclass(frozen=True)
class Fusion:
    """a·recall + b·P(Yes).

    Attributes:
        kind: `alpha`: a = α, b = 1 − α. `sum`: a = 1, b = w.
        value: α or w.
        by_task: α or w of single tasks.
    """

    kind: Literal["alpha", "sum"]
    value: float
    by_task: Mapping[str, float] = field(default_factory=dict)

    def weights(self, task: str) -> tuple[float, float]:
        """(a, b) of a task's ranking."""
        value = self.by_task.get(task, self.value)
        return (value, 1 - value) if self.kind == "alpha" else (1.0, value)

    def teacher_weights(self, task: str) -> tuple[float, float]:
        """(a, b) of the scores that a student learns: those of the ranking; of a sum, half."""
        recall, p_yes = self.weights(task)
        return (recall, p_yes) if self.kind == "alpha" else (recall / 2, p_yes / 2)

    def facts(self) -> dict[str, Any]:
        """For files and reports."""
        return {"kind": self.kind, "value": self.value, "by_task": dict(self.by_task)}


def fuse(scores: Scores, weights: tuple[float, float]) -> Run:
    """Rank each list by a·recall + b·P(Yes); ties keep the order of the recall."""
    a, b = weights
    qids, dids, fused = [], [], []
    for qid, own, recall, p_yes in scores.rows():
        total = (a * recall + b * p_yes).astype(np.float32)
        order = np.argsort(-total, kind="stable")
        qids.append(qid)
        dids.append([own[place] for place in order])
        fused.append(total[order])
    return Run(qids=qids, dids=dids, scores=fused)


def teacher_table(scores: Scores, weights: tuple[float, float]) -> "pa.Table":
    """A run by the teacher's scores, so that training reads it as any list, with what they were made of.

    Returns:
        qid, did, score as a `Run`; recall and p_yes in the same order.
    """
    import pyarrow as pa

    a, b = weights
    columns: dict[str, list[Any]] = {name: [] for name in ("qid", "did", "score", "recall", "p_yes")}
    for qid, dids, recall, p_yes in scores.rows():
        total = (a * recall + b * p_yes).astype(np.float32)
        order = np.argsort(-total, kind="stable")
        columns["qid"].append(qid)
        columns["did"].append([dids[place] for place in order])
        for name, values in (("score", total), ("recall", recall), ("p_yes", p_yes)):
            columns[name].append(values[order].astype(np.float32))
    floats = pa.list_(pa.float32())
    kinds = {"qid": pa.string(), "did": pa.list_(pa.string())}
    return pa.table({name: pa.array(rows, kinds.get(name, floats)) for name, rows in columns.items()})


def tune_alpha(
    scores: Mapping[str, Scores],
    quality: Mapping[str, Callable[[Run], np.ndarray]],
    *,
    alphas: Sequence[float] = ALPHAS,
) -> dict[str, Any]:
    """The alpha to rank with, chosen on validation data, and the whole curve.

    It is the largest whose mean is within one standard error of the best one's, over the same queries: a weak
    reranker's best alpha is often noise, and the recall is what it has to beat. Source: the rule of one
    standard error of Breiman, Friedman, Olshen and Stone, Classification and Regression Trees (1984), 3.4.3.

    Args:
        scores: Of each task's validation queries.
        quality: For each task a function of a run → [Q], a number for each of its queries, higher is better.
        alphas: To try.

    Returns:
        `{"alpha": …, "best": …, "curve": [[alpha, mean over tasks], …], "tasks": {task: [mean, …]}}`; `best`
        is the alpha at the top of the curve, the largest among equals.
    """
    by_task = {
        task: np.stack([np.asarray(quality[task](fuse(own, (alpha, 1 - alpha)))) for alpha in alphas])
        for task, own in scores.items()
    }  # [A, Q] of each task
    means = np.mean([values_AQ.mean(axis=1) for values_AQ in by_task.values()], axis=0)
    best = max(range(len(alphas)), key=lambda place: (round(means[place], 6), alphas[place]))
    lost = [values_AQ[best] - values_AQ for values_AQ in by_task.values()]
    error_A = np.sqrt(sum(lost_AQ.var(axis=1) / lost_AQ.shape[1] for lost_AQ in lost)) / len(lost)
    alike = np.flatnonzero(means[best] - means <= error_A + 1e-6)
    return {
        "alpha": max(alphas[int(place)] for place in alike),
        "best": alphas[best],
        "curve": [[alpha, float(mean)] for alpha, mean in zip(alphas, means, strict=True)],
        "tasks": {task: values_AQ.mean(axis=1).tolist() for task, values_AQ in by_task.items()},
    }
