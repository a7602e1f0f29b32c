"""All tasks of a benchmark in one pass over its pools: a segment of a pool meets every query that wants it.

A finished segment is one file with the best candidates of those queries; local, pair and global runs are
merges of segments, so one product serves all of them, and a killed scoring does only the segments that are
missing. Results are those of a search per task and pool.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umarvel_ray.artifacts import fingerprint
from umarvel_ray.errors import ShardError
from umarvel_ray.retrieve.hits import read_hits, write_hits, write_run
from umarvel_ray.retrieve.store import EmbeddingPool, EmbeddingStore
from umarvel_ray.runtime.cluster import RuntimeSettings
from umarvel_ray.runtime.pool import run_actors
from umarvel_ray.storage import Place

SEGMENT_ROWS = 262_144
"""Candidates per segment: what a kill can cost one actor."""
_CANDIDATE_ROWS = 65_536


@dataclass(frozen=True)
class Wanted:
    """One run.

    Attributes:
        queries: Name of its query store.
        pools: Names of the stores that, laid end to end, are its pool.
        output: The run file.
    """

    queries: str
    pools: tuple[str, ...]
    output: Place


@dataclass(frozen=True)
class _Segment:
    """Rows of one pool, and the query stores that are scored against them."""

    pool: Place
    start: int
    stop: int
    queries: tuple[Place, ...]
    k: int
    part: Place


@dataclass(frozen=True)
class ScoringPlan:
    """What a scoring will do, known before it starts.

    Attributes:
        num_queries, num_candidates: Of all tasks and pools.
        segments: Units of work.
        products: Inner products in all.
        flops: Floating-point operations of those.
        pool_bytes: Read from the pools' files, once.
        query_bytes: Held by each actor while it works.
        scratch_bytes: On disk until the runs are merged.
    """

    num_queries: int
    num_candidates: int
    segments: tuple[_Segment, ...]
    products: int
    flops: int
    pool_bytes: int
    query_bytes: int
    scratch_bytes: int

    def line(self) -> str:
        """The plan in one line."""
        return (
            f"{self.num_queries:,} queries × {self.num_candidates:,} candidates in {len(self.segments)} "
            f"segments, one pass: {self.flops / 1e12:,.1f} TFLOP, {self.pool_bytes / 2**30:,.1f} GiB read, "
            f"{self.query_bytes / 2**30:,.1f} GiB of queries per actor, {self.scratch_bytes / 2**30:,.1f} "
            "GiB of scratch"
        )


def plan_scoring(
    embeddings: Place, wanted: Sequence[Wanted], *, k: int, scratch: Place, segment_rows: int = SEGMENT_ROWS
) -> ScoringPlan:
    """Cut the pools into segments and count the work.

    Args:
        embeddings: Folder of the stores.
        wanted: The runs; those whose file stands are passed over.
        k: Hits kept per query.
        scratch: Folder of the finished segments.
        segment_rows: Candidates per segment.

    Raises:
        ShardError: A store is incomplete, or widths differ.
    """
    missing = [run for run in wanted if not run.output.exists()]
    askers: dict[str, dict[str, None]] = {}
    for run in missing:
        for pool in run.pools:
            askers.setdefault(pool, {})[run.queries] = None
    queries = {name: EmbeddingStore.open(embeddings / name) for run in missing for name in (run.queries,)}
    dim = next((store.dim for store in queries.values()), None)
    pools = {name: EmbeddingStore.open(embeddings / name, dim=dim) for name in askers}
    for name, store in queries.items():
        if store.dim != dim:
            raise ShardError(
                f"{embeddings / name}: vectors of width {store.dim}, others have {dim}. Embed all with one "
                "checkpoint."
            )
    segments, products, pool_bytes, scratch_bytes = [], 0, 0, 0
    for name, store in pools.items():
        asked = tuple(askers[name])
        num_asked = sum(len(queries[query]) for query in asked)
        # Named by all that decides its content: a segment of other vectors is never taken for ours.
        key = fingerprint(
            [store.fingerprint, [queries[query].fingerprint for query in asked], k, segment_rows]
        )
        for start in range(0, len(store), segment_rows):
            stop = min(start + segment_rows, len(store))
            segments.append(
                _Segment(
                    pool=embeddings / name,
                    start=start,
                    stop=stop,
                    queries=tuple(embeddings / query for query in asked),
                    k=k,
                    part=scratch / f"{name.replace('/', '.')}.{key}.{start:010d}.arrow",
                )
            )
            products += num_asked * (stop - start)
            scratch_bytes += num_asked * min(k, stop - start) * 12
        pool_bytes += len(store) * store.dim * (4 if store.dtype == "float32" else 2)
    return ScoringPlan(
        num_queries=sum(map(len, queries.values())),
        num_candidates=sum(map(len, pools.values())),
        segments=tuple(segments),
        products=products,
        flops=2 * products * (dim or 0),
        pool_bytes=pool_bytes,
        query_bytes=sum(map(len, queries.values())) * (dim or 0) * 4,
        scratch_bytes=scratch_bytes,
    )


def score_all(
    embeddings: Place,
    wanted: Sequence[Wanted],
    runtime: RuntimeSettings,
    *,
    k: int,
    scratch: Place,
    segment_rows: int = SEGMENT_ROWS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ScoringPlan:
    """Write every wanted run; segments found on disk are kept.

    Args as `plan_scoring`; `progress` is called with (products done, all).
    """
    plan = plan_scoring(embeddings, wanted, k=k, scratch=scratch, segment_rows=segment_rows)
    missing = [segment for segment in plan.segments if not segment.part.exists()]
    # The last small segment should not keep one actor waiting for a large one.
    missing.sort(key=lambda segment: segment.start - segment.stop)
    sizes = {str(segment.part): segment.stop - segment.start for segment in plan.segments}
    total = sum(sizes.values())
    done = total - sum(sizes[str(segment.part)] for segment in missing)
    progress(done, total)
    for answer in run_actors(missing, ScoringWorker, runtime):
        done += answer["rows"]
        progress(done, total)
    of_pool: dict[str, list[_Segment]] = {}
    for segment in plan.segments:
        of_pool.setdefault(str(segment.pool), []).append(segment)
    for run in wanted:
        if not run.output.exists():
            _merge(embeddings, run, of_pool, k)
    for segment in plan.segments:
        segment.part.unlink(missing_ok=True)
    if isinstance(scratch, Path) and scratch.is_dir() and not any(scratch.iterdir()):
        scratch.rmdir()
    return plan


class ScoringWorker:
    """Holds the queries of the segment before, which the next one mostly shares; scores one segment a
    call."""

    def __init__(self) -> None:
        import torch

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._held: tuple[tuple[Place, ...], Any] = ((), None)

    def __call__(self, segment: _Segment) -> dict[str, Any]:
        """Write the segment's best candidates: rows of its pool, and scores."""
        from umarvel_ray.retrieve.search import top_k

        if self._held[0] != segment.queries:
            self._held = ((), None)
            stores = [EmbeddingStore.open(path) for path in segment.queries]
            self._held = (segment.queries, np.concatenate([store.vectors(0, len(store)) for store in stores]))
        pool = EmbeddingPool([segment.pool])
        best = top_k(
            self._held[1],
            pool.blocks(_CANDIDATE_ROWS, start=segment.start, stop=segment.stop),
            segment.k,
            first_row=segment.start,
            device=self._device,
        )
        write_hits(segment.part, best)
        return {"rows": segment.stop - segment.start}


def _merge(embeddings: Place, run: Wanted, of_pool: Mapping[str, Sequence[_Segment]], k: int) -> None:
    """The run of one query store over its pools, from their segments."""
    from umarvel_ray.retrieve.search import TopK, merge_top_k

    pool = EmbeddingPool([embeddings / name for name in run.pools])
    queries = EmbeddingStore.open(embeddings / run.queries)
    best: TopK | None = None
    first_row = 0
    for name, store in zip(run.pools, pool.stores, strict=True):
        for segment in of_pool[str(embeddings / name)]:
            place = segment.queries.index(embeddings / run.queries)
            start = sum(len(EmbeddingStore.open(path)) for path in segment.queries[:place])
            hits = read_hits(segment.part)
            mine = slice(start, start + len(queries))
            found = TopK(hits.scores_QK[mine], hits.rows_QK[mine].astype(np.int64) + first_row)
            best = found if best is None else merge_top_k([best, found], k)
        first_row += len(store)
    assert best is not None
    write_run(run.output, [best], qids=queries.ids, dids=pool.ids)
