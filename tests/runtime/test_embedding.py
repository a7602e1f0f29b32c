"""What dies while embedding, and where the files lie, changes no byte: real processes, real signals."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import fixtures_embed
import pytest
from fixtures_embed import embed_config, stub_model, write_texts

from umarvel_ray.errors import DataError, ResourceError
from umarvel_ray.retrieve.embed import plan_stores
from umarvel_ray.retrieve.store import EmbeddingStore
from umarvel_ray.runtime.cluster import RuntimeSettings, connect
from umarvel_ray.runtime.embedding import embed_stores

pytestmark = pytest.mark.slow
ROWS = 60
_TESTS = Path(fixtures_embed.__file__).parent
_IMPORTABLE = os.pathsep.join([str(_TESTS.parent), str(_TESTS), os.environ.get("PYTHONPATH", "")])
LOCAL = RuntimeSettings(kind="local")


@pytest.fixture
def by_value(ray_session: None):
    """Ray, whose workers cannot import test files: classes of the fixtures travel whole."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(fixtures_embed)
    yield
    cloudpickle.unregister_pickle_by_value(fixtures_embed)


def content(config: Any) -> dict[str, bytes]:
    folder = Path(config.output)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.arrow"))}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A pool in which every fifth row is a copy, and the shards that one process makes of it."""
    home = tmp_path_factory.mktemp("undisturbed")
    lines = [
        fixtures_embed.candidate_line(f"9:{row}", txt=f"text {row if row % 5 else row // 3}")
        for row in range(ROWS)
    ]
    (home / "pool.jsonl").write_text("".join(lines))
    config = embed_config(home, [home / "pool.jsonl"], home / "out")
    embed_stores(plan_stores(config), stub_model(), config, LOCAL)
    return home, content(config)


def calls(log: Path) -> list[tuple[int, int]]:
    """(process, items) of each call of an encoder."""
    return [(int(pid), int(items)) for pid, _, items in (name.split("-") for name in os.listdir(log))]


def test_an_actor_that_is_killed_costs_only_its_shards(undisturbed, by_value, tmp_path):
    home, expected = undisturbed
    config = embed_config(home, [home / "pool.jsonl"], tmp_path / "out")
    log = tmp_path / "log"
    log.mkdir()
    killed: list[int] = []

    def kill_one(progress: Any) -> None:
        if progress.shards >= 2 and not killed:
            killed.append(calls(log)[0][0])
            os.kill(killed[0], signal.SIGKILL)

    progress = embed_stores(
        plan_stores(config),
        stub_model(delay_s=0.1, log=str(log)),
        config,
        RuntimeSettings(num_actors=2),
        kill_one,
    )
    assert killed and len({pid for pid, _ in calls(log)}) >= 3
    assert content(config) == expected
    assert progress.rows_done == ROWS
    # Two shards were under work in that actor, of three windows at most each; nothing else ran again.
    embedded = EmbeddingStore.open(tmp_path / "out" / "pools" / "pool").counts["embedded"]
    assert embedded <= sum(items for _, items in calls(log)) <= embedded + 2 * 4


def driver(
    config: Any, *, delay_s: float = 0.0, log: str = "", env: dict[str, str] | None = None, **runtime: Any
):
    """A driver in its own process."""
    spec = {
        "config": config.model_dump(mode="json"),
        "runtime": {"num_actors": 2} | runtime,
        "model": {"delay_s": delay_s, "log": log},
    }
    return subprocess.Popen(
        [sys.executable, str(_TESTS / "fixtures_embed.py"), json.dumps(spec)],
        env={**os.environ, "PYTHONPATH": _IMPORTABLE, **(env or {})},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_driver_that_is_killed_goes_on_from_its_shards(undisturbed, tmp_path):
    home, expected = undisturbed
    config = embed_config(home, [home / "pool.jsonl"], tmp_path / "out")
    log = tmp_path / "log"
    log.mkdir()
    folder = tmp_path / "out" / "pools" / "pool"
    first = driver(config, delay_s=0.3, log=str(log))
    try:
        wait_for(lambda: len(list(folder.glob("shard-*.arrow"))) >= 2, first)
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    wait_until_quiet(log)
    finished = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.arrow")}
    assert 2 <= len(finished) < len(expected)
    second = driver(config)
    assert second.wait(timeout=120) == 0
    assert second.stdout is not None
    summary = json.loads(second.stdout.read().splitlines()[-1])
    assert content(config) == expected
    # Shards stand as they were: not one was written again.
    assert finished == {name: (folder / name).stat().st_mtime_ns for name in finished}
    assert summary["rows_found_finished"] == 4 * len(finished)
    assert summary["rows"] == ROWS


def wait_for(what: Any, process: Any, timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def wait_until_quiet(log: Path) -> None:
    """Workers of a driver that was killed notice it within a moment."""
    before = -1
    while before != (now := len(os.listdir(log))):
        before = now
        time.sleep(1.5)


def test_two_runs_on_one_folder_do_not_harm_each_other(undisturbed, by_value, tmp_path):
    home, expected = undisturbed
    config = embed_config(home, [home / "pool.jsonl"], tmp_path / "out")
    other = threading.Thread(
        target=lambda: embed_stores(plan_stores(config), stub_model(delay_s=0.01), config, LOCAL)
    )
    other.start()
    embed_stores(plan_stores(config), stub_model(delay_s=0.01), config, RuntimeSettings(num_actors=2))
    other.join()
    assert content(config) == expected


def test_the_pool_grows_under_load_and_shrinks_after(by_value, tmp_path):
    """Watched through the CPUs that Ray says are free: one actor holds one."""
    import ray

    pool = write_texts(tmp_path / "pool.jsonl", 160)
    config = embed_config(tmp_path, [pool], tmp_path / "out", duplicates="each")
    total = ray.cluster_resources()["CPU"]
    held: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            held.append(total - ray.available_resources().get("CPU", 0))

    watcher = threading.Thread(target=watch)
    watcher.start()
    progress = embed_stores(
        plan_stores(config),
        stub_model(delay_s=0.2),
        config,
        RuntimeSettings(num_actors=1, max_actors=4, readers=1),
    )
    deadline = time.monotonic() + 20
    while held[-1] > 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    stop.set()
    watcher.join()
    assert progress.rows_done == 160
    assert len(progress.workers) >= 3
    assert max(held) >= 3 and held[-1] == 0


def test_more_actors_than_fit_are_refused_in_one_line(ray_session):
    """Eight CPUs: of 99 actors they hold 8, and beside 8 no reader."""
    for num_actors, said in ((99, r"room for 8 of 99"), (8, r"needs 9 CPUs: 8 times 1 CPUs, and a reader")):
        with pytest.raises(ResourceError, match=said) as refused:
            connect(RuntimeSettings(num_actors=num_actors))
        assert "\n" not in str(refused.value)
    connect(RuntimeSettings(num_actors=7, max_actors=99))


def test_encoders_that_hold_every_cpu_read_for_themselves(by_value, tmp_path, monkeypatch):
    """Two actors of four of the eight CPUs leave none for readers: both would wait for ever."""
    from umarvel_ray.runtime import embedding

    monkeypatch.setattr(embedding, "_PATIENCE_S", 1.0)
    pool = write_texts(tmp_path / "pool.jsonl", 40)
    config = embed_config(tmp_path, [pool], tmp_path / "out", duplicates="each")
    progress = embed_stores(plan_stores(config), stub_model(), config, RuntimeSettings(num_actors=2, cpus=4))
    assert progress.rows_done == 40


def test_encoders_told_to_read_for_themselves_write_the_same_bytes(undisturbed, by_value, tmp_path):
    home, expected = undisturbed
    config = embed_config(home, [home / "pool.jsonl"], tmp_path / "out")
    embed_stores(plan_stores(config), stub_model(), config, RuntimeSettings(num_actors=2, readers=0))
    assert content(config) == expected


def test_a_bad_row_stops_the_run_on_ray_and_is_named(by_value, tmp_path):
    pool = write_texts(tmp_path / "pool.jsonl", 40)
    with pool.open("a") as file:
        file.write(fixtures_embed.candidate_line("9:40", img_path="none.img"))
    config = embed_config(tmp_path, [pool], tmp_path / "out")
    with pytest.raises(DataError, match=r"pool\.jsonl:41: 9:40 cannot be embedded.*none\.img") as refused:
        embed_stores(plan_stores(config), stub_model(), config, RuntimeSettings(num_actors=2))
    assert "\n" not in str(refused.value)


@pytest.mark.cluster
def test_a_node_that_is_killed_costs_nothing_that_was_finished(undisturbed, tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    home, expected = undisturbed
    config = embed_config(home, [home / "pool.jsonl"], tmp_path / "out")
    log = tmp_path / "log"
    log.mkdir()
    folder = tmp_path / "out" / "pools" / "pool"
    tests = Path(fixtures_embed.__file__).parent
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")]
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=3)
        cluster.wait_for_nodes()
        run = driver(config, delay_s=0.3, log=str(log), env={"RAY_ADDRESS": cluster.address}, num_actors=3)
        wait_for(lambda: len(list(folder.glob("shard-*.arrow"))) >= 2, run)
        finished = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.arrow")}
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=3)
        assert run.wait(timeout=180) == 0
    finally:
        cluster.shutdown()
    assert content(config) == expected
    assert finished == {name: (folder / name).stat().st_mtime_ns for name in finished}


@pytest.fixture
def object_storage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """An empty bucket of an S3 server on this machine; its URI."""
    boto3 = pytest.importorskip("boto3")
    from moto.server import ThreadedMotoServer

    from umarvel_ray import cache, storage

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    storage._filesystem.cache_clear()
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield "s3://bucket"
    storage._filesystem.cache_clear()
    server.stop()


@pytest.mark.cluster
def test_object_storage_gives_the_same_bytes(object_storage, tmp_path):
    """Pool, pictures and output in a bucket, on Ray; a second start finds everything."""
    from umarvel_ray.artifacts import atomic_write
    from umarvel_ray.storage import at

    here, there = tmp_path / "M-BEIR", at(object_storage) / "M-BEIR"
    files = {f"images/{name}.img": f"PICTURE of a {name[0]}".encode() for name in ("kite", "kiosk", "boat")}
    rows = [
        (f"text {row % 7}" if row % 3 else None, list(files)[row % 3] if row % 2 else None)
        for row in range(30)
    ]
    lines = [
        fixtures_embed.candidate_line(f"9:{n}", txt=txt, img_path=img)
        for n, (txt, img) in enumerate(rows)
        if txt or img
    ]
    files["pool.jsonl"] = "".join(lines).encode()
    for root in (here, there):
        for name, data in files.items():
            with atomic_write(root / name, "wb") as file:
                file.write(data)
    local = embed_config(here, [here / "pool.jsonl"], tmp_path / "out", dtype="float16")
    embed_stores(plan_stores(local), stub_model(), local, LOCAL)
    remote = embed_config(there, [there / "pool.jsonl"], f"{object_storage}/out", dtype="float16")
    for found in (0, len(lines)):
        run = driver(remote)
        assert run.wait(timeout=120) == 0
        assert json.loads(run.stdout.read().splitlines()[-1])["rows_found_finished"] == found
    stored = at(object_storage) / "out"
    assert {
        name: (stored / name).read_bytes() for name in stored.files() if name.endswith(".arrow")
    } == content(local)
    one, other = (EmbeddingStore.open(f"{root}/pools/pool") for root in (tmp_path / "out", stored))
    assert one.fingerprint == other.fingerprint
    other.verify()
    assert (one.vectors(0, len(one)) == other.vectors(0, len(other))).all()
