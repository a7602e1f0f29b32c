"""Score and fuse: reads a reranker and runs, writes P(Yes) of every hit, fused runs and alpha.json.

ray job submit --working-dir . -- python jobs/rerank.py configs/jobs/rerank.yaml alpha=0.5
"""

import sys

from umarvel_ray.cli import main

if __name__ == "__main__":
    main(["rerank", *sys.argv[1:]])
