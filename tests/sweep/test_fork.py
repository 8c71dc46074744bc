"""A fork ends as the straight run does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.fault_tolerance.lock import DriverLock, HeldRunError
from prelora_ray.method.phases import Phase
from prelora_ray.run_folder import RunFolder
from prelora_ray.sweep.fork import fork
from prelora_ray.train.run import train
from tests.runs import EPOCHS, FREEZE, SWITCH, assert_same_bits, final, settings


def test_a_fork_ends_with_the_bits_of_the_straight_run(trunk, digits, storage, undisturbed):
    run, straight = settings(digits, storage, "forked", 1), undisturbed(1)
    assert fork(trunk, run) == SWITCH
    assert fork(trunk, run) == SWITCH  # the second time does nothing
    assert RunFolder.of(run).read_json("data.json") == trunk.read_json("data.json")  # so that it refuses other images
    result = train(run)
    assert (result["switch_epoch"], result["freeze_epoch"], result["restarts"]) == (SWITCH, FREEZE, 0)
    assert_same_bits(final(run), final(straight))
    ours, theirs = RunFolder.of(run), RunFolder.of(straight)
    assert ours.read_json("ranks.json") == theirs.read_json("ranks.json")
    for own, straight_ones in ((ours.norms(), theirs.norms()), (ours.windows(), theirs.windows())):
        assert [replace(line, attempt=0) for line in own] == straight_ones
    assert [line.epoch for line in ours.epochs()] == list(range(EPOCHS))


def test_a_fork_without_warmup_freezes_where_it_forks(trunk, digits, storage):
    method = {"warmup_epochs": 0}
    forked, straight = (settings(digits, storage, name, 1, method=method) for name in ("forked-0", "straight-0"))
    assert fork(trunk, forked) == SWITCH
    for run in (forked, straight):
        assert train(run)["freeze_epoch"] == SWITCH
    assert final(forked).state["phases"]["phase"] == Phase.LORA
    assert_same_bits(final(forked), final(straight))


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
    Checkpoints(trunk).folder.remove_folder(f"{EPOCHS - 1:05d}-000000")
    late = settings(digits, storage, "late", 1, method={"windows": EPOCHS - 1})
    with pytest.raises(ValueError, match=r"has no checkpoint of epoch 6, .*keep_trunk"):
        fork(trunk, late)
