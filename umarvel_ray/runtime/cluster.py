"""Connect to Ray, and refuse early what cannot be placed."""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, Self

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from umarvel_ray import logs
from umarvel_ray.config import Config
from umarvel_ray.errors import ResourceError
from umarvel_ray.train.settings import StrategySettings

_MIN_LOGICAL_CPUS = 8
"""On fewer, an actor pool and its reader wait for each other's CPU for ever; logical CPUs cost nothing."""

_LOOK_EVERY_S = 5.0
_TELL_EVERY_S = 60.0
Say = Callable[[str], None]


def _say_nothing(text: str) -> None:
    """For who does not want to hear."""


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
    min_workers: PositiveInt | None = None
    """A training goes on with as few while nodes are away, and grows again to `num_workers`; by default it
    waits for all. The global batches stay the same."""
    strategy: StrategySettings = StrategySettings()
    """How a training lies on its workers."""
    num_actors: PositiveInt = 1
    """Actors that embed, search and rerank."""
    max_actors: PositiveInt | None = None
    """Up to which a pool that embeds or re-ranks may grow while there is work and the cluster has room; it
    shrinks to `num_actors` when there is less. None: it stays at `num_actors`."""
    readers: NonNegativeInt = 2
    """Windows read ahead for each shard under work, on any CPU of the cluster. 0: an encoder reads for
    itself, which is quicker where it computes on the CPU that readers would take."""
    cpus: PositiveInt = 1
    """CPUs of one worker or actor."""
    gpus: NonNegativeFloat = 0
    """GPUs of one worker or actor; fractions let several share one."""
    threads: PositiveInt = 1
    """Threads of one worker or actor; part of what makes two runs equal to the last bit."""
    wait_for_nodes_s: NonNegativeFloat = 0
    """How long to wait for machines that a cluster has yet to bring; what does not fit is refused at once by
    default."""

    @model_validator(mode="after")
    def _workers_fit_the_strategy(self) -> Self:
        kind = self.strategy.kind
        if self.kind == "local" and kind != "ddp":
            raise ValueError(
                f"runtime.kind local plays all workers in one process, which {kind} cannot: use ddp, or ray"
            )
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers is {self.min_workers}, more than num_workers ({self.num_workers}): lower it"
            )
        if self.min_workers is not None and kind == "deepspeed":
            raise ValueError(
                f"deepspeed (ZeRO-{self.strategy.zero_stage}) is made for a fixed number of workers: leave "
                "min_workers out, or use ddp or fsdp2"
            )
        return self


def prepare_environment() -> None:
    """Set our defaults in this process's environment; workers inherit them."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def connect(settings: RuntimeSettings, say: Say = _say_nothing) -> None:
    """Join the cluster that `RAY_ADDRESS` names (as in a submitted job), or start one on this machine.

    Args:
        settings: What is to be placed.
        say: Told what is waited for.

    Raises:
        ResourceError: Nodes for what training or a pool needs at once are not there, and do not come.
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
            if variables := logs.for_workers():
                where["runtime_env"] = {"env_vars": variables}
            with _native_messages_hidden():
                ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise ResourceError(
                f"RAY_ADDRESS is {os.environ.get('RAY_ADDRESS')!r}, but no cluster answers there "
                f"({' '.join(str(error).split())[:200]}). "
                "Start one by `ray start --head`, or unset RAY_ADDRESS."
            ) from None
    wait_for_room(settings, say)


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


def wait_for_room(
    settings: RuntimeSettings, say: Say = _say_nothing, *, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Wait until the nodes that are there can hold what is needed at once.

    Raises:
        ResourceError: They do not come within `wait_for_nodes_s`.
    """
    waited = 0.0
    try:
        while lack := what_lacks(settings, node_resources()):
            if waited >= settings.wait_for_nodes_s:
                raise ResourceError(
                    f"{lack}. Lower runtime.num_workers and runtime.num_actors, or add nodes; where the "
                    "cluster brings them when asked, set runtime.wait_for_nodes_s "
                    f"(it is {settings.wait_for_nodes_s:g})."
                )
            if not waited:
                _ask_for_nodes(settings)
            if waited % _TELL_EVERY_S == 0:
                say(f"waits for nodes: {lack}")
            sleep(_LOOK_EVERY_S)
            waited += _LOOK_EVERY_S
    finally:
        if waited:
            _ask_for_nodes(None)  # what is asked for stays asked for, and would be paid for, after this run


def what_lacks(settings: RuntimeSettings, nodes: Sequence[Mapping[str, float]]) -> str:
    """What keeps a run's workers or actors, and one reader, from being placed; empty where nothing does.

    Args:
        settings: What is to be placed.
        nodes: Resources of each node. A worker or actor stands on one of them, whole.
    """
    need, most = bundle(settings), max(settings.min_workers or settings.num_workers, settings.num_actors)
    place_for = sum(
        int(min(node.get(name, 0) / amount for name, amount in need.items() if amount)) for node in nodes
    )
    cpus, reader = sum(node.get("CPU", 0) for node in nodes), most * settings.cpus + 1
    if place_for >= most and cpus >= reader:
        return ""
    one = " and ".join(f"{amount:g} {name}s" for name, amount in need.items() if amount)
    have = ", ".join(
        f"{sum(node.get(name, 0) for node in nodes):g} {name}s" for name, amount in need.items() if amount
    )
    if place_for >= most:
        return f"the cluster has {have}, the run needs {reader:g} CPUs: {most} times {one}, and a reader"
    return (
        f"the cluster has room for {place_for} of {most} workers or actors of {one} each "
        f"({have} on {len(nodes)} nodes)"
    )


def bundle(settings: RuntimeSettings) -> dict[str, float]:
    """Resources of one worker or actor."""
    return {"CPU": settings.cpus, "GPU": settings.gpus}


def node_resources() -> list[dict[str, float]]:
    """Resources of every node that is alive, in use or not."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _ask_for_nodes(settings: RuntimeSettings | None) -> None:
    """Tell an autoscaler, if there is one, what is needed: it acts on demand, and nothing is placed yet.

    None takes back what was asked for.
    """
    from ray.autoscaler.sdk import request_resources

    if settings is None:
        request_resources(bundles=[])
        return
    most = max(settings.min_workers or settings.num_workers, settings.num_actors)
    need = {name: amount for name, amount in bundle(settings).items() if amount}
    request_resources(bundles=[need] * most + [{"CPU": 1}])


class _Watch:
    """Says what work waits for, when a node is lost while it is on, and that it goes on."""

    def __init__(self, settings: RuntimeSettings, say: Say) -> None:
        self._settings, self._say = settings, say
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="nodes", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(timeout=_LOOK_EVERY_S)  # a cluster that is gone may keep it waiting

    def _work(self) -> None:
        told, silent_s = "", 0.0
        while not self._stop.wait(_LOOK_EVERY_S):
            try:
                lack = what_lacks(self._settings, node_resources())
            except Exception:  # Ray is going away, and the work with it
                return
            silent_s += _LOOK_EVERY_S
            if lack and (lack != told or silent_s >= _TELL_EVERY_S):
                self._say(f"waits for nodes: {lack}")
                silent_s = 0.0
            elif told and not lack:
                self._say("all nodes are there again")
            told = lack


def disconnect() -> None:
    """Leave Ray; a cluster that this process started ends."""
    if _is_connected():
        sys.modules["ray"].shutdown()


@contextmanager
def connected(settings: RuntimeSettings, say: Say = _say_nothing) -> Iterator[None]:
    """Ray for the length of a block, see `connect`; nothing more inside another such block and on `local`."""
    found = _is_connected()
    try:
        connect(settings, say)
        with nullcontext() if found or settings.kind == "local" else _Watch(settings, say):
            yield
    finally:
        if not found:
            disconnect()


def exposures() -> list[str]:
    """What lets strangers run programs on the cluster that this process would use; one line each."""
    found = []
    address = os.environ.get("RAY_ADDRESS", "")
    if address and os.environ.get("RAY_AUTH_MODE", "token") != "token":
        found.append(
            f"RAY_ADDRESS is {address} and RAY_AUTH_MODE is {os.environ['RAY_AUTH_MODE']!r}: whoever reaches "
            "that cluster runs programs as you. Set RAY_AUTH_MODE=token on all of its nodes and here."
        )
    dashboard = os.environ.get("RAY_API_SERVER_ADDRESS") or (
        address if address.startswith("http") else "http://127.0.0.1:8265"
    )
    if _answers_strangers(dashboard):
        found.append(
            f"the dashboard at {dashboard} answers without a token: whoever reaches it runs programs there. "
            "Start the cluster with RAY_AUTH_MODE=token, and forward its port instead of opening it."
        )
    return found


def _answers_strangers(dashboard: str) -> bool:
    import urllib.request

    try:
        with urllib.request.urlopen(f"{dashboard.rstrip('/')}/api/jobs/", timeout=3) as answer:
            return answer.status == 200
    except (OSError, ValueError):
        return False


def _is_connected() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def prepare_worker(settings: RuntimeSettings) -> None:
    """Bound this process's compute threads, and hide GPUs that it was not given."""
    logs.configure()
    if not settings.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    torch.set_num_threads(settings.threads)
