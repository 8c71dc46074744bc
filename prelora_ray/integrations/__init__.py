"""PreLoRA in other libraries' training loops (docs/own-loop.md): each module needs the one that it is named after."""

from prelora_ray.torchvision_ops import make_importable

make_importable()  # Lightning and Transformers import torchvision too
