"""Trains a recipe on the cluster: `ray job submit --working-dir . -- python jobs/train.py CONFIG [OPTIONS]`.

Takes what `prelora train` takes. A job that is submitted again under the same name resumes its run.
"""

import sys

from prelora_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
