"""Runs → hard negatives: positives, their copies and likely false negatives out; the best of the rest.

What a query gets depends on its own row, the settings and the seed, never on its neighbours. Every hit is
counted once: listed positive, copy of one, filtered, or left.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from umarvel_ray.data.trec import Qrels, Run
from umarvel_ray.errors import ConfigError, DataError
from umarvel_ray.retrieve.choosing import COUNTERS, Chunk
from umarvel_ray.retrieve.negatives import MinedNegatives, negatives_schema
from umarvel_ray.retrieve.settings import MiningConfig
from umarvel_ray.storage import Place

if TYPE_CHECKING:
    import pyarrow as pa

    from umarvel_ray.data.mbeir import Pool
    from umarvel_ray.retrieve.store import EmbeddingPool, EmbeddingStore

_CHUNK_QUERIES = 8192
_BIN_EDGES = np.linspace(-1.0, 1.0, 101)


@dataclass(frozen=True, eq=False)
class MiningReport:
    """What was looked at, dropped and kept.

    Attributes:
        config: The settings.
        by_task: Per task its counts. `hits` is the sum of `hits_listed_positive`, `hits_copy_of_positive`,
            `hits_filtered` and `hits_left`; `negatives_kept` counts those of the run and those of the pool,
            `negatives_random`. `queries_filtered` lost at least one hit to the rule; `queries_short` have
            fewer negatives than asked for in the end, `queries_without_negatives` among them.
        histograms: Per task the cosines of each query's best positive (`positives`), of hits `kept`, and of
            hits `dropped` by the rule; (100,) int64 each, over −1 to 1.
    """

    config: MiningConfig
    by_task: Mapping[str, Mapping[str, int]]
    histograms: Mapping[str, Mapping[str, np.ndarray]]

    @property
    def counts(self) -> dict[str, int]:
        """Sums over the tasks."""
        return {name: sum(counts[name] for counts in self.by_task.values()) for name in COUNTERS}

    def as_json(self) -> dict[str, Any]:
        """Ready to be stored and plotted; `threshold` is a cosine where the rule is one."""
        config = self.config
        return {
            "rule": {"name": config.rule, "value": config.value},
            "threshold": config.value if config.rule == "max_score" else None,
            "counts": self.counts,
            "by_task": {task: dict(counts) for task, counts in self.by_task.items()},
            "histograms": {
                "bin_edges": _BIN_EDGES.tolist(),
                **{
                    name: sum((by_name[name] for by_name in self.histograms.values()), empty).tolist()
                    for name, empty in _empty_histograms().items()
                },
            },
            "histograms_by_task": {
                task: {name: values.tolist() for name, values in by_name.items()}
                for task, by_name in self.histograms.items()
            },
            "settings": config.model_dump(mode="json"),
        }

    @staticmethod
    def join(config: MiningConfig, reports: "Sequence[MiningReport]") -> "MiningReport":
        """One report of several tasks."""
        return MiningReport(
            config,
            {task: counts for report in reports for task, counts in report.by_task.items()},
            {task: by_name for report in reports for task, by_name in report.histograms.items()},
        )


def mine_negatives(
    run: Run,
    positives: Mapping[str, Mapping[str, int]],
    positive_scores: Mapping[str, float],
    content_of: Mapping[str, Any],
    config: MiningConfig,
    *,
    seed: int,
    task: str = "all",
    pool_dids: "Sequence[str] | pa.Array | None" = None,
) -> tuple[MinedNegatives, MiningReport]:
    """Choose the hard negatives of every query of one task.

    Args:
        run: What the encoder finds, best first.
        positives: All listed positives of each query, in the pool or not.
        positive_scores: The best cosine among each query's positives. A query without one keeps no hit under
            `margin` and `relative`, for nothing tells how near is too near; it is counted.
        content_of: A key of each candidate's content, any hashable; without key it is a copy of none.
        config: The rule.
        seed: Of draws.
        task: Its name, for `by_task`.
        pool_dids: Where random negatives come from.

    Raises:
        DataError: A query has no listed positive.
        ConfigError: Random negatives are wanted and no pool is given.
    """
    import pyarrow as pa

    whole, config = config, config.for_task(task)
    needs_pool = config.pick == "random" or config.short == "random"
    pool: Any = pa.array([], pa.string()) if pool_dids is None else pool_dids
    if not isinstance(pool, pa.Array):
        pool = pa.array(pool, pa.string())
    if needs_pool and not len(pool):
        raise ConfigError(
            f"mining of {task}: pick is {config.pick}, short is {config.short}: give a pool to draw from."
        )
    if odd := [qid for qid in run.qids if not positives.get(qid)]:
        raise DataError(
            f"mining of {task}: {len(odd)} of {len(run)} queries have no positive (first: {odd[0]}). "
            "Give the judgements of the queries that were searched."
        )
    table, tables = run.table(), [negatives_schema().empty_table()]
    counts, histograms = dict.fromkeys(COUNTERS, 0), _empty_histograms()
    for start in range(0, len(run), _CHUNK_QUERIES):
        chunk = Chunk(
            table.slice(start, _CHUNK_QUERIES), positives, positive_scores, content_of, config, seed=seed
        )
        chunk.choose()
        if needs_pool:
            chunk.fill_up(pool)
        tables.append(chunk.result())
        for name, count in chunk.counts().items():
            counts[name] += count
        for name, cosines in chunk.cosines().items():
            histograms[name] += np.histogram(np.clip(cosines, -1, 1), _BIN_EDGES)[0]
    report = MiningReport(whole, {task: counts}, {task: histograms})
    facts = {"settings": whole.model_dump(mode="json"), "seed": seed, "counts": report.counts}
    return MinedNegatives(pa.concat_tables(tables), facts), report


def mine_run(
    parts: Sequence[tuple[str, Run, Place, Sequence[Place]]],
    qrels: Qrels,
    pool: "Pool",
    config: MiningConfig,
    *,
    seed: int,
) -> tuple[MinedNegatives, dict[str, Any]]:
    """Mine the training queries of several tasks.

    Args:
        parts: For each task its name, its run, the store of its queries and the stores of the candidates.
        qrels: All positives of the training queries.
        pool: The candidates: contents decide which hits are copies of a positive.
        config: The rule.
        seed: Of draws.

    Returns:
        Negatives by qid with their scores, hardest first; and the report: `counts`, `by_task`, `histograms`,
        `rule`, and the stores it came from.

    Raises:
        DataError: A query has no positive, or is not in its store.
        ShardError: A store is incomplete.
    """
    import pyarrow as pa

    from umarvel_ray.retrieve.store import EmbeddingPool, EmbeddingStore

    if odd := sorted(config.by_task.keys() - {task for task, *_ in parts}):
        raise ConfigError(
            f"mining.by_task: {len(odd)} tasks are not mined (first: {odd[0]}). "
            f"There are: {', '.join(task for task, *_ in parts)}."
        )
    content_of = ContentOfPool(pool)
    tables, reports, sources = [negatives_schema().empty_table()], [], {}
    pools: dict[tuple[Place, ...], EmbeddingPool] = {}
    for task, run, query_store, pool_stores in parts:
        paths = tuple(pool_stores)
        if paths not in pools:
            pools[paths] = EmbeddingPool(paths)
        searched = pools[paths]
        queries = EmbeddingStore.open(query_store, dim=searched.dim)
        scores = best_positive_scores(queries, searched, qrels, qids=run.qids)
        mined, report = mine_negatives(
            run, qrels, scores, content_of, config, seed=seed, task=task, pool_dids=searched.ids
        )
        tables.append(mined.table)
        reports.append(report)
        sources[task] = {
            "queries": {"fingerprint": queries.fingerprint, "settings": queries.settings},
            "pools": [store.fingerprint for store in searched.stores],
        }
    whole = MiningReport.join(config, reports)
    told = whole.as_json() | {"seed": seed, "sources": sources}
    facts = {name: told[name] for name in ("settings", "seed", "counts", "sources")}
    return MinedNegatives(pa.concat_tables(tables), facts), told


def best_positive_scores(
    queries: "EmbeddingStore",
    pool: "EmbeddingPool",
    positives: Mapping[str, Mapping[str, int]],
    *,
    qids: Sequence[str],
) -> dict[str, float]:
    """The best score among each query's positives; queries without a positive in the pool are left out.

    Args and errors are those of `positive_scores`.
    """
    place_P, _, score_P = positive_scores(queries, pool, positives, qids=qids)
    best = np.full(len(qids), -np.inf, dtype=np.float32)
    np.maximum.at(best, place_P, score_P)
    found: list[int] = np.unique(place_P).tolist()
    return {str(qids[place]): float(best[place]) for place in found}


def positive_scores(
    queries: "EmbeddingStore",
    pool: "EmbeddingPool",
    positives: Mapping[str, Mapping[str, int]],
    *,
    qids: Sequence[str],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of the positives in the pool, to the last bit as a search scores them.

    Args:
        queries: Holds `qids`.
        pool: What was searched.
        positives: Listed positives; those outside the pool have no score.
        qids: The queries.

    Returns:
        (P,) each: the place of the query in `qids`, the positive's row of the pool, the score, float32.

    Raises:
        DataError: A query is not in the store.
    """
    import torch

    from umarvel_ray.retrieve.scoring import exact_scores

    place_P = np.repeat(np.arange(len(qids)), [len(positives.get(qid, ())) for qid in qids])
    query_rows = _rows_of(qids, queries.ids)
    listed = np.unique(place_P)
    if len(odd := listed[query_rows[listed] < 0]):
        raise DataError(
            f"{queries.folder}: {len(odd)} of {len(qids)} queries of the run are not in this store (first: "
            f"{qids[odd[0]]}). Give the store that was searched with."
        )
    row_P = _rows_of([did for qid in qids for did in positives.get(qid, ())], pool.ids)
    found = np.flatnonzero(row_P >= 0)
    # By row: a memory-mapped pool is then read forwards.
    found = found[np.argsort(row_P[found], kind="stable")]
    place_P, row_P = place_P[found], row_P[found]
    score_P = np.empty(len(found), dtype=np.float32)
    step = max(1, (1 << 22) // pool.dim)
    for start in range(0, len(found), step):
        piece = slice(start, start + step)
        query_ND = torch.from_numpy(queries.gather(query_rows[place_P[piece]]))
        candidate_ND = torch.from_numpy(pool.gather(row_P[piece]))
        score_P[piece] = exact_scores(query_ND, candidate_ND).numpy()
    return place_P, row_P, score_P


class ContentOfPool(Mapping[str, Any]):
    """Content keys by did, each made once, when asked for."""

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._key_of: dict[str, Any] = {}

    def __getitem__(self, did: str) -> Any:
        if did not in self._key_of:
            row = self._pool.find(did)
            if row is None:
                raise KeyError(did)
            self._key_of[did] = self._pool.content_key(row)
        return self._key_of[did]

    def __iter__(self) -> Iterator[str]:
        return (candidate.did for candidate in self._pool)

    def __len__(self) -> int:
        return len(self._pool)


def _empty_histograms() -> dict[str, np.ndarray]:
    return {name: np.zeros(len(_BIN_EDGES) - 1, dtype=np.int64) for name in ("positives", "kept", "dropped")}


def _rows_of(ids: Sequence[str], among: "pa.Array | pa.ChunkedArray") -> np.ndarray:
    """Row of each id, -1 where there is none, (N,) int64."""
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted, held = pa.array(ids, pa.large_string()), among.cast(pa.large_string())
    return (
        pc.call_function("index_in", [wanted], pc.SetLookupOptions(held))
        .fill_null(-1)
        .to_numpy()
        .astype(np.int64)
    )
