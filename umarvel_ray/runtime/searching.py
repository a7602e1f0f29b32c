"""Exact search over stores: query blocks dealt to actors that stream memory-mapped candidates.

Queries are sharded first: an actor takes one block of queries past the whole pool, so nothing is merged and no matrix
crosses the object store. A finished block is a file; a killed search does only what is missing.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umarvel_ray.data.trec import Run
from umarvel_ray.errors import DataError
from umarvel_ray.retrieve.store import EmbeddingStore
from umarvel_ray.runtime.cluster import RuntimeSettings
from umarvel_ray.runtime.pool import run_actors

_CANDIDATE_ROWS = 65_536


@dataclass(frozen=True)
class SearchTask:
    """Queries to search for.

    Attributes:
        queries: Their store.
        pools: Stores whose rows, laid end to end, are the pool.
        k: Hits kept per query; all of a smaller pool.
        output: The run file.
    """

    queries: Path
    pools: tuple[Path, ...]
    k: int
    output: Path


@dataclass(frozen=True)
class _Block:
    """One block of a task's queries."""

    task: SearchTask
    start: int
    stop: int
    part: Path


def search(
    tasks: Sequence[SearchTask],
    runtime: RuntimeSettings,
    *,
    query_block_rows: int = 1024,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the run of every task; blocks found on disk are kept.

    Args:
        tasks: What to search.
        runtime: Who does it.
        query_block_rows: Queries that pass the pool together.
        progress: Called with (query blocks done, all).
    """
    blocks = {task: _blocks(task, query_block_rows) for task in tasks if not task.output.exists()}
    missing = [block for some in blocks.values() for block in some if not block.part.exists()]
    total = sum(map(len, blocks.values()))
    done = total - len(missing)
    progress(done, total)
    for _ in run_actors(missing, SearchWorker, runtime):
        done += 1
        progress(done, total)
    for task, some in blocks.items():
        parts = [Run.read(block.part) for block in some]
        Run(
            qids=[qid for part in parts for qid in part.qids],
            dids=[dids for part in parts for dids in part.dids],
            scores=[scores for part in parts for scores in part.scores],
        ).write(task.output)
        for block in some:
            block.part.unlink()
        some[0].part.parent.rmdir()


def _blocks(task: SearchTask, rows: int) -> list[_Block]:
    num_queries = len(EmbeddingStore.open(task.queries))
    folder = task.output.with_name(f".{task.output.stem}.parts")
    return [
        _Block(task, start, min(start + rows, num_queries), folder / f"block-{start // rows:05d}.arrow")
        for start in range(0, num_queries, rows)
    ]


class SearchWorker:
    """Opens stores as they are asked for; searches one block of queries a call."""

    def __init__(self) -> None:
        import torch

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._pools: dict[tuple[Path, ...], tuple[list[EmbeddingStore], np.ndarray]] = {}

    def __call__(self, block: _Block) -> dict[str, Any]:
        """Write the block's part of the run."""
        from umarvel_ray.retrieve.search import top_k

        queries = EmbeddingStore.open(block.task.queries)
        stores, dids = self._pool(block.task.pools)
        best = top_k(
            queries.vectors(block.start, block.stop),
            (
                store.vectors(start, min(start + _CANDIDATE_ROWS, len(store)))
                for store in stores
                for start in range(0, len(store), _CANDIDATE_ROWS)
            ),
            block.task.k,
            device=self._device,
        )
        block.part.parent.mkdir(parents=True, exist_ok=True)
        Run(
            qids=queries.ids.slice(block.start, block.stop - block.start).to_pylist(),
            dids=dids[best.rows_QK].tolist(),
            scores=best.scores_QK,
        ).write(block.part)
        return {"queries": block.stop - block.start}

    def _pool(self, paths: tuple[Path, ...]) -> tuple[list[EmbeddingStore], np.ndarray]:
        if paths not in self._pools:
            stores = [EmbeddingStore.open(path) for path in paths]
            if len({store.dim for store in stores}) > 1:
                widths = ", ".join(f"{os.path.basename(s.folder)}: {s.dim}" for s in stores)
                raise DataError(f"{paths[0].parent}: stores of different widths ({widths}). Embed them with one checkpoint.")
            dids = np.concatenate([np.asarray(store.ids.to_pylist(), dtype=object) for store in stores])
            self._pools = {paths: (stores, dids)}  # one pool at a time: ids of 5.6M candidates are half a gigabyte
        return self._pools[paths]
