"""What becomes of each hit of some queries: positive, copy of one, filtered, left, kept.

Whole columns at a time. Axes: Q queries of a chunk, H their hits laid end to end, P their positives, R random
draws, U different dids.
"""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from umarvel_ray.retrieve.negatives import negatives_schema
from umarvel_ray.retrieve.settings import MiningConfig, Rule

if TYPE_CHECKING:
    import pyarrow as pa

_RANDOM_TURNS = 8
"""Each doubles the draws of the queries that are still short."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


COUNTERS: tuple[str, ...] = (
    "queries",
    "hits",
    "hits_listed_positive",
    "hits_copy_of_positive",
    "hits_filtered",
    "hits_left",
    "negatives_kept",
    "negatives_random",
    "queries_listed_positive",
    "queries_copy_of_positive",
    "queries_filtered",
    "queries_short",
    "queries_without_negatives",
    "queries_without_positive_score",
)


class Chunk:
    """Some queries of a run, and what becomes of each of their hits.

    Attributes:
        score_H: float32.
        positive_Q: float64, the score of each query's best positive; NaN where none is in the pool.
        is_listed_H: Listed positives.
        rest_H: Neither listed positives nor copies of one.
        is_filtered_H: Taken for false negatives, once chosen.
    """

    def __init__(
        self,
        table: "pa.Table",
        positives: Mapping[str, Mapping[str, int]],
        positive_scores: Mapping[str, float],
        content_of: Mapping[str, Any],
        config: MiningConfig,
        *,
        seed: int,
    ) -> None:
        import pyarrow as pa

        self._config = config
        self._seed = seed
        self._content_of = content_of
        self._content_numbers: dict[Any, int] = {}
        self._content_U = np.empty(0, dtype=np.int64)
        self._dids_U: pa.StringArray = pa.array([], pa.string())
        self._qids: list[str] = table.column("qid").to_pylist()
        self.positive_Q = np.array([positive_scores.get(qid, np.nan) for qid in self._qids], dtype=np.float64)

        dids, scores = (pa.concat_arrays(table.column(name).chunks) for name in ("did", "score"))
        query_H = np.repeat(np.arange(len(self._qids)), np.diff(dids.offsets.to_numpy()))
        near = np.flatnonzero(places(query_H) < config.depth)
        self._query_H = query_H[near]
        self.score_H = scores.flatten().to_numpy(zero_copy_only=False)[near]

        listed = [positives[qid] for qid in self._qids]
        self._query_P = np.repeat(np.arange(len(listed)), [len(row) for row in listed])
        listed_dids = pa.array([did for row in listed for did in row], pa.string())
        numbers = self._number(pa.concat_arrays([dids.flatten().take(pa.array(near)), listed_dids]))
        self._did_H, self._did_P = numbers[: len(near)], numbers[len(near) :]
        self._content_P = self._content_U[self._did_P]
        self._query_R = self._did_R = np.empty(0, dtype=np.int64)
        self.is_listed_H = are_pairs(self._query_H, self._did_H, self._query_P, self._did_P)
        self._is_copy_H = ~self.is_listed_H & are_pairs(
            self._query_H, self._content_U[self._did_H], self._query_P, self._content_P
        )
        self.rest_H = ~(self.is_listed_H | self._is_copy_H)
        self._is_kept_H = self._is_left_H = self.is_filtered_H = np.zeros(len(near), dtype=bool)

    def _number(self, dids: "pa.StringArray") -> np.ndarray:
        """Number dids, and their contents, by first appearance; numbers given before stay."""
        import pyarrow as pa

        known, numbers = len(self._dids_U), self._content_numbers
        encoded = pa.concat_arrays([self._dids_U, dids]).dictionary_encode()
        self._dids_U = encoded.dictionary
        fresh = []
        for did in self._dids_U[known:].to_pylist():
            key = self._content_of.get(did)
            # Without a key, a content of its own, which no other's key can equal.
            fresh.append(numbers.setdefault((did, None) if key is None else (None, key), len(numbers)))
        self._content_U = np.concatenate([self._content_U, np.array(fresh, dtype=np.int64)])
        return encoded.indices.to_numpy()[known:].astype(np.int64)

    def choose(self) -> None:
        """Decide on every hit, by the settings."""
        config, query_H = self._config, self._query_H
        self.is_filtered_H = self.rest_H & self.taken_for_false(config.rule, config.value or 0.0)
        self._is_left_H = self.rest_H & ~self.is_filtered_H
        rank_H = rank_among(self._is_left_H, query_H)
        self._is_kept_H = np.zeros(len(query_H), dtype=bool)
        if config.pick == "top":
            self._is_kept_H = self._is_left_H & (rank_H < config.num_negatives)
        elif config.pick == "sample":
            hits = np.flatnonzero(self._is_left_H & (rank_H < (config.window or config.depth)))
            lots = _mix(self._lots("sample")[query_H[hits]] + rank_H[hits].astype(np.uint64) * _GOLDEN)
            drawn = hits[np.lexsort((lots, query_H[hits]))]
            self._is_kept_H[drawn[places(query_H[drawn]) < config.num_negatives]] = True

    def taken_for_false(self, rule: Rule, value: float) -> np.ndarray:
        """Hits that a rule takes for false negatives, positives among them, bool (H,)."""
        score_H, positive_H = self.score_H.astype(np.float64), self.positive_Q[self._query_H]
        if rule == "max_score":
            return score_H > value
        # `not at most` rather than `above`: where the positive's score is unknown (NaN) no hit is safe.
        if rule == "margin":
            return ~(score_H <= positive_H - value)
        if rule == "relative":
            return ~(score_H <= positive_H * value)
        if rule == "skip_top":
            return rank_among(self.rest_H, self._query_H) < value
        return np.zeros(len(score_H), dtype=bool)

    def fill_up(self, pool: "pa.Array") -> None:
        """Draw what is still wanted: no positive, no copy of one, nothing filtered, nothing twice."""
        import pyarrow as pa

        num_queries = len(self._qids)
        need_Q = self._config.num_negatives - np.bincount(
            self._query_H[self._is_kept_H], minlength=num_queries
        )
        banned_H = ~self._is_left_H | self._is_kept_H
        lots_Q = self._lots("random")
        width = int(need_Q.max(initial=0)) + 8
        short = np.flatnonzero(need_Q > 0)
        found = [(self._query_R, self._did_R)]
        for turn in range(_RANDOM_TURNS):
            if not len(short):
                break
            # A longer draw starts with the shorter one, so what a query gets does not depend on the others.
            draws = _mix(lots_Q[short][:, None] + np.arange(width, dtype=np.uint64) * _GOLDEN)
            rows = (draws % np.uint64(len(pool))).reshape(-1).astype(np.int64)
            query_R = np.repeat(short, width)
            did_R = self._number(pool.take(pa.array(rows)).cast(pa.string()))
            free_R = ~are_pairs(query_R, did_R, self._query_P, self._did_P)
            free_R &= ~are_pairs(query_R, did_R, self._query_H[banned_H], self._did_H[banned_H])
            free_R &= ~are_pairs(query_R, self._content_U[did_R], self._query_P, self._content_P)
            free_R &= first_of_pair(query_R, did_R)
            free_R &= rank_among(free_R, query_R) < need_Q[query_R]
            # Sixteen draws per candidate of a small pool miss one of them once in ten million times.
            is_last = turn == _RANDOM_TURNS - 1 or width >= 16 * len(pool)
            is_settled_Q = is_last | (np.bincount(query_R[free_R], minlength=num_queries) == need_Q)
            free_R &= is_settled_Q[query_R]
            found.append((query_R[free_R], did_R[free_R]))
            short = short[~is_settled_Q[short]]
            width *= 2
        self._query_R, self._did_R = (np.concatenate(column) for column in zip(*found, strict=True))

    def result(self) -> "pa.Table":
        """The negatives of each query that has any, those of the run first."""
        import pyarrow as pa

        kept_H = self._is_kept_H
        query = np.concatenate([self._query_H[kept_H], self._query_R])
        did = np.concatenate([self._did_H[kept_H], self._did_R])
        score = np.concatenate([self.score_H[kept_H], np.full(len(self._did_R), -np.inf, dtype=np.float32)])
        order = np.argsort(query, kind="stable")
        counts_Q = np.bincount(query, minlength=len(self._qids))
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts_Q)]).astype(np.int32))
        positive_Q = self.positive_Q.astype(np.float32)
        columns = [
            pa.array(self._qids, pa.string()),
            pa.ListArray.from_arrays(offsets, self._dids_U.take(pa.array(did[order]))),
            pa.ListArray.from_arrays(offsets, pa.array(score[order].astype(np.float32))),
            pa.array(positive_Q, mask=np.isnan(positive_Q)),
        ]
        return pa.Table.from_arrays(columns, schema=negatives_schema()).filter(pa.array(counts_Q > 0))

    @property
    def query_H(self) -> np.ndarray:
        """Which query of the chunk each hit belongs to; hits of a query stand together, best first."""
        return self._query_H

    def cosines(self) -> dict[str, np.ndarray]:
        """What the histograms show."""
        return {
            "positives": self.positive_Q[~np.isnan(self.positive_Q)],
            "kept": self.score_H[self._is_kept_H],
            "dropped": self.score_H[self.is_filtered_H],
        }

    def counts(self) -> dict[str, int]:
        """`COUNTERS` of these queries."""
        num_queries = len(self._qids)
        kept_Q = np.bincount(self._query_H[self._is_kept_H], minlength=num_queries)
        kept_Q += np.bincount(self._query_R, minlength=num_queries)
        counts = {
            "queries": num_queries,
            "hits": len(self._query_H),
            "hits_listed_positive": self.is_listed_H.sum(),
            "hits_copy_of_positive": self._is_copy_H.sum(),
            "hits_filtered": self.is_filtered_H.sum(),
            "hits_left": self._is_left_H.sum(),
            "negatives_kept": kept_Q.sum(),
            "negatives_random": len(self._query_R),
            "queries_listed_positive": len(np.unique(self._query_H[self.is_listed_H])),
            "queries_copy_of_positive": len(np.unique(self._query_H[self._is_copy_H])),
            "queries_filtered": len(np.unique(self._query_H[self.is_filtered_H])),
            "queries_short": (kept_Q < self._config.num_negatives).sum(),
            "queries_without_negatives": (kept_Q == 0).sum(),
            "queries_without_positive_score": np.isnan(self.positive_Q).sum(),
        }
        return {name: int(count) for name, count in counts.items()}

    def _lots(self, purpose: str) -> np.ndarray:
        """(Q,) uint64 from seed, purpose and qid alone."""
        texts = (f"{self._seed}\n{purpose}\n{qid}".encode() for qid in self._qids)
        digests = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts)
        return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def starts(group: np.ndarray) -> np.ndarray:
    """For each item the place of the first of its group; items of a group stand together."""
    place = np.arange(len(group))
    is_first = np.ones(len(group), dtype=bool)
    is_first[1:] = group[1:] != group[:-1]
    return np.maximum.accumulate(np.where(is_first, place, 0))


def places(group: np.ndarray) -> np.ndarray:
    """Place of each item within its group, from 0."""
    return np.arange(len(group)) - starts(group)


def rank_among(chosen: np.ndarray, group: np.ndarray) -> np.ndarray:
    """How many chosen items of its group stand before each item; a large number for those not chosen."""
    before = np.cumsum(chosen) - chosen
    return np.where(chosen, before - before[starts(group)], np.iinfo(np.int64).max >> 1)


def are_pairs(
    left: np.ndarray, right: np.ndarray, among_left: np.ndarray, among_right: np.ndarray
) -> np.ndarray:
    """Whether each pair (left, right) is one of the others."""
    base = max(right.max(initial=0), among_right.max(initial=0)) + 1
    return np.isin(left * base + right, among_left * base + among_right)


def first_of_pair(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Whether each pair (left, right) stands there for the first time."""
    _, first = np.unique(left * (right.max(initial=0) + 1) + right, return_index=True)
    is_first = np.zeros(len(left), dtype=bool)
    is_first[first] = True
    return is_first


def _mix(values: np.ndarray) -> np.ndarray:
    """Spread uint64 evenly: the finalizer of SplitMix64 (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
