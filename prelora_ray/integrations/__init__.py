"""PreLoRA in other libraries' training loops (docs/own-loop.md): a module named after one needs it."""

from prelora_ray.torchvision_ops import make_importable

make_importable()  # Lightning and Transformers import torchvision too
