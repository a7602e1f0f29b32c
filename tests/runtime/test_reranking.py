"""Whatever dies while a run is scored, each hit is scored exactly once, with the scores of a quiet run.

A lost node is `e2e/test_nodes.py`'s.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from fixtures_rerank import DEPTH, NUM_QUERIES

from umarvel_ray.retrieve.rerank import RerankingWorker, plan_scores, scored_lists
from umarvel_ray.retrieve.scores import Scores
from umarvel_ray.runtime import reranking
from umarvel_ray.runtime.cluster import RuntimeSettings
from umarvel_ray.runtime.reranking import score_lists

LOCAL = RuntimeSettings(kind="local")
RAY = RuntimeSettings(kind="ray", num_actors=2)
DRIVER = """
import json, sys, time
from pathlib import Path
from umarvel_ray.config import build_config
from umarvel_ray.retrieve.settings import RerankConfig
from umarvel_ray.retrieve.rerank import RerankingWorker, scored_lists
from umarvel_ray.runtime import reranking
from umarvel_ray.runtime.cluster import RuntimeSettings, connected

class Slow(RerankingWorker):
    def __call__(self, tasks):
        time.sleep(1.0)
        return super().__call__(tasks)

reranking.RerankingWorker = Slow
config = build_config(json.loads(Path(sys.argv[1]).read_text()), RerankConfig)
settings = RuntimeSettings(kind="ray", num_actors=2)
with connected(settings):
    reranking.score_lists(config, scored_lists(config), settings)
"""


class DiesOnce(RerankingWorker):
    """Killed in the middle of its second part, once in all."""

    def __init__(self, config, *, mark: str) -> None:
        super().__init__(config)
        self._mark = Path(mark)

    def __call__(self, tasks):
        if tasks[0].part.name == "00001.arrow" and not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(tasks)


@pytest.fixture
def by_value(ray_session: None) -> Iterator[None]:
    """Ray, whose workers cannot import test files: classes of this one travel whole."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def quiet(list_files, tmp_path_factory) -> Scores:
    """The scores when nobody dies."""
    config = list_files.config(tmp_path_factory.mktemp("quiet") / "out")
    (scores,) = score_lists(config, scored_lists(config), LOCAL)
    return scores


def require_the_same(scores: Scores, quiet: Scores) -> None:
    assert scores.num_pairs == (NUM_QUERIES - 1) * (DEPTH - 1) + 1
    assert len({(qid, did) for qid, dids, *_ in scores.rows() for did in dids}) == scores.num_pairs
    assert scores.table.equals(quiet.table)


@pytest.mark.slow
def test_a_killed_actor(list_files, tmp_path, by_value, quiet, monkeypatch):
    mark = tmp_path / "died"
    monkeypatch.setattr(reranking, "RerankingWorker", partial(DiesOnce, mark=str(mark)))
    config = list_files.config(tmp_path / "out")
    (scores,) = score_lists(config, scored_lists(config), RAY)
    assert mark.exists()
    require_the_same(scores, quiet)


@pytest.mark.slow
def test_a_killed_driver(list_files, tmp_path, quiet):
    config = list_files.config(tmp_path / "out")
    settings = tmp_path / "config.json"
    settings.write_text(config.model_dump_json())
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(settings)])
    try:
        until = time.monotonic() + 120
        while not list((tmp_path / "out").rglob("parts/**/*.arrow")) and time.monotonic() < until:
            assert driver.poll() is None
            time.sleep(0.05)
    finally:
        driver.kill()
        driver.wait()
    parts, missing = plan_scores(config, scored_lists(config))
    assert 0 < len(missing) < len(parts)
    (scores,) = score_lists(config, scored_lists(config), LOCAL)
    require_the_same(scores, quiet)
