"""A pool of workers over a list of tasks: Ray Data's actor pool, or one worker in this process.

A worker is a class: state in `__init__`, one verb in `__call__`, small answers. Its work must be repeatable,
since a task may run twice when an actor dies.
"""

import logging
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from umarvel_ray.errors import UmarvelError
from umarvel_ray.runtime.cluster import RuntimeSettings, prepare_worker

logger = logging.getLogger(__name__)

MakeWorker = Callable[[], Callable[[Any], dict[str, Any]]]


class _Actor:
    """The actor: makes its worker once, hands it one task a call.

    Our own errors, that of a worker which cannot be made included, are answers, so that the user reads them
    without Ray's wrapping.
    """

    def __init__(self, make_worker: MakeWorker, runtime: RuntimeSettings) -> None:
        prepare_worker(runtime)
        try:
            self._worker = make_worker()
        except UmarvelError as error:
            refusal = error
            self._worker = lambda task: refusal

    def work(self, task: Any) -> dict[str, Any] | UmarvelError:
        """One task."""
        try:
            return _told(self._worker, task)
        except UmarvelError as error:
            return error


def _told(work: Callable[[Any], Any], task: Any) -> Any:
    """The answer to a task; the log hears which part of which folder is done."""
    started = time.perf_counter()
    answer = work(task)
    seconds = round(time.perf_counter() - started, 3)
    logger.info("part done", extra={"shard": str(getattr(task, "part", task)), "seconds": seconds})
    return answer


class _Shell(_Actor):
    """The actor as Ray Data calls it: tasks and answers travel as bytes in a column."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        return {"answer": [pickle.dumps(self.work(pickle.loads(task))) for task in batch["task"]]}


def run_pool(
    tasks: Sequence[Any], make_worker: MakeWorker, runtime: RuntimeSettings, *, calls_at_once: int = 1
) -> Iterator[dict[str, Any]]:
    """Work off `tasks`; yields each answer as it comes, in any order.

    Args:
        tasks: Each handed to one worker.
        make_worker: Makes a worker, on its actor.
        runtime: Who does the work: from `num_actors` to `max_actors` actors.
        calls_at_once: Tasks that one worker works on at a time, in threads; it has to guard what it shares.

    Raises:
        UmarvelError: What a worker raised first.
    """
    if not tasks:
        return
    if runtime.kind == "local":
        prepare_worker(runtime)
        work = make_worker()
        for task in tasks:
            yield _told(work, task)
        return
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    most = min(max(runtime.num_actors, runtime.max_actors or 0), len(tasks))
    dataset = ray.data.from_items(
        [{"task": pickle.dumps(task)} for task in tasks], override_num_blocks=len(tasks)
    ).map_batches(
        _Shell,
        fn_constructor_args=(make_worker, runtime),
        batch_size=1,
        compute=ActorPoolStrategy(
            min_size=min(runtime.num_actors, len(tasks)),
            max_size=most,
            max_concurrent_calls_per_actor=calls_at_once,
            # Ray grows a pool whose actors have 1.75 tasks per call waiting: fewer could never grow.
            max_tasks_in_flight_per_actor=2 * calls_at_once,
            enable_true_multi_threading=calls_at_once > 1,
        ),
        num_cpus=runtime.cpus,
        num_gpus=runtime.gpus or None,
    )
    for row in dataset.iter_rows():
        answer = pickle.loads(row["answer"])
        if isinstance(answer, UmarvelError):
            raise answer
        yield answer


def run_tasks(
    tasks: Sequence[Any], function: Callable[[Any], Any], runtime: RuntimeSettings
) -> Iterator[Any]:
    """Apply a function without state to each task, on any CPU; yields answers as they come, in any order.

    Raises:
        UmarvelError: What the function raised first.
    """
    if runtime.kind == "local" or not tasks:
        yield from map(function, tasks)
        return
    import ray

    remote = ray.remote(num_cpus=1, max_retries=-1)(_answer_of)
    waiting: list[Any] = []
    rest = iter(tasks)
    # Two for each CPU: none idles, nothing piles up.
    room = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    try:
        while True:
            while len(waiting) < room and (task := next(rest, None)) is not None:
                waiting.append(remote.remote(function, task))
            if not waiting:
                return
            (ready,), waiting = ray.wait(waiting, num_returns=1)
            answer = ray.get(ready)
            if isinstance(answer, UmarvelError):
                raise answer
            yield answer
    finally:
        for task in waiting:
            ray.cancel(task)


def _answer_of(function: Callable[[Any], Any], task: Any) -> Any:
    try:
        return function(task)
    except UmarvelError as error:
        return error


def run_actors(
    tasks: Sequence[Any], make_worker: MakeWorker, runtime: RuntimeSettings
) -> Iterator[dict[str, Any]]:
    """Like `run_pool`, over plain Ray actors: for workers that keep state between tasks.

    Two tasks wait at each actor, so none idles and nothing piles up; an actor that dies is made anew and its
    tasks are repeated.
    """
    if not tasks:
        return
    if runtime.kind == "local":
        yield from run_pool(tasks, make_worker, runtime)
        return
    import ray

    actor_class = ray.remote(
        num_cpus=runtime.cpus, num_gpus=runtime.gpus, max_restarts=-1, max_task_retries=3
    )(_Actor)
    actors = [actor_class.remote(make_worker, runtime) for _ in range(min(runtime.num_actors, len(tasks)))]
    waiting = iter(tasks)
    home_of: dict[Any, Any] = {}

    def hand_out(actor: Any) -> None:
        task = next(waiting, None)
        if task is not None:
            home_of[actor.work.remote(task)] = actor

    for actor in (*actors, *actors):
        hand_out(actor)
    try:
        while home_of:
            (ready,), _ = ray.wait(list(home_of), num_returns=1)
            hand_out(home_of.pop(ready))
            answer = ray.get(ready)
            if isinstance(answer, UmarvelError):
                raise answer
            yield answer
    finally:
        # An actor ends with its last handle, after the task it is at; Ray would tell a kill as a failure.
        for task in home_of:
            ray.cancel(task)
