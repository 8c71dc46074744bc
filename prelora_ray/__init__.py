"""PreLoRA pre-training of Vision Transformers on Ray.

`PreLoRA` is the method for any training loop; it imports no Ray. The functions do what the commands do.
"""

from typing import TYPE_CHECKING, Any

import prelora_ray.train  # noqa: F401  # Python names the package at its first import alone: the function comes after
from prelora_ray.api import evaluate, export, load, replay, train

if TYPE_CHECKING:
    from prelora_ray.engine.prelora import PreLoRA

__version__ = "0.1.0"
__all__ = ["PreLoRA", "evaluate", "export", "load", "replay", "train"]


def __getattr__(name: str) -> Any:
    """Imports torch no sooner than it is wanted: the command line starts without it."""
    if name == "PreLoRA":
        from prelora_ray.engine.prelora import PreLoRA

        return PreLoRA
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
