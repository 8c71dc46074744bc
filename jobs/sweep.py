"""Runs a sweep on the cluster: `ray job submit --working-dir . -- python jobs/sweep.py CONFIG [OPTIONS]`.

Takes what `prelora sweep` takes. A job that is submitted again under the same name goes on with its sweep.
"""

import sys

from prelora_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "sweep")
    main()
