"""A job script handed to a running cluster, as the README has it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from fixtures_run import TinyRun

from umarvel_ray.artifacts import is_finished
from umarvel_ray.data.mbeir import TASK_BY_NAME, Mbeir
from umarvel_ray.data.sources import local_pool_source, query_source
from umarvel_ray.data.trec import Run
from umarvel_ray.retrieve.store import EmbeddingStore, finish_store, plan_shards, write_shard

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_S = 90


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def environment() -> dict[str, str]:
    """This one with our Python first, and no cluster in it."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return kept | {"PATH": f"{BIN}{os.pathsep}{kept['PATH']}", "RAY_AUTH_MODE": "disabled"}


@pytest.fixture
def cluster() -> Iterator[str]:
    """`ray start --head` in a session of its own; the address of its jobs."""
    home = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: sockets lie in it
    gcs, dashboard, client, agent = free_ports(4)
    process = subprocess.Popen(
        [
            *(str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"),
            *(f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"),
            *(f"--dashboard-agent-listen-port={agent}", "--num-cpus=4", f"--temp-dir={home}"),
            *("--object-store-memory=100000000", "--disable-usage-stats"),
        ],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + START_S
        while not answers(f"{address}/api/jobs/"):
            assert process.poll() is None, "ray start ended"
            assert time.monotonic() < deadline, "the dashboard does not answer"
            time.sleep(0.5)
        yield address
    finally:
        started = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs([psutil.Process(process.pid), *started], timeout=5)
        for one in alive:
            one.kill()
        process.wait()
        shutil.rmtree(home, ignore_errors=True)


def answers(url: str) -> bool:
    """Whether something sensible stands at `url`."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.mark.slow
def test_a_job_script_runs_on_a_running_cluster(tiny: TinyRun, tmp_path, cluster):
    mbeir, task = Mbeir(tiny.root), TASK_BY_NAME["mscoco_task0"]
    rng = np.random.default_rng(0)
    for source in (query_source(mbeir, task, "test"), local_pool_source(mbeir, task, "test")):
        folder, plan = tmp_path / "embeddings" / source.name, plan_shards(len(source), 100)
        records = [source[row] for row in range(len(source))]
        ids = [getattr(record, "qid", None) or record.did for record in records]  # type: ignore[union-attr]
        vectors = rng.standard_normal((len(ids), 8)).astype(np.float32)
        write_shard(folder, plan[0], ids, vectors, dtype="float32", fingerprint="f")
        finish_store(folder, plan, fingerprint="f", settings={})
    config = tmp_path / "search.yaml"
    values = {
        "embeddings": "embeddings",
        "output": "found",
        "root": str(tiny.root),
        "requests": [{"split": "test", "scopes": ["local"], "depth": 1}],
        "tasks": ["mscoco_task0"],
        "query_block_rows": 1,
        "runtime": {"kind": "ray", "num_actors": 2},
    }
    config.write_text(yaml.safe_dump(values))
    submitted = subprocess.run(
        [
            *(str(BIN / "ray"), "job", "submit", f"--address={cluster}", "--working-dir", "."),
            *("--", "python", "jobs/search.py", str(config)),
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "✓ search" in submitted.stdout
    assert is_finished(tmp_path / "found")
    queries = EmbeddingStore.open(tmp_path / "embeddings/queries/test/mscoco_task0")
    pool = EmbeddingStore.open(tmp_path / "embeddings/pools/mscoco_task0_test")
    best = (queries.vectors(0, len(queries)) @ pool.vectors(0, len(pool)).T).argmax(axis=1)
    run = Run.read(tmp_path / "found/test/mscoco_task0.local.arrow")
    assert [dids[0] for dids in run.dids] == [pool.ids[int(row)].as_py() for row in best]
