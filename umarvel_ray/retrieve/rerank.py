"""Runs → P(Yes) of every hit → fused runs: recall-then-rerank, and the teacher of the distillation.

Scores are stored beside the run they re-score, in parts that appear whole; a killed job scores only what is
missing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from umarvel_ray.artifacts import fingerprint
from umarvel_ray.data.mbeir import Mbeir
from umarvel_ray.data.sources import RecordReader, chosen_tasks, pool_sources, query_source
from umarvel_ray.data.trec import Run
from umarvel_ray.errors import ShardError
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.retrieve.settings import RerankConfig, Scope, run_path


@dataclass(frozen=True)
class ScoreTask:
    """Queries of one run to score, one part of the output."""

    task: str
    split: str
    scope: Scope
    run: Path
    rows: tuple[int, ...]
    depth: int
    part: Path


def sampled_rows(num_queries: int, share: float, *, seed: int, name: str) -> np.ndarray:
    """Ascending rows of a share of a task's queries; the same for the same seed and name."""
    if share >= 1:
        return np.arange(num_queries)
    rng = np.random.default_rng([seed, int(fingerprint(name), 16)])
    return np.sort(rng.permutation(num_queries)[: max(1, round(share * num_queries))])


def plan_scores(config: RerankConfig) -> list[ScoreTask]:
    """All parts, finished ones included: a pure function of the runs and the settings."""
    mbeir = Mbeir(config.root)
    plan = []
    for request in config.requests:
        for task in chosen_tasks(mbeir, request.split, config.tasks):
            for scope in request.scopes:
                path = run_path(config.runs, request.split, task.name, scope)
                rows = sampled_rows(len(Run.read(path)), request.share, seed=config.seed, name=task.name)
                for part, start in enumerate(range(0, len(rows), config.queries_per_shard)):
                    chosen = tuple(int(row) for row in rows[start : start + config.queries_per_shard])
                    where = (
                        Path(config.output)
                        / "parts"
                        / request.split
                        / f"{task.name}.{scope}"
                        / f"{part:05d}.arrow"
                    )
                    plan.append(
                        ScoreTask(task.name, request.split, scope, path, chosen, request.depth, where)
                    )
    return plan


@lru_cache(maxsize=8)
def _open_run(path: Path) -> Run:
    return Run.read(path)


class RerankingWorker:
    """One reranker; scores one part a call."""

    def __init__(self, config: RerankConfig) -> None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._reranker = Reranker.load(config.checkpoint, device=device, dtype=config.compute_dtype)
        self._config = config
        self._mbeir = Mbeir(config.root)
        self._open = lru_cache(maxsize=64)(self._open_sources)

    def _open_sources(self, split: str, task: str) -> tuple[Any, dict[str, int], RecordReader]:
        tasks = chosen_tasks(self._mbeir, split, None)
        source = query_source(
            self._mbeir,
            next(known for known in tasks if known.name == task),
            split,
            choice=self._config.instruction,
            seed=self._config.seed,
        )
        row_of = {source.record(row).query.qid: row for row in range(len(source))}
        return source, row_of, RecordReader(pool_sources(self._mbeir, split, tasks))

    def __call__(self, task: ScoreTask) -> dict[str, Any]:
        """Score the hits of some queries; a finished part is left as it stands."""
        run = _open_run(task.run)
        source, row_of, reader = self._open(task.split, task.task)
        lists = []
        for row in task.rows:
            dids = list(run.dids[row])[: task.depth]
            lists.append((source[row_of[run.qids[row]]], [reader.candidate(did) for did in dids]))
        scores = self._reranker.score_many(lists, max_tokens=self._config.max_tokens)
        ranked = [
            sorted(zip((c.did for c in candidates), row.tolist(), strict=True), key=lambda hit: -hit[1])
            for (_, candidates), row in zip(lists, scores, strict=True)
        ]
        Run(
            qids=[query.qid for query, _ in lists],
            dids=[[did for did, _ in hits] for hits in ranked],
            scores=[[score for _, score in hits] for hits in ranked],
        ).write(task.part)
        return {"queries": len(lists), "pairs": sum(len(candidates) for _, candidates in lists)}


def merge_runs(runs: Sequence[Run]) -> Run:
    """Runs over different queries as one."""
    return Run(
        qids=[qid for run in runs for qid in run.qids],
        dids=[list(row) for run in runs for row in run.dids],
        scores=[np.asarray(row) for run in runs for row in run.scores],
    )


def fuse(recall: Run, reranked: Run, alpha: float) -> Run:
    """Re-rank by `alpha·recall + (1 − alpha)·P(Yes)`; ties keep the order of the recall.

    Args:
        recall: The run that was scored; queries and hits that were not are left out.
        reranked: P(Yes) of its hits.
        alpha: Weight of the recall score, 0 … 1.

    Raises:
        ShardError: A scored hit is not in the recall's run.
    """
    row_of = {qid: row for row, qid in enumerate(recall.qids)}
    dids, scores = [], []
    for qid, scored, p_yes in zip(reranked.qids, reranked.dids, reranked.scores, strict=True):
        if qid not in row_of:
            raise ShardError(
                f"query {qid} was scored but the recall run lacks it. Score the run that is fused."
            )
        p_of = dict(zip(scored, np.asarray(p_yes, dtype=np.float64).tolist(), strict=True))
        row = row_of[qid]
        hits = [
            (did, alpha * float(score) + (1 - alpha) * p_of[did])
            for did, score in zip(recall.dids[row], recall.scores[row], strict=True)
            if did in p_of
        ]
        if len(hits) != len(p_of):
            raise ShardError(
                f"query {qid}: {len(p_of) - len(hits)} of {len(p_of)} scored candidates are not in the "
                "recall run. Score the run that is fused."
            )
        hits.sort(key=lambda hit: -hit[1])
        dids.append([did for did, _ in hits])
        scores.append(np.array([score for _, score in hits], dtype=np.float32))
    return Run(qids=list(reranked.qids), dids=dids, scores=scores)


def tune_alpha(
    pairs: Mapping[str, tuple[Run, Run]], quality: Mapping[str, Any], *, grid: Sequence[float]
) -> dict[str, Any]:
    """The alpha whose fused runs are best on validation data, and the whole curve.

    Args:
        pairs: For each task its recall run and the scores of its hits.
        quality: For each task a function of a run, higher is better.
        grid: Alphas to try; among equals the largest, which trusts the recall most.

    Returns:
        `{"alpha": …, "curve": [[alpha, mean quality], …]}`.
    """
    curve = [
        [alpha, float(np.mean([quality[task](fuse(*runs, alpha)) for task, runs in pairs.items()]))]
        for alpha in grid
    ]
    best = max(curve, key=lambda point: (round(point[1], 6), point[0]))
    return {"alpha": best[0], "curve": curve}
