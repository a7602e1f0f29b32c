"""P(Yes) of lists of records that are in no file of M-BEIR: zero-shot sets and own data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.model.settings import DtypeName
from umarvel_ray.retrieve.scores import Scores
from umarvel_ray.storage import Place


@dataclass(frozen=True)
class ListTask:
    """Queries with their candidates and the recall's scores, one part of the output."""

    lists: tuple[tuple[Query, Sequence[Candidate], Sequence[float]], ...]
    part: Place


class ListReranker:
    """One reranker; scores one part a call."""

    def __init__(self, checkpoint: str, dtype: DtypeName, *, max_tokens: int) -> None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._reranker = Reranker.load(checkpoint, device=device, dtype=dtype)
        self._max_tokens = max_tokens

    def __call__(self, task: ListTask) -> dict[str, Any]:
        """Write P(Yes) of each candidate; the same task gives the same file."""
        pairs = [(query, candidates) for query, candidates, _ in task.lists]
        p_yes = self._reranker.score_many(pairs, max_tokens=self._max_tokens)
        Scores.of_lists(
            qids=[query.qid for query, _, _ in task.lists],
            dids=[[candidate.did for candidate in candidates] for _, candidates, _ in task.lists],
            recall=[recall for _, _, recall in task.lists],
            p_yes=p_yes,
            facts={},
        ).write(task.part)
        return {"queries": len(task.lists)}
