"""Run + judgements → hard negatives, with counts of all that was dropped.

Whole columns at a time: Q queries, H hits of all queries laid end to end.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from umarvel_ray.artifacts import fingerprint
from umarvel_ray.config import Config
from umarvel_ray.data.mbeir import Pool
from umarvel_ray.data.trec import Qrels, Run
from umarvel_ray.errors import DataError
from umarvel_ray.retrieve.store import EmbeddingStore

Rule = Literal["none", "max_score", "margin", "relative", "skip_top"]
_BIN_EDGES = np.linspace(-1, 1, 101)


class MiningConfig(Config):
    """How a run becomes hard negatives."""

    rule: Rule
    """Which hits are taken for false negatives and dropped. `max_score`: cosine above `value`. `margin`: less than
    `value` below the best positive's cosine. `relative`: above `value` times the best positive's. `skip_top`: the
    first `value` hits. `none`: none."""
    value: NonNegativeFloat | None = None
    """The rule's number: a cosine, a share, or a count of ranks. The paper does not publish its own."""
    depth: PositiveInt = 100
    """Hits looked at per query, best first."""
    num_negatives: PositiveInt = 5
    """Hard negatives kept per query."""
    pick: Literal["top", "sample", "random"] = "top"
    """Of the hits that are left: the first; a seeded draw among the first `window`; or any candidates of the pool."""
    window: PositiveInt | None = None
    """For `sample`: how many hits to draw from; all that are left by default."""
    short: Literal["fewer", "random"] = "fewer"
    """A query with too few hits left gets fewer, or is filled up from the pool by a seeded draw."""
    by_task: dict[str, Literal["top", "sample", "random"]] = Field(default_factory=dict)
    """`pick` for single tasks."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.depth < self.num_negatives:
            raise ValueError(
                f"depth is {self.depth} but num_negatives is {self.num_negatives}: no query could get enough. "
                "Raise depth or ask for fewer negatives."
            )
        if (self.rule == "none") != (self.value is None):
            raise ValueError(
                f"rule {self.rule!r} takes no value. Remove value."
                if self.rule == "none"
                else f"rule {self.rule!r} needs its number. Give value."
            )
        if self.rule in ("max_score", "relative") and self.value is not None and self.value > 1:
            raise ValueError(f"rule {self.rule!r} compares cosines: value {self.value} is above 1. Give at most 1.")
        return self


def mine_run(
    parts: Sequence[tuple[str, Run, Path, Sequence[Path]]],
    qrels: Qrels,
    pool: Pool,
    config: MiningConfig,
    *,
    seed: int,
) -> tuple[Run, dict[str, Any]]:
    """Mine the training queries of several tasks.

    Args:
        parts: For each task its name, its run, the store of its queries and the stores of the candidates.
        qrels: All positives of the training queries.
        pool: The candidates: contents decide which hits are copies of a positive.
        config: The rule.
        seed: Of draws.

    Returns:
        Negatives by qid with their scores, hardest first; and the report: `counts`, `by_task`, `histograms`, `rule`.
    """
    positives = _PositiveScores(qrels)
    keys = _ContentKeys(pool)
    mined, tasks = [], {}
    histograms = {name: np.zeros(len(_BIN_EDGES) - 1, dtype=np.int64) for name in ("positives", "kept", "dropped")}
    for name, run, query_store, pool_stores in parts:
        best_Q = positives.best(run.qids, query_store, pool_stores)
        negatives, counts = _mine_task(
            run, qrels, best_Q, keys, pool, config, pick=config.by_task.get(name, config.pick), seed=seed, bins=histograms
        )
        mined.append(negatives)
        tasks[name] = counts
    counts = {key: sum(task[key] for task in tasks.values()) for key in next(iter(tasks.values()))}
    report = {
        "rule": {"name": config.rule, "value": config.value},
        "threshold": config.value if config.rule == "max_score" else None,
        "counts": counts,
        "by_task": tasks,
        "histograms": {
            "bin_edges": _BIN_EDGES.tolist(),
            **{name: values.tolist() for name, values in histograms.items()},
        },
        "settings": config.model_dump(mode="json"),
    }
    joined = Run(
        qids=[qid for run in mined for qid in run.qids],
        dids=[row for run in mined for row in run.dids],
        scores=[row for run in mined for row in run.scores],
    )
    return joined, report


def _mine_task(
    run: Run,
    qrels: Qrels,
    best_Q: np.ndarray,
    keys: "_ContentKeys",
    pool: Pool,
    config: MiningConfig,
    *,
    pick: str,
    seed: int,
    bins: dict[str, np.ndarray],
) -> tuple[Run, dict[str, int]]:
    lengths_Q = np.array([min(len(row), config.depth) for row in run.dids])
    query_H = np.repeat(np.arange(len(run)), lengths_Q)
    rank_H = np.concatenate([np.arange(length) for length in lengths_Q])
    dids_H = np.concatenate([np.asarray(row[: config.depth], dtype=object) for row in run.dids])
    score_H = np.concatenate([np.asarray(row[: config.depth], dtype=np.float32) for row in run.scores])

    listed_H, copy_H = _positives_among(run.qids, query_H, dids_H, qrels, keys)
    positive_H = listed_H | copy_H
    filtered_H = ~positive_H & _taken_for_false(config, score_H, rank_H, best_Q[query_H], positive_H, query_H)
    left_H = ~positive_H & ~filtered_H

    place_H = _place_within(query_H, left_H)
    if pick == "sample":
        window = config.window or config.depth
        draw_H = np.random.default_rng([seed, int(fingerprint([*run.qids]), 16)]).random(len(query_H))
        draw_H[~(left_H & (place_H < window))] = 2.0
        order_H = np.lexsort((draw_H, query_H))
        drawn_H = np.empty(len(query_H), dtype=np.int64)
        drawn_H[order_H] = rank_in_group(query_H[order_H])
        kept_H = (draw_H < 1) & (drawn_H < config.num_negatives)
    elif pick == "random":
        kept_H = np.zeros(len(query_H), dtype=bool)
    else:
        kept_H = left_H & (place_H < config.num_negatives)

    kept_Q = np.bincount(query_H[kept_H], minlength=len(run))
    dids = np.split(dids_H[kept_H], np.cumsum(kept_Q)[:-1])
    scores = np.split(score_H[kept_H], np.cumsum(kept_Q)[:-1])
    num_short, num_random = int((kept_Q < config.num_negatives).sum()), 0
    if pick == "random" or config.short == "random":
        for index in np.flatnonzero(kept_Q < config.num_negatives):
            qid, have = run.qids[index], set(dids[index])
            extra = _random_negatives(
                qid, config.num_negatives - len(have), have, qrels.get(qid, {}), keys, pool, seed=seed
            )
            num_random += len(extra)
            dids[index] = np.array([*dids[index], *extra], dtype=object)
            # A drawn candidate was not scored: the lowest cosine there is keeps it behind all that were.
            scores[index] = np.concatenate([scores[index], np.full(len(extra), -1, dtype=np.float32)])
    bins["positives"] += np.histogram(best_Q, _BIN_EDGES)[0]
    bins["kept"] += np.histogram(score_H[kept_H], _BIN_EDGES)[0]
    bins["dropped"] += np.histogram(score_H[filtered_H], _BIN_EDGES)[0]
    counts = {
        "queries": len(run),
        "hits": len(query_H),
        "hits_listed_positive": int(listed_H.sum()),
        "hits_copy_of_positive": int(copy_H.sum()),
        "hits_filtered": int(filtered_H.sum()),
        "queries_filtered": len(np.unique(query_H[filtered_H])),
        "hits_left": int(left_H.sum()),
        "negatives_kept": int(sum(len(row) for row in dids)),
        "negatives_random": num_random,
        "queries_short": num_short,
        "queries_without_negatives": sum(len(row) == 0 for row in dids),
    }
    mined = [index for index in range(len(run)) if len(dids[index])]
    negatives = Run(
        qids=[run.qids[index] for index in mined],
        dids=[dids[index].tolist() for index in mined],
        scores=[scores[index] for index in mined],
    )
    return negatives, counts


def _taken_for_false(
    config: MiningConfig,
    score_H: np.ndarray,
    rank_H: np.ndarray,
    best_H: np.ndarray,
    positive_H: np.ndarray,
    query_H: np.ndarray,
) -> np.ndarray:
    """Hits that the rule takes for false negatives, bool (H,)."""
    value = config.value or 0.0
    if config.rule == "max_score":
        return score_H > value
    if config.rule == "margin":
        return score_H > best_H - value
    if config.rule == "relative":
        return score_H > value * best_H
    if config.rule == "skip_top":
        return _place_within(query_H, ~positive_H) < value
    return np.zeros(len(rank_H), dtype=bool)


def rank_in_group(group_H: np.ndarray) -> np.ndarray:
    """For each element its place among those of the same group before it; groups stand together."""
    first_H = np.r_[True, group_H[1:] != group_H[:-1]] if len(group_H) else np.zeros(0, dtype=bool)
    index_H = np.arange(len(group_H))
    return index_H - np.maximum.accumulate(np.where(first_H, index_H, 0)) if len(group_H) else index_H


def _place_within(query_H: np.ndarray, chosen_H: np.ndarray) -> np.ndarray:
    """For each hit how many chosen ones of its query stand before it."""
    before_H = np.cumsum(chosen_H) - chosen_H
    first_H = rank_in_group(query_H) == 0
    return before_H - np.maximum.accumulate(np.where(first_H, before_H, 0)) if len(query_H) else before_H


def _positives_among(
    qids: Sequence[str], query_H: np.ndarray, dids_H: np.ndarray, qrels: Qrels, keys: "_ContentKeys"
) -> tuple[np.ndarray, np.ndarray]:
    """Hits that are listed positives, and hits that copy one's content without being listed."""
    import pyarrow as pa
    import pyarrow.compute as pc

    listed = pa.array([f"{index}\0{did}" for index, qid in enumerate(qids) for did in qrels.get(qid, ())])
    copies = pa.array(
        [f"{index}\0{keys.of(did)}" for index, qid in enumerate(qids) for did in qrels.get(qid, ()) if keys.has(did)]
    )
    query = pc.cast(pa.array(query_H), pa.string())
    hit_did = pc.binary_join_element_wise(query, pa.array(dids_H, pa.string()), "\0")
    hit_key = pc.binary_join_element_wise(query, pa.array(keys.of_all(dids_H), pa.string()), "\0")
    listed_H = pc.is_in(hit_did, value_set=listed.cast(pa.string())).to_numpy(zero_copy_only=False)
    copy_H = pc.is_in(hit_key, value_set=copies.cast(pa.string())).to_numpy(zero_copy_only=False)
    return listed_H, copy_H & ~listed_H


def _random_negatives(
    qid: str, num: int, have: set[str], listed: dict[str, int], keys: "_ContentKeys", pool: Pool, *, seed: int
) -> list[str]:
    """Candidates of the pool that are neither positives nor copies of one; the same for the same seed and qid."""
    forbidden = {keys.of(did) for did in listed if keys.has(did)}
    rng = np.random.default_rng([seed, int(fingerprint(qid), 16)])
    chosen: list[str] = []
    for row in rng.permutation(len(pool))[: 50 * num + 50]:
        did = pool.candidate(int(row)).did
        if len(chosen) == num:
            break
        if did not in have and did not in listed and keys.of(did) not in forbidden:
            chosen.append(did)
    return chosen


class _ContentKeys:
    """Content keys of candidates by did, each computed once."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._key_of: dict[str, str] = {}

    def has(self, did: str) -> bool:
        """Whether the pool holds it; a positive of another pool has no copies here."""
        return did in self._key_of or self._pool.find(did) is not None

    def of(self, did: str) -> str:
        """Equal for equal content."""
        if did not in self._key_of:
            row = self._pool.find(did)
            if row is None:
                raise DataError(f"{self._pool.path}: has no candidate {did}, which was found. Search the same pool.")
            self._key_of[did] = self._pool.content_key(row).hex()
        return self._key_of[did]

    def of_all(self, dids: np.ndarray) -> list[str]:
        """One key per did."""
        return [self.of(did) for did in dids.tolist()]


class _PositiveScores:
    """Cosine of each query to its best positive, from the stores that were searched."""

    def __init__(self, qrels: Qrels) -> None:
        self._qrels = qrels
        self._opened: tuple[tuple[Path, ...], list[EmbeddingStore], dict[str, tuple[int, int]]] | None = None

    def best(self, qids: Sequence[str], query_store: Path, pool_stores: Sequence[Path]) -> np.ndarray:
        """float32 (Q,); -1 for a query without a positive in the stores, so that no margin is taken for granted."""
        stores, place_of = self._open(tuple(pool_stores))
        queries = EmbeddingStore.open(query_store)
        row_of = {qid: row for row, qid in enumerate(queries.ids.to_pylist())}
        pairs = [
            (index, *place_of[did])
            for index, qid in enumerate(qids)
            for did in self._qrels.get(qid, ())
            if did in place_of
        ]
        best_Q = np.full(len(qids), -1, dtype=np.float32)
        if not pairs:
            return best_Q
        index_P, store_P, candidate_P = (np.array(column) for column in zip(*pairs, strict=True))
        query_rows = np.array([row_of[qid] for qid in qids])
        for number, store in enumerate(stores):
            mine = np.flatnonzero(store_P == number)
            for start in range(0, len(mine), 65_536):
                some = mine[start : start + 65_536]
                query_PD = queries.gather(query_rows[index_P[some]])
                score_P = np.einsum("pd,pd->p", query_PD, store.gather(candidate_P[some]))
                np.maximum.at(best_Q, index_P[some], score_P)
        return best_Q

    def _open(self, paths: tuple[Path, ...]) -> tuple[list[EmbeddingStore], dict[str, tuple[int, int]]]:
        if self._opened is None or self._opened[0] != paths:
            stores = [EmbeddingStore.open(path) for path in paths]
            place_of = {
                did: (number, row) for number, store in enumerate(stores) for row, did in enumerate(store.ids.to_pylist())
            }
            self._opened = (paths, stores, place_of)
        return self._opened[1], self._opened[2]
