"""Whether drop path is as accurate as a subset as it is as masks: full training, both forms, several rates and seeds.

    python benchmarks/drop_path.py RECIPE STORAGE [--rates 0.1 0.3] [--seeds 0 1 2] [--set train.epochs=60 ...]

STORAGE is where the runs go; one that is there already is resumed, or read where it has ended. Prints each run as a
line of JSON, then the mean and spread of top-1 for each rate and form.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys

from prelora_ray.config_file import load_settings
from prelora_ray.ray_session import ray_session
from prelora_ray.train.run import train

FORMS = ("mask", "subset")


def main(recipe: str, storage: str, rates: list[float], seeds: list[int], overrides: list[str]) -> None:
    top1: dict[tuple[float, str], list[float]] = {(rate, form): [] for rate in rates for form in FORMS}
    results = sys.stdout  # a session of Ray turns standard output to where its own messages go
    with ray_session():
        for seed in seeds:
            for rate, form in top1:
                keys = {"method.enabled": "false", "train.seed": seed, "model.drop_path": rate, "model.drop_path_form": form}
                told = [f"{key}={value}" for key, value in keys.items()]
                result = train(load_settings(recipe, [*overrides, *told], name=f"{form}-{rate}-{seed}", storage=storage))
                top1[rate, form].append(result["val_top1"])
                print(json.dumps({"rate": rate, "form": form, "seed": seed, **result}), file=results, flush=True)
    for (rate, form), values in top1.items():
        spread = statistics.stdev(values) if len(values) > 1 else None
        mean = statistics.mean(values)
        print(json.dumps({"rate": rate, "form": form, "mean_top1": mean, "standard_deviation": spread}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("storage")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.1, 0.3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    main(options.recipe, options.storage, options.rates, options.seeds, options.overrides)
