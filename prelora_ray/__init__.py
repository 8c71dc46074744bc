"""PreLoRA pre-training of Vision Transformers on Ray.

`PreLoRA` is the method for any training loop; it imports no Ray.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prelora_ray.engine.prelora import PreLoRA

__version__ = "0.1.0"
__all__ = ["PreLoRA"]


def __getattr__(name: str) -> Any:
    """Imports torch no sooner than it is wanted: the command line starts without it."""
    if name == "PreLoRA":
        from prelora_ray.engine.prelora import PreLoRA

        return PreLoRA
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
