import pytest
import torch

from prelora_ray.engine.precision import phase_format
from prelora_ray.method.phases import Phase


@pytest.mark.parametrize(
    ("precision", "device", "formats"),
    [
        ("fp8", "cuda", ["bf16", "bf16", "fp8"]),  # of a base that trains, e4m3 would lose what a step changes
        ("bf16", "cuda", ["bf16"] * 3),
        ("auto", "cuda", ["bf16"] * 3),
        ("auto", "cpu", ["fp32"] * 3),
        ("fp64", "cpu", ["fp64"] * 3),
    ],
)
def test_formats_of_full_warmup_and_lora(precision, device, formats):
    assert [phase_format(precision, phase, torch.device(device)) for phase in Phase] == formats
