"""What is handed to a running cluster: a job script, a run, another user's run, the same run twice."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from fixtures_recipe import ALL_CONTROLS, require_equal
from fixtures_run import Lines, TinyRun

from umarvel_ray.artifacts import is_finished
from umarvel_ray.data.mbeir import TASK_BY_NAME, Mbeir
from umarvel_ray.data.sources import local_pool_source, query_source
from umarvel_ray.data.trec import Run
from umarvel_ray.pipeline.run import run_recipe
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


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """`ray start --head` in a session of its own; the address of its jobs."""
    home = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: sockets lie in it
    gcs, dashboard, client, agent = free_ports(4)
    process = subprocess.Popen(
        [
            *(str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"),
            *(f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"),
            *(f"--dashboard-agent-listen-port={agent}", "--num-cpus=8", f"--temp-dir={home}"),
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
@pytest.mark.cluster
def test_a_job_script_runs_on_a_running_cluster(tiny: TinyRun, tmp_path, cluster):
    mbeir, task = Mbeir(tiny.root), TASK_BY_NAME["mscoco_task0"]
    rng = np.random.default_rng(0)
    for source in (query_source(mbeir, task, "test"), local_pool_source(mbeir, task, "test")):
        folder, plan = tmp_path / "embeddings" / source.name, plan_shards(len(source), 100)
        records = [source[row] for row in range(len(source))]
        ids = [getattr(record, "qid", None) or record.did for record in records]  # type: ignore[union-attr]
        vectors = rng.standard_normal((len(ids), 8)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
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


class Command:
    """`umarvel` in a process of its own, and what it said."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self._log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "umarvel_ray.cli", *arguments],
                env=environment(),
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )

    @property
    def said(self) -> str:
        """So far."""
        return self._log.read_text()

    def until(self, is_time: Callable[[], bool]) -> None:
        """Wait for a moment of its life."""
        deadline = time.monotonic() + 150
        while not is_time():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def end(self) -> int:
        """Its exit code."""
        return self.process.wait(timeout=240)


@pytest.mark.slow
@pytest.mark.cluster
def test_runs_on_one_cluster_do_not_disturb_each_other(tiny: TinyRun, finished, tmp_path, cluster):
    """A run handed in ends as one made here; meanwhile comes the same run again, a job of another user, and
    someone who starts one into the first one's folder."""
    output, other = tiny.home / "submitted", tmp_path / "other"
    # Most of it is done here: a training alone takes Ray half a minute to start on two cores.
    run_recipe(tiny.settings(output, ALL_CONTROLS), Lines())
    for job in ("train/text", "embed/instruct", "search/instruct", "rerank/reranked", "report"):
        shutil.rmtree(output / job)
    same = ("submit", str(tiny.config), f"output={output}", ALL_CONTROLS, "runtime.kind=ray")
    first = Command(tmp_path / "first.log", *same, f"--address={cluster}")
    first.until(lambda: (output / "train" / "text" / "job.json").exists())

    refused = Command(tmp_path / "refused.log", "run", str(tiny.config), f"output={output}", ALL_CONTROLS)
    assert refused.end() == 2
    assert " works there, since " in refused.said and "umarvel status" in refused.said
    again = Command(tmp_path / "again.log", *same, f"--address={cluster}", "--no-attach")
    assert again.end() == 2 and "this run is on already, as umarvel-run-" in again.said
    config = tmp_path / "embed.yaml"
    settings = {
        "checkpoint": str(tiny.home / "backbone"),
        "root": str(tiny.root),
        "output": str(other),
        "tasks": ["mscoco_task0"],
    }
    config.write_text(yaml.safe_dump(settings))
    stranger = Command(
        tmp_path / "stranger.log",
        *("submit", str(config), "--job", "embed", "--detach", f"--address={cluster}"),
    )
    assert stranger.end() == 0, stranger.said
    status = Command(tmp_path / "status.log", "status", str(output))
    assert status.end() == 0 and "jobs finished" in status.said and "works there, last sign" in status.said

    assert first.end() == 0, first.said
    assert "succeeded" in first.said.splitlines()[-1] and "✓ report" in first.said
    require_equal(output, Path(finished[0].output))
    deadline = time.monotonic() + 150
    while not is_finished(other):
        assert time.monotonic() < deadline, Command(tmp_path / "s.log", "status", str(other)).said
        time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.cluster
def test_an_exit_code_comes_back(tiny: TinyRun, tmp_path, cluster):
    wrong = Command(
        tmp_path / "wrong.log",
        *("submit", str(tiny.config), f"output={tmp_path / 'run'}", "runtime.kind=ray"),
        *(f"backbone={tmp_path / 'nowhere'}", f"--address={cluster}"),
    )
    assert wrong.end() == 2
    assert "no config.json there, so no backbone" in wrong.said
    nowhere = Command(
        tmp_path / "nowhere.log",
        "submit",
        str(tiny.config),
        "runtime.kind=ray",
        "--address=http://127.0.0.1:9",
    )
    assert nowhere.end() == 2
    assert nowhere.said.startswith("umarvel: http://127.0.0.1:9: no job server answers")
