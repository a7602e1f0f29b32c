"""What all tests share: an environment that is quiet, offline and small, and one Ray for the whole session.

The environment is set before anything imports torch or Ray, and only where the caller did not set it, so that
plain `pytest` does what `make test` does.
"""

import logging
import os
from collections.abc import Iterator

import pytest

ENVIRONMENT = {
    # Two workers on two cores: more threads each only wait for one another.
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "MPLBACKEND": "Agg",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Ray Train looks after its workers every 2 s by default: half of a tiny run would be waiting.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

pytest_plugins = [
    "fixtures_model",
    "fixtures_backbones",
    "fixtures_run",
    "fixtures_recipe",
    "fixtures_rerank",
]


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray on this machine, started once: 3 s to start, 1 s to stop.

    Eight logical CPUs whatever the machine has: on two, a small actor pool leaves none for its reader and
    both wait for ever. `address="local"` keeps out of any cluster that happens to run here.
    """
    import ray

    ray.init(
        address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    yield
    ray.shutdown()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU; torch is imported only if there are any."""
    gpu_items = [item for item in items if "gpu" in item.keywords]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
