"""The whole recipe: reads settings and data, writes a folder per job and a report; goes on after a kill.

ray job submit --working-dir . -- python jobs/run.py configs/mbeir_qwen2vl_7b.yaml output=/data/runs/again
"""

import sys

from umarvel_ray.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
