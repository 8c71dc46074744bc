"""A fork ends as the straight run does."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest

from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.fault_tolerance.lock import DriverLock, HeldRunError
from prelora_ray.method.phases import Phase
from prelora_ray.run_folder import RunFolder
from prelora_ray.sweep.fork import fork
from prelora_ray.sweep.map import what_it_means
from prelora_ray.train.checks import settle
from prelora_ray.train.run import train
from tests.disturbed import train_disturbed
from tests.runs import EPOCHS, FREEZE, SWITCH, assert_same_bits, final, last, settings


@pytest.mark.slow
def test_a_fork_ends_with_the_bits_of_the_straight_run(grid, undisturbed):
    """The straight run's on Ray Train alone, without Tune."""
    straight, forked = RunFolder.of(undisturbed(1)), grid.run("like the recipe")
    result = forked.read_json("result.json")
    assert (result["switch_epoch"], result["freeze_epoch"], result["restarts"]) == (SWITCH, FREEZE, 0)
    assert_same_bits(last(forked), last(straight))
    assert forked.read_json("ranks.json") == straight.read_json("ranks.json")
    for own, straight_ones in ((forked.norms(), straight.norms()), (forked.windows(), straight.windows())):
        assert [replace(line, attempt=0) for line in own] == straight_ones
    assert [line.epoch for line in forked.epochs()] == list(range(EPOCHS))


@pytest.mark.slow
def test_a_fork_without_warmup_freezes_where_it_forks(trunk, digits, storage):
    straight, forked = (
        settings(digits, storage, f"{kind}-0", 1, method={"warmup_epochs": 0, "windows": 5}) for kind in ("straight", "fork")
    )
    assert fork(trunk, forked) == 5
    assert train(straight)["freeze_epoch"] == train(forked)["freeze_epoch"] == 5
    assert final(forked).state["phases"]["phase"] == Phase.LORA
    assert_same_bits(final(forked), final(straight))


@pytest.mark.slow
def test_a_fork_that_ends_sooner_has_the_bits_of_the_straight_run(controlled, trunk, digits, storage):
    """A sweep's control; images grow behind the bend too."""
    plan, _ = controlled
    straight = settings(digits, storage, "bent", 1, **bent(5), method={"enabled": False})
    train(straight)
    forked = RunFolder(plan.folder) / "full-3-to-5"
    assert_same_bits(last(forked), final(straight))
    lines, of_trunk = forked.epochs(), trunk.epochs()
    assert [line.epoch for line in lines] == list(range(5))
    assert [line.image_size for line in lines] == [4, 6, 6, 6, 8]
    assert [line.loss for line in lines[:SWITCH]] == [line.loss for line in of_trunk[:SWITCH]]
    assert lines[SWITCH].learning_rate < of_trunk[SWITCH].learning_rate
    assert what_it_means(str(forked), straight.method).image_sizes == [line.image_size for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "epochs", "method", "kill_in"), [("full", 5, {"enabled": False}, SWITCH + 1), ("adapters", 6, {}, SWITCH + 1)]
)
def test_a_fork_that_ends_sooner_and_is_killed_has_them_too(trunk, digits, storage, name, epochs, method, kill_in):
    """In full training, and behind the switch, an epoch in front of the end, so that it comes in time."""
    straight = settings(digits, storage, f"bent-{name}", 1, **bent(epochs), method=method)
    forked = settings(digits, storage, f"bent-fork-{name}", 1, **bent(epochs), method=method, checkpoint={"every_steps": 4})
    assert fork(trunk, forked) == SWITCH
    assert train_disturbed(forked, {kill_in: "worker killed"}).result["restarts"] == 1
    train(straight)
    assert_same_bits(final(forked), final(straight))
    image_sizes = [4, 6, 6, 6, 8] if name == "full" else [4, 6, 6, 6, 6, 8]
    assert [line.image_size for line in RunFolder.of(forked).epochs()] == image_sizes


def bent(epochs: int) -> dict[str, Any]:
    """Settings of a run that ends so much sooner, with a schedule that bends where the trunk's runs switch."""
    return {"train": {"epochs": epochs, "bend": {"after": SWITCH, "of": EPOCHS}}}


def test_a_fork_is_made_once_and_refuses_other_images_as_its_trunk_does(trunk, digits, storage):
    run = settings(digits, storage, "forked", 1)
    folder = RunFolder.of(run)
    assert fork(trunk, run) == SWITCH
    before = {name: folder.read_bytes(name) for name in folder.list_files()}
    assert fork(trunk, run) == SWITCH
    assert {name: folder.read_bytes(name) for name in folder.list_files()} == before
    assert folder.read_json("data.json") == trunk.read_json("data.json")


def test_a_fork_goes_on_with_the_form_of_drop_path_that_its_trunk_settled(trunk, digits, storage):
    """Which an earlier version may have settled otherwise than this one would."""
    masks = RunFolder(shutil.copytree(trunk.path, storage / "masks"))
    masks.write_settings(trunk.read_settings(["model.drop_path_form=mask"]))
    run = settings(digits, storage, "forked-masks", 1, model={"drop_path_form": "auto"})
    assert fork(masks, run) == SWITCH
    begun = RunFolder.of(run).read_settings()
    assert begun.model.drop_path_form == "mask"
    assert settle(run, begun, 0).model.drop_path_form == "mask"
    assert settle(run, None, 0).model.drop_path_form == "subset"


def test_a_folder_that_another_driver_holds_is_not_forked_into(trunk, digits, storage):
    run = settings(digits, storage, "held", 1)
    with DriverLock(RunFolder.of(run)), pytest.raises(HeldRunError, match="held is being trained by process"):
        fork(trunk, run)
    assert RunFolder.of(run).list_files() == {}


def test_what_cannot_fork_is_told(trunk, digits, storage):
    other = settings(digits, storage, "other", 1, train={"weight_decay": 0.3})
    with pytest.raises(ValueError, match=r"train\.weight_decay = 0\.3 is not allowed in a fork: its trunk .* with 0\.05"):
        fork(trunk, other)
    never = settings(digits, storage, "never", 1, method={"tau": 0})
    with pytest.raises(ValueError, match="does not switch with the settings of never"):
        fork(trunk, never)
    full = settings(digits, storage, "full", 1, method={"enabled": False})
    with pytest.raises(ValueError, match=r"method\.enabled = False is not allowed in a fork without train\.bend"):
        fork(trunk, full)
    early = settings(digits, storage, "early", 1, train={"epochs": 5, "bend": {"after": 2, "of": EPOCHS}})
    with pytest.raises(ValueError, match=r"train\.bend\.after = 2 is not allowed in a fork of .*: it must be at least 3"):
        fork(trunk, early)
    lacking = RunFolder(shutil.copytree(trunk.path, storage / "lacking"))
    Checkpoints(lacking).folder.remove_folder(f"{EPOCHS - 1:05d}-000000")
    late = settings(digits, storage, "late", 1, method={"windows": EPOCHS - 1})
    with pytest.raises(ValueError, match=r"has no checkpoint of epoch 6, .*keep_trunk"):
        fork(lacking, late)
