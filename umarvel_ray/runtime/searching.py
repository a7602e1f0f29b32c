"""Exact search over stores: cells of (query block, slice of the pool) dealt to actors that stream candidates.

Queries are sharded first: an actor takes a block of queries past the pool, which it reads from its stores a
block at a time, and nothing is merged. The pool is sliced too only where there are more actors than blocks of
queries. A finished cell is a file of rows and scores; no matrix crosses the object store. A search that was
killed, or lost actors, does only the cells that are missing.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from umarvel_ray.artifacts import fingerprint, read_json, write_json
from umarvel_ray.errors import DataError, ResourceError
from umarvel_ray.retrieve.settings import SearchBackend
from umarvel_ray.retrieve.store import EmbeddingPool, EmbeddingStore
from umarvel_ray.runtime.cluster import RuntimeSettings
from umarvel_ray.runtime.pool import run_actors
from umarvel_ray.storage import Place, remove_tree

_CANDIDATE_BYTES = 1 << 28
"""float32 candidates that are searched together; another such block is read ahead."""
_MIN_BLOCK_ROWS = 512
_MIN_SLICE_ROWS = 65_536
_UNIT_TOLERANCE = 0.01
"""Of a stored vector's length: bfloat16 keeps 8 bits."""
_PROCESS_BYTES = 600 << 20
"""Python, Torch and Arrow, without data."""
_THREAD_BYTES = 160 << 20
"""Products of one tile, and survivors at their bound."""


@dataclass(frozen=True)
class SearchTask:
    """Queries to search for.

    Attributes:
        queries: Their store.
        pools: Stores whose rows, laid end to end, are the pool.
        k: Hits kept per query; all of a smaller pool.
        output: The run file.
    """

    queries: Place
    pools: tuple[Place, ...]
    k: int
    output: Place


@dataclass(frozen=True)
class SearchEstimate:
    """What a search will take.

    Attributes:
        num_cells: Tasks for actors, finished ones included.
        flop: Of the plain product of all missing cells.
        read_bytes: Candidates read, each slice once per query block.
        actor_bytes: Most memory of an actor, without pages of mapped files, which the system takes back.
        dim: Width of the vectors.
    """

    num_cells: int
    flop: float
    read_bytes: int
    actor_bytes: int
    dim: int

    def seconds(self, flop_per_s: float, num_actors: int) -> float:
        """At a rate per actor, if all have as much to do."""
        return self.flop / (flop_per_s * min(num_actors, max(1, self.num_cells)))

    def measured_rate(self, threads: int) -> float:
        """FLOP/s of a search of random vectors on this machine's CPU, timed for a fraction of a second."""
        import torch

        from umarvel_ray.retrieve.search import top_k

        generator = np.random.default_rng(0)
        pool_CD = generator.standard_normal((32_768, self.dim), dtype=np.float32) / math.sqrt(self.dim)
        num_threads = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            started = time.perf_counter()
            top_k(pool_CD[:512], pool_CD, 10)
            return 2.0 * 512 * pool_CD.size / (time.perf_counter() - started)
        finally:
            torch.set_num_threads(num_threads)


@dataclass(frozen=True)
class SearchSummary:
    """What a search took.

    Attributes:
        num_cells: All cells.
        num_found: Those found finished.
        actor_seconds: Of work on cells, over all actors; time to start and to wait is not in it.
        wall_seconds: From the first actor's order to the last answer.
        first_seconds: Of them, before the first actor took up work.
        actor_bytes: Most memory that an actor held between blocks, without pages of mapped files.
    """

    num_cells: int
    num_found: int
    actor_seconds: float
    wall_seconds: float
    first_seconds: float
    actor_bytes: int


@dataclass(frozen=True)
class _Cell:
    """Queries `start` to `stop` of a task against rows `first` to `last` of its pool."""

    task: SearchTask
    start: int
    stop: int
    first: int
    last: int
    part: Place


def search(
    tasks: Sequence[SearchTask],
    runtime: RuntimeSettings,
    *,
    query_block_rows: int = 8192,
    backend: SearchBackend = "tiles",
    progress: Callable[[int, int], None] = lambda done, total: None,
    announce: Callable[[SearchEstimate], None] = lambda estimate: None,
) -> SearchSummary:
    """Write the run of every task; cells found on disk are kept.

    Args:
        tasks: What to search.
        runtime: Who does it.
        query_block_rows: Queries that pass the pool together, at most.
        backend: What multiplies; the runs are the same.
        progress: Called with (cells done, all).
        announce: Called with what it will take, before anything starts.

    Raises:
        DataError: A vector is not finite or not of unit length.
        ResourceError: The actors need more memory than there is.
        ShardError: A store is incomplete, or widths differ.
    """
    plans = {task: _plan(task, runtime, query_block_rows) for task in tasks if not task.output.exists()}
    cells = [cell for some in plans.values() for cell in some]
    missing = [cell for cell in cells if not cell.part.exists()]
    estimate = _estimate(cells, missing, runtime)
    announce(estimate)
    _require_memory(estimate, runtime, num_actors=min(runtime.num_actors, len(missing)))
    done = len(cells) - len(missing)
    progress(done, len(cells))
    num_found, answers, ordered = done, [], time.time()
    for answer in run_actors(missing, partial(SearchWorker, backend), runtime):
        answers.append(answer)
        done += 1
        progress(done, len(cells))
    ended = time.time()
    for task, some in plans.items():
        _finish(task, some)
    return SearchSummary(
        num_cells=len(cells),
        num_found=num_found,
        actor_seconds=sum(answer["seconds"] for answer in answers),
        wall_seconds=ended - ordered,
        first_seconds=min((answer["started"] for answer in answers), default=ended) - ordered,
        actor_bytes=max((answer["bytes"] for answer in answers), default=0),
    )


def _plan(task: SearchTask, runtime: RuntimeSettings, most_rows: int) -> list[_Cell]:
    """The cells of a task. How it is cut is decided once and kept beside the cells, so that a search goes on
    with other numbers of actors; the cut does not move the result."""
    queries = EmbeddingStore.open(task.queries)
    pool = EmbeddingPool(task.pools)
    if queries.dim != pool.dim:
        raise DataError(
            f"{task.queries}: vectors of width {queries.dim}, but {task.pools[0]} has width {pool.dim}. "
            "Embed both with the same checkpoint."
        )
    made_of = [queries.fingerprint, [store.fingerprint for store in pool.stores], task.k]
    # Named by all that decides its content: cells of another search are never taken for ours.
    folder = task.output.parent / f".{task.output.stem}.{fingerprint(made_of)}.parts"
    if not (folder / "cut.json").exists():
        num_blocks, num_slices = _cut(len(queries), len(pool), runtime.num_actors, most_rows)
        write_json(folder / "cut.json", {"query_blocks": num_blocks, "pool_slices": num_slices})
    cut = read_json(folder / "cut.json")
    return [
        _Cell(task, start, stop, first, last, folder / f"queries-{start:09d}-pool-{first:09d}.arrow")
        for start, stop in pairwise(_even(len(queries), cut["query_blocks"]))
        for first, last in pairwise(_even(len(pool), cut["pool_slices"]))
    ]


def _cut(num_queries: int, num_candidates: int, num_actors: int, most_rows: int) -> tuple[int, int]:
    """(query blocks, pool slices): as many blocks for each actor, none too small to fill a product; more
    actors than such blocks share the pool."""
    rounds = math.ceil(num_queries / (most_rows * num_actors))
    num_blocks = max(1, min(num_actors * rounds, num_queries // min(_MIN_BLOCK_ROWS, most_rows)))
    num_blocks = max(num_blocks, math.ceil(num_queries / most_rows))
    num_slices = max(1, min(num_actors // num_blocks, num_candidates // _MIN_SLICE_ROWS))
    return num_blocks, num_slices


def _even(num: int, parts: int) -> list[int]:
    return [num * part // parts for part in range(parts + 1)]


def _estimate(cells: Sequence[_Cell], missing: Sequence[_Cell], runtime: RuntimeSettings) -> SearchEstimate:
    dims = {task.queries: EmbeddingStore.open(task.queries).dim for task in {cell.task for cell in missing}}
    flop, read, most = 0.0, 0, 0
    for cell in missing:
        dim, rows = dims[cell.task.queries], cell.stop - cell.start
        flop += 2.0 * rows * (cell.last - cell.first) * dim
        read += (cell.last - cell.first) * dim * 2
        # The block searched, the one read ahead, and a quarter and a half for it in 8 and 16 bits; queries
        # twice and the same of them; scores and rows, old and merged.
        held = 2.75 * min(_CANDIDATE_BYTES, 4 * dim * (cell.last - cell.first))
        most = max(most, int(held + rows * (11 * dim + 48 * cell.task.k)))
    bytes_ = most + _PROCESS_BYTES + runtime.threads * _THREAD_BYTES
    return SearchEstimate(len(cells), flop, read, bytes_, max(dims.values(), default=0))


def _require_memory(estimate: SearchEstimate, runtime: RuntimeSettings, *, num_actors: int) -> None:
    if not num_actors:
        return
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    need = estimate.actor_bytes * (1 if runtime.kind == "local" else num_actors)
    if runtime.kind == "ray":
        import ray

        have = max(have, int(ray.cluster_resources().get("memory", 0)))
    if need > have:
        raise ResourceError(
            f"the search needs {need / 1e9:.1f} GB, {estimate.actor_bytes / 1e9:.1f} GB for each of "
            f"{num_actors} actors; there are {have / 1e9:.1f} GB. Lower query_block_rows or "
            "runtime.num_actors, or add nodes."
        )


def _finish(task: SearchTask, cells: Sequence[_Cell]) -> None:
    """Join the cells of a task to its run, and remove them."""
    from umarvel_ray.retrieve.hits import read_hits, write_run
    from umarvel_ray.retrieve.search import merge_top_k

    by_block: dict[int, list[_Cell]] = {}
    for cell in cells:
        by_block.setdefault(cell.start, []).append(cell)
    blocks = (merge_top_k([read_hits(cell.part) for cell in some], task.k) for some in by_block.values())
    queries, pool = EmbeddingStore.open(task.queries), EmbeddingPool(task.pools)
    write_run(task.output, blocks, qids=queries.ids, dids=pool.ids)
    # With all in it: an actor whose driver was killed may still have been at a part of its own.
    remove_tree(cells[0].part.parent)


class SearchWorker:
    """Opens stores as they are asked for; searches one cell a call."""

    def __init__(self, backend: SearchBackend = "tiles") -> None:
        import torch

        self._backend = backend
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._pools: dict[tuple[Place, ...], EmbeddingPool] = {}
        self._sound: set[tuple[Any, ...]] = set()
        self._most_bytes = 0

    def __call__(self, cell: _Cell) -> dict[str, Any]:
        """Write the cell's part."""
        from umarvel_ray.retrieve.hits import write_hits

        if self._backend == "faiss":
            from umarvel_ray.retrieve.faiss_search import faiss_top_k as top_k
        else:
            from umarvel_ray.retrieve.search import top_k

        started, clock = time.time(), time.perf_counter()
        queries, pool = EmbeddingStore.open(cell.task.queries), self._pool(cell.task.pools)
        queries_QD = queries.vectors(cell.start, cell.stop)
        _require_unit(queries_QD, queries.folder, lambda rows: queries.ids.take(rows + cell.start))
        blocks = _read_ahead(partial(self._candidates, pool), cell.first, cell.last, pool.dim)
        best = top_k(queries_QD, blocks, cell.task.k, first_row=cell.first, device=self._device)
        write_hits(cell.part, best)
        return {
            "started": started,
            "seconds": time.perf_counter() - clock,
            "bytes": self._most_bytes,
        }

    def _candidates(self, pool: EmbeddingPool, start: int, stop: int) -> np.ndarray:
        vectors_CD = pool.vectors(start, stop)
        key = (*(store.folder for store in pool.stores), start, stop)
        if key not in self._sound:
            where = ", ".join(str(store.folder) for store in pool.stores)
            _require_unit(vectors_CD, where, lambda rows: pool.ids.take(rows + start))
            self._sound.add(key)
        self._most_bytes = max(self._most_bytes, _anonymous_bytes())
        return vectors_CD

    def _pool(self, paths: tuple[Place, ...]) -> EmbeddingPool:
        if paths not in self._pools:
            # One at a time: the ids of 5.6M candidates are 0.1 GB.
            self._pools = {paths: EmbeddingPool(paths)}
        return self._pools[paths]


def _read_ahead(
    read: Callable[[int, int], np.ndarray], first: int, last: int, dim: int
) -> Iterator[np.ndarray]:
    """Candidates in blocks; while one is searched, the next is read."""
    rows = max(1, _CANDIDATE_BYTES // (4 * dim))
    with ThreadPoolExecutor(1) as reader:
        waiting = None
        for start in range(first, last, rows):
            coming = reader.submit(read, start, min(start + rows, last))
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()


def _require_unit(vectors_ND: np.ndarray, where: Any, names: Callable[[np.ndarray], Any]) -> None:
    """Refuse vectors that are not finite or not of unit length, by name."""
    lengths_N = np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND))
    odd = np.flatnonzero(~(np.abs(lengths_N - 1) <= _UNIT_TOLERANCE))
    if len(odd):
        length = lengths_N[odd[0]]
        what = "is not finite" if not np.isfinite(length) else f"has length {length:.3g}"
        raise DataError(
            f"{where}: {len(odd)} of {len(vectors_ND)} vectors are not of unit length (first: "
            f"{names(odd[:1])[0]} {what}). Embed again, or normalise them."
        )


def _anonymous_bytes() -> int:
    """Resident memory of this process, without pages of mapped files."""
    try:
        with open("/proc/self/status") as file:
            sizes = dict(line.split(":", 1) for line in file)
        return int(sizes["RssAnon"].split()[0]) * 1024
    except (OSError, KeyError):
        return 0
