"""What the number format of phase lora costs in accuracy: one trunk, several seeds, each format to the end.

    python benchmarks/formats.py TRUNK STORAGE [--formats plain merged fp8] [--seeds 0 1 2] [--set method.tau=0.5 ...]

TRUNK is the folder of a run of full training that kept its checkpoints (`checkpoint.keep_trunk`); the runs that fork
from it go to STORAGE. A seed draws the adapters, and the order of the data from the switch on: all formats of one seed
see the same images. Prints each run as a line of JSON, then mean and spread of each format.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml

from prelora_ray.config import Settings
from prelora_ray.ray_session import ray_session
from prelora_ray.run_folder import RunFolder
from prelora_ray.sweep.fork import fork
from prelora_ray.train.run import train

FORMATS: dict[str, dict[str, Any]] = {
    "plain": {"adapters": "plain", "precision": "auto"},
    "merged": {"adapters": "merged", "precision": "auto"},
    "fp8": {"adapters": "merged", "precision": "fp8"},
}


def main(trunk: Path, storage: Path, formats: list[str], seeds: list[int], overrides: list[str]) -> None:
    top1: dict[str, list[float]] = {name: [] for name in formats}
    results = sys.stdout  # a session of Ray turns standard output to where its own messages go
    with ray_session():
        for seed in seeds:
            for name in formats:
                settings = _begin(trunk, storage, name, seed, overrides)
                result = train(settings)
                top1[name].append(result["val_top1"])
                freezes = [line for line in RunFolder.of(settings).read_lines("events.jsonl") if line["event"] == "freeze"]
                told = {"format": name, "seed": seed, "logit_change": freezes[-1]["logit_change"] if freezes else None}
                print(json.dumps({**told, **result}), file=results, flush=True)
    for name, values in top1.items():
        spread = statistics.stdev(values) if len(values) > 1 else None
        print(json.dumps({"format": name, "mean_top1": statistics.mean(values), "standard_deviation": spread}))


def _begin(trunk: Path, storage: Path, name: str, seed: int, overrides: list[str]) -> Settings:
    """A run that stands at its switch, as if `trunk` had been trained with the format and the seed."""
    folder = storage / f"trunk-{name}-{seed}"
    if not folder.exists():
        folder.mkdir(parents=True)
        for file in trunk.glob("*.jsonl"):
            os.symlink(file.resolve(), folder / file.name)
        for name in ("checkpoints", "data.json"):
            os.symlink((trunk / name).resolve(), folder / name)
        content = yaml.safe_load((trunk / "config.yaml").read_text())
        content["train"] |= {"seed": seed, **FORMATS[name]}
        content["checkpoint"]["keep_trunk"] = False
        content["method"]["enabled"] = True
        (folder / "config.yaml").write_text(yaml.safe_dump(content))
    place = [("name", f"{name}-{seed}"), ("storage", str(storage))]
    settings = RunFolder(str(folder)).read_settings([*overrides, *place])
    fork(RunFolder(str(folder)), settings)
    return settings


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("trunk", type=Path)
    parser.add_argument("storage", type=Path)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    main(options.trunk, options.storage, options.formats, options.seeds, options.overrides)
