"""Embed query sets and pools: reads a checkpoint and M-BEIR, writes one store of Arrow shards per source.

ray job submit --working-dir . -- python jobs/embed.py configs/jobs/embed.yaml rows_per_shard=4096
"""

import sys

from umarvel_ray.cli import main

if __name__ == "__main__":
    main(["embed", *sys.argv[1:]])
