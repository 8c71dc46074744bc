"""What the passes between products in e4m3 take on a GPU, beside what their bytes take at the rate of a copy.

    python benchmarks/passes.py [--rows 50432] [--width 1024] [--sweep]

`--sweep` tries other numbers of values a thread, and, where rows are summed, of rows a program and rows in flight. Rows
are the tokens of a batch, 256 images of 197 by default; the width is the model's. Prints a line of JSON for each, in
microseconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from itertools import product

import torch

from prelora_ray.bench.machine import copy_rate, describe, seconds_per_call
from prelora_ray.kernels import passes, passes_triton

_CALLS = 100


def calls(rows: int, width: int, device: torch.device) -> Iterator[tuple[str, Callable[[], object], int]]:
    """Name, call and bytes for each element of each pass of a block."""
    hidden = 4 * width
    h, dg = (torch.randn(rows, hidden, device=device, dtype=torch.bfloat16) for _ in range(2))
    _, kept = passes.gelu_quantize_both(h, hidden)
    yield "gelu, trained", lambda: passes.gelu_quantize(h), 3 * rows * hidden
    yield "gelu backward, trained", lambda: passes.gelu_quantize_backward(dg, h), 9 * rows * hidden
    yield "gelu, frozen", lambda: passes.gelu_quantize_both(h, hidden), 4 * rows * hidden
    yield "gelu backward, frozen", lambda: passes.gelu_quantize_both_backward(dg, kept), 8 * rows * hidden
    for columns in (width, 3 * width):
        dy = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
        yield f"quantize and sum, {columns}", lambda dy=dy: passes.quantize_and_sum(dy), 3 * rows * columns


def main(rows: int, width: int, *, sweep: bool) -> None:
    device = torch.device("cuda")
    rate, usual = copy_rate(device), passes_triton._warps
    print(json.dumps({**describe(device), "copy_bytes_per_second": rate}))
    choices = product((None, 4, 8, 16, 32), (16, 32, 64), (1, 2, 3)) if sweep else [(None, 32, 2)]
    for given, each, stages in choices:
        passes_triton._warps = lambda block, values_each=16, given=given: usual(block, given or values_each)
        passes_triton._EACH, passes_triton._STAGES = each, stages
        for name, call, count in calls(rows, width, device):
            if not any(word in name for word in ("backward, trained", "sum")) and (each, stages) != (32, 2):
                continue
            call()
            took = seconds_per_call(call, device, _CALLS)
            shape = {"values_each": given, "rows_each": each, "stages": stages}
            print(json.dumps({"pass": name, **shape, "took": round(took * 1e6, 1), "bytes_take": round(count / rate * 1e6, 1)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256 * 197)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    main(options.rows, options.width, sweep=options.sweep)
