import pytest

from prelora_ray.config import ModelSettings, Settings
from prelora_ray.config_file import parse_settings
from prelora_ray.engine.flops import forward_flops, peak_flops, training_passes
from prelora_ray.method.phases import Phase
from prelora_ray.train.checks import settle


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("Quadro P400", None),
    ],
)
def test_peaks_are_those_of_the_vendors_data_sheets(name, peak):
    assert peak_flops(name) == peak


def test_a_vit_base_takes_35_gflops():
    """17.6 G multiplications and additions (arXiv 2012.12877, table 5), each two operations."""
    assert forward_flops(ModelSettings(name="vit_base_patch16_224"), 1000) == pytest.approx(2 * 17.6e9, rel=0.01)


def test_a_smaller_image_takes_fewer():
    """By hand, ViT-B at 112: the patches' and blocks' products over 50 tokens, and attention's over their pairs."""
    tokens, d = 50, 768
    products = 49 * 768 * d + 12 * tokens * (4 * d * d + 2 * d * 4 * d) + 12 * 2 * tokens**2 * d + 1000 * d
    assert forward_flops(ModelSettings(name="vit_base_patch16_224"), 1000, image_size=112) == 2 * products


def test_what_a_subset_leaves_out_is_not_counted():
    """By hand, ViT-B at 112: half of what its blocks take."""
    tokens, d = 50, 768
    blocks = 12 * tokens * (4 * d * d + 2 * d * 4 * d) + 12 * 2 * tokens**2 * d
    dropped = {"drop_path": 0.5, "drop_path_rule": "uniform", "drop_path_form": "subset"}
    settings = ModelSettings(name="vit_base_patch16_224", image_size=112, **dropped)
    assert forward_flops(settings, 1000) - forward_flops(settings, 1000, cell=16) == 2 * blocks / 2


def test_grey_images_save_two_thirds_of_the_patch_embedding():
    rgb, grey = (
        forward_flops(ModelSettings(name="vit_base_patch16_224", options={"in_chans": channels}), 1000) for channels in (3, 1)
    )
    assert rgb - grey == 2 * 14**2 * 768 * 16**2 * 2


def test_a_frozen_base_saves_one_product_of_three():
    assert [training_passes(phase) for phase in Phase] == [3, 3, 2]


@pytest.mark.parametrize(
    ("asked", "kept", "gpus", "comes_to"),
    [
        ("auto", None, 2, True),
        ("auto", None, 1, False),
        ("auto", "auto", 2, True),
        ("auto", True, 0, True),
        ("auto", False, 2, False),
        (True, None, 0, True),
        (True, False, 0, True),
        (False, True, 2, False),
    ],
)
def test_auto_takes_gpus_that_are_there_and_then_what_the_run_has(asked, kept, gpus, comes_to):
    """`kept`: what the run folder holds of an earlier start of the run, None before the first; two workers at least."""

    def run(gpu: bool | str) -> Settings:
        return parse_settings({"name": "run", "data": {"path": "x"}, "workers": {"min": 2, "max": 2, "gpu": gpu}})

    settled = settle(run(asked), None if kept is None else run(kept), gpus)
    assert settled == run(comes_to)
