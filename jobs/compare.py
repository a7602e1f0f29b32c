"""Comparison: reads evaluated systems, writes compare.html and compare.json.

ray job submit --working-dir . -- python jobs/compare.py configs/jobs/compare.yaml baseline=1
"""

import sys

from umarvel_ray.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
