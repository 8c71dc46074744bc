import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from prelora_ray.config import ModelSettings
from prelora_ray.engine.model import compile_blocks, create_model
from tests.runs import TINY_VIT

TINY = ModelSettings(name="vit_tiny_patch16_224", image_size=8, options=TINY_VIT)


def test_the_model_is_timms_own():
    model = create_model(TINY, num_classes=10, seed=3)
    torch.manual_seed(3)
    plain = timm.create_model("vit_tiny_patch16_224", img_size=8, num_classes=10, **TINY_VIT)
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(model.eval()(images), plain.eval()(images))
    assert not torch.equal(create_model(TINY, 10, seed=4).head.weight, plain.head.weight)


RESAMPLED = [
    ("vit_tiny_patch16_224", {}),
    ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    ("vit_tiny_patch16_224", {"no_embed_class": True, "reg_tokens": 3, "qk_norm": True}),
    ("deit3_small_patch16_224", {}),
    ("deit_tiny_distilled_patch16_224", {}),
]


@pytest.mark.parametrize(("name", "options"), RESAMPLED)
def test_positions_for_a_smaller_image_are_those_that_timm_resamples(name, options):
    """Against a plain model of that size with resampled positions; of its own size it is the plain model to the bit."""
    options = {**TINY_VIT, **options}
    settings = ModelSettings(name=name, image_size=8, options=options)
    model = create_model(settings, 10, seed=3, any_size=True).eval()
    plain = {size: timm.create_model(name, img_size=size, num_classes=10, **options).eval() for size in (8, 6)}
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain[8].state_dict().items()}
    for parameter in model.parameters():  # some heads begin at zero
        torch.nn.init.normal_(parameter, std=0.5)
    weights = model.state_dict()
    grid, prefix = 3, plain[6].pos_embed.shape[1] - 9
    positions = weights["pos_embed"][:, prefix:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    small = F.interpolate(positions, (grid, grid), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    plain[8].load_state_dict(weights)
    plain[6].load_state_dict({**weights, "pos_embed": torch.cat([weights["pos_embed"][:, :prefix], small], 1)})
    images = {size: torch.randn(4, 3, size, size) for size in plain}
    assert torch.equal(model(images[8]), plain[8](images[8]))
    torch.testing.assert_close(model(images[6]), plain[6](images[6]))


def test_blocks_stay_whole_for_several_workers(tmp_path):
    """torch would cut what it compiles for DDP where gradients fill a mebibyte."""
    model = create_model(ModelSettings(name="vit_tiny_patch16_224", image_size=32, options={"depth": 2}), 10, 0)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        compile_blocks(model, backend="aot_eager")
        torch._dynamo.utils.counters.clear()
        DistributedDataParallel(model)(torch.randn(2, 3, 32, 32)).sum().backward()
    finally:
        dist.destroy_process_group()
    assert torch._dynamo.utils.counters["aot_autograd"]["total"] == 1
