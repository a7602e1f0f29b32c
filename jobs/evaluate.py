"""Evaluate: reads runs and qrels, writes results.json.

ray job submit --working-dir . -- python jobs/evaluate.py configs/jobs/evaluate.yaml split=val
"""

import sys

from umarvel_ray.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
