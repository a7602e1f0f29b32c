"""Train one stage: reads pairs and a checkpoint, writes metrics.jsonl and the next checkpoint.

ray job submit --working-dir . -- python jobs/train.py configs/jobs/train.yaml train.num_steps=1000
"""

import sys

from umarvel_ray.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
