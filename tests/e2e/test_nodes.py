"""A cluster of three nodes that loses one during each kind of work, and gets another: the same results."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fixtures_recipe import ALL_CONTROLS, require_equal
from fixtures_run import Lines, TinyRun

from umarvel_ray.artifacts import is_finished
from umarvel_ray.pipeline.run import run_recipe

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "umarvel_ray.cli", "run"]
NODE = {"num_cpus": 3, "object_store_memory": 80_000_000}
MOMENTS = [
    # A file that says the job is in the middle; the job; what its processes are called.
    ("train/instruct/states/step-000002/state.json", "train/instruct", "RayTrainWorker"),
    ("embed/instruct/*/*/*/shard-00000.arrow", "embed/instruct", "MapWorker"),
    ("search/instruct/*/.*.parts/queries-*.arrow", "search/instruct", "_Actor"),
    ("rerank/reranked/parts/*/*/00000.arrow", "rerank/reranked", "MapWorker"),
]


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A head without CPUs and three nodes of three; a death is noticed after seconds, not half a minute."""
    from ray.cluster_utils import Cluster

    noticed_soon = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": 80_000_000,
            "include_dashboard": False,
            "_system_config": noticed_soon,
        },
    )
    for _ in range(3):
        cluster.add_node(**NODE)
    yield cluster
    cluster.shutdown()


def busiest(nodes: Any, process_name: str) -> Any:
    """A node on which a process of that name works; None where there is none yet."""
    for node in nodes.worker_nodes:
        raylet = node.all_processes["raylet"][0].process.pid
        try:
            names = [child.cmdline() for child in psutil.Process(raylet).children(recursive=True)]
        except psutil.Error:
            continue
        if any(process_name in " ".join(name) for name in names):
            return node
    return None


@pytest.mark.slow
@pytest.mark.cluster
def test_a_node_lost_during_each_kind_of_work_changes_nothing(tiny: TinyRun, finished, nodes):
    output = tiny.home / "nodes"
    log = output.with_suffix(".log")
    # All but the jobs under test is done here: a training alone takes Ray half a minute on two cores.
    run_recipe(tiny.settings(output, ALL_CONTROLS), Lines())
    for _, job, _ in MOMENTS:
        shutil.rmtree(output / job)
    with log.open("w") as file:
        process = subprocess.Popen(
            [*COMMAND, str(tiny.config), f"output={output}", ALL_CONTROLS, "runtime.kind=ray"],
            env={**os.environ, "RAY_ADDRESS": nodes.address},
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
    try:
        for pattern, job, process_name in MOMENTS:
            deadline = time.monotonic() + 150
            while not any(output.glob(pattern)) or not (lost := busiest(nodes, process_name)):
                assert process.poll() is None, f"ended before {job}:\n{log.read_text()}"
                assert time.monotonic() < deadline, log.read_text()
                assert not is_finished(output / job), f"no node was lost during {job}"
                time.sleep(0.003)
            nodes.remove_node(lost, allow_graceful=False)
            assert not is_finished(output / job), f"lost too late for {job}"
            nodes.add_node(**NODE)
        assert process.wait(timeout=420) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    require_equal(output, Path(finished[0].output))
