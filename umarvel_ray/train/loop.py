"""The training loop, for embedder and reranker alike."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from umarvel_ray.train.checkpoint import MetricsLog, restore_latest, save_state
from umarvel_ray.train.gather import Lanes
from umarvel_ray.train.optimizer import (
    clip_gradients,
    learning_rate,
    make_optimizer,
    require_finite,
    set_learning_rate,
)
from umarvel_ray.train.settings import TrainSettings


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
        """Ids to name in an error."""
        ...

    def backward(self, prepared: Any, *, seed: int) -> dict[str, float]:
        """Leave the mean gradient over the global batch in `.grad`; return figures, `loss` among them."""
        ...

    def after_step(self) -> None:
        """Bring parameters back into their range."""
        ...


def train(
    task: Task,
    settings: TrainSettings,
    *,
    lanes: Lanes,
    num_steps: int,
    seed: int,
    output: Path,
    on_step: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> None:
    """Train `task.model` to the end, from its newest state on disk if there is one."""
    optimizer = make_optimizer(task.model, weight_decay=settings.weight_decay, betas=settings.betas)
    first = restore_latest(output / "states", task.model, optimizer)
    log = MetricsLog(output / "metrics.jsonl", steps_done=first) if lanes.leads else None
    task.model.train()
    for step, prepared in _prepared_ahead(task, range(first, num_steps)):
        started = time.perf_counter()
        rate = learning_rate(
            step, peak=settings.learning_rate, num_steps=num_steps, warmup_ratio=settings.warmup_ratio
        )
        set_learning_rate(optimizer, rate)
        figures = task.backward(prepared, seed=hash((seed, step)))
        grad_norm = clip_gradients(task.model, settings.max_grad_norm)
        done = step + 1
        require_finite(step=done, samples=task.samples(prepared), loss=figures["loss"], grad_norm=grad_norm)
        optimizer.step()
        task.after_step()
        if log:
            seconds = time.perf_counter() - started
            entry = {
                "step": done,
                "num_steps": num_steps,
                **figures,
                "grad_norm": grad_norm,
                "learning_rate": rate,
            }
            entry["queries_per_s"] = round(settings.batch_size / seconds, 2)
            log.write(entry)
            on_step(entry)
        if lanes.leads and (done % settings.save_every == 0 or done == num_steps):
            save_state(output / "states", task.model, optimizer, step=done, keep=settings.keep_last)
    if log:
        log.close()
    task.model.eval()


def _prepared_ahead(task: Task, steps: range) -> Iterator[tuple[int, Any]]:
    """Prepare the next batch while the current one computes."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(task.prepare, steps[0]) if steps else None
        for step in steps:
            assert following is not None
            prepared = following.result()
            following = pool.submit(task.prepare, step + 1) if step + 1 in steps else None
            yield step, prepared
