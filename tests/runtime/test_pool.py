"""A pool answers every task once, whoever does the work, whatever dies; our own errors come as they are."""

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from umarvel_ray.errors import CheckpointError, DataError
from umarvel_ray.runtime.cluster import RuntimeSettings
from umarvel_ray.runtime.pool import run_actors, run_pool

POOLS = [run_pool, run_actors]
LOCAL = RuntimeSettings(kind="local")
RAY = RuntimeSettings(kind="ray", num_actors=2)


class Doubler:
    """Doubles; may refuse a task, die once, or refuse to be made."""

    def __init__(self, *, refuses: int | None = None, dies_at: int | None = None, mark: str = "") -> None:
        if refuses == -1:
            raise CheckpointError("checkpoints/nowhere: nothing to load there.")
        self._refuses, self._dies_at, self._mark = refuses, dies_at, mark

    def __call__(self, task: int) -> dict[str, Any]:
        if task == self._refuses:
            raise DataError(f"queries.jsonl:{task}: not valid JSON. Mend the line.")
        if task == self._dies_at and not os.path.exists(self._mark):
            Path(self._mark).touch()
            os._exit(1)
        return {"task": task, "twice": 2 * task}


@pytest.fixture
def by_value(ray_session: None) -> Iterator[None]:
    """Ray, whose workers cannot import test files: classes of this one travel whole."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def answers(pool: Any, runtime: RuntimeSettings, num_tasks: int = 7, **worker: Any) -> list[tuple[int, int]]:
    found = pool(list(range(num_tasks)), partial(Doubler, **worker), runtime)
    return sorted((answer["task"], answer["twice"]) for answer in found)


TWICE = [(task, 2 * task) for task in range(7)]


@pytest.mark.parametrize("pool", POOLS)
def test_one_process_answers_every_task_once(pool):
    assert answers(pool, LOCAL) == TWICE
    assert answers(pool, LOCAL, num_tasks=0, refuses=-1) == []  # no worker is made for nothing


def test_the_log_hears_of_each_part(caplog):
    with caplog.at_level("INFO", "umarvel_ray.runtime.pool"):
        answers(run_pool, LOCAL, num_tasks=2)
    assert [(record.message, record.shard) for record in caplog.records] == [  # type: ignore[attr-defined]
        ("part done", "0"), ("part done", "1"),
    ]  # fmt: skip


@pytest.mark.parametrize("pool", POOLS)
def test_one_process_raises_what_a_worker_raises(pool):
    with pytest.raises(DataError, match=r"^queries\.jsonl:3: not valid JSON"):
        answers(pool, LOCAL, refuses=3)


@pytest.mark.slow
@pytest.mark.parametrize("pool", POOLS)
def test_actors_answer_every_task_once_though_one_dies(pool, by_value, tmp_path):
    assert answers(pool, RAY, dies_at=4, mark=str(tmp_path / "died")) == TWICE
    assert (tmp_path / "died").exists()
    assert answers(pool, RAY, num_tasks=1) == TWICE[:1]


@pytest.mark.slow
@pytest.mark.parametrize("pool", POOLS)
def test_actors_raise_what_a_worker_raises(pool, by_value):
    with pytest.raises(DataError, match=r"^queries\.jsonl:3: not valid JSON\. Mend the line\.$"):
        answers(pool, RAY, refuses=3)
    with pytest.raises(CheckpointError, match=r"^checkpoints/nowhere: nothing to load there\.$"):
        answers(pool, RAY, refuses=-1)
