"""Runs → P(Yes) of every hit, in parts that appear whole: a killed job scores only what is missing.

Any run can be scored: those of M-BEIR's tasks, or a file of TREC's with its queries and pool. Queries that
share candidates stand beside each other, so that a picture is read and looked at once for all of them. Runs
of the same queries over several pools are scored together: a candidate that is found in the local and in the
global pool is scored once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from umarvel_ray.artifacts import data_fingerprint, fingerprint
from umarvel_ray.data.mbeir import Mbeir
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.data.sources import (
    PoolSource,
    QueryFile,
    QuerySource,
    RecordReader,
    chosen_tasks,
    pool_sources,
    query_source,
)
from umarvel_ray.data.trec import Run, import_trec
from umarvel_ray.errors import ConfigError, DataError, ShardError
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.retrieve.embed import checkpoint_fingerprint
from umarvel_ray.retrieve.scores import Scores
from umarvel_ray.retrieve.settings import RerankConfig, run_path
from umarvel_ray.storage import Place, at

Queries = QuerySource | QueryFile
"""Where queries stand; each finds one by its qid."""


@dataclass(frozen=True)
class ScoredList:
    """One run to score, and where its records stand.

    Attributes:
        name: Of its task, or of the run.
        split: train, val or test; decides what it may be used for.
        scope: local or global.
        run: The file.
        depth: Hits scored per query, best first.
        rows: The queries to score, as rows of the run, in the order in which they are scored.
        queries: Theirs.
        pools: Its candidates'.
        folder: Where its parts go.
        facts: All that decides its scores.
    """

    name: str
    split: str
    scope: str
    run: Place
    depth: int
    rows: np.ndarray
    queries: Queries
    pools: tuple[PoolSource, ...]
    folder: Place
    facts: dict[str, Any]

    @property
    def key(self) -> tuple[str, str, str]:
        """(split, name, scope)."""
        return self.split, self.name, self.scope


@dataclass(frozen=True)
class ScoreTask:
    """One part of the output.

    Attributes:
        of: The run, and of its rows those of this part.
        part: The file.
        beside: Fingerprints of the runs of the same queries that are scored with it: who shares a pass
            through the model moves the last bit.
    """

    of: ScoredList
    part: Place
    beside: tuple[str, ...] = ()

    @property
    def num_queries(self) -> int:
        """Queries of this part."""
        return len(self.of.rows)

    @property
    def facts(self) -> dict[str, Any]:
        """All that decides its content."""
        beside = {"beside": list(self.beside)} if self.beside else {}
        return {**self.of.facts, "rows": fingerprint(self.of.rows.tolist()), **beside}


def open_run(path: Place) -> Run:
    """A run of ours, or TREC's text form."""
    return _open_run(path, path.stat().st_mtime_ns if path.exists() else 0)


@lru_cache(maxsize=8)
def _open_run(path: Place, mtime_ns: int) -> Run:
    """Its time is part of the key, so a run that was replaced is read again."""
    return Run.read(path) if path.suffix == ".arrow" else import_trec(path)


def sampled_rows(num_queries: int, share: float, *, seed: int, name: str) -> np.ndarray:
    """Ascending rows of a share of a task's queries; the same for the same seed and name."""
    if share >= 1:
        return np.arange(num_queries)
    rng = np.random.default_rng([seed, int(fingerprint(name), 16)])
    return np.sort(rng.permutation(num_queries)[: max(1, round(share * num_queries))])


def neighbourhoods(run: Run, rows: np.ndarray, depth: int) -> np.ndarray:
    """The rows, ordered so that queries which share many of their first `depth` hits meet.

    Two lists have the same least hash with the probability of their overlap over their union (Broder 1997).
    """
    if len(rows) < 3:
        return rows
    lists = [list(run.dids[int(row)])[:depth] for row in rows]
    number_of: dict[str, int] = {}
    flat = np.array(
        [number_of.setdefault(did, len(number_of)) for dids in lists for did in dids], dtype=np.uint64
    )
    lengths = np.array([len(dids) for dids in lists])
    starts = np.cumsum(lengths) - lengths
    filled = lengths > 0
    sketches = []
    for salt in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9):
        hashed = (flat + np.uint64(1)) * np.uint64(salt)
        hashed ^= hashed >> np.uint64(29)
        hashed *= np.uint64(0xBF58476D1CE4E5B9)
        least = np.zeros(len(rows), dtype=np.uint64)
        if filled.any():
            least[filled] = np.minimum.reduceat(hashed, starts[filled])
        sketches.append(least)
    return rows[np.lexsort((rows, *reversed(sketches)))]


def scored_lists(config: RerankConfig) -> list[ScoredList]:
    """All runs to score: a pure function of the files and the settings.

    Raises:
        ConfigError: A name repeats.
        DataError: A run is missing or broken.
    """
    how = {
        "checkpoint": checkpoint_fingerprint(config.checkpoint),
        "dtype": config.compute_dtype,
        "backend": config.backend,
    }
    found = [*_mbeir_lists(config, how), *_file_lists(config, how)]
    keys = [one.key for one in found]
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ConfigError(f"two runs are called {'/'.join(twice)}. Give each its own name.")
    return found


def _mbeir_lists(config: RerankConfig, how: dict[str, Any]) -> list[ScoredList]:
    if not config.requests:
        return []
    assert config.root is not None and config.runs is not None  # a rule of the settings
    mbeir, found = Mbeir(config.root), []
    for request in config.requests:
        tasks = chosen_tasks(mbeir, request.split, None)
        pools = tuple(pool_sources(mbeir, request.split, tasks))
        for task in chosen_tasks(mbeir, request.split, config.tasks):
            queries = query_source(mbeir, task, request.split, choice=config.instruction, seed=config.seed)
            first: ScoredList | None = None
            for scope in request.scopes:
                path = run_path(config.runs, request.split, task.name, scope)
                one = _scored_list(
                    config, how, name=task.name, split=request.split, scope=scope, run=path,
                    depth=request.depth, share=request.share, queries=queries, pools=pools,
                )  # fmt: skip
                if first is not None and open_run(first.run).qids == open_run(path).qids:
                    one = replace(one, rows=first.rows)
                first = first or one
                found.append(one)
    return found


def _file_lists(config: RerankConfig, how: dict[str, Any]) -> list[ScoredList]:
    return [
        _scored_list(
            config, how, name=one.name, split=one.split, scope="local", run=at(one.run), depth=one.depth,
            share=1.0, queries=QueryFile(one.queries, one.root, one.instruction),
            pools=tuple(PoolSource(name=at(path).stem, root=one.root, path=path) for path in one.pools),
        )
        for one in config.lists
    ]  # fmt: skip


def _scored_list(
    config: RerankConfig, how: dict[str, Any], *, name: str, split: str, scope: str, run: Place, depth: int,
    share: float, queries: Queries, pools: tuple[PoolSource, ...],
) -> ScoredList:  # fmt: skip
    opened = open_run(run)
    rows = sampled_rows(len(opened), share, seed=config.seed, name=name)
    facts = {
        **how,
        "run": data_fingerprint(run),
        "depth": depth,
        "share": share,
        "seed": config.seed if share < 1 else None,
        "queries": queries.fingerprint,
        "pools": [pool.fingerprint for pool in pools],
    }
    return ScoredList(
        name=name,
        split=split,
        scope=scope,
        run=run,
        depth=depth,
        rows=neighbourhoods(opened, rows, depth),
        queries=queries,
        pools=pools,
        folder=at(config.output) / "parts" / split / f"{name}.{scope}",
        facts=facts,
    )


def plan_scores(
    config: RerankConfig, lists: Sequence[ScoredList]
) -> tuple[list[ScoreTask], list[tuple[ScoreTask, ...]]]:
    """All parts; and those that are still missing with those that are scored with them.

    Raises:
        ShardError: A part that stands there was made with another checkpoint, run or setting.
    """
    parts, missing = [], []
    for group in _of_same_queries(lists):
        for number, start in enumerate(range(0, len(group[0].rows), config.queries_per_shard)):
            tasks = tuple(
                ScoreTask(
                    of=replace(one, rows=one.rows[start : start + config.queries_per_shard]),
                    part=one.folder / f"{number:05d}.arrow",
                    beside=tuple(other.facts["run"] for other in group if other is not one),
                )
                for one in group
            )
            parts += tasks
            found = [task for task in tasks if task.part.exists()]
            for task in found:
                Scores.read(task.part, made_with=task.facts)
            if len(found) < len(tasks):
                missing.append(tasks)
    return parts, missing


def _of_same_queries(lists: Sequence[ScoredList]) -> list[list[ScoredList]]:
    """Runs of one task and split whose queries stand in the same order, together."""
    groups: dict[tuple[str, str, str], list[ScoredList]] = {}
    for one in lists:
        qids = open_run(one.run).qids
        key = one.split, one.name, fingerprint([qids[row] for row in one.rows.tolist()])
        groups.setdefault(key, []).append(one)
    return list(groups.values())


def collect_scores(one: ScoredList, parts: Sequence[ScoreTask]) -> Scores:
    """A run's scores out of its parts, each hit exactly once, in the order of the run.

    Raises:
        ShardError: A part is missing, of other settings, or does not hold the hits it should.
    """
    run = open_run(one.run)
    merged = Scores.concat([Scores.read(task.part, made_with=task.facts) for task in parts], one.facts)
    place_of = {run.qids[int(row)]: int(row) for row in one.rows}
    place_now = [place_of.get(qid, -1) for qid in merged.table.column("qid").to_pylist()]
    ordered = Scores(merged.table.take(np.argsort(place_now, kind="stable")), one.facts)
    expected = np.sort(one.rows)
    if len(ordered) != len(expected):
        raise ShardError(f"{one.folder}: {len(ordered)} of {len(expected)} queries are scored. Score again.")
    for row, (qid, dids, _, _) in zip(expected, ordered.rows(), strict=True):
        if qid != run.qids[int(row)] or dids != list(run.dids[int(row)])[: one.depth]:
            raise ShardError(
                f"{one.folder}: query {qid} holds other candidates than {one.run}. Remove the folder and "
                "score again."
            )
    return ordered


class RerankingWorker:
    """One reranker; scores a part of each of some runs of the same queries a call."""

    def __init__(self, config: RerankConfig) -> None:
        self._config = config
        self._score_many = _backend(config)
        self._open = lru_cache(maxsize=16)(RecordReader)

    def __call__(self, tasks: Sequence[ScoreTask]) -> dict[str, Any]:
        """Score the hits of some queries, each candidate once."""
        hits = [_Hits.of(task.of) for task in tasks]
        wanted = [dict.fromkeys(chain(*rows)) for rows in zip(*(own.dids for own in hits), strict=True)]
        candidates: dict[str, Candidate] = {}
        for task, own in zip(tasks, hits, strict=True):
            reader = self._open(task.of.pools)
            for did in dict.fromkeys(chain(*own.dids)):
                if did not in candidates:
                    candidates[did] = reader.candidate(did)
        queries = [tasks[0].of.queries.by_qid(qid) for qid in hits[0].qids]
        lists = [
            (query, [candidates[did] for did in dids]) for query, dids in zip(queries, wanted, strict=True)
        ]
        scored = [
            dict(zip(dids, p_yes, strict=True))
            for dids, p_yes in zip(wanted, self._score_many(lists), strict=True)
        ]
        for task, own in zip(tasks, hits, strict=True):
            p_yes = [[of[did] for did in dids] for of, dids in zip(scored, own.dids, strict=True)]
            Scores.of_lists(own.qids, own.dids, own.recall, p_yes, task.facts).write(task.part)
        pairs = sum(len(dids) for own in hits for dids in own.dids)
        return {
            "queries": sum(task.num_queries for task in tasks),
            "pairs": pairs,
            "candidates": len(candidates),
        }


class _Hits(NamedTuple):
    """What is to be scored of a run: dids and the recall's scores of each query."""

    qids: list[str]
    dids: list[list[str]]
    recall: list[Any]

    @classmethod
    def of(cls, one: ScoredList) -> "_Hits":
        run = open_run(one.run)
        rows: list[int] = one.rows.tolist()
        return cls(
            [run.qids[row] for row in rows],
            [list(run.dids[row])[: one.depth] for row in rows],
            [run.scores[row][: one.depth] for row in rows],
        )


def _backend(config: RerankConfig) -> Any:
    """(query, candidates) lists → P(Yes) of each."""
    if config.backend == "vllm":
        from umarvel_ray.model.vllm_reranker import VllmReranker

        return VllmReranker.load(config.checkpoint, dtype=config.compute_dtype).score_many
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    reranker = Reranker.load(config.checkpoint, device=device, dtype=config.compute_dtype)

    def score_many(lists: Sequence[tuple[Query, Sequence[Candidate]]]) -> list[np.ndarray]:
        # Pictures are looked at once a part, not once an actor: who shares a pass through the tower moves the
        # last bit, and a part must come out the same whoever scores it, after whatever.
        reranker.keep_pictures(config.picture_bytes)
        return reranker.score_many(lists, max_tokens=config.max_tokens, num_readers=config.readers)

    return score_many


def require_records(lists: Sequence[ScoredList]) -> None:
    """Look before scoring: the first query of each run is in its query file, its hits in its pools.

    Raises:
        DataError: One is not.
    """
    for one in lists:
        run = open_run(one.run)
        if not len(one.rows):
            raise DataError(f"{one.run}: holds no query. Search first.")
        row = int(one.rows[0])
        one.queries.by_qid(run.qids[row])
        reader = RecordReader(one.pools)
        for did in list(run.dids[row])[: one.depth]:
            reader.candidate(did)
