"""What each false-negative filter would do to a run, before one is chosen.

The paper does not publish its threshold, and it depends on the encoder. What can be measured without new
labels: how positives score, and the candidates at each rank; and of the positives that are known besides a
query's best, which are the false negatives one can count, how many a rule would have caught. Ranks count
candidates that are neither positives nor copies of one.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from umarvel_ray.data.trec import Qrels, Run
from umarvel_ray.retrieve.choosing import Chunk, rank_among
from umarvel_ray.retrieve.mine import ContentOfPool, positive_scores
from umarvel_ray.retrieve.settings import MiningConfig, Rule
from umarvel_ray.storage import Place

if TYPE_CHECKING:
    from umarvel_ray.data.mbeir import Pool

RANKS = (1, 5, 10, 50, 100)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_CHUNK_QUERIES = 8192
_BIN_EDGES = np.linspace(-1.0, 1.0, 201)
_GRID: dict[Rule, tuple[float, ...]] = {
    "none": (0.0,),
    "margin": (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2),
    "relative": (0.8, 0.85, 0.9, 0.95, 0.98, 1.0),
    "skip_top": (1, 3, 5, 10, 20, 30),
}
_MOST_THRESHOLDS = 9


class Explanation:
    """Scores and what-ifs of one task's queries, gathered chunk by chunk."""

    def __init__(self, config: MiningConfig, thresholds: Sequence[float]) -> None:
        self._config = config
        self._positive_scores: list[np.ndarray] = []
        self._best_scores: list[np.ndarray] = []
        self._rank_scores: dict[int, list[np.ndarray]] = {rank: [] for rank in RANKS}
        grid: dict[Rule, tuple[float, ...]] = {**_GRID, "max_score": tuple(thresholds)}
        self._tried: dict[tuple[Rule, float], dict[str, float]] = {
            (rule, value): dict.fromkeys(_TALLIES, 0.0) for rule in grid for value in grid[rule]
        }
        self._num_queries = self._num_others = 0

    def add(
        self, chunk: Chunk, other_Q: np.ndarray, other_scores: np.ndarray, all_scores: np.ndarray
    ) -> None:
        """Look at some queries.

        Args:
            chunk: Their hits.
            other_Q: Of each known positive besides the best, the query's place in the chunk.
            other_scores: Its score.
            all_scores: Those of all known positives.
        """
        num_queries = len(chunk.positive_Q)
        self._num_queries += num_queries
        self._num_others += len(other_Q)
        self._positive_scores.append(all_scores)
        self._best_scores.append(chunk.positive_Q[~np.isnan(chunk.positive_Q)])
        rank_H = rank_among(chunk.rest_H, chunk.query_H)
        for rank in RANKS:
            self._rank_scores[rank].append(chunk.score_H[rank_H == rank - 1])
        best_of_other = chunk.positive_Q[other_Q]
        # How many candidates that are no positive score above each other positive: its rank, to skip_top.
        above = _above(chunk, other_Q, other_scores)
        for (rule, value), tally in self._tried.items():
            caught = {
                "none": np.zeros(len(other_Q), dtype=bool),
                "max_score": other_scores > value,
                "margin": ~(other_scores <= best_of_other - value),
                "relative": ~(other_scores <= best_of_other * value),
                "skip_top": above < value,
            }[rule]
            filtered_H = chunk.rest_H & chunk.taken_for_false(rule, value)
            left_H = chunk.rest_H & ~filtered_H
            kept_H = left_H & (rank_among(left_H, chunk.query_H) < self._config.num_negatives)
            kept_Q = np.bincount(chunk.query_H[kept_H], minlength=num_queries)
            tally["hits"] += int(chunk.rest_H.sum())
            tally["dropped"] += int(filtered_H.sum())
            tally["kept"] += int(kept_H.sum())
            tally["kept_score"] += float(chunk.score_H[kept_H].sum(dtype=np.float64))
            tally["kept_rank"] += float((rank_H[kept_H] + 1).sum())
            tally["short"] += int((kept_Q < self._config.num_negatives).sum())
            tally["without"] += int((kept_Q == 0).sum())
            tally["caught"] += int(caught.sum())

    def as_json(self) -> dict[str, Any]:
        """`queries`, `scores`, `positives_above`, `settings`, `histograms`; shares are 0 to 1."""
        positives, best = _join(self._positive_scores), _join(self._best_scores)
        ranked = {rank: _join(self._rank_scores[rank]) for rank in RANKS}
        named = {"positives": positives, "best positive": best} | {f"rank {r}": ranked[r] for r in RANKS}
        thresholds = [value for rule, value in self._tried if rule == "max_score"]
        return {
            "queries": self._num_queries,
            "num_negatives": self._config.num_negatives,
            "known_positives": len(positives),
            "known_positives_besides_the_best": self._num_others,
            "scores": {name: _spread(values) for name, values in named.items() if len(values)},
            "positives_above": [
                {
                    "threshold": value,
                    "positives": _share(positives > value),
                    **{f"rank {rank}": _share(ranked[rank] > value) for rank in RANKS if len(ranked[rank])},
                }
                for value in thresholds
            ],
            "settings": [self._told(rule, value, tally) for (rule, value), tally in self._tried.items()],
            "histograms": {
                "bin_edges": _BIN_EDGES.tolist(),
                **{
                    name: np.histogram(np.clip(values, -1, 1), _BIN_EDGES)[0].tolist()
                    for name, values in named.items()
                    if len(values)
                },
            },
        }

    def _told(self, rule: Rule, value: float, tally: Mapping[str, float]) -> dict[str, Any]:
        kept, queries = tally["kept"], max(1, self._num_queries)
        return {
            "rule": rule,
            "value": None if rule == "none" else value,
            "hits_dropped": tally["dropped"] / max(1, tally["hits"]),
            "negatives_per_query": kept / queries,
            "queries_short": tally["short"] / queries,
            "queries_without_negatives": tally["without"] / queries,
            "mean_rank_kept": tally["kept_rank"] / kept if kept else None,
            "mean_score_kept": tally["kept_score"] / kept if kept else None,
            "other_positives_caught": tally["caught"] / self._num_others if self._num_others else None,
        }


_TALLIES: tuple[str, ...] = (
    "hits",
    "dropped",
    "kept",
    "kept_score",
    "kept_rank",
    "short",
    "without",
    "caught",
)


def explain_run(
    parts: Sequence[tuple[str, Run, Place, Sequence[Place]]],
    qrels: Qrels,
    pool: "Pool",
    config: MiningConfig,
    *,
    seed: int,
) -> dict[str, Any]:
    """Explain the filters on the runs of several tasks; arguments and errors as of `mine_run`.

    Returns:
        `{"tasks": {task: …}}`, per task what `Explanation.as_json` gives.
    """
    from umarvel_ray.retrieve.store import EmbeddingPool, EmbeddingStore

    content_of = ContentOfPool(pool)
    tasks: dict[str, Any] = {}
    for task, run, query_store, pool_stores in parts:
        searched = EmbeddingPool(tuple(pool_stores))
        queries = EmbeddingStore.open(query_store, dim=searched.dim)
        place_P, _, score_P = positive_scores(queries, searched, qrels, qids=run.qids)
        tasks[task] = explain_task(run, qrels, place_P, score_P, content_of, config.for_task(task), seed=seed)
    return {"tasks": tasks}


def explain_task(
    run: Run,
    positives: Mapping[str, Mapping[str, int]],
    place_P: np.ndarray,
    score_P: np.ndarray,
    content_of: Mapping[str, Any],
    config: MiningConfig,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Explain the filters on one run.

    Args:
        run: What the encoder finds, best first.
        positives: All listed positives of each query.
        place_P: Of each positive in the pool, the place of its query in the run.
        score_P: Its score.
        content_of: A key of each candidate's content.
        config: How many negatives are wanted, and how deep the run is looked at.
        seed: Of the mining; the filters draw nothing.
    """
    order = np.lexsort((-score_P, place_P))
    place_P, score_P = place_P[order], score_P[order]
    is_best_P = np.ones(len(place_P), dtype=bool)
    is_best_P[1:] = place_P[1:] != place_P[:-1]
    best_of = {run.qids[p]: float(s) for p, s in zip(place_P[is_best_P], score_P[is_best_P], strict=True)}
    told = Explanation(config, _thresholds(score_P))
    table = run.table()
    for start in range(0, len(run), _CHUNK_QUERIES):
        chunk = Chunk(table.slice(start, _CHUNK_QUERIES), positives, best_of, content_of, config, seed=seed)
        low, high = np.searchsorted(place_P, [start, start + _CHUNK_QUERIES])
        others = np.flatnonzero(~is_best_P[low:high]) + low
        told.add(chunk, place_P[others] - start, score_P[others], score_P[low:high])
    return told.as_json()


def _thresholds(score_P: np.ndarray) -> list[float]:
    """Round cosines across where positives lie."""
    if not len(score_P):
        return [0.5]
    low, high = np.quantile(score_P, [0.02, 0.98]).tolist()
    step = next((step for step in (0.01, 0.02, 0.05, 0.1) if (high - low) / step < _MOST_THRESHOLDS), 0.25)
    first, last = int(np.floor(low / step)), int(np.ceil(high / step))
    return [round(i * step, 2) for i in range(first, last + 1) if -1 <= i * step <= 1]


def _above(chunk: Chunk, other_Q: np.ndarray, other_scores: np.ndarray) -> np.ndarray:
    """Candidates that are no positive and score above each of some others, of the same query."""
    query_H, score_H = chunk.query_H[chunk.rest_H], chunk.score_H[chunk.rest_H]
    # Cosines span 2, so queries 4 apart never mix; within one, hits rise along the key as scores fall.
    starts_Q = np.searchsorted(query_H, other_Q)
    keys_H = query_H * 4.0 - score_H
    return np.searchsorted(keys_H, other_Q * 4.0 - other_scores.astype(np.float64), side="left") - starts_Q


def _join(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)


def _spread(values: np.ndarray) -> dict[str, float]:
    found = np.quantile(values, QUANTILES).tolist()
    names = [f"{quantile:.0%}" for quantile in QUANTILES]
    return {"queries": len(values), **dict(zip(names, found, strict=True))}


def _share(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
