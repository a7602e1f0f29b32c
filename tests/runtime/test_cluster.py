"""Who is joined, what is refused, and that Ray ends with the block that started it."""

import os

import pytest

from umarvel_ray.errors import ResourceError
from umarvel_ray.runtime import cluster
from umarvel_ray.runtime.cluster import RuntimeSettings, connect, connected, disconnect, prepare_environment


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

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

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
    ("settings", "said"),
    [
        (
            {"num_workers": 9},
            "the cluster has 8 CPUs, the run needs 10 at once: 9 workers or 1 actors of 1 CPUs and 0 GPUs, "
            "and one reader. Lower runtime.num_workers and runtime.num_actors, or add nodes.",
        ),
        ({"num_actors": 4, "cpus": 2}, "the cluster has 8 CPUs, the run needs 9 at once: 1 workers or 4 act"),
        ({"num_workers": 2, "gpus": 0.5}, "the cluster has 0 GPUs, the run needs 1 at once"),
    ],
)  # fmt: skip
def test_what_cannot_be_placed_is_refused(settings, said):
    with pytest.raises(ResourceError) as error:
        cluster._require_room(RuntimeSettings(**settings), {"CPU": 8.0})
    assert str(error.value).startswith(said)


def test_what_just_fits_is_not_refused():
    cluster._require_room(RuntimeSettings(num_workers=7, gpus=0.5), {"CPU": 8.0, "GPU": 4.0})


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    prepare_environment()
    assert (os.environ["RAY_USAGE_STATS_ENABLED"], os.environ["HF_HUB_OFFLINE"]) == ("1", "1")
