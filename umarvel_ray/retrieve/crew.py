"""The threads of one search."""

import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Crew:
    """On the CPU each thread works alone on whole pieces: none waits for another within a product, as Torch's
    own would at each of many small steps."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.size = torch.get_num_threads() if device == "cpu" else 1
        self._executor = ThreadPoolExecutor(self.size) if self.size > 1 else None
        self._buffers: queue.SimpleQueue[Tensor] = queue.SimpleQueue()

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._executor is not None:
            self._executor.shutdown()

    def run(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Results of all calls, in order."""
        if self._executor is None or len(calls) < 2:
            return [call() for call in calls]
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return list(self._executor.map(_inferring, calls))
        finally:
            torch.set_num_threads(num_threads)

    @contextmanager
    def buffer(self, num_values: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """Memory for products; used again, since fresh pages cost more than the products' selection."""
        try:
            buffer = self._buffers.get_nowait()
        except queue.Empty:
            buffer = torch.empty(0, dtype=dtype, device=self._device)
        if buffer.dtype != dtype or len(buffer) < num_values:
            buffer = torch.empty(num_values, dtype=dtype, device=self._device)
        try:
            yield buffer[:num_values]
        finally:
            self._buffers.put(buffer)


def _inferring(call: Callable[[], Any]) -> Any:
    with torch.inference_mode():  # a property of each thread
        return call()
