import pytest
import torch

from prelora_ray.engine.precision import check_precision, phase_format
from prelora_ray.errors import UserError
from prelora_ray.method.phases import Phase


@pytest.mark.parametrize(
    ("precision", "fp8_from", "device", "formats"),
    [
        ("fp8", "lora", "cuda", ["bf16", "bf16", "fp8"]),
        ("fp8", "warmup", "cuda", ["bf16", "fp8", "fp8"]),
        ("fp8", "full", "cuda", ["fp8"] * 3),
        ("bf16", "full", "cuda", ["bf16"] * 3),
        ("auto", "full", "cuda", ["bf16"] * 3),
        ("auto", "lora", "cpu", ["fp32"] * 3),
        ("fp64", "lora", "cpu", ["fp64"] * 3),
    ],
)
def test_formats_of_full_warmup_and_lora(precision, fp8_from, device, formats):
    assert [phase_format(precision, Phase(fp8_from), phase, torch.device(device)) for phase in Phase] == formats


def test_a_device_without_products_of_e4m3_is_refused():
    with pytest.raises(
        UserError, match=r"^train\.precision = 'fp8' is not allowed on a CPU: it needs an NVIDIA GPU .*; use bf16$"
    ):
        check_precision("fp8", torch.device("cpu"))
    check_precision("bf16", torch.device("cpu"))
