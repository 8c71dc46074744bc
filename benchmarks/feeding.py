"""Seconds that a recipe's stream takes for an epoch where the loop takes none, epoch by epoch of each image size.

    python benchmarks/feeding.py RECIPE [--decoders 14 ...] [--epochs 10] [--set data.path=data/cifar10 ...]

Each number of decoders is measured twice: as they are, and with decoders that keep no pixels for the next epochs. An
epoch's time goes from its first batch to the next epoch's, and what is ready ahead of the loop makes the first one
short. The last line that is printed is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from unittest.mock import patch

import torch

from prelora_ray.bench.machine import describe
from prelora_ray.config import Settings
from prelora_ray.config_file import load_settings
from prelora_ray.data import augment, stream
from prelora_ray.data.batch import Pass, StreamPlan
from prelora_ray.data.manifest import read_manifest
from prelora_ray.ray_session import ray_session
from prelora_ray.storage import Storage
from prelora_ray.train.batch_stream import stream_plan


class KeepsNothing(stream._Decode):
    """Decodes every image in every epoch. It is sent to its process by value, as it is defined in a script."""

    def __init__(self, plan: StreamPlan) -> None:
        augment._KEPT_BYTES = 0
        super().__init__(plan)


def seconds(settings: Settings, epochs: list[int], decoders: int) -> list[float]:
    """Of each epoch but the last, which is left early."""
    plan = stream_plan(settings, read_manifest(Storage(settings.data.path)), rank=0, world_size=1)
    begins = []
    for batch in stream.stream_batches(plan, [Pass("train", epoch) for epoch in epochs], decoders):
        if batch.batch == 0:
            begins.append(time.perf_counter())
            if len(begins) == len(epochs):
                break
    return [end - begin for begin, end in itertools.pairwise(begins)]


def main(recipe: str, overrides: list[str], decoders: list[int], most: int) -> None:
    results = sys.stdout  # a session of Ray turns standard output to where its own messages go
    settings = load_settings(recipe, overrides)
    sizes: dict[int, list[int]] = {}
    for epoch in range(settings.train.epochs):
        sizes.setdefault(settings.image_size(epoch), []).append(epoch)
    rows = []
    with ray_session():
        for count, (size, epochs), decode in itertools.product(decoders, sizes.items(), (KeepsNothing, stream._Decode)):
            with patch.object(stream, "_Decode", decode):
                found = seconds(settings, epochs[: most + 1], count)
            keeps = decode is not KeepsNothing
            rows.append({"decoders": count, "image_size": size, "keeps": keeps, "seconds": [round(each, 2) for each in found]})
    print(json.dumps({"benchmark": "feeding", **describe(torch.device("cpu")), "rows": rows}), file=results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("--decoders", type=int, nargs="+", default=[max(1, (os.cpu_count() or 1) - 1)])
    parser.add_argument("--epochs", type=int, default=10, help="of each image size")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    main(options.recipe, options.overrides, options.decoders, options.epochs)
