"""Metrics of ranked results: grades in, one number per query out.

Axes: Q queries of the run, in its order; K ranks, best first, as deep as asked. Every metric gives (Q,)
float64 in [0, 1]. A candidate without a judgement counts as not relevant; only grades above zero make a
positive. Queries without a positive score 0 and stay in the mean, as the benchmark counts them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from umarvel_ray.errors import ConfigError, DataError

DEFINITION = (
    "hit@k is 1 if any positive of the query is among its first k candidates, else 0 (M-BEIR prints it "
    'as "Recall@k"), recall@k is the share of its positives among them, ndcg@k has linear gains and log2 '
    "discounts, mrr@k is 1 / rank of the first positive, map@k divides by min(k, number of positives); all "
    "are means over the queries; recall, ndcg and map count only the positives that the pool holds."
)
"""One sentence that stands in every results file."""


@dataclass(frozen=True)
class Judged:
    """A run beside its judgements.

    Attributes:
        qids: (Q,) the queries, in the order of the run.
        gain_QK: float64, grade of the candidate at each rank; 0 where not relevant or past a ranking's end.
        ideal_QK: float64, the same for the best possible ranking.
        num_positives_Q: int64, positives of each query, found or not.
    """

    qids: tuple[str, ...]
    gain_QK: np.ndarray
    ideal_QK: np.ndarray
    num_positives_Q: np.ndarray


def judge(
    qrels: Mapping[str, Mapping[str, int]], ranking: Mapping[str, Sequence[str]], *, depth: int
) -> Judged:
    """Look up the grade of every ranked candidate.

    Args:
        qrels: `{qid: {did: grade}}`.
        ranking: `{qid: dids, best first}`.
        depth: Ranks looked at, K.

    Raises:
        DataError: A ranked query has no entry in the qrels, or a ranking names a candidate twice.
    """
    qids = tuple(ranking)
    if missing := [qid for qid in qids if qid not in qrels]:
        raise DataError(
            f"run: {len(missing)} of {len(qids)} queries have no judgement (first: query {missing[0]}). "
            "Use the qrels of the same task and split."
        )
    gain_QK = np.zeros((len(qids), depth))
    ideal_QK = np.zeros((len(qids), depth))
    num_positives_Q = np.zeros(len(qids), dtype=np.int64)
    repeated: list[tuple[str, str]] = []
    for row, qid in enumerate(qids):
        dids = ranking[qid]
        if len(set(dids)) < len(dids):
            repeated.append((qid, next(did for place, did in enumerate(dids) if did in dids[:place])))
        positives = {did: grade for did, grade in qrels[qid].items() if grade > 0}
        for place, did in enumerate(dids[:depth]):
            gain_QK[row, place] = positives.get(did, 0)
        best = sorted(positives.values(), reverse=True)[:depth]
        ideal_QK[row, : len(best)] = best
        num_positives_Q[row] = len(positives)
    if repeated:
        qid, did = repeated[0]
        raise DataError(
            f"run: {len(repeated)} of {len(qids)} rankings name a candidate twice (first: query {qid}, "
            f"candidate {did}). Remove the double ids from the pool and search again."
        )
    return Judged(qids, gain_QK, ideal_QK, num_positives_Q)


def hit_at(judged: Judged, k: int) -> np.ndarray:
    """1 if any positive is among the first k, else 0: what M-BEIR prints as "Recall@k"."""
    return np.where((judged.gain_QK[:, :k] > 0).any(axis=1), 1.0, 0.0)


def recall_at(judged: Judged, k: int) -> np.ndarray:
    """Share of the query's positives among the first k."""
    found_Q = (judged.gain_QK[:, :k] > 0).sum(axis=1)
    return found_Q / np.maximum(judged.num_positives_Q, 1)


def ndcg_at(judged: Judged, k: int) -> np.ndarray:
    """Discounted gain over that of the best ranking; the gain is the grade itself, as in trec_eval.

    Source: Järvelin and Kekäläinen 2002, Cumulated gain-based evaluation of IR techniques.
    """
    k = min(k, judged.gain_QK.shape[1])
    discount_K = 1 / np.log2(np.arange(2, k + 2))
    ideal_Q = (judged.ideal_QK[:, :k] * discount_K).sum(axis=1)
    return (judged.gain_QK[:, :k] * discount_K).sum(axis=1) / np.where(ideal_Q > 0, ideal_Q, 1)


def average_precision_at(judged: Judged, k: int) -> np.ndarray:
    """Sum of the precision at each positive's rank, over min(k, number of positives).

    Source: Baldrati et al. 2023, CIRCO, arXiv:2303.15247; trec_eval divides by the number of positives.
    """
    relevant_QK = judged.gain_QK[:, :k] > 0
    precision_QK = relevant_QK.cumsum(axis=1) / np.arange(1, relevant_QK.shape[1] + 1)
    return (precision_QK * relevant_QK).sum(axis=1) / np.clip(judged.num_positives_Q, 1, k)


def reciprocal_rank_at(judged: Judged, k: int) -> np.ndarray:
    """1 / rank of the first positive; 0 if it is not among the first k."""
    rank_Q = first_positive_rank(judged)
    found_Q = (rank_Q > 0) & (rank_Q <= k)
    return found_Q / np.maximum(rank_Q, 1)


def first_positive_rank(judged: Judged) -> np.ndarray:
    """Rank of each query's first positive, from 1; 0 where no rank looked at holds one. (Q,) int64."""
    relevant_QK = judged.gain_QK > 0
    return np.where(relevant_QK.any(axis=1), relevant_QK.argmax(axis=1) + 1, 0)


METRICS: dict[str, Callable[[Judged, int], np.ndarray]] = {
    "hit": hit_at,
    "recall": recall_at,
    "ndcg": ndcg_at,
    "map": average_precision_at,
    "mrr": reciprocal_rank_at,
}


def parse_metric(name: str) -> tuple[Callable[[Judged, int], np.ndarray], int]:
    """`"hit@5"` → (`hit_at`, 5).

    Raises:
        ConfigError: The name is not of that form.
    """
    metric, _, k = name.partition("@")
    if metric not in METRICS or not k.isdecimal() or int(k) < 1:
        raise ConfigError(
            f"metric {name!r} is not known. Write one of {', '.join(METRICS)}, then @k, as in hit@5."
        )
    return METRICS[metric], int(k)


def score_queries(
    qrels: Mapping[str, Mapping[str, int]], ranking: Mapping[str, Sequence[str]], metrics: Sequence[str]
) -> dict[str, np.ndarray]:
    """Each metric of each query: `{"hit@5": (Q,) float64}`, in the ranking's order; errors as `judge`."""
    parsed = {name: parse_metric(name) for name in metrics}
    judged = judge(qrels, ranking, depth=max((k for _, k in parsed.values()), default=1))
    return {name: function(judged, k) for name, (function, k) in parsed.items()}


def mean_scores(
    qrels: Mapping[str, Mapping[str, int]], ranking: Mapping[str, Sequence[str]], metrics: Sequence[str]
) -> dict[str, float]:
    """Each metric as the mean over the queries of the ranking.

    Raises:
        DataError: As in `judge`, or there is no query.
    """
    if not ranking:
        raise DataError(
            "run: holds no query, so no mean exists. Search first, or check the name of the split."
        )
    return {name: float(values_Q.mean()) for name, values_Q in score_queries(qrels, ranking, metrics).items()}
