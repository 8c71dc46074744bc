import timm
import torch
import torch.distributed as dist
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
