"""Records made ready ahead of the model, in processes of their own: pictures decoded, texts tokenized."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

_builder: Any = None
"""In a loader process: what builds."""


class Loaders:
    """Calls `build` of a builder for many records, here or in `num_processes` processes.

    Args:
        builder: Used here, or pickled for each process.
        num_processes: 0 for none.
    """

    def __init__(self, builder: Any, num_processes: int) -> None:
        self._builder = builder
        self._pool: ProcessPoolExecutor | None = None
        if num_processes:
            # A forked process would hold locks of the threads that it does not have.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(num_processes, context, initializer=_start, initargs=(builder,))
            self._chunks = 4 * num_processes

    def build(self, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """`builder.build(*call)` for each call, in order."""
        if self._pool is None:
            return [self._builder.build(*call) for call in calls]
        size = -(-len(calls) // self._chunks) or 1
        return list(self._pool.map(_build, calls, chunksize=size))

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _start(builder: Any) -> None:
    global _builder
    _builder = builder


def _build(call: tuple[Any, ...]) -> Any:
    return _builder.build(*call)
