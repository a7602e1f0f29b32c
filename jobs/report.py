"""Report: reads results, curves and mining reports, writes report.html, report.md and report.json.

ray job submit --working-dir . -- python jobs/report.py configs/jobs/report.yaml published=true
"""

import sys

from umarvel_ray.cli import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
