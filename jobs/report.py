"""Writes a report on the cluster: `ray job submit --working-dir . -- python jobs/report.py RUN... [OPTIONS]`.

Takes what `prelora report` takes; give `--out` a place that outlives the job.
"""

import sys

from prelora_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "report")
    main()
