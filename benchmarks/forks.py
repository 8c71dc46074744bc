"""What a switch costs in accuracy, beside full training that ends sooner: forks of one trunk, each to its end.

    python benchmarks/forks.py TRUNK STORAGE [--after 60] [--ends 75 104] [--no-adapters] [--set method.r_max=32 ...]

TRUNK is the folder of a run of full training that kept its checkpoints (`checkpoint.keep_trunk`). All forks leave it
after the same epoch: one switches there, and for each of `--ends` one goes on in full training, its schedule bent to be
over after so many epochs (`train.bend`). They go to STORAGE; one that is there already is resumed, or read where it has
ended. Prints each run as a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from prelora_ray.ray_session import ray_session
from prelora_ray.run_folder import RunFolder
from prelora_ray.sweep.fork import fork
from prelora_ray.train.run import train


def main(trunk: Path, storage: Path, after: int, ends: list[int], overrides: list[str], *, adapters: bool) -> None:
    results = sys.stdout  # a session of Ray turns standard output to where its own messages go
    of = RunFolder(str(trunk)).read_settings().train.epochs
    forks = (
        {f"{trunk.name}-switch-{after}": ["method.enabled=true", f"method.switch_epoch={after}", *overrides]}
        if adapters
        else {}
    )
    for end in ends:
        forks[f"{trunk.name}-end-{end}"] = [
            "method.enabled=false",
            f"train.epochs={end}",
            f"train.bend={{after: {after}, of: {of}}}",
        ]
    with ray_session():
        for name, keys in forks.items():
            place = [("name", name), ("storage", str(storage))]
            settings = RunFolder(str(trunk)).read_settings([*keys, "checkpoint.keep_trunk=false", *place])
            fork(RunFolder(str(trunk)), settings)
            print(json.dumps({"fork": name, **train(settings)}), file=results, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("trunk", type=Path)
    parser.add_argument("storage", type=Path)
    parser.add_argument("--after", type=int, default=60)
    parser.add_argument("--ends", nargs="*", type=int, default=[])
    parser.add_argument("--no-adapters", dest="adapters", action="store_false", help="full training that ends sooner alone")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    main(options.trunk, options.storage, options.after, options.ends, options.overrides, adapters=options.adapters)
