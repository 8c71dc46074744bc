"""What a model's card says of a run that has recorded little."""

from __future__ import annotations

import pytest
from torch import nn

from prelora_ray.config_file import parse_settings
from prelora_ray.inference.card import write_cards
from prelora_ray.inference.load import Preprocessing, RunModel
from prelora_ray.records import EpochLine
from prelora_ray.run_folder import RunFolder
from tests.lines import epoch_line


@pytest.mark.parametrize(("top1", "row"), [(None, "not validated so far"), (0.75, "75.0% of the run's validation images")])
def test_a_run_that_was_never_validated_is_told_as_that(tmp_path, top1, row):
    """Validation may come every few epochs, and the export before the first."""
    folder = RunFolder(tmp_path / "run")
    folder.write_records(EpochLine, [epoch_line(0, val_top1=top1)])
    settings = parse_settings({"name": "run", "data": {"path": "x"}})
    run = RunModel(nn.Identity(), ("a", "b"), Preprocessing(8, (0.5,), (0.5,), 1.0), None, settings, folder, "00001-000000")
    (tmp_path / "timm").mkdir()
    write_cards(run, tmp_path, {"timm": 0.0}, samples=1)
    card = (tmp_path / "README.md").read_text()
    assert f"| top-1 | {row} |" in card and "| training | 1 epoch of phase full |" in card
