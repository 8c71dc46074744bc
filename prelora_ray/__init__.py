"""PreLoRA pre-training of Vision Transformers on Ray."""

__version__ = "0.1.0"
