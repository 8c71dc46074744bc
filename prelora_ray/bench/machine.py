"""Where a benchmark ran, the two rates that bound any step there, and how its rows are measured and told."""

from __future__ import annotations

import gc
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import Any

import torch

from prelora_ray.engine.precision import has_fp8
from prelora_ray.errors import UserError

logger = logging.getLogger(__name__)

INTERRUPTED = "interrupted"
"""What `failed` says where a user ended a benchmark."""
_PACKAGES = ("torch", "timm", "peft", "transformers", "ray", "numpy", "pyarrow", "pillow", "simplejpeg")


def describe(device: torch.device) -> dict[str, Any]:
    """Date, processor or GPU, and versions."""
    on_gpu = device.type == "cuda"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30 if on_gpu else None,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def usual_size(batch_on_cpu: int) -> dict[str, Any]:
    """Model, image size and batch to measure with: the paper's on a GPU, and on a CPU what takes a minute or two."""
    if torch.cuda.is_available():
        return {"model": "vit_large_patch16_224", "image_size": 224, "batch": 256}
    return {"model": "vit_tiny_patch16_224", "image_size": 64, "batch": batch_on_cpu}


def check_rows(wanted: Sequence[str], names: Sequence[str]) -> None:
    """Raises UserError where one of the wanted beginnings is that of no row's name."""
    for beginning in wanted:
        if not any(name.startswith(beginning) for name in names):
            raise UserError(f"--row {beginning!r} is not allowed: no row's name begins so; there are {'; '.join(names)}")


def measure_rows(rows: Iterable[Any], told: Callable[[Any], str]) -> dict[str, Any]:
    """`rows`, as JSON can hold them, and `failed`, which says what ended them before the last one, or is None.

    Each row is a dataclass with a name, logged as soon as it is kept, with what `told` says of it.
    """
    content: list[dict[str, Any]] = []
    failed = None
    try:
        for row in rows:
            content.append(vars(row))
            logger.info("%s: %s", row.name, told(row))
    except RuntimeError as error:  # after a device fault this process cannot use it any more; what was measured counts
        logger.debug("", exc_info=True)
        failed = next(iter(str(error).splitlines()), type(error).__name__)
    except KeyboardInterrupt:
        failed = INTERRUPTED
    return {"rows": content, "failed": failed}


def missing_fp8(device: torch.device, *names: str) -> dict[str, str]:
    """Why rows in e4m3 are not measured, by their names; empty on a GPU that has it."""
    return {} if has_fp8(device) else dict.fromkeys(names, "needs a GPU with products of e4m3")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Gives back the memory of what went before, and counts the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def cpu_time_of(call: Callable[[], object]) -> float:
    """Seconds of processor time of a call, which depend little on what else the machine does."""
    start = time.process_time()
    call()
    return time.process_time() - start


def seconds_per_call(call: Callable[[], object], device: torch.device, calls: int, rounds: int = 5) -> float:
    """Wall-clock seconds of a call, in the median of rounds of `calls`, the device's work included."""
    took = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        took.append((time.perf_counter() - start) / calls)
    return statistics.median(took)


def matrix_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations a second of a large matrix product of random numbers."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds_per_call(lambda: a @ b, device, 10)


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a large copy on the device, those read and those written counted."""
    size = 2**30 if device.type == "cuda" else 2**24
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / seconds_per_call(lambda: target.copy_(source), device, 10)
