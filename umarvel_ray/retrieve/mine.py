"""Runs → hard negatives: positives, their copies and likely false negatives out; the best of the rest.

Whole columns at a time; what a query gets depends on its own row, the settings and the seed, never on its
neighbours. Every hit is counted once: listed positive, copy of one, filtered, or left.

Axes: Q queries of a chunk, H their hits laid end to end, P their positives, R random draws, U different dids.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from umarvel_ray.artifacts import atomic_write
from umarvel_ray.config import Config
from umarvel_ray.data.trec import Qrels, Run
from umarvel_ray.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from umarvel_ray.data.mbeir import Pool
    from umarvel_ray.retrieve.store import EmbeddingPool, EmbeddingStore

Rule = Literal["none", "max_score", "margin", "relative", "skip_top"]
Pick = Literal["top", "sample", "random"]

_CHUNK_QUERIES = 8192
_BIN_EDGES = np.linspace(-1.0, 1.0, 101)
_RANDOM_TURNS = 8
"""Each doubles the draws of the queries that are still short."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_METADATA_KEY = b"umarvel_ray.mined"


class MiningConfig(Config):
    """How a run becomes hard negatives."""

    rule: Rule
    """Which hits are taken for false negatives and dropped. `max_score`: cosine above `value`. `margin`: less
    than `value` below the best positive's cosine. `relative`: above `value` times the best positive's.
    `skip_top`: the first `value` hits, positives not counted. `none`: none."""
    value: NonNegativeFloat | None = None
    """The rule's number: a cosine, a share, or a count of ranks. The paper does not publish its own."""
    depth: PositiveInt = 100
    """Hits looked at per query, best first."""
    num_negatives: PositiveInt = 5
    """Hard negatives kept per query."""
    pick: Pick = "top"
    """Of the hits that are left: the first; a seeded draw among the first `window`; or any of the pool."""
    window: PositiveInt | None = None
    """For `sample`: how many hits to draw from; all that are left by default."""
    short: Literal["fewer", "random"] = "fewer"
    """A query with too few hits left gets fewer, or is filled up from the pool by a seeded draw."""
    by_task: dict[str, Pick] = Field(default_factory=dict)
    """`pick` for single tasks."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.depth < self.num_negatives:
            raise ValueError(
                f"depth is {self.depth} but num_negatives is {self.num_negatives}: no query could get "
                "enough. Raise depth or ask for fewer negatives."
            )
        if (self.rule == "none") != (self.value is None):
            raise ValueError(
                f"rule {self.rule!r} takes no value. Remove value."
                if self.rule == "none"
                else f"rule {self.rule!r} needs its number. Give value."
            )
        if self.rule in ("max_score", "relative") and self.value is not None and self.value > 1:
            raise ValueError(
                f"rule {self.rule!r} compares cosines: value {self.value} is above 1. Give at most 1."
            )
        if self.rule == "skip_top" and self.value != int(self.value or 0):
            raise ValueError(f"rule 'skip_top' counts ranks: value {self.value} is no whole number.")
        if self.window is not None and self.window < self.num_negatives:
            raise ValueError(
                f"window is {self.window} but num_negatives is {self.num_negatives}: no draw could be "
                "enough. Widen the window."
            )
        return self


@dataclass(frozen=True, eq=False)
class MinedNegatives:
    """Hard negatives by qid, hardest first; those drawn from the pool stand last and score minus infinity.

    The file is a run with one more column, so training reads it as any other list of candidates. Queries that
    got no negative are not in it.

    Attributes:
        table: qid string, did list<string>, score list<float32>, positive_score float32 (null where no
            positive is in the pool).
        facts: What made it, JSON; kept in the file.
    """

    table: "pa.Table"
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.table)

    def as_dict(self) -> dict[str, list[tuple[str, float]]]:
        """`{qid: [(did, score)]}`; for small sets."""
        columns = (self.table.column(name).to_pylist() for name in ("qid", "did", "score"))
        return {qid: list(zip(dids, scores, strict=True)) for qid, dids, scores in zip(*columns, strict=True)}

    def write(self, path: str | os.PathLike) -> None:
        """Write an Arrow IPC file, by rename."""
        import pyarrow as pa

        facts = json.dumps(self.facts, sort_keys=True).encode()
        table = self.table.replace_schema_metadata({_METADATA_KEY: facts})
        with atomic_write(path, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=_CHUNK_QUERIES)

    @classmethod
    def read(cls, path: str | os.PathLike) -> "MinedNegatives":
        """Open mined negatives, memory-mapped.

        Raises:
            DataError: The file is missing or holds something else.
        """
        import pyarrow as pa

        try:
            with pa.memory_map(os.fspath(path)) as source:
                table = pa.ipc.open_file(source).read_all()
            facts = json.loads((table.schema.metadata or {})[_METADATA_KEY])
            return cls(table.select(_schema().names), facts)
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{path}: no mined negatives ({reason}). Run the mining job.") from None


@dataclass(frozen=True, eq=False)
class MiningReport:
    """What was looked at, dropped and kept.

    Attributes:
        config: The settings.
        by_task: Per task its counts. `hits` is the sum of `hits_listed_positive`, `hits_copy_of_positive`,
            `hits_filtered` and `hits_left`; `negatives_kept` counts those of the run and those of the pool,
            `negatives_random`. `queries_filtered` lost at least one hit to the rule; `queries_short` have
            fewer negatives than asked for in the end, `queries_without_negatives` among them.
        histograms: Cosines of each query's best positive (`positives`), of hits `kept`, and of hits `dropped`
            by the rule; (100,) int64 each, over −1 to 1.
    """

    config: MiningConfig
    by_task: Mapping[str, Mapping[str, int]]
    histograms: Mapping[str, np.ndarray]

    @property
    def counts(self) -> dict[str, int]:
        """Sums over the tasks."""
        return {name: sum(counts[name] for counts in self.by_task.values()) for name in _COUNTERS}

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
                **{name: values.tolist() for name, values in self.histograms.items()},
            },
            "settings": config.model_dump(mode="json"),
        }

    @staticmethod
    def join(config: MiningConfig, reports: "Sequence[MiningReport]") -> "MiningReport":
        """One report of several tasks."""
        by_task = {task: counts for report in reports for task, counts in report.by_task.items()}
        histograms = _empty_histograms()
        for report in reports:
            for name, values in report.histograms.items():
                histograms[name] += values
        return MiningReport(config, by_task, histograms)


_COUNTERS: tuple[str, ...] = (
    "queries",
    "hits",
    "hits_listed_positive",
    "hits_copy_of_positive",
    "hits_filtered",
    "hits_left",
    "negatives_kept",
    "negatives_random",
    "queries_filtered",
    "queries_short",
    "queries_without_negatives",
    "queries_without_positive_score",
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

    pick = config.by_task.get(task, config.pick)
    needs_pool = pick == "random" or config.short == "random"
    pool: Any = pa.array([], pa.string()) if pool_dids is None else pool_dids
    if not isinstance(pool, pa.Array):
        pool = pa.array(pool, pa.string())
    if needs_pool and not len(pool):
        raise ConfigError(
            f"mining of {task}: pick is {pick}, short is {config.short}: give a pool to draw from."
        )
    if odd := [qid for qid in run.qids if not positives.get(qid)]:
        raise DataError(
            f"mining of {task}: {len(odd)} of {len(run)} queries have no positive (first: {odd[0]}). "
            "Give the judgements of the queries that were searched."
        )
    table, tables = run.table(), [_schema().empty_table()]
    counts, histograms = dict.fromkeys(_COUNTERS, 0), _empty_histograms()
    for start in range(0, len(run), _CHUNK_QUERIES):
        chunk = _Chunk(
            table.slice(start, _CHUNK_QUERIES), positives, positive_scores, content_of, config, seed=seed
        )
        chunk.choose(pick)
        if needs_pool:
            chunk.fill_up(pool)
        tables.append(chunk.result())
        for name, count in chunk.counts().items():
            counts[name] += count
        for name, cosines in chunk.cosines().items():
            histograms[name] += np.histogram(np.clip(cosines, -1, 1), _BIN_EDGES)[0]
    report = MiningReport(config, {task: counts}, histograms)
    facts = {"settings": config.model_dump(mode="json"), "seed": seed, "counts": report.counts}
    return MinedNegatives(pa.concat_tables(tables), facts), report


def mine_run(
    parts: Sequence[tuple[str, Run, Path, Sequence[Path]]],
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

    content_of = _ContentOfPool(pool)
    tables, reports, sources = [_schema().empty_table()], [], {}
    pools: dict[tuple[Path, ...], EmbeddingPool] = {}
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
    """The best score among each query's positives, to the last bit as a search scores them.

    Args:
        queries: Holds `qids`.
        pool: What was searched.
        positives: Listed positives; those outside the pool have no score.
        qids: The queries.

    Returns:
        `{qid: score}`; queries without a positive in the pool are left out.

    Raises:
        DataError: A query is not in the store.
    """
    import pyarrow as pa
    import torch

    from umarvel_ray.retrieve.search import exact_scores

    pairs = [(qid, did) for qid in qids for did in positives.get(qid, ())]
    if not pairs:
        return {}
    query_rows = _rows_of([qid for qid, _ in pairs], queries.ids)
    if len(odd := np.flatnonzero(query_rows < 0)):
        raise DataError(
            f"{queries.folder}: {len({pairs[i][0] for i in odd.tolist()})} of {len(qids)} queries of the run "
            f"are not in this store (first: {pairs[odd[0]][0]}). Give the store that was searched with."
        )
    pool_rows = _rows_of([did for _, did in pairs], pool.ids)
    found = np.flatnonzero(pool_rows >= 0)
    # By row: a memory-mapped pool is then read forwards.
    found = found[np.argsort(pool_rows[found], kind="stable")]
    scores = np.empty(len(found), dtype=np.float32)
    step = max(1, (1 << 22) // pool.dim)
    for start in range(0, len(found), step):
        piece = found[start : start + step]
        query_ND = torch.from_numpy(queries.gather(query_rows[piece]))
        scores[start : start + step] = exact_scores(
            query_ND, torch.from_numpy(pool.gather(pool_rows[piece]))
        ).numpy()
    best = np.full(len(queries), -np.inf, dtype=np.float32)
    np.maximum.at(best, query_rows[found], scores)
    rows = np.unique(query_rows[found])
    return dict(zip(queries.ids.take(pa.array(rows)).to_pylist(), best[rows].tolist(), strict=True))


class _ContentOfPool(Mapping[str, Any]):
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


class _Chunk:
    """Some queries of a run, and what becomes of each of their hits."""

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
        self._positive_Q = np.array(
            [positive_scores.get(qid, np.nan) for qid in self._qids], dtype=np.float64
        )

        dids, scores = (pa.concat_arrays(table.column(name).chunks) for name in ("did", "score"))
        query_H = np.repeat(np.arange(len(self._qids)), np.diff(dids.offsets.to_numpy()))
        near = np.flatnonzero(_places(query_H) < config.depth)
        self._query_H = query_H[near]
        self._score_H = scores.flatten().to_numpy(zero_copy_only=False)[near]

        listed = [positives[qid] for qid in self._qids]
        self._query_P = np.repeat(np.arange(len(listed)), [len(row) for row in listed])
        listed_dids = pa.array([did for row in listed for did in row], pa.string())
        numbers = self._number(pa.concat_arrays([dids.flatten().take(pa.array(near)), listed_dids]))
        self._did_H, self._did_P = numbers[: len(near)], numbers[len(near) :]
        self._content_P = self._content_U[self._did_P]
        self._query_R = self._did_R = np.empty(0, dtype=np.int64)

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

    def choose(self, pick: Pick) -> None:
        """Decide on every hit."""
        config, query_H = self._config, self._query_H
        self._is_listed_H = _are_pairs(query_H, self._did_H, self._query_P, self._did_P)
        self._is_copy_H = ~self._is_listed_H & _are_pairs(
            query_H, self._content_U[self._did_H], self._query_P, self._content_P
        )
        rest_H = ~(self._is_listed_H | self._is_copy_H)
        self._is_filtered_H = rest_H & self._taken_for_false(rest_H)
        self._is_left_H = rest_H & ~self._is_filtered_H
        rank_H = _rank_among(self._is_left_H, query_H)
        self._is_kept_H = np.zeros(len(query_H), dtype=bool)
        if pick == "top":
            self._is_kept_H = self._is_left_H & (rank_H < config.num_negatives)
        elif pick == "sample":
            hits = np.flatnonzero(self._is_left_H & (rank_H < (config.window or config.depth)))
            lots = _mix(self._lots("sample")[query_H[hits]] + rank_H[hits].astype(np.uint64) * _GOLDEN)
            drawn = hits[np.lexsort((lots, query_H[hits]))]
            self._is_kept_H[drawn[_places(query_H[drawn]) < config.num_negatives]] = True

    def _taken_for_false(self, rest_H: np.ndarray) -> np.ndarray:
        """Hits that the rule takes for false negatives, bool (H,)."""
        rule, value = self._config.rule, self._config.value or 0.0
        score_H, positive_H = self._score_H.astype(np.float64), self._positive_Q[self._query_H]
        if rule == "max_score":
            return score_H > value
        # `not at most` rather than `above`: where the positive's score is unknown (NaN) no hit is safe.
        if rule == "margin":
            return ~(score_H <= positive_H - value)
        if rule == "relative":
            return ~(score_H <= positive_H * value)
        if rule == "skip_top":
            return _rank_among(rest_H, self._query_H) < value
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
            free_R = ~_are_pairs(query_R, did_R, self._query_P, self._did_P)
            free_R &= ~_are_pairs(query_R, did_R, self._query_H[banned_H], self._did_H[banned_H])
            free_R &= ~_are_pairs(query_R, self._content_U[did_R], self._query_P, self._content_P)
            free_R &= _first_of_pair(query_R, did_R)
            free_R &= _rank_among(free_R, query_R) < need_Q[query_R]
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
        score = np.concatenate([self._score_H[kept_H], np.full(len(self._did_R), -np.inf, dtype=np.float32)])
        order = np.argsort(query, kind="stable")
        counts_Q = np.bincount(query, minlength=len(self._qids))
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts_Q)]).astype(np.int32))
        positive_Q = self._positive_Q.astype(np.float32)
        columns = [
            pa.array(self._qids, pa.string()),
            pa.ListArray.from_arrays(offsets, self._dids_U.take(pa.array(did[order]))),
            pa.ListArray.from_arrays(offsets, pa.array(score[order].astype(np.float32))),
            pa.array(positive_Q, mask=np.isnan(positive_Q)),
        ]
        return pa.Table.from_arrays(columns, schema=_schema()).filter(pa.array(counts_Q > 0))

    def cosines(self) -> dict[str, np.ndarray]:
        """What the histograms show."""
        return {
            "positives": self._positive_Q[~np.isnan(self._positive_Q)],
            "kept": self._score_H[self._is_kept_H],
            "dropped": self._score_H[self._is_filtered_H],
        }

    def counts(self) -> dict[str, int]:
        """`_COUNTERS` of these queries."""
        num_queries = len(self._qids)
        kept_Q = np.bincount(self._query_H[self._is_kept_H], minlength=num_queries)
        kept_Q += np.bincount(self._query_R, minlength=num_queries)
        counts = {
            "queries": num_queries,
            "hits": len(self._query_H),
            "hits_listed_positive": self._is_listed_H.sum(),
            "hits_copy_of_positive": self._is_copy_H.sum(),
            "hits_filtered": self._is_filtered_H.sum(),
            "hits_left": self._is_left_H.sum(),
            "negatives_kept": kept_Q.sum(),
            "negatives_random": len(self._query_R),
            "queries_filtered": len(np.unique(self._query_H[self._is_filtered_H])),
            "queries_short": (kept_Q < self._config.num_negatives).sum(),
            "queries_without_negatives": (kept_Q == 0).sum(),
            "queries_without_positive_score": np.isnan(self._positive_Q).sum(),
        }
        return {name: int(count) for name, count in counts.items()}

    def _lots(self, purpose: str) -> np.ndarray:
        """(Q,) uint64 from seed, purpose and qid alone."""
        texts = (f"{self._seed}\n{purpose}\n{qid}".encode() for qid in self._qids)
        digests = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts)
        return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _empty_histograms() -> dict[str, np.ndarray]:
    return {name: np.zeros(len(_BIN_EDGES) - 1, dtype=np.int64) for name in ("positives", "kept", "dropped")}


def _schema() -> "pa.Schema":
    import pyarrow as pa

    return pa.schema(
        {
            "qid": pa.string(),
            "did": pa.list_(pa.string()),
            "score": pa.list_(pa.float32()),
            "positive_score": pa.float32(),
        }
    )


def _starts(group: np.ndarray) -> np.ndarray:
    """For each item the place of the first of its group; items of a group stand together."""
    place = np.arange(len(group))
    is_first = np.ones(len(group), dtype=bool)
    is_first[1:] = group[1:] != group[:-1]
    return np.maximum.accumulate(np.where(is_first, place, 0))


def _places(group: np.ndarray) -> np.ndarray:
    """Place of each item within its group, from 0."""
    return np.arange(len(group)) - _starts(group)


def _rank_among(chosen: np.ndarray, group: np.ndarray) -> np.ndarray:
    """How many chosen items of its group stand before each item; a large number for those not chosen."""
    before = np.cumsum(chosen) - chosen
    return np.where(chosen, before - before[_starts(group)], np.iinfo(np.int64).max >> 1)


def _are_pairs(
    left: np.ndarray, right: np.ndarray, among_left: np.ndarray, among_right: np.ndarray
) -> np.ndarray:
    """Whether each pair (left, right) is one of the others."""
    base = max(right.max(initial=0), among_right.max(initial=0)) + 1
    return np.isin(left * base + right, among_left * base + among_right)


def _first_of_pair(left: np.ndarray, right: np.ndarray) -> np.ndarray:
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
