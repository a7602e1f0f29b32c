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
    quality: Mapping[str, Callable[[Run], float]],
    *,
    alphas: Sequence[float] = ALPHAS,
) -> dict[str, Any]:
    """The alpha whose rankings are best on validation data, and the whole curve.

    Args:
        scores: Of each task's validation queries.
        quality: For each task a function of a run, higher is better.
        alphas: To try; among equals the largest, which trusts the recall most.

    Returns:
        `{"alpha": …, "curve": [[alpha, mean quality], …], "tasks": {task: [quality, …]}}`.
    """
    by_task = {
        task: [float(quality[task](fuse(own, (alpha, 1 - alpha)))) for alpha in alphas]
        for task, own in scores.items()
    }
    curve = [
        [alpha, float(np.mean([row[place] for row in by_task.values()]))]
        for place, alpha in enumerate(alphas)
    ]
    best = max(curve, key=lambda point: (round(point[1], 6), point[0]))
    return {"alpha": best[0], "curve": curve, "tasks": by_task}
