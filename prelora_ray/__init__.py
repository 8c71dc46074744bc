"""PreLoRA pre-training of Vision Transformers on Ray.

`PreLoRA` is the method for any training loop; it imports no Ray. The functions do what the commands do.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

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


class _FrontDoor(ModuleType):
    """`prelora_ray.train` stays the function when Python sets it to the package of that name, whose modules are
    imported by their full names."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _FrontDoor
