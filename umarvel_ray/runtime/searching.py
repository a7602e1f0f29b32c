"""Exact search over stores: query blocks dealt to actors that stream memory-mapped candidates.

Queries are sharded first: an actor takes one block of queries past the whole pool, so nothing is merged and
no matrix crosses the object store. A finished block is a file; a killed search does only what is missing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umarvel_ray.artifacts import fingerprint
from umarvel_ray.data.trec import Run
from umarvel_ray.errors import DataError
from umarvel_ray.retrieve.store import EmbeddingPool, EmbeddingStore
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
    import pyarrow as pa

    for task, some in blocks.items():
        tables = [Run.read(block.part).table() for block in some]
        Run.from_table(pa.concat_tables(tables)).write(task.output)
        for block in some:
            block.part.unlink()
        some[0].part.parent.rmdir()


def _blocks(task: SearchTask, rows: int) -> list[_Block]:
    queries, pool = EmbeddingStore.open(task.queries), EmbeddingPool(task.pools)
    made_of = [queries.fingerprint, [store.fingerprint for store in pool.stores], task.k, rows]
    # Named by all that decides its content: blocks of another search are never taken for ours.
    folder = task.output.with_name(f".{task.output.stem}.{fingerprint(made_of)}.parts")
    num_queries = len(queries)
    return [
        _Block(task, start, min(start + rows, num_queries), folder / f"block-{start // rows:05d}.arrow")
        for start in range(0, num_queries, rows)
    ]


class SearchWorker:
    """Opens stores as they are asked for; searches one block of queries a call."""

    def __init__(self) -> None:
        import torch

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._pools: dict[tuple[Path, ...], EmbeddingPool] = {}

    def __call__(self, block: _Block) -> dict[str, Any]:
        """Write the block's part of the run."""
        import pyarrow as pa

        from umarvel_ray.retrieve.search import top_k

        queries = EmbeddingStore.open(block.task.queries)
        pool = self._pool(block.task.pools)
        try:
            best = top_k(
                queries.vectors(block.start, block.stop),
                pool.blocks(_CANDIDATE_ROWS),
                block.task.k,
                device=self._device,
            )
        except DataError:
            for store in (queries, *pool.stores):
                store.verify()  # names the file, where the fault is in one
            raise
        num_queries, num_hits = best.rows_QK.shape
        dids = pool.ids.take(pa.array(best.rows_QK.reshape(-1))).cast(pa.string())
        offsets = np.arange(num_queries + 1, dtype=np.int32) * num_hits
        Run.from_table(
            pa.table(
                {
                    "qid": queries.ids.slice(block.start, num_queries),
                    "did": pa.ListArray.from_arrays(pa.array(offsets), dids),
                    "score": pa.ListArray.from_arrays(
                        pa.array(offsets), pa.array(best.scores_QK.reshape(-1))
                    ),
                }
            )
        ).write(block.part)
        return {"queries": num_queries}

    def _pool(self, paths: tuple[Path, ...]) -> EmbeddingPool:
        if paths not in self._pools:
            # One at a time: the ids of 5.6M candidates are 0.1 GB.
            self._pools = {paths: EmbeddingPool(paths)}
        return self._pools[paths]
