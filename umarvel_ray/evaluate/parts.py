"""What is evaluated outside M-BEIR: parts of a set, each with queries, candidates, judgements and a rule.

A part is one figure of a table: a direction of Flickr30K, a subset of GeneCIS, a user's own data. Its
candidates are one pool for all queries, or a list of each query's own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from umarvel_ray.artifacts import fingerprint
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.data.trec import Qrels
from umarvel_ray.errors import DataError
from umarvel_ray.evaluate.metrics import DEFINITION, judge, parse_metric

Ties = Literal["lost", "averaged"]
"""What an exact tie with a right candidate is worth in a query's own list: nothing, or its share of the
orders. A collapsed encoder, which ties everything, then scores 0 or chance, never 1."""


def record_id(record: Query | Candidate) -> str:
    """qid or did; where one similarity matrix serves both directions, a query serves as candidate."""
    return record.qid if isinstance(record, Query) else record.did


@dataclass(frozen=True)
class Part:
    """One figure of a table.

    Attributes:
        name: `"flickr30k: text → image"`.
        kind: What is asked with what, for people.
        queries: Each qid once.
        candidates: The pool, or all candidates of all lists; each id once.
        qrels: `{qid: {did: grade}}`; empty where a server keeps them.
        lists: Each query's own candidates; None where all are one pool.
        metrics: What is computed; the first is the headline.
        ties: In lists, what a tie with a right candidate is worth.
        targets: CIRCO's one target per query, for the recall beside its mAP.
        files: Where it was read from; their content is part of the fingerprint.
    """

    name: str
    kind: str
    queries: Sequence[Query]
    candidates: Sequence[Candidate | Query]
    qrels: Qrels
    metrics: tuple[str, ...]
    lists: Mapping[str, tuple[str, ...]] | None = None
    ties: Ties = "averaged"
    targets: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        """Raises DataError: nothing is there, ids repeat, or judgements and lists name what is not there."""
        qids, dids = [query.qid for query in self.queries], [record_id(c) for c in self.candidates]
        for what, ids in (("queries", qids), ("candidates", dids)):
            if not ids:
                raise DataError(f"{self.name}: has no {what}. Look whether its files are whole.")
            if len(set(ids)) != len(ids):
                twice = next(name for place, name in enumerate(ids) if name in set(ids[:place]))
                raise DataError(
                    f"{self.name}: {len(ids) - len(set(ids))} of {len(ids)} {what} repeat an id (first: "
                    f"{twice}). Keep one."
                )
        pool = set(dids)
        asked = set(qids)
        if strangers := [qid for qid in self.qrels if qid not in asked]:
            raise DataError(
                f"{self.name}: {len(strangers)} judged queries are not asked (first: {strangers[0]}). Use "
                "the judgements of these queries."
            )
        named = {did for judged in self.qrels.values() for did in judged}
        named |= {did for dids_of in (self.lists or {}).values() for did in dids_of}
        if self.qrels and not named & pool:
            raise DataError(
                f"{self.name}: none of {len(named)} judged candidates is among {len(pool)} (first: "
                f"{next(iter(named), 'none')}, the pool begins with {dids[0]}). Ids never match: look how "
                "both files write them."
            )
        if self.lists is not None and (lost := sorted(named - pool)):
            raise DataError(
                f"{self.name}: {len(lost)} candidates of lists have no record (first: {lost[0]}). Give them."
            )

    @cached_property
    def fingerprint(self) -> str:
        """Names ids, words, judgements and lists (not the content of pictures)."""
        return fingerprint(
            [
                [repr(query) for query in self.queries],
                [repr(candidate) for candidate in self.candidates],
                self.qrels,
                {qid: list(dids) for qid, dids in (self.lists or {}).items()},
            ]
        )


def judged_lists(part: Part, scores_of: Callable[[str, Sequence[str]], np.ndarray]) -> dict[str, np.ndarray]:
    """Every metric of every query of a part with lists, (Q,) float64, ties as the part says.

    Args:
        part: Its metrics are hit@k and mrr-like names of `metrics.py`; hit@1 of a list of two is accuracy.
        scores_of: (qid, dids) → their scores; the order of the list carries nothing.

    Raises:
        DataError: A score is NaN or infinite, or a metric other than hit@k is asked of lists.
    """
    assert part.lists is not None
    found: dict[str, list[float]] = {name: [] for name in part.metrics}
    odd: list[str] = []
    all_tied = 0
    for query in part.queries:
        dids = part.lists[query.qid]
        scores = np.asarray(scores_of(query.qid, dids), dtype=np.float32)
        if not np.isfinite(scores).all():
            odd.append(query.qid)
            continue
        all_tied += len(scores) > 1 and bool((scores == scores[0]).all())
        right = np.array([part.qrels[query.qid].get(did, 0) > 0 for did in dids])
        for name in part.metrics:
            metric, k = name.split("@")
            if metric != "hit":
                raise DataError(f"{part.name}: {name} is not defined for lists of candidates. Ask for hit@k.")
            found[name].append(hit_in_list(scores, right, int(k), ties=part.ties))
    if odd:
        raise DataError(
            f"{part.name}: {len(odd)} of {len(part.queries)} queries have a score that is not finite (first: "
            f"{odd[0]}). The embeddings are broken: check the checkpoint and its dtype, embed again."
        )
    if all_tied == len(part.queries):
        raise DataError(
            f"{part.name}: in all {all_tied} lists every candidate has the same score. The encoder gives one "
            "vector for all: check that the checkpoint is loaded."
        )
    return {name: np.array(values) for name, values in found.items()}


def hit_in_list(scores: np.ndarray, right: np.ndarray, k: int, *, ties: Ties) -> float:
    """Whether a right candidate is among the first k, whatever order the list came in.

    `lost`: a right candidate stands behind all others of its score. `averaged`: the probability under a
    uniformly drawn order of equal scores.

    Args:
        scores: (C,) finite.
        right: (C,) bool.
        k: Ranks looked at.
    """
    if not right.any():
        return 0.0
    best = scores[right].max()
    ahead = int((scores > best).sum())
    tied_wrong = int(((scores == best) & ~right).sum())
    if ties == "lost":
        return float(ahead + tied_wrong < k)
    room = k - ahead
    tied_right = int(((scores == best) & right).sum())
    if room <= 0:
        return 0.0
    miss = 1.0
    for drawn in range(min(room, tied_wrong + tied_right)):
        miss *= max(tied_wrong - drawn, 0) / (tied_wrong + tied_right - drawn)
    return 1 - miss


def part_results(part: Part, values: Mapping[str, np.ndarray], **more: Any) -> dict[str, Any]:
    """The entry of a part in a results document, as a task of M-BEIR has one."""
    first = part.metrics[0]
    return {
        "kind": part.kind,
        "headline": first,
        "num_queries": len(part.queries),
        "local": {
            **{name: float(values_Q.mean()) for name, values_Q in values.items()},
            "pool_size": len(part.candidates),
            **more,
        },
    }


def ranked_values(part: Part, ranking: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
    """Every metric of every query of a part with one pool, (Q,) float64, in the order of its queries.

    Raises:
        DataError: A query is not ranked, or a ranking names a candidate twice.
    """
    if missing := [query.qid for query in part.queries if query.qid not in ranking]:
        raise DataError(
            f"{part.name}: {len(missing)} of {len(part.queries)} queries are not in the run (first: "
            f"{missing[0]}). Search all of them."
        )
    pool = {record_id(candidate) for candidate in part.candidates}
    reachable = {
        query.qid: {did: g for did, g in part.qrels.get(query.qid, {}).items() if did in pool}
        for query in part.queries
    }
    ordered = {query.qid: ranking[query.qid] for query in part.queries}
    parsed = {name: parse_metric(name) for name in part.metrics}
    depth = max(k for _, k in parsed.values())
    judged = judge(reachable, ordered, depth=depth)
    values = {name: function(judged, k) for name, (function, k) in parsed.items()}
    if part.targets:
        of_target = judge({qid: {did: 1} for qid, did in part.targets.items()}, ordered, depth=depth)
        for name, (_, k) in parsed.items():
            if name.startswith("map@"):
                values[f"target_hit@{k}"] = parse_metric(f"hit@{k}")[0](of_target, k)
    return values


LIST_DEFINITION = (
    DEFINITION
    + " In a query's own list of candidates, exact ties with a right one count as wrong (ties: lost) "
    "or by their share of the orders (ties: averaged)."
)
