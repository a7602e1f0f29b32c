"""Connect to Ray, and refuse early what cannot be placed."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveInt

from umarvel_ray.config import Config
from umarvel_ray.errors import ResourceError

_MIN_LOGICAL_CPUS = 8
"""On fewer, an actor pool and its reader wait for each other's CPU for ever; logical CPUs cost nothing."""

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Ray Data hands actors their class through the object store; Ray's core calls that an error each time.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Defaults; what the user set stays."""


class RuntimeSettings(Config):
    """Who does the work."""

    kind: Literal["ray", "local"] = "ray"
    """`local` runs the same functions in this process, one after the other: breakpoints work, no cluster."""
    num_workers: PositiveInt = 1
    """Training workers; the lanes into which a step is cut. `local` plays them all."""
    num_actors: PositiveInt = 1
    """Actors that embed, search and rerank."""
    cpus: PositiveInt = 1
    """CPUs of one worker or actor."""
    gpus: NonNegativeFloat = 0
    """GPUs of one worker or actor; fractions let several share one."""
    threads: PositiveInt = 1
    """Threads of one worker or actor; part of what makes two runs equal to the last bit."""


def prepare_environment() -> None:
    """Set our defaults in this process's environment; workers inherit them."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def connect(settings: RuntimeSettings) -> None:
    """Join the cluster that `RAY_ADDRESS` names (as in a submitted job), or start one on this machine.

    Raises:
        ResourceError: The cluster has fewer CPUs or GPUs than training or a pool needs at once.
    """
    if settings.kind == "local":
        return
    prepare_environment()
    import ray

    if not ray.is_initialized():
        where: dict[str, Any] = {}
        if not os.environ.get("RAY_ADDRESS"):
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # nothing outside this machine can reach it
            # A cluster of this process alone is not preempted, and each training would start a watcher.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            logical_cpus = max(_MIN_LOGICAL_CPUS, os.cpu_count() or 1)
            where = {"address": "local", "num_cpus": logical_cpus, "include_dashboard": False}
        try:
            with _native_messages_hidden():
                ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise ResourceError(
                f"RAY_ADDRESS is {os.environ.get('RAY_ADDRESS')!r}, but no cluster answers there "
                f"({' '.join(str(error).split())[:200]}). "
                "Start one by `ray start --head`, or unset RAY_ADDRESS."
            ) from None
    _require_room(settings, ray.cluster_resources())


@contextmanager
def _native_messages_hidden() -> Iterator[None]:
    """Ray's core announces its log level on stderr, past Python; faults come as exceptions anyway."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _require_room(settings: RuntimeSettings, resources: Mapping[str, float]) -> None:
    most = max(settings.num_workers, settings.num_actors)
    for name, need in (("CPU", most * settings.cpus + 1), ("GPU", most * settings.gpus)):
        have = resources.get(name, 0)
        if need > have:
            raise ResourceError(
                f"the cluster has {have:g} {name}s, the run needs {need:g} at once: "
                f"{settings.num_workers} workers or {settings.num_actors} actors of {settings.cpus} CPUs and "
                f"{settings.gpus:g} GPUs, and one reader. "
                "Lower runtime.num_workers and runtime.num_actors, or add nodes."
            )


def disconnect() -> None:
    """Leave Ray; a cluster that this process started ends."""
    if _is_connected():
        sys.modules["ray"].shutdown()


@contextmanager
def connected(settings: RuntimeSettings) -> Iterator[None]:
    """Ray for the length of a block, see `connect`; nothing more inside another such block and on `local`."""
    found = _is_connected()
    try:
        connect(settings)
        yield
    finally:
        if not found:
            disconnect()


def _is_connected() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def prepare_worker(settings: RuntimeSettings) -> None:
    """Bound this process's compute threads, and hide GPUs that it was not given."""
    if not settings.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    torch.set_num_threads(settings.threads)
