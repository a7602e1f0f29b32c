"""Mine hard negatives: reads runs of the training queries, writes negatives.arrow and mining_report.json.

ray job submit --working-dir . -- python jobs/mine.py configs/jobs/mine.yaml mining.depth=200
"""

import sys

from umarvel_ray.cli import main

if __name__ == "__main__":
    main(["mine", *sys.argv[1:]])
