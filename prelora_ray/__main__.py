"""`python -m prelora_ray` is the command `prelora`."""

import os
import sys

if not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.dirname(os.path.abspath(__file__))):
    del sys.path[0]  # the current folder, which may hold a module with the name of a library

from prelora_ray.cli import main

if __name__ == "__main__":
    main()
