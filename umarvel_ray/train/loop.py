"""The training loop, for embedder and reranker alike."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from umarvel_ray.storage import Place
from umarvel_ray.train.checkpoint import MetricsLog, State, save_state
from umarvel_ray.train.optimizer import learning_rate, require_finite
from umarvel_ray.train.settings import TrainSettings
from umarvel_ray.train.strategy import Replicated
from umarvel_ray.train.trackers import Tracker

_AHEAD = 2
"""Batches prepared while one computes."""


class Task(Protocol):
    """What differs between embedder and reranker: the batch and its gradient."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        ...

    def prepare(self, step: int) -> Any:
        """The batch of a step, a pure function of it."""
        ...

    def samples(self, prepared: Any) -> list[str]:
        """Ids to name in an error, the guilty ones first."""
        ...

    def backward(self, prepared: Any, *, seed: int) -> dict[str, float]:
        """Leave the mean gradient over the global batch; return figures, `loss` among them."""
        ...

    def after_step(self) -> None:
        """Bring parameters back into their range."""
        ...

    def validate(self) -> dict[str, float]:
        """Figures of the held-out queries, `score` among them: the higher, the better."""
        ...

    def close(self) -> None:
        """End what prepared the batches."""
        ...


@dataclass(frozen=True, slots=True)
class Watchers:
    """Who looks on.

    Attributes:
        on_step: Called with each line of the metrics.
        trackers: Get the figures of each step.
        must_save: Says that this worker will be taken away soon: the state is saved at once.
        facts: Noted with each state.
    """

    on_step: Callable[[dict[str, Any]], None] = lambda entry: None
    trackers: Sequence[Tracker] = ()
    must_save: Callable[[], bool] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def train(
    task: Task,
    strategy: Replicated,
    settings: TrainSettings,
    *,
    num_steps: int,
    seed: int,
    output: Place,
    state: State | None = None,
    watchers: Watchers = Watchers(),
) -> None:
    """Train `task.model` to the end; from `state`, whose weights it holds already, if there is one."""
    lanes = strategy.lanes
    first = 0
    if state is not None:
        first = state.step
        strategy.set_moments(state.tensors, step=first)
    best = state.facts.get("best", float("-inf")) if state else float("-inf")
    log = MetricsLog(output / "metrics.jsonl", steps_done=first) if lanes.leads else None
    task.model.train()
    finished = time.perf_counter()
    for step, prepared in _prepared_ahead(task, range(first, num_steps)):
        waited = time.perf_counter() - finished
        rate = learning_rate(
            step, peak=settings.rate, num_steps=num_steps, warmup_ratio=settings.warmup_ratio
        )
        figures = task.backward(prepared, seed=hash((seed, step)))
        grad_norm = strategy.clip(settings.max_grad_norm)
        done = step + 1
        require_finite(step=done, samples=task.samples(prepared), loss=figures["loss"], grad_norm=grad_norm)
        strategy.step(rate)
        task.after_step()
        entry: dict[str, Any] = {"step": done, "num_steps": num_steps, **figures, "grad_norm": grad_norm}
        entry["learning_rate"] = rate
        is_best = False
        if settings.validation and _is_due(done, settings.validation.every, last=num_steps):
            entry |= {f"validation_{name}": value for name, value in task.validate().items()}
            is_best = entry["validation_score"] > best
            best = max(best, entry["validation_score"])
        seconds = time.perf_counter() - finished
        if log:
            entry["queries_per_s"] = round(settings.batch_size / seconds, 2)
            entry["waited_s"] = round(waited, 4)
            log.write(entry)
            for tracker in watchers.trackers:
                tracker.write(done, entry)
            watchers.on_step(entry)
        leaving = watchers.must_save is not None and lanes.any(watchers.must_save())
        if is_best or leaving or _is_due(done, settings.save_every, last=num_steps):
            # Of a sharded state every worker has a part to give.
            tensors = strategy.state() if lanes.leads or strategy.lockstep else {}
            if lanes.leads:
                save_state(
                    output / "states",
                    tensors,
                    step=done,
                    keep=settings.keep_last,
                    facts={**watchers.facts, **({"best": best} if settings.validation else {})},
                    best=is_best,
                )
        finished = time.perf_counter()
    if log:
        log.close()
    for tracker in watchers.trackers:
        tracker.close()
    task.model.eval()


def _is_due(done: int, every: int, *, last: int) -> bool:
    return done % every == 0 or done == last


def _prepared_ahead(task: Task, steps: range) -> Iterator[tuple[int, Any]]:
    """Prepare the following batches while the current one computes."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = [pool.submit(task.prepare, step) for step in steps[:_AHEAD]]
        for step in steps:
            prepared = waiting.pop(0).result()
            if step + _AHEAD in steps:
                waiting.append(pool.submit(task.prepare, step + _AHEAD))
            yield step, prepared
