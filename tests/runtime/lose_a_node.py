"""What `test_training` starts: a stage on two nodes of this machine, one of which is killed on the way.

python lose_a_node.py STAGE.json
"""

import json
import logging
import os
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from umarvel_ray.runtime.cluster import RuntimeSettings, prepare_environment
from umarvel_ray.runtime.training import run_stage
from umarvel_ray.train.settings import StageConfig

KILL_AT = 6
"""Steps done."""


def main() -> None:
    """Train, kill, go on; print with how many workers each step was made."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    prepare_environment()
    stage = StageConfig.model_validate_json(Path(sys.argv[1]).read_text())
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    killed = []

    def on_step(entry: dict) -> None:
        if entry["step"] >= KILL_AT and not killed:
            killed.append(entry["step"])
            cluster.remove_node(nodes[1], allow_graceful=False)

    # A worker takes a whole node; with one node gone, one worker goes on.
    run_stage(stage, RuntimeSettings(num_workers=2, min_workers=1, cpus=2), on_step)
    print(json.dumps({"killed_at": killed}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
