"""One training stage under Ray Train, a lane a worker; or all lanes in this process."""

import json
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from umarvel_ray.errors import TrainingError, UmarvelError
from umarvel_ray.runtime.cluster import RuntimeSettings, prepare_worker
from umarvel_ray.storage import Place, at, is_remote
from umarvel_ray.train.checkpoint import latest_step
from umarvel_ray.train.settings import StageConfig

logger = logging.getLogger(__name__)

_RETRIES = 2
"""Workers that die start again from the newest state in the output folder, so often in a row without a newer
state. Ray Train would try again whatever went wrong; our own errors would only come again."""

OnStep = Callable[[dict[str, Any]], None]


def run_stage(config: StageConfig, runtime: RuntimeSettings, on_step: OnStep = lambda entry: None) -> None:
    """Train a stage to its end; calls `on_step` with each new line of its metrics."""
    if runtime.kind == "local":
        from umarvel_ray.train.gather import Lanes
        from umarvel_ray.train.stage import train_stage

        prepare_worker(runtime)
        train_stage(config, Lanes(runtime.num_workers), on_step, how=runtime.strategy)
        return
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    most = runtime.num_workers
    workers = ScalingConfig(
        num_workers=most if runtime.min_workers is None else (runtime.min_workers, most),
        use_gpu=runtime.gpus > 0,
        resources_per_worker={"CPU": runtime.cpus, **({"GPU": runtime.gpus} if runtime.gpus else {})},
    )
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": config.model_dump(), "runtime": runtime.model_dump()},
        scaling_config=workers,
        torch_config=TorchConfig(backend="nccl" if runtime.gpus else "gloo"),
        run_config=RunConfig(name="ray", storage_path=str(_absolute(config.output) / "ray")),
    )
    states = _absolute(config.output) / "states"
    with _Tail(_absolute(config.output) / "metrics.jsonl", on_step):
        failures, reached = 0, latest_step(states)
        while True:
            try:
                _fit(trainer)
                return
            except Exception as error:
                if own := _own_error(error):
                    raise own from error
                step = latest_step(states)
                failures, reached = (failures + 1 if step == reached else 1), step
                logger.warning(
                    "a training worker failed; going on from step %d (%d of %d failures without progress)",
                    step, failures, 1 + _RETRIES,
                )  # fmt: skip
                if failures > _RETRIES:
                    logger.error("%s", error)
                    raise _last_line(error) from error


def _absolute(path: str) -> Place:
    """The same on every node."""
    return at(path if is_remote(path) else Path(path).resolve())


def _fit(trainer: Any) -> None:
    """`trainer.fit()` in a thread: in the main one it takes Ctrl-C for itself, and never gives it back."""
    ended: Future[None] = Future()

    def work() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            ended.set_exception(error)
        else:
            ended.set_result(None)

    threading.Thread(target=work, daemon=True).start()
    ended.result()


def _worker(settings: dict[str, Any]) -> None:
    import torch

    from umarvel_ray.config import build_config
    from umarvel_ray.train.gather import WorkerLanes
    from umarvel_ray.train.stage import train_stage

    runtime = build_config(settings["runtime"], RuntimeSettings)
    prepare_worker(runtime)
    train_stage(
        build_config(settings["config"], StageConfig),
        WorkerLanes(),
        how=runtime.strategy,
        must_save=_preemption_watch(),
    )
    torch.distributed.barrier()


def _preemption_watch() -> Callable[[], bool] | None:
    """True once for each notice that a node of ours will be taken away; None where nobody gives notice.

    All workers ask equally often, and hear the same.
    """
    import ray.train

    ask = getattr(ray.train, "get_preemption_info", None)
    if ask is None or os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") == "0":
        return None
    heard: list[Any] = []

    def must_save() -> bool:
        notice = ask()
        is_new = notice is not None and notice not in heard
        heard.extend([notice] if is_new else [])
        return is_new

    return must_save


def _own_error(error: BaseException) -> UmarvelError | None:
    """What of ours a worker raised, out of Ray's wrapping, so that the user reads one line; else None."""
    seen: BaseException | None = error
    while seen is not None:
        failures = getattr(seen, "worker_failures", None) or {}
        for failure in failures.values():
            inner = getattr(failure, "cause", None) or failure
            if isinstance(inner, UmarvelError):
                return inner
        if isinstance(seen, UmarvelError):
            return seen
        seen = seen.__cause__
    return None


def _last_line(error: BaseException) -> TrainingError:
    lines = [line for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    return TrainingError(
        f"a training worker failed: {last.strip()}. Its trace stands above; the same command goes on from "
        "the newest state."
    )


class _Tail:
    """Follows a metrics file from another thread: workers need no way back to this process."""

    def __init__(self, path: Place, on_step: OnStep) -> None:
        self._path = path
        self._pause_s = 0.3 if isinstance(path, Path) else 10.0
        self._on_step = on_step
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        shown = 0
        while not self._stop.wait(self._pause_s):
            shown = self._show_from(shown)
        self._show_from(shown)

    def _show_from(self, shown: int) -> int:
        if not self._path.exists():
            return shown
        text = self._path.read_text(encoding="utf-8")
        if not (lines := text[: text.rfind("\n") + 1].splitlines()):
            return shown
        newest = json.loads(lines[-1])
        if newest["step"] != shown:
            self._on_step(newest)
        return newest["step"]
