from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from prelora_ray.config import Settings, acts, comparable, flat, inner_section, settled_alike, with_absolute_paths
from prelora_ray.config_file import load_settings, parse_section, parse_settings, read_named, set_key
from prelora_ray.engine.check import check_model
from prelora_ray.errors import UserError
from prelora_ray.method.convergence import ConvergenceTest, first_verdict
from prelora_ray.run_folder import RunFolder
from prelora_ray.section import Section
from prelora_ray.sweep.fork import _check_same_trunk
from prelora_ray.sweep.settings import SEARCHABLE, SweepSettings
from prelora_ray.torchvision_ops import make_importable
from prelora_ray.train.checks import _check_unchanged, settle
from prelora_ray.train.no_effect import without_effect

make_importable()

from timm.data import auto_augment  # noqa: E402

CONFIGS = sorted((Path(__file__).parent.parent / "jobs" / "configs").glob("*.yaml"))
DATA = {"data": {"path": "x"}}


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * path.stem.endswith("_paper")) for path in CONFIGS],
)
def test_every_recipe_is_sound(path: Path):
    settings = load_settings(path)
    assert settings.name == path.stem
    assert check_model(settings)
    assert without_effect(settings) == []


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem.startswith("imagenet")], ids=lambda path: path.stem)
def test_recipes_for_clusters_whose_gpus_come_when_asked_for_ask_for_them(path: Path):
    assert load_settings(path).workers.gpu is True
    command = path.read_text().partition("# Data:")[0]
    assert "--storage /mnt/shared/runs" in command  # else each node would write into a folder of its own


def test_the_papers_run():
    """arXiv 2509.21619: ViT-L, 300 epochs on 64 GPUs, three windows of three epochs; in batches of 4096."""
    paper = load_settings(next(path for path in CONFIGS if path.stem == "imagenet_vit_large_paper"))
    assert (paper.train.epochs, paper.data.batch_size, paper.workers.max) == (300, 4096, 64)
    assert (paper.method.windows, paper.method.window_epochs, paper.method.warmup_epochs) == (3, 3, 10)


def steps(*steps: tuple) -> dict:
    """A schedule of (until, image_size) or (until, image_size, policy)."""
    keys = "until", "image_size", "policy"
    return {"train": {"resolution": [dict(zip(keys, step, strict=False)) for step in steps]}}


def bend(epochs: int, after: int, of: int) -> dict:
    return {"train": {"epochs": epochs, "bend": {"after": after, "of": of}}}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"train": {"epoch": 3}}, "train.epoch = 3 is not allowed: there is no such key, did you mean train.epochs?"),
        ({"tau": 1}, "tau = 1 is not allowed: there is no such key, did you mean method.tau?"),
        ({"train": {"epochs": "ten"}}, "train.epochs = 'ten' is not allowed: it must be a valid integer"),
        ({"train": {"epochs": True}}, "train.epochs = True is not allowed: it must be a valid integer"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate = nan is not allowed: it must be a finite number"),
        (
            {"train": {"precision": "fp16"}},
            "train.precision = 'fp16' is not allowed: it must be 'auto', 'fp64', 'fp32', 'bf16' or 'fp8'",
        ),
        (
            {"train": {"fp8_from": "freeze"}},
            "train.fp8_from = 'freeze' is not allowed: it must be 'full', 'warmup' or 'lora'",
        ),
        (
            {"data": {"path": "x", "decoders": "many"}},
            "data.decoders = 'many' is not allowed: it must be a valid integer, or 'auto'",
        ),
        (
            {"data": {"path": "x", "mean": [0.5, 0.4]}},
            "data.mean = [0.5, 0.4] is not allowed: it must be one value for all channels, such as [0.5], or three",
        ),
        ({"data": {"path": "x", "std": [0]}}, "data.std = 0 is not allowed: it must be greater than 0"),
        ({"data": {}}, "data.path is missing: it must be given"),
        ({"data": None}, "data = None is not allowed: it must be a mapping, such as {key: value}"),
        ({"train": {3: 4}}, "train.3 is not allowed as a key: it must be text, between quotes"),
        ({"method": {"rank_pattern": {1: 8}}}, "method.rank_pattern.1 is not allowed as a key: it must be text"),
        (
            {"method": {"rank_pattern": {"a.b": "x"}}},
            "method.rank_pattern.a.b = 'x' is not allowed: it must be a valid integer",
        ),
        ({"train": {"betas": [0.9]}}, "train.betas = [0.9] is not allowed: it has too few entries"),
        ({"train": {"betas": [0.9, 0.9, 0.9]}}, "train.betas = [0.9, 0.9, 0.9] is not allowed: it must be a list of at most 2"),
        ({"train": {"betas": 0.9}}, "train.betas = 0.9 is not allowed: it must be a list, such as [a, b]"),
        ({"train": {"a\nb": 1}}, "train.a b = 1 is not allowed: there is no such key"),
        ({"method": {"r_min": 16, "r_max": 8}}, "method.r_min = 16 is not allowed: it must not exceed r_max = 8"),
        ({"method": {"r_max": 48}}, "method.r_max = 48 is not allowed: a rank is a power of two, such as 8 or 16"),
        ({"method": {"rank_pattern": {"key": 3}}}, "method.rank_pattern.key = 3 is not allowed: a rank is a power of two"),
        ({"method": {"targets": []}}, "method.targets is empty"),
        ({"method": {"windows": 1}}, "method.windows = 1 is not allowed: it must be greater than or equal to 2"),
        ({"method": {"switch_epoch": 5}}, "method.switch_epoch = 5 is not allowed: ranks need two windows"),
        ({"method": {"switch_epoch": 300}}, "method.switch_epoch = 300 is not allowed: it must be below train.epochs = 300"),
        (
            {"train": {"epochs": 8}},
            "train.epochs = 8 is not allowed: the test needs 3 windows of 3 epochs, so at least 9; or set a smaller "
            "method.window_epochs or method.windows, method.switch_epoch to switch without the test, or method.enabled: false",
        ),
        ({"train": {"ramp_epochs": 300}}, "train.ramp_epochs = 300 is not allowed: it must be below train.epochs = 300"),
        (
            {"train": {"epochs": 10, "schedule": "constant-then-decay", "decay_share": 0.8}},
            "train.decay_share = 0.8 is not allowed: it comes to 8 epochs, and 5 are left behind the ramp",
        ),
        (
            {"data": {"path": "x", "batch_size": 100}},
            "data.batch_size = 100 is not allowed: it must be a multiple of data.cell = 16",
        ),
        ({"workers": {"max": 65}}, "workers.max = 65 is not allowed: a batch of 1024 has 64 cells of 16"),
        ({"workers": {"min": 2}}, "workers.min = 2 is not allowed: it must not exceed workers.max = 1"),
        ({"train": {"micro_batch": 20}}, "train.micro_batch = 20 is not allowed: it must be a multiple of data.cell = 16"),
        ({"model": {"name": "hf-hub:timm/vit"}}, "model.name = 'hf-hub:timm/vit' fetches from elsewhere"),
        ({"model": {"options": {"img_size": 32}}}, "model.options.img_size is not allowed: set model.image_size"),
        (
            {"model": {"options": {"in_chans": 2}}},
            "model.options.in_chans = 2 is not allowed: it must be 3, or 1 for grey images",
        ),
        ({"model": {"options": {"in_chans": True}}}, "model.options.in_chans = True is not allowed: it must be 3, or 1"),
        ({"augment": {"policy": "rand-m9;x"}}, "augment.policy = 'rand-m9;x' is not allowed: it must be `3a` or a RandAugment"),
        (
            {"train": {"precision": "fp64", "gradient_exchange": "bf16"}},
            "train.gradient_exchange = 'bf16' is not allowed with train.precision = 'fp64', of which it would leave 8 bits",
        ),
        ({"name": "../up"}, "name = '../up' is not allowed: it must be 1 to 128 letters"),
        (
            bend(60, 60, 120),
            "train.epochs = 60 is not allowed: it must be above train.bend.after = 60 and below train.bend.of = 120",
        ),
        (bend(120, 60, 120), "train.epochs = 120 is not allowed: it must be above train.bend.after = 60 and below"),
        (bend(9, 0, 120), "train.bend.after = 0 is not allowed: it must be greater than or equal to 1"),
        ({"train": {"bend": {"after": 60}}}, "train.bend.of is missing: it must be given"),
        (
            {"train": {"bend": {"after": 60, "off": 9, "of": 120}}},
            "train.bend.off = 9 is not allowed: there is no such key, did you mean train.bend.of?",
        ),
        (
            {"train": bend(9, 2, 12)["train"] | {"ramp_epochs": 12}, "method": {"enabled": False}},
            "train.ramp_epochs = 12 is not allowed: it must be below train.bend.of = 12",
        ),
        (
            {"train": bend(80, 60, 120)["train"] | steps((120, 64))["train"]},
            "train.resolution.until = 120 is not allowed: it comes to 120 epochs, which must be more than 0, where its step "
            "begins, and fewer than train.bend.of = 120",
        ),
        (steps((1.5, 64)), "train.resolution.until = 1.5 is not allowed: it must be a valid integer, or less than 1"),
        (steps((True, 64)), "train.resolution.until = True is not allowed: it must be a valid integer"),
        (steps((300, 64)), "train.resolution.until = 300 is not allowed: it comes to 300 epochs, which must be more than 0"),
        (steps((0.001, 64)), "train.resolution.until = 0.001 is not allowed: it comes to 0 epochs, which must be more than 0"),
        (
            steps((30, 64), (0.1, 128)),
            "train.resolution.until = 0.1 is not allowed: it comes to 30 epochs, which must be more than 30, where its step "
            "begins, and fewer than train.epochs = 300",
        ),
        (steps((9, 256)), "train.resolution.image_size = 256 is not allowed: it must be at most model.image_size = 224"),
        (steps((9, 0)), "train.resolution.image_size = 0 is not allowed: it must be greater than or equal to 1"),
        (steps((9, 64, "rand-q")), "train.resolution.policy = 'rand-q' is not allowed: it must be `3a` or a RandAugment"),
        ({"train": {"resolution": [160]}}, "train.resolution = 160 is not allowed: it must be a mapping"),
        (
            steps((9, 64)) | {"model": {"options": {"dynamic_img_size": False}}},
            "model.options.dynamic_img_size = False is not allowed with train.resolution",
        ),
        (
            {"train": {"resolution": [{"until": 9, "image_size": 64, "polcy": "3a"}]}},
            "train.resolution.polcy = '3a' is not allowed: there is no such key, did you mean train.resolution.policy?",
        ),
    ],
)
def test_refused_in_one_sentence(content, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        parse_settings({"name": "run", **DATA, **content})
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


POLICIES = [
    *("rand", "rand-m9", "rand-m0-n1-p0.5", "rand-m12-mmax15", "rand-mstd0.5-m9-inc1", "rand-m9-mstd101-inc0", "rand-p1.0"),
    *("rand-n9-tweights", "rand-n9-t3aw-m5", "rand-t3a-inc1", "3a"),
]
NO_POLICIES = [
    *(
        "rand-m9.5",
        "rand-m9.5-mstd0.5",
        "rand-mfoo",
        "rand-m",
        "rand-n0",
        "rand-n2.5",
        "rand-m9-mstdx",
        "rand-m9-mstd",
        "rand-m-9",
    ),
    *(
        "rand-p1.5",
        "rand-inc2",
        "rand-mmax0",
        "rand-mstd.5",
        "rand-q3",
        "rand-tfoo",
        "rand-m9x",
        "rand-",
        "rand-m9-",
        "randm9",
        "4a",
    ),
    *("rand-m٣", ""),
]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_that_is_taken_is_timms(policy):
    assert parse_settings({"name": "run", **DATA, "augment": {"policy": policy}}).augment.policy == policy
    make = auto_augment.rand_augment_transform if policy.startswith("rand") else auto_augment.auto_augment_transform
    transform = make(policy, {"img_mean": (1, 1, 1), "translate_const": 5})
    assert transform(Image.new("RGB", (16, 16))).size == (16, 16)


@pytest.mark.parametrize("policy", NO_POLICIES)
def test_a_policy_that_timm_fails_on_or_passes_over_is_refused(policy):
    with pytest.raises(
        ValueError, match=rf"augment\.policy = {policy!r} is not allowed: it must be `3a` or a RandAugment"
    ) as error:
        parse_settings({"name": "run", **DATA, "augment": {"policy": policy}})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        ("data: {path: x}\ndata: {path: y}", [], "key 'data' stands twice"),
        ("data: {path: x}\ntrain: &a {seed: 1}\nmethod: {<<: *a, tau: 1, tau: 2}", [], "key 'tau' stands twice"),
        ("data: &a {path: x, cell: 1, cell: 2}\ntrain: {<<: *a}", [], "key 'cell' stands twice"),
        ("data: {path: x}", ["method.rank_pattern={a: 8, b: 8, a: 4}"], "the value is not YAML: key 'a' stands twice"),
        ("- a", [], "holds no settings"),
        ("a: [", [], "is not YAML"),
        ("data: {path: x}", ["train.epochs"], "write key.path=value"),
        ("data: {path: x}", ["data.path.more=3"], "data.path.more = 3 is not allowed: path is no section"),
        ("data: {path: x}", ["train.epochs=[1"], "the value is not YAML"),
        ("data: {path: x}", ["train.epochs=none"], "train.epochs = 'none' is not allowed"),
    ],
)
def test_files_and_overrides_that_are_refused(tmp_path, text, override, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_settings(path, override)


def test_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {path: x}\ntrain: {learning_rate: 1e-3}")  # which plain YAML reads as text
    settings = load_settings(path, ["train.epochs=20", "method.targets=[fc1, fc2]", "workers.max=2"], name="other")
    assert settings.train.learning_rate == 1e-3
    assert settings.train.epochs == 20
    assert settings.method.targets == ("fc1", "fc2")
    assert (settings.name, settings.workers.max) == ("other", 2)


def test_overrides_leave_what_they_do_not_name(tmp_path):
    """Whether they name a key, a section, or both, in any order; `null` in front makes room."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "data: {path: x}\ntrain: &train {epochs: 30, ramp_epochs: 2}\ncopy: *train\n"
        "model: {options: {depth: 3, patch_size: 2}}\nmethod: {rank_pattern: {a: 8}}\n"
    )
    content = read_named(
        path,
        [
            *("train={epochs: 50, betas: [0.8, 0.9]}", "train.seed=4", "model={options: {depth: 4}, drop_path: 0.1}"),
            *("method.rank_pattern=null", "method.rank_pattern={b: 4}"),
        ],
    )
    assert content["train"] == {"epochs": 50, "ramp_epochs": 2, "betas": [0.8, 0.9], "seed": 4}
    assert content["copy"] == {"epochs": 30, "ramp_epochs": 2}
    assert content["model"] == {"options": {"depth": 4, "patch_size": 2}, "drop_path": 0.1}
    assert content["method"] == {"rank_pattern": {"b": 4}}


def keys_of(section: type[Section], prefix: str = "") -> list[str]:
    """Of a section and those in it, also of the entries of its lists."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if (inner := inner_section(field.annotation)) is not None:
            keys += keys_of(inner, f"{prefix}{name}.")
    return keys


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(0, 10**400),
    st.floats(),
    st.text(max_size=6),
    st.binary(max_size=3),
    st.dates(),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.text(max_size=4), st.integers(), st.booleans()), inner, max_size=3),
        st.sets(st.integers(), max_size=2),
    ),
    max_leaves=6,
)
"""What YAML may hold."""
ANY_SPEED = hypothesis_settings(deadline=None, max_examples=300)
LEAKS = re.compile(
    r"function-|\[key\]|Input should|Value error|instance of|validation|constrained|literal\[|tagged|pydantic|"
    r"(list|dict|tuple|set|union|nullable)\[|unable to|Traceback|Range\b|Settings\b|Section\b"
)


@ANY_SPEED
@given(st.sampled_from(keys_of(Settings)), VALUES)
@example("train.resolution", [{"until": 0.5, "image_size": 3}])
def test_every_refusal_is_a_sentence_of_ours(key, value):
    """Whatever a key is given: no word of pydantic, a line a mistake, each with the key or a rule that names it."""
    content: dict = {"name": "run", "data": {"path": "x"}}
    if key.startswith("train.resolution."):
        step = {"until": 9, "image_size": 64, key.rpartition(".")[2]: value}
        content["train"] = {"resolution": [step]}
    else:
        set_key(content, key, value)
    told_in_our_words(lambda: parse_settings(content), key, value)


@ANY_SPEED
@given(st.sampled_from([*keys_of(SweepSettings), "space.method.tau", "asha.grace_epochs", "settings.0"]), VALUES)
@example("space.method.tau", [2.0])
@example("space.method.tau", {"min": 1})
@example("space.method.tau", {"min": 2, "max": 1})
def test_every_refusal_of_a_sweep_is_a_sentence_of_ours(key, value):
    content: dict = {"name": "sweep", "recipe": "r.yaml", "space": {"method.tau": [1.0]}}
    if key == "space.method.tau":
        content["space"]["method.tau"] = value
    elif key == "settings.0":
        content |= {"space": {}, "settings": [value]}
    else:
        set_key(content, key, value)
    told_in_our_words(lambda: parse_section(SweepSettings, content), key.removesuffix(".0"), value)


def told_in_our_words(parse: Callable[[], object], key: str, value: object) -> None:
    try:
        parse()
    except UserError as error:
        for sentence in str(error).split("\n"):
            said = sentence.replace(repr(value), "")
            assert not LEAKS.search(said), sentence
            assert key.split(".")[-1] in sentence or "must be given" in sentence, sentence


def test_each_mistake_in_a_list_of_steps_has_its_own_sentence():
    with pytest.raises(UserError) as error:
        parse_settings({"name": "run", **DATA, **steps((-1, 64), (2.5, 0))})
    keys = [sentence.split(" is not allowed")[0] for sentence in str(error.value).splitlines()]
    assert keys == [
        *("train.resolution.until = -1", "train.resolution.until = 2.5", "train.resolution.image_size = 0"),
    ]


def test_the_size_of_an_epochs_images():
    """`until` is completed epochs or a share of the run; behind the last step, and in validation, it is the model's."""
    run = parse_settings({"name": "run", **DATA, **steps((2, 64), (0.014, 96), (0.5, 64, "3a"))})
    assert run.train.epochs == 300 and run.train.step_ends == [2, 4, 150]
    assert [run.image_size(epoch) for epoch in (0, 1, 2, 3, 4, 149, 150, 299)] == [64, 64, 96, 96, 64, 64, 224, 224]
    assert parse_settings({"name": "run", **DATA}).image_size(0) == 224


def test_behind_a_bend_a_step_has_the_epochs_that_lie_in_it_as_a_whole():
    """From epoch 60 on each epoch goes through 3 of the schedule: 63 - 66, ..., and the last one begins at 117."""
    train = bend(80, 60, 120)["train"] | steps((30, 64), (0.6, 96), (119, 128))["train"]
    run = parse_settings({"name": "run", **DATA, "train": train})
    assert run.train.step_ends == [30, 64, 79]
    assert [run.image_size(epoch) for epoch in (29, 30, 63, 64, 78, 79)] == [64, 96, 96, 128, 128, 224]
    short = steps((0.7, 64), (0.71, 96))["train"] | bend(80, 60, 120)["train"]  # epochs 84 and 85: none lies in the second
    assert parse_settings({"name": "run", **DATA, "train": short}).train.step_ends == [68, 68]


@pytest.mark.parametrize(
    ("channels", "given", "taken"),
    [
        (3, [0.25, 0.375, 0.875], (0.25, 0.375, 0.875)),
        (3, [0.1307], (0.1307, 0.1307, 0.1307)),
        (1, [0.1307], (0.1307,)),
        (1, [0.25, 0.375, 0.875], (0.5,)),
    ],
)
def test_mean_and_deviation_of_the_channels_that_the_model_takes(channels, given, taken):
    data, model = {"path": "x", "mean": given, "std": given}, {"options": {"in_chans": channels}}
    assert parse_settings({"name": "run", "data": data, "model": model}).normalization == (taken, taken)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("a: &a {x: 1, y: 1}\nb: {<<: *a, y: 2}", {"x": 1, "y": 2}),
        ("a: &a {x: 1, y: 1}\nb: {y: 2, <<: *a}", {"x": 1, "y": 2}),
        ("a: &a {x: 1}\nc: &c {x: 2, z: 3}\nb: {<<: [*a, *c], y: 2}", {"x": 1, "y": 2, "z": 3}),
        ("a: &a {x: 1}\nc: &c {z: 3}\nb: {<<: *a, <<: *c, y: 2}", {"x": 1, "y": 2, "z": 3}),
        ("a: &a {x: 1}\nc: {deep: {er: &c {<<: *a, x: 2}}}\nb: {<<: *c}", {"x": 2}),
    ],
)
def test_merged_keys_give_way_to_a_mappings_own(tmp_path, text, content):
    (tmp_path / "run.yaml").write_text(text)
    assert read_named(tmp_path / "run.yaml")["b"] == content


def test_an_override_changes_one_of_two_that_share_an_anchor(tmp_path):
    (tmp_path / "run.yaml").write_text("a: &a {x: {y: 1}}\nb: *a\nc: {<<: *a}")
    content = read_named(tmp_path / "run.yaml", ["b.x.y=2", "c.x.z=3"])
    assert [content[key] for key in "abc"] == [{"x": {"y": 1}}, {"x": {"y": 2}}, {"x": {"y": 1, "z": 3}}]


def test_every_path_of_a_run_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"storage": "r", "data": {"path": "d", "source": "./digits"}, "model": {"init_from": "m.safetensors"}}
    settings = with_absolute_paths(parse_settings({"name": "run", **given}))
    paths = (settings.storage, settings.data.path, settings.data.source, settings.model.init_from)
    assert paths == tuple(str(tmp_path / name) for name in ("r", "d", "digits", "m.safetensors"))
    words = {"storage": "s3://b/r", "data": {"path": "gs://b/d", "source": "digits"}}
    settings = with_absolute_paths(parse_settings({"name": "run", **words}))
    assert (settings.storage, settings.data.path, settings.data.source) == ("s3://b/r", "gs://b/d", "digits")


def test_settings_without_effect_are_told():
    settings = parse_settings(
        {
            "name": "run",
            **DATA,
            "method": {"rank_pattern": {".*": 8}, "r_max": 32, "targets": ["query", "fc1"]},
            "augment": {"crop": "center", "padding": 2},
            "train": {"precision": "fp32", "residual": "bf16", "gradient_exchange": "bf16"},
            "model": {"drop_path_form": "subset"},
        }
    )
    told = [sentence.split()[0] for sentence in without_effect(settings)]
    trained = ["train.residual", "train.gradient_exchange", "model.drop_path_form"]
    assert told == ["method.r_max", "method.targets", *trained, "augment.padding"]
    full = parse_settings({"name": "run", **DATA, "method": {"enabled": False}, "train": {"adapters": "merged"}})
    assert without_effect(full) == ["train.adapters has no effect, as method.enabled is false"]
    fp8 = parse_settings({"name": "run", **DATA, "method": {"enabled": False}, "train": {"precision": "fp8"}})
    assert without_effect(fp8) == ["train.precision = fp8 has no effect, as method.enabled is false and train.fp8_from is lora"]
    trunk = {"method": {"enabled": False}, "checkpoint": {"keep_trunk": True}}
    fp8_and_plain = {"train": {"precision": "fp8", "adapters": "plain"}}
    assert without_effect(parse_settings({"name": "run", **DATA, **trunk, **fp8_and_plain})) == []
    plain = {"train": {"precision": "fp8", "fp8_from": "warmup", "adapters": "plain"}}
    told = "train.adapters has no effect, as train.precision is fp8 with train.fp8_from warmup"
    assert without_effect(parse_settings({"name": "run", **DATA, **plain})) == [told]
    bf16 = parse_settings({"name": "run", **DATA, "train": {"precision": "bf16", "fp8_from": "full"}})
    assert without_effect(bf16) == ["train.fp8_from has no effect, as train.precision is bf16"]
    cosine = parse_settings({"name": "run", **DATA, "train": {"decay_share": 0.5}})
    assert without_effect(cosine) == ["train.decay_share has no effect, as train.schedule is cosine"]
    floor = parse_settings({"name": "run", **DATA, "method": {"rank_floor_percent": 0.5, "rank_pattern": {".*": 8}}})
    assert without_effect(floor) == ["method.rank_floor_percent has no effect, as method.rank_pattern gives the ranks"]


def test_all_families_of_a_plain_vit_by_name_are_all_that_the_model_has():
    """A run whose config.yaml lists them goes on with a recipe that says nothing."""
    named = {"targets": ["query", "key", "value", "proj", "fc1", "fc2"]}
    of_names, of_all = parse_settings({"name": "run", **DATA, "method": named}), parse_settings({"name": "run", **DATA})
    assert comparable(of_names) == comparable(of_all)
    assert flat(of_names)["method.targets"] == named["targets"]  # as it is recorded
    some = comparable(parse_settings({"name": "run", **DATA, "method": {"targets": ["proj", "fc1"]}}))
    assert some["method.targets"] == ["proj", "fc1"]


def check_same_trunk(trunk: RunFolder, forked: Settings) -> None:
    """As `fork` does it."""
    of_trunk = trunk.read_settings()
    _check_same_trunk(trunk, of_trunk, settled_alike(forked, of_trunk))


def test_the_form_of_drop_path_is_settled_once(tmp_path):
    """By the first driver; later ones go by what it wrote."""
    plain = {"name": "run", **DATA, "model": {"drop_path": 0.1}}
    auto = parse_settings(plain)
    first = settle(auto, None, 0)
    assert first.model.drop_path_form == "subset"
    small = parse_settings({**plain, "data": {"path": "x", "cell": 1}})
    assert settle(small, None, 0).model.drop_path_form == "mask"
    masks = parse_settings({**plain, "model": {"drop_path": 0.1, "drop_path_form": "mask"}})
    assert settle(auto, masks, 0).model.drop_path_form == "mask"
    folder = RunFolder(tmp_path)
    folder.write_settings(masks)
    _check_unchanged(masks, auto, folder)
    check_same_trunk(folder, auto)
    with pytest.raises(UserError, match=r"model\.drop_path_form = 'subset' is not allowed"):
        _check_unchanged(masks, first, folder)


def test_how_drop_path_is_computed_says_nothing_where_there_is_none():
    """A run whose config.yaml has an earlier version's default goes on with a recipe that says nothing."""
    for rate, alike in ((0, True), (0.1, False)):
        default, mask = (
            comparable(parse_settings({"name": "run", **DATA, "model": {"drop_path": rate, **form}}))
            for form in ({}, {"drop_path_form": "mask"})
        )
        assert (default == mask) == alike


@pytest.mark.parametrize(
    ("ramp", "windows", "window_epochs"), [(0, 2, 1), (1, 2, 3), (5, 3, 3), (6, 3, 3), (7, 4, 2), (9, 2, 5)]
)
def test_a_run_that_ends_before_the_tests_first_verdict_is_told(ramp, windows, window_epochs):
    """As the test itself finds over norms that do not change."""
    method = {"windows": windows, "window_epochs": window_epochs}
    test = ConvergenceTest(1.0, 1.0, ramp_epochs=ramp, **method)
    verdicts = [test.end_epoch(epoch, {"blocks.0.attn.query": 1.0}, 1.0) for epoch in range(60)]
    first = next(epoch + 1 for epoch, verdict in enumerate(verdicts) if verdict is not None and verdict.largest is not None)
    for epochs, is_told in ((first, True), (first + 1, False)):
        run = parse_settings({"name": "run", **DATA, "train": {"epochs": epochs, "ramp_epochs": ramp}, "method": method})
        assert first_verdict(windows, window_epochs, ramp) == first
        assert any(sentence.startswith("the run cannot switch: ") for sentence in without_effect(run)) == is_told


CHANGES = {
    "model.drop_path": (0.5, "always"),
    "model.drop_path_form": ("subset", "always"),
    "data.batch_size": (512, "always"),
    "data.path": ("y", "never"),
    "data.decoders": (2, "never"),
    "augment.flip": (0.1, "always"),
    "train.seed": (3, "always"),
    "train.residual": ("bf16", "always"),
    "train.schedule": ("constant-then-decay", "always"),
    "train.gradient_exchange": ("bf16", "always"),
    "train.adapters": ("plain", "switch"),
    "train.micro_batch": (16, "never"),
    "train.resolution": ([{"until": 9, "image_size": 64}], "always"),
    "method.targets": (["fc1"], "always"),
    "method.enabled": (False, "switch"),
    "method.tau": (2.0, "switch"),
    "method.freeze": ("prefix", "switch"),
    "workers.max": (2, "never"),
    "checkpoint.keep": (5, "never"),
    "monitor.port": (9999, "never"),
    "storage": ("elsewhere", "never"),
}
"""Another value of a key, and when it acts."""


@pytest.mark.parametrize("key", CHANGES)
def test_a_resume_and_a_fork_may_change_what_does_not_act_before_them(tmp_path, key):
    value, when = CHANGES[key]
    section, _, name = key.rpartition(".")
    content = {"name": "run", **DATA, "model": {"drop_path": 0.1}}
    before = parse_settings(content)
    now = parse_settings(content | ({section: {**content.get(section, {}), name: value}} if section else {name: value}))
    folder = RunFolder(tmp_path)
    folder.write_settings(before)
    assert acts(key) == when
    for check, is_free in (
        (lambda: _check_unchanged(before, now, folder), when == "never"),
        (lambda: check_same_trunk(folder, now), when != "always"),
    ):
        if is_free:
            check()
        else:
            with pytest.raises(UserError, match=rf"^{re.escape(key)} = .* is not allowed"):
                check()
    assert (key in SEARCHABLE) == (when == "switch" and section == "method" and name != "enabled")


@pytest.mark.parametrize(
    ("trunk", "fork", "refused"),
    [
        (("bf16", "lora"), ("fp8", "lora"), None),
        (("fp8", "lora"), ("bf16", "lora"), None),
        (("bf16", "lora"), ("fp8", "warmup"), None),
        (("fp8", "warmup"), ("fp8", "lora"), None),
        (("fp8", "full"), ("fp8", "full"), None),
        (("bf16", "lora"), ("bf16", "full"), None),
        (("fp32", "lora"), ("fp8", "lora"), "train.precision = 'fp8' is not allowed in a fork"),
        (("bf16", "lora"), ("fp8", "full"), "train.precision = 'fp8' is not allowed in a fork: its trunk .* with 'bf16'"),
        (("fp8", "full"), ("fp8", "lora"), "train.fp8_from = 'lora' is not allowed in a fork: its trunk .* with 'full'"),
        (("fp8", "full"), ("bf16", "lora"), "train.precision = 'bf16' is not allowed in a fork: its trunk .* with 'fp8'"),
        (("fp8", "full"), ("bf16", "full"), "train.precision = 'bf16' is not allowed in a fork: its trunk .* with 'fp8'"),
    ],
)
def test_a_fork_in_fp8_has_a_trunk_that_computes_alike(tmp_path, trunk, fork, refused):
    folder = RunFolder(tmp_path)
    run, forked = (
        parse_settings({"name": "run", **DATA, "train": {"precision": precision, "fp8_from": phase}})
        for precision, phase in (trunk, fork)
    )
    folder.write_settings(run)
    if refused is None:
        check_same_trunk(folder, forked)
    else:
        with pytest.raises(UserError, match=refused):
            check_same_trunk(folder, forked)


@pytest.mark.parametrize(
    ("train", "refused"),
    [
        ({"epochs": 80, "bend": {"after": 60, "of": 120}}, None),
        ({"epochs": 80}, r"^train.epochs = 80 is not .* with 120; it ends sooner with train.bend: {after: EPOCH, of: 120}$"),
        ({"epochs": 130}, r"^train.epochs = 130 is not allowed in a fork: its trunk .* was run with 120$"),
        ({"epochs": 80, "bend": {"after": 60, "of": 110}}, r"^train.bend.of = 110 is not .* with train.epochs = 120$"),
        (
            {"epochs": 80, "bend": {"after": 60, "of": 120}, "ramp_epochs": 7},
            r"^train.ramp_epochs = 7 is not allowed in a fork",
        ),
    ],
)
def test_a_fork_may_end_before_its_trunk_where_its_schedule_says_how(tmp_path, train, refused):
    folder = RunFolder(tmp_path)
    folder.write_settings(parse_settings({"name": "run", **DATA, "train": {"epochs": 120}}))
    forked = parse_settings({"name": "fork", **DATA, "train": train})
    if refused is None:
        check_same_trunk(folder, forked)
    else:
        with pytest.raises(UserError, match=refused):
            check_same_trunk(folder, forked)


def test_a_bend_stays_as_it_was_on_resume(tmp_path):
    folder = RunFolder(tmp_path)
    run = parse_settings({"name": "run", **DATA, **bend(80, 60, 120)})
    folder.write_settings(run)
    _check_unchanged(folder.read_settings(), run, folder)
    for other in (bend(80, 61, 120), {"train": {"epochs": 80}}):
        with pytest.raises(UserError, match=r"^train\.bend"):
            _check_unchanged(run, parse_settings({"name": "run", **DATA, **other}), folder)


def test_every_key_says_when_it_acts():
    keys = flat(parse_settings({"name": "run", **DATA}))
    assert {acts(key) for key in keys} == {"always", "switch", "never"}
    assert acts("model.options.depth") == acts("train.bend.after") == "always"
    assert acts("method.rank_pattern.blocks.3.attn") == "switch"


@pytest.mark.parametrize("key", ["model.drop_path_rule", "augment.crop", "train.precision", "train.fp8_from", "method.freeze"])
def test_the_reference_in_the_docs_spells_the_words_that_a_key_may_be(key):
    """Those that the refusal of another one names."""
    section, name = key.split(".")
    with pytest.raises(UserError) as error:
        parse_settings({"name": "run", **DATA, section: {name: "else"}})
    words = re.findall(r"'(\w+)'", str(error.value).partition("must be")[2])
    rows = (Path(__file__).parent.parent / "docs" / "settings.md").read_text().splitlines()
    (row,) = [row for row in rows if row.startswith(f"| `{key}` |")]
    assert len(words) > 1
    assert row.endswith(f" One of {', '.join(f'`{word}`' for word in words)}. |")


def test_the_reference_in_the_docs_is_up_to_date():
    docs = Path(__file__).parent.parent / "docs"
    reference = runpy.run_path(str(docs / "make_settings.py"))["reference"]
    assert (docs / "settings.md").read_text() == reference(), "run `python docs/make_settings.py`"
