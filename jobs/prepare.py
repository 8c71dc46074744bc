"""Prepares images on the cluster: `ray job submit --working-dir . -- python jobs/prepare.py SOURCE OUT [OPTIONS]`.

Takes what `prelora prepare` takes. A job that is submitted again goes on where the one before was stopped.
"""

import sys

from prelora_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "prepare")
    main()
