"""Sizes of a model, by hand: a ConvNeXt whose every layer but the head is a convolution."""

from prelora_ray.config import MethodSettings, ModelSettings
from prelora_ray.method.phases import Phase
from prelora_ray.plan.sizes import forward_size, parameters_by_phase

DIMS, DEPTHS, SIDES = (8, 12, 16, 24), (1, 1, 2, 1), (8, 4, 2, 1)
OPTIONS = {"patch_size": 2, "depths": DEPTHS, "dims": DIMS}
MODEL = ModelSettings(name="convnext_atto", image_size=32, options=OPTIONS)


def test_what_layers_put_out():
    """A block's are the depthwise convolution's, four times as many, and as many again. A convolution more begins each
    stage, and one that halves the image is in front of all."""
    stages = sum((1 + 6 * depth) * dim * side**2 for dim, depth, side in zip(DIMS, DEPTHS, SIDES, strict=True))
    assert forward_size(MODEL, 10).outputs == DIMS[0] * 16**2 + stages + 10


def test_parameters_of_each_phase():
    """Adapters of rank 4 on two matrices of d x 4d a block, which with their 5d biases freeze in phase lora."""
    method = MethodSettings(rank_pattern={".*": 4})
    counts = parameters_by_phase(MODEL, method, 10, None)
    full, _ = counts[Phase.FULL]
    blocks = [dim for dim, depth in zip(DIMS, DEPTHS, strict=True) for _ in range(depth)]
    adapters, frozen = (sum(values) for values in zip(*((2 * 4 * 5 * d, 2 * 4 * d * d + 5 * d) for d in blocks), strict=True))
    assert counts[Phase.FULL] == (full, full)
    assert counts[Phase.WARMUP] == (full + adapters, full + adapters)
    assert counts[Phase.LORA] == (full + adapters - frozen, full + adapters)
