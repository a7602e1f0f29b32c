"""Who is joined, what is refused, and that Ray ends with the block that started it."""

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from umarvel_ray.errors import ResourceError
from umarvel_ray.runtime import cluster
from umarvel_ray.runtime.cluster import (
    RuntimeSettings,
    connect,
    connected,
    disconnect,
    exposures,
    prepare_environment,
    wait_for_room,
    what_lacks,
)


class StubRay:
    """Notes with what Ray was started."""

    def __init__(self, *, cpus: float = 8, gpus: float = 0, error: Exception | None = None) -> None:
        self.resources = {"CPU": cpus, "GPU": gpus}
        self.error = error
        self.started_with: list[dict] = []
        self.up = False

    def is_initialized(self) -> bool:
        return self.up

    def init(self, **where: object) -> None:
        if self.error:
            raise self.error
        self.started_with.append(where)
        self.up = True

    def nodes(self) -> list[dict]:
        return [{"Alive": True, "Resources": self.resources}, {"Alive": False, "Resources": {"CPU": 99}}]

    def shutdown(self) -> None:
        self.up = False


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> StubRay:
    stub = StubRay()
    monkeypatch.setitem(__import__("sys").modules, "ray", stub)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return stub


def test_the_cluster_of_a_submitted_job_is_joined(ray, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    connect(RuntimeSettings(num_workers=2))
    [where] = ray.started_with
    assert not {"address", "num_cpus", "include_dashboard"} & set(where)


def test_without_one_a_cluster_starts_here_with_room_for_a_pool_and_its_reader(ray):
    connect(RuntimeSettings(num_workers=2))
    [where] = ray.started_with
    assert where["address"] == "local" and where["num_cpus"] >= 8 and where["include_dashboard"] is False


def test_an_address_where_nobody_answers_is_named(ray, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    ray.error = ConnectionError("ray client\nconnection timeout")
    with pytest.raises(
        ResourceError, match=r"RAY_ADDRESS is '10\.0\.0\.1:6379', but no cluster answers"
    ) as error:
        connect(RuntimeSettings())
    assert "\n" not in str(error.value)


def test_local_starts_nothing(ray):
    with connected(RuntimeSettings(kind="local")):
        pass
    assert ray.started_with == []


def test_ray_lasts_as_long_as_the_outer_block(ray):
    settings = RuntimeSettings()
    with connected(settings):
        with connected(settings):
            assert ray.up
        assert ray.up
    assert not ray.up
    assert len(ray.started_with) == 1
    with connected(settings), pytest.raises(ResourceError):
        ray.resources = {"CPU": 1}
        connect(settings)
    disconnect()
    assert not ray.up


def test_a_refused_block_leaves_no_cluster_behind(ray):
    with pytest.raises(ResourceError), connected(RuntimeSettings(gpus=1)):
        pass
    assert not ray.up


@pytest.mark.parametrize(
    ("settings", "nodes", "said"),
    [
        ({"num_workers": 7}, [{"CPU": 8}], ""),
        ({"num_workers": 7, "gpus": 0.5}, [{"CPU": 8, "GPU": 4}], ""),
        (
            {"num_workers": 8},
            [{"CPU": 8}],
            "the cluster has 8 CPUs, the run needs 9 CPUs: 8 times 1 CPUs, and a reader",
        ),
        (
            {"num_workers": 9},
            [{"CPU": 8}],
            "the cluster has room for 8 of 9 workers or actors of 1 CPUs each (8 CPUs on 1 nodes)",
        ),
        (
            {"num_workers": 2, "gpus": 0.5},
            [{"CPU": 8}],
            "the cluster has room for 0 of 2 workers or actors of 1 CPUs and 0.5 GPUs each "
            "(8 CPUs, 0 GPUs on 1 nodes)",
        ),
        # As many CPUs as are needed, but no worker stands on two nodes.
        (
            {"num_actors": 2, "cpus": 4},
            [{"CPU": 3}, {"CPU": 3}, {"CPU": 4}],
            "the cluster has room for 1 of 2 workers or actors of 4 CPUs each (10 CPUs on 3 nodes)",
        ),
    ],
)
def test_what_cannot_be_placed_is_said(settings, nodes, said):
    assert what_lacks(RuntimeSettings(**settings), nodes) == said


def test_what_does_not_fit_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(cluster, "node_resources", lambda: [{"CPU": 2.0}])
    with pytest.raises(ResourceError, match=r"room for 2 of 3 .*set runtime\.wait_for_nodes_s \(it is 0\)"):
        wait_for_room(RuntimeSettings(num_workers=3), sleep=lambda s: pytest.fail("it waited"))


def test_nodes_that_are_to_come_are_asked_and_waited_for_and_asked_no_longer(monkeypatch):
    nodes: list[dict[str, float]] = []
    asked: list[RuntimeSettings | None] = []
    monkeypatch.setattr(cluster, "node_resources", lambda: nodes)
    monkeypatch.setattr(cluster, "_ask_for_nodes", asked.append)
    slept = 0.0

    def sleep(seconds: float) -> None:
        nonlocal slept
        slept += seconds
        if slept >= 90:
            nodes.append({"CPU": 4.0})

    said: list[str] = []
    settings = RuntimeSettings(num_workers=3, wait_for_nodes_s=600)
    wait_for_room(settings, said.append, sleep=sleep)
    assert asked == [settings, None]
    lack = "the cluster has room for 0 of 3 workers or actors of 1 CPUs each (0 CPUs on 0 nodes)"
    assert said == [f"waits for nodes: {lack}"] * 2  # at the start, and a minute later
    with pytest.raises(ResourceError):
        wait_for_room(RuntimeSettings(num_workers=9, wait_for_nodes_s=60), sleep=lambda seconds: None)
    assert asked[-1] is None


def test_a_node_that_is_lost_meanwhile_is_told(monkeypatch):
    nodes = [{"CPU": 4.0}]
    told: list[str] = []
    there_again = threading.Event()

    def say(text: str) -> None:
        told.append(text)
        if "again" in text:
            there_again.set()
        else:
            nodes.append({"CPU": 4.0})

    monkeypatch.setattr(cluster, "node_resources", lambda: nodes)
    monkeypatch.setattr(cluster, "_LOOK_EVERY_S", 0.01)
    with cluster._Watch(RuntimeSettings(num_workers=3), say):
        nodes.clear()
        assert there_again.wait(10)
    assert told[0].startswith("waits for nodes: the cluster has room for 0 of 3")
    assert told[1:] == ["all nodes are there again"]


@pytest.fixture
def dashboard() -> Iterator[HTTPServer]:
    """Answers like one that asks for no token, or for one."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401 if self.server.asks else 200)  # type: ignore[attr-defined]
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.asks = False  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_dashboard_without_a_token_is_warned_of(dashboard, monkeypatch):
    address = f"http://127.0.0.1:{dashboard.server_port}"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    [warning] = exposures()
    assert warning.startswith(f"the dashboard at {address} answers without a token")
    dashboard.asks = True
    assert exposures() == []


def test_a_cluster_without_authentication_is_warned_of(monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    [warning] = exposures()
    assert warning.startswith("RAY_ADDRESS is 10.0.0.1:6379 and RAY_AUTH_MODE is 'disabled'")
    for mode in ("token", None):
        monkeypatch.delenv("RAY_AUTH_MODE") if mode is None else monkeypatch.setenv("RAY_AUTH_MODE", mode)
        assert exposures() == []


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    prepare_environment()
    assert (os.environ["RAY_USAGE_STATS_ENABLED"], os.environ["HF_HUB_OFFLINE"]) == ("1", "1")
