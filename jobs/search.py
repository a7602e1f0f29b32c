"""Search: reads embedding stores, writes one exact top-k run per task, local and global.

ray job submit --working-dir . -- python jobs/search.py configs/jobs/search.yaml requests.0.depth=200
"""

import sys

from umarvel_ray.cli import main

if __name__ == "__main__":
    main(["search", *sys.argv[1:]])
