"""What a headline hides: ties, copies, kinds of wrong answers, how far right and wrong scores lie apart.

Axes: Q queries of a run, K ranks.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from umarvel_ray.data.mbeir import DATASETS, DOMAINS, dataset_id_of
from umarvel_ray.data.trec import Run
from umarvel_ray.errors import DataError

BIN_WIDTH = 0.005
"""Of score histograms; their edges are whole multiples of it."""


class PoolIndex:
    """Which candidates a pool holds, and of which modality: 9 bytes a candidate, so millions fit.

    A did is kept as a 64-bit hash of this process; two of 5.6M share one by accident once in a million pools.
    """

    def __init__(self, parts: Mapping[str, tuple[str, Iterable[str]]]) -> None:
        """Take in the parts of a pool.

        Args:
            parts: (modality, dids) by name.

        Raises:
            DataError: A did stands in it twice.
        """
        self.names = tuple(parts)
        self.modalities = tuple(modality for modality, _ in parts.values())
        hashes, numbers = [], []
        for number, (_, dids) in enumerate(parts.values()):
            mine = np.fromiter((hash(did) for did in dids), dtype=np.int64)
            hashes.append(mine)
            numbers.append(np.full(len(mine), number, dtype=np.int8))
        joined = np.concatenate(hashes) if hashes else np.zeros(0, dtype=np.int64)
        order = np.argsort(joined, kind="stable")
        self._hashes = joined[order]
        self._numbers = np.concatenate(numbers)[order] if numbers else np.zeros(0, dtype=np.int8)
        if repeats := int((self._hashes[1:] == self._hashes[:-1]).sum()):
            raise DataError(
                f"pool of {', '.join(self.names[:3])}{' …' * (len(self.names) > 3)}: {repeats} of "
                f"{len(self._hashes)} candidates stand in it twice. A pool must hold each did once."
            )

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, did: object) -> bool:
        return self.modality_of(str(did)) is not None

    def __iter__(self) -> Iterator[str]:
        raise TypeError("a pool index holds hashes; ask it for a did")

    def modality_of(self, did: str) -> str | None:
        """The modality of a candidate; None for a stranger."""
        value = hash(did)
        place = int(np.searchsorted(self._hashes, value))
        if place == len(self._hashes) or self._hashes[place] != value:
            return None
        return self.modalities[int(self._numbers[place])]


@dataclass(frozen=True)
class Ranking:
    """One query of a run beside its judgements."""

    qid: str
    dids: Sequence[str]
    scores: np.ndarray
    positives: frozenset[str]


def rankings(run: Run, qrels: Mapping[str, Mapping[str, int]]) -> Iterator[Ranking]:
    """The queries of a run, in its order."""
    for qid, dids, scores in zip(run.qids, run.dids, run.scores, strict=True):
        right = frozenset(did for did, grade in qrels[qid].items() if grade > 0)
        yield Ranking(qid, dids, np.asarray(scores), right)


def tie_bounds(run: Run, qrels: Mapping[str, Mapping[str, int]], k: int) -> tuple[float, float]:
    """hit@k if every exact tie went against the query, and if every one went for it.

    A tie that reaches past the run's depth is seen as far as the run goes.
    """
    lost = won = 0
    for query in rankings(run, qrels):
        right = np.fromiter((did in query.positives for did in query.dids), dtype=bool, count=len(query.dids))
        if right.any():
            best = query.scores[right].max()
            ahead = int((query.scores > best).sum())
            tied_wrong = int(((query.scores == best) & ~right).sum())
            won += ahead < k
            lost += ahead + tied_wrong < k
    return lost / len(run), won / len(run)


def twin_counts(
    run: Run,
    qrels: Mapping[str, Mapping[str, int]],
    k: int,
    content_key: Callable[[str], bytes | None],
    rough_key: Callable[[str], Hashable | None] | None = None,
) -> dict[str, int]:
    """Queries that miss at k though an unlisted copy of a positive is among their first k.

    Args:
        run: Best first.
        qrels: Judgements.
        k: The headline's.
        content_key: did → what equal content shares; None for a did that the pool lacks. Only candidates of
            queries that miss are asked for.
        rough_key: The same but cheap, and different only where content is: then few pictures are read.
    """
    missed = saved = 0
    for query in rankings(run, qrels):
        top: Sequence[str] = query.dids[:k]
        if query.positives & set(top):
            continue
        missed += 1
        right: Sequence[str] = sorted(query.positives)
        if rough_key is not None:
            rough = {key for did in right if (key := rough_key(did)) is not None}
            top = [did for did in top if rough_key(did) in rough]
            alike = {rough_key(did) for did in top}
            right = [did for did in right if rough_key(did) in alike]
        if not top or not right:
            continue
        keys = {key for did in right if (key := content_key(did)) is not None}
        saved += any(content_key(did) in keys for did in top) if keys else 0
    return {"queries_missed": missed, "queries_missed_but_copy_found": saved}


def error_kinds(
    run: Run, qrels: Mapping[str, Mapping[str, int]], pool: PoolIndex, *, modality: str, domain: str
) -> dict[str, Any]:
    """Of the queries whose first candidate is wrong: in its modality, in its domain only, or in neither.

    Returns:
        `errors` (queries), the shares of them `wrong_modality`, `wrong_domain`, `other`, and
        `modality_at_1`: share of all queries by the modality of their first candidate.

    Source: the error analysis of UniIR, arXiv:2311.17136.
    """
    counts = {"wrong_modality": 0, "wrong_domain": 0, "other": 0}
    first: dict[str, int] = {}
    for query in rankings(run, qrels):
        if not len(query.dids):
            continue
        did = query.dids[0]
        found = pool.modality_of(did) or "unknown"
        first[found] = first.get(found, 0) + 1
        if did in query.positives:
            continue
        dataset = dataset_id_of(did)
        known = dataset is not None and dataset < len(DATASETS)
        found_domain = DOMAINS[DATASETS[dataset]] if known and dataset is not None else domain
        if found != modality:
            counts["wrong_modality"] += 1
        elif found_domain != domain:
            counts["wrong_domain"] += 1
        else:
            counts["other"] += 1
    errors = sum(counts.values())
    return {
        "errors": errors,
        **{name: count / errors if errors else 0.0 for name, count in counts.items()},
        "modality_at_1": {name: count / len(run) for name, count in sorted(first.items())},
    }


def score_histograms(run: Run, qrels: Mapping[str, Mapping[str, int]]) -> dict[str, list[float]] | None:
    """Scores of each query's best positive and of its best wrong candidate, as counts over `bin_edges`:
    bins of `BIN_WIDTH`, as far as there are scores.

    None where a score lies outside −1 … 1, as no cosine and no fusion of one with a probability does.
    """
    right, wrong = [], []
    for query in rankings(run, qrels):
        mask = np.fromiter((did in query.positives for did in query.dids), dtype=bool, count=len(query.dids))
        if mask.any():
            right.append(float(query.scores[mask][0]))
        if not mask.all():
            wrong.append(float(query.scores[~mask][0]))
    values = np.array([*right, *wrong])
    if not len(values) or np.abs(values).max() > 1 + 1e-6:
        return None
    first, last = np.floor(values.min() / BIN_WIDTH), np.floor(values.max() / BIN_WIDTH) + 1
    edges = np.arange(first, last + 1) * BIN_WIDTH
    return {
        "bin_edges": [round(float(edge), 4) for edge in edges],
        "positives": np.histogram(right, edges)[0].tolist(),
        "wrong": np.histogram(wrong, edges)[0].tolist(),
    }


def vector_spread(vectors_ND: np.ndarray) -> dict[str, float]:
    """Mean and deviation of the cosines of a sample's pairs, and the largest deviation of a column.

    Args:
        vectors_ND: A sample of rows, at least two.
    """
    unit_ND = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    cosine_NN = unit_ND @ unit_ND.T
    pairs = cosine_NN[~np.eye(len(unit_ND), dtype=bool)]
    return {
        "mean_cosine": float(pairs.mean()),
        "cosine_deviation": float(pairs.std()),
        "largest_column_deviation": float(unit_ND.std(axis=0).max()),
    }
