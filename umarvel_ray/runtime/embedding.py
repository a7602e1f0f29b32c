"""Embedding on Ray: readers on any CPU, a pool of encoders that grows and shrinks, one stream of shards.

Ray Data's actor pool deals shards to encoders. An encoder asks readers for the windows of its shard a few at
a time, so memory is bounded whatever the pool's size, and works on two shards at once: while it computes for
one, the other's windows are being read. A shard is written by the encoder that made it; only counts return.
"""

import functools
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from umarvel_ray.data.sources import Source
from umarvel_ray.errors import UmarvelError
from umarvel_ray.model.systems import Builder
from umarvel_ray.retrieve.embed import (
    EmbeddingWorker,
    Model,
    ShardTask,
    StorePlan,
    Window,
    complete_stores,
    digest_rows,
    find_copies,
    join_parts,
    missing_shards,
    read_copies,
    read_window,
    refuse_too_many_bad,
    shard_tasks,
    write_copies,
)
from umarvel_ray.retrieve.settings import EmbedConfig
from umarvel_ray.runtime.cluster import RuntimeSettings
from umarvel_ray.runtime.pool import run_pool, run_tasks

_log = logging.getLogger(__name__)
_PATIENCE_S = 30.0
"""After which a window that nobody reads is read by the encoder itself."""
_READING_HERE = threading.Lock()
"""Tokenizers do not bear two threads."""
_DIGEST_ROWS = 16384
"""Rows of one task that looks for copies."""


@dataclass
class Progress:
    """What a run has done so far.

    Attributes:
        rows: Of all stores together.
        rows_done: Written, those found finished included.
        rows_found: Found finished.
        items: Embedded in this run.
        tokens: Theirs; nothing is padded, so all that is computed is text or image.
        copies: Rows that took the vector of equal content.
        bad: Rows left out.
        shards: Written in this run.
        busy_s: Seconds that encoders computed, all together.
        read_s: Seconds that readers read.
        workers: Encoders that wrote a shard.
        encoder_peak_bytes: Most memory that one of them held.
        reader_peak_bytes: Most memory that one reader held.
    """

    rows: int = 0
    rows_done: int = 0
    rows_found: int = 0
    items: int = 0
    tokens: int = 0
    copies: int = 0
    bad: int = 0
    shards: int = 0
    busy_s: float = 0.0
    read_s: float = 0.0
    workers: set[str] = field(default_factory=set)
    encoder_peak_bytes: int = 0
    reader_peak_bytes: int = 0
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Since the first shard was handed out."""
        return max(time.perf_counter() - self.started, 1e-9)

    @property
    def busy_share(self) -> float:
        """Of the encoders' time, what they computed; counted from the first shard to now."""
        return self.busy_s / (self.seconds * max(1, len(self.workers)))

    @property
    def seconds_left(self) -> float:
        """At the rate so far."""
        fresh = self.rows_done - self.rows_found
        return (self.rows - self.rows_done) * self.seconds / fresh if fresh else float("inf")

    def summary(self) -> dict[str, Any]:
        """For people and programs, as JSON."""
        return {
            "rows": self.rows,
            "rows_found_finished": self.rows_found,
            "items_embedded": self.items,
            "copies": self.copies,
            "bad_rows": self.bad,
            "shards_written": self.shards,
            "tokens": self.tokens,
            "padding_share": 0.0,
            "items_per_s": round(self.items / self.seconds, 2),
            "tokens_per_s": round(self.tokens / self.seconds, 2),
            "encoder_busy_share": round(self.busy_share, 4),
            "encoder_seconds": round(self.busy_s, 3),
            "reader_seconds": round(self.read_s, 3),
            "encoders": len(self.workers),
            "encoder_peak_bytes": self.encoder_peak_bytes,
            "reader_peak_bytes": self.reader_peak_bytes,
            "seconds": round(self.seconds, 3),
        }


def embed_stores(
    plans: Sequence[StorePlan],
    model: Model,
    config: EmbedConfig,
    runtime: RuntimeSettings,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    *,
    chosen: Callable[[int], bool] | None = None,
) -> Progress:
    """Embed what is missing of all stores, as one stream, and write their manifests.

    With `chosen`, only shards whose number, counted through all plans, it answers with true; manifests, and
    shards that take vectors from others, are left to who embeds the rest.

    Raises:
        DataError: A row is bad, or too many are.
        ShardError: A store was made with other settings.
    """
    progress = Progress(rows=sum(plan.num_rows for plan in plans))
    missing = [(plan, shards) for plan in plans if (shards := missing_shards(plan))]
    if chosen is not None:
        first = dict(zip((id(plan) for plan in plans), shard_numbers(plans), strict=True))
        missing = [
            (plan, [shard for shard in shards if chosen(first[id(plan)] + shard.index)])
            for plan, shards in missing
        ]
        missing = [(plan, shards) for plan, shards in missing if shards]
        progress.rows = sum(shard.num_rows for _, shards in missing for shard in shards)
    progress.rows_done = progress.rows - sum(shard.num_rows for _, shards in missing for shard in shards)
    progress.rows_found = progress.rows_done
    on_progress(progress)

    copies = _find_copies([plan for plan, _ in missing], config, runtime)
    tasks = [
        task for plan, shards in missing for task in shard_tasks(plan, shards, copies.get(plan.source.name))
    ]
    progress.copies = sum(task.num_copies for task in tasks)
    # Short shards come last: no encoder starts a long one when the others are done.
    tasks.sort(key=lambda task: -len(task.own_rows))
    read = None
    if runtime.kind == "ray" and model.builder is not None and runtime.readers:
        read = _ReadAhead(model.builder, runtime.readers)
    progress.started = time.perf_counter()
    for answer in run_pool(
        tasks, functools.partial(EmbeddingWorker, model, read), runtime, calls_at_once=2 if read else 1
    ):
        progress.rows_done += answer["rows"]
        progress.items += answer["items"]
        progress.tokens += answer["tokens"]
        progress.bad += answer["bad"]
        progress.shards += answer["written"]
        progress.busy_s += answer["busy_s"]
        progress.read_s += answer["read_s"]
        progress.workers.add(answer["worker"])
        progress.encoder_peak_bytes = max(progress.encoder_peak_bytes, answer["peak_bytes"])
        progress.reader_peak_bytes = max(progress.reader_peak_bytes, answer["reader_peak_bytes"])
        refuse_too_many_bad(config, progress.bad, progress.rows)
        on_progress(progress)

    if chosen is not None:
        return progress
    parts = [(task, copies[task.source.name]) for task in tasks if task.is_partial]
    for answer in run_tasks(parts, _join, runtime):
        progress.rows_done += answer["rows"]
        on_progress(progress)
    stores = complete_stores(plans)
    progress.bad = sum(store.num_bad for store in stores)
    refuse_too_many_bad(config, progress.bad, progress.rows)
    return progress


def shard_numbers(plans: Sequence[StorePlan]) -> list[int]:
    """Number of each store's first shard, counted through all of them."""
    counts = [len(plan.shards) for plan in plans]
    return [sum(counts[:index]) for index in range(len(counts))]


def _join(part: tuple[ShardTask, np.ndarray]) -> dict[str, Any]:
    return join_parts(*part)


def _find_copies(
    plans: Sequence[StorePlan], config: EmbedConfig, runtime: RuntimeSettings
) -> dict[str, np.ndarray]:
    """Copies by store; found once, and kept with the store for the next start."""
    if config.duplicates == "each":
        return {}
    copies = {plan.source.name: found for plan in plans if (found := read_copies(plan)) is not None}
    for plan in plans:
        if plan.source.name in copies:
            continue
        ranges = [
            (plan.source, start, min(start + _DIGEST_ROWS, plan.num_rows))
            for start in range(0, plan.num_rows, _DIGEST_ROWS)
        ]
        digests = np.empty((plan.num_rows, 3), dtype=np.uint64)
        for start, found in run_tasks(ranges, _digest, runtime):
            digests[start : start + len(found)] = found
        copies[plan.source.name] = find_copies(plan.source, digests)
        write_copies(plan, copies[plan.source.name])
    return copies


def _digest(part: tuple[Source, int, int]) -> tuple[int, np.ndarray]:
    source, start, stop = part
    return start, digest_rows(_opened(source), start, stop)


@functools.lru_cache(maxsize=64)
def _opened(source: Source) -> Source:
    """The process's own copy of a source: its file is opened and its index mapped once."""
    return source


class _ReadAhead:
    """Reads windows on other processes, a few ahead of who asks; they come in the order asked for."""

    def __init__(self, make_builder: Callable[..., Builder], depth: int) -> None:
        self._make_builder, self._depth = make_builder, depth
        self._patience_s = _PATIENCE_S
        self._name = uuid.uuid4().hex  # of the model, so that a process makes its builder once

    def __call__(self, source: Source, windows: Sequence[np.ndarray]) -> Iterator[Window]:
        read, waiting = _remote_reader(), deque[Any]()
        for rows in windows:
            if len(waiting) >= self._depth:
                yield self._take(*waiting.popleft())
            arguments = (self._name, self._make_builder, source, rows)
            waiting.append((read.remote(*arguments), arguments))
        while waiting:
            yield self._take(*waiting.popleft())

    def look_into(self, vision_store: Path) -> None:
        """See `ReadWindows`."""
        self._make_builder = functools.partial(self._make_builder, vision_store=vision_store)
        self._name += vision_store.name

    def _take(self, reference: Any, arguments: tuple[Any, ...]) -> Window:
        import ray

        ready, _ = ray.wait([reference], timeout=self._patience_s)
        if ready:
            window: Any = ray.get(reference)
            self._patience_s = _PATIENCE_S
        else:
            # Encoders may have taken every CPU there is: readers would wait for them, and they for readers.
            _log.warning("no CPU came free for readers: this encoder reads for itself")
            ray.cancel(reference)
            with _READING_HERE:
                window, self._patience_s = _read(*arguments), _PATIENCE_S / 30
        if isinstance(window, UmarvelError):
            raise window
        return window


@functools.cache
def _remote_reader() -> Any:
    import ray

    return ray.remote(num_cpus=1, max_retries=-1)(_read)


_BUILDERS: dict[str, Builder] = {}


def _read(
    name: str, make_builder: Callable[[], Builder], source: Source, rows: np.ndarray
) -> Window | UmarvelError:
    try:
        if name not in _BUILDERS:
            _BUILDERS.clear()
            _BUILDERS[name] = make_builder()
        return read_window(_opened(source), rows, _BUILDERS[name])
    except UmarvelError as error:  # an answer: Ray would wrap what is raised
        return error
