"""The search space: refused in one line, suggested in order, and every trial has valid settings."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_cxr.config import TrainSettings
from ray_cxr.errors import ConfigError
from ray_cxr.tuning import space as module
from ray_cxr.tuning.space import KNOWN, Space, default_space

BASE = TrainSettings()
SIZES = (224, 320)

#: Every kind of parameter, with one condition of each kind.
FULL = """
learning_rate = { low = 1e-5, high = 3e-3, log = true }
backbone = ["ResNet50", "DenseNet121", "TinyCNN"]
size = "prepared"
dropout = { low = 0.0, high = 0.5, step = 0.1 }
batch_size = [16, 32, 64]
optimizer = ["adam", "adamw", "sgd"]
ema = ["none", 0.99, 0.999]
weights = ["none", "imagenet"]
plateau_patience = { low = 1, high = 9, step = 2 }
frozen_epochs = { low = 1, high = 8, log = true }
warmup_epochs = { low = 0, high = 2 }
flip = [true, false]
[when."optimizer=sgd"]
momentum = { low = 0.5, high = 0.99 }
[when."optimizer=adam|adamw"]
clip_norm = { low = 0.1, high = 10, log = true }
[when."backbone=ResNet50"]
dense = [[], [256], [512, 256]]
rotation = { low = 0, high = 10 }
[when."backbone=TinyCNN|DenseNet121"]
rotation = { low = 0, high = 5 }
[when."ema=none"]
zoom = { low = 0, high = 0.1 }
"""


def read(text: str, base: TrainSettings = BASE, sizes: Sequence[int] = SIZES) -> Space:
    return Space.read(tomllib.loads(text), base, sizes)


def refuse(text: str, base: TrainSettings = BASE, sizes: Sequence[int] = SIZES) -> str:
    """Return the one line with which a table is refused."""
    with pytest.raises(ConfigError) as caught:
        read(text, base, sizes)
    message = str(caught.value)
    assert message.splitlines() == [message]
    return message


def new_study() -> optuna.Study:
    return optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))


def draw(space: Space, count: int) -> list[dict[str, Any]]:
    """Return the Optuna values of `count` random trials."""
    study = new_study()
    trials = [study.ask() for _ in range(count)]
    for trial in trials:
        space.suggest(trial)
    return [trial.params for trial in trials]


def test_names_fields_and_choices() -> None:
    space = read(FULL)
    always = "backbone learning_rate size dropout batch_size optimizer ema weights plateau_patience frozen_epochs"
    always += " warmup_epochs flip momentum clip_norm dense"
    assert space.names == (*always.split(), "rotation@ResNet50", "rotation@DenseNet121|TinyCNN", "zoom")
    assert space.fields == (*always.split(), "rotation", "zoom")
    assert space.categorical == ("backbone", "size", "batch_size", "optimizer", "ema", "weights", "flip", "dense")
    assert space.backbones == ("ResNet50", "DenseNet121", "TinyCNN")
    assert space.conditional
    small = read("momentum = [0, 0.9]", TrainSettings(backbone="TinyCNN", optimizer="sgd"))
    assert small.names == small.fields == small.categorical == ("momentum",)
    assert small.backbones == ("TinyCNN",)
    assert not small.conditional
    once = 'backbone = ["ResNet50", "TinyCNN"]\n[when."backbone = TinyCNN"]\ndropout = [0.1, 0.2]'
    assert read(once).names == ("backbone", "dropout")


def test_names_have_no_slash_and_differ() -> None:
    text = 'weights = ["runs/a", "runs%2Fa", "runs/b"]\n'
    for dropout, weights in enumerate(("runs/a", "runs%2Fa", "runs/b"), 1):
        text += f'[when."weights={weights}"]\ndropout = [0.{dropout}]\n'
    assert read(text).names == ("weights", "dropout@runs%2Fa", "dropout@runs%252Fa", "dropout@runs%2Fb")


#: A table, the key that the message names first, and what else it names.
REFUSED: list[tuple[str, ...]] = [
    # What is searched
    ("droput = [0.1]", ".droput", "'dropout'"),
    ('"drop\\nout" = [0.1]', ".drop out", "'dropout'"),
    ("[when]", ""),
    # Choices
    ("dropout = 0.3", ".dropout", "[train]"),
    ("dropout = []", ".dropout", "empty"),
    ("dropout = [0, 0.0]", ".dropout.1", "0.0"),
    ("dense = [[8], [8]]", ".dense.1", "[8]"),
    ("dropout = [0.1, 1.0]", ".dropout.1", "1.0"),
    ("dense = [512, 256]", ".dense.0", "512", "dense = [[], [256]]"),
    ("dense = [[], [0]]", ".dense.1.0", "0"),
    (f"frozen_epochs = [1, {2**53 + 1}]", ".frozen_epochs.1", str(2**53)),
    ("frozen_epochs = [1, 0x" + "f" * 5000 + "]", ".frozen_epochs.1"),
    # Ranges
    ("dropout = { low = 0 }", ".dropout", "low", "high"),
    ("dropout = { low = 0.5, high = 0.1 }", ".dropout", "0.5", "0.1"),
    ("dropout = { low = 0, hihg = 0.1 }", ".dropout", "'hihg'", "'high'"),
    ("dropout = { low = 0, high = 1 }", ".dropout.high", "1"),
    ("dropout = { low = nan, high = 0.5 }", ".dropout.low"),
    ("warmup_epochs = { low = 0, high = inf }", ".warmup_epochs.high", "inf"),
    ('dropout = { low = "0", high = 0.5 }', ".dropout.low", "'0'"),
    ("dropout = { low = false, high = 0.5 }", ".dropout.low", "False"),
    ("dropout = { low = 0, high = 0.5, step = true }", ".dropout.step", "True"),
    ("dropout = { low = 0, high = 0.5, step = 0 }", ".dropout.step", "0"),
    ("dropout = { low = 0, high = 0.5, step = nan }", ".dropout.step", "nan"),
    ("dropout = { low = 0, high = 0.5, step = 1e-9 }", ".dropout.step", "1000000"),
    ("dropout = { low = 0, high = 0.5, step = 0.2 }", ".dropout.step", "0.4 or 0.6"),
    ("dropout = { low = 0, high = 0.5, log = 1 }", ".dropout.log", "true or false"),
    ("dropout = { low = 0, high = 0.5, log = true }", ".dropout.low", "0.0"),
    ("dropout = { low = 0.1, high = 0.5, log = true, step = 0.1 }", ".dropout", "log", "step"),
    ("flip = { low = 0, high = 1 }", ".flip", "choices"),
    ("dense = { low = 0, high = 1 }", ".dense", "choices"),
    ("frozen_epochs = { low = 0.5, high = 3 }", ".frozen_epochs.low"),
    ("frozen_epochs = { low = 0, high = 3, step = 1.5 }", ".frozen_epochs.step", "1.5"),
    ("frozen_epochs = { low = 0, high = 3, step = 2 }", ".frozen_epochs.step", "2 or 4"),
    ("frozen_epochs = { low = 0, high = 10_000_000_000_000_000 }", ".frozen_epochs.high"),
    # Sizes
    ("size = [224, 300]", ".size.1", "300", "224, 320"),
    ('size = ["none"]', ".size.0", "none"),
    ('size = "prepard"', ".size", '"prepared"'),
    ("size = { low = 224, high = 320 }", ".size", '"prepared"'),
    # Conditions
    ("when = 3", ".when"),
    ("flip = [true]\n[when]\ndropout = [0.1]", '.when."dropout"', "field=value"),
    ('flip = [true]\n[when."flip=true"]', '.when."flip=true"'),
    ('flip = [true]\n[when]\n"flip=true" = 3', '.when."flip=true"'),
    ('[when."backbone=ResNet50"]\ndropout = [0.1]', '.when."backbone=ResNet50"', "[tune.space]"),
    ('backbone = ["TinyCNN"]\n[when."bakcbone=x"]\ndropout = [0.1]', '.when."bakcbone=x"', "'backbone'"),
    ('backbone = ["TinyCNN"]\n[when."backbone=TinyCNM"]\ndropout = [0.1]', '.when."backbone=TinyCNM"', "(TinyCNN)"),
    ('backbone = ["TinyCNN"]\n[when."backbone="]\ndropout = [0.1]', '.when."backbone="', "''"),
    ('backbone = ["TinyCNN"]\n[when."backbone=TinyCNN|"]\ndropout = [0.1]', '.when."backbone=TinyCNN|"', "''"),
    ('flip = [true]\n[when."flip=' + "[" * 3000 + '"]\ndropout = [0.1]', '.when."flip=' + "[" * 3000 + '"', "(true)"),
    ('flip = [true]\n[when."flip\\n=x"]\ndropout = [0.1]', '.when."flip =x"'),
    ('zoom = { low = 0, high = 0.1 }\n[when."zoom=0.1"]\nflip = [true]', '.when."zoom=0.1"', "range"),
    ('ema = [0.9]\n[when."ema=0.9"]\nflip = [true]\n[when."flip=true"]\ndropout = [0.1]', '.when."flip=true"', "flip"),
    ('flip = [true]\n[when."flip=true".when."flip=true"]\ndropout = [0.1]', '.when."flip=true".when'),
    ('flip = [true]\n[when."flip=true"]\nbackbone = ["ResNet50"]', '.when."flip=true".backbone', "[tune.space]"),
    ('flip = [true]\nzoom = [0.1]\n[when."flip=true"]\nzoom = [0.2]', '.when."flip=true".zoom', "[tune.space]"),
    (
        'flip = [true, false]\nema = [0.9]\n[when."flip=true"]\ndropout = [0.2]\n[when."ema=0.9"]\ndropout = [0.3]',
        '.when."ema=0.9".dropout',
        '"flip=true"',
    ),
    (
        'flip = [true, false]\n[when."flip=true|false"]\ndropout = [0.2]\n[when."flip=true"]\ndropout = [0.3]',
        '.when."flip=true".dropout',
        '"flip=true|false"',
    ),
    ('flip = [true]\n[when."flip=true"]\nepoch = [1]', '.when."flip=true".epoch', "'epoch'"),
    ('flip = [true]\n[when."flip=true"]\nzoom = { low = 0, high = 1 }', '.when."flip=true".zoom.high', "1"),
    ('flip = [true, false]\n[when."flip=true"]\nsize = "prepared"', ".when", "flip=false", "[train]"),
    # Settings that exclude each other
    ("xla = [true, false]\nsync_batchnorm = [false, true]", "", "xla=true, sync_batchnorm=true"),
    ('xla = [true, false]\n[when."xla=true"]\nsync_batchnorm = [true]', "", "xla=true, sync_batchnorm=true"),
    (
        'flip = [true, false]\n[when."flip=true"]\nsync_batchnorm = [true]\nxla = [true]',
        "",
        "flip=true, sync_batchnorm=true, xla=true",
    ),
    # Settings that are never searched
    *((f"{field} = [1, 2]", f".{field}", "[train]") for field in module._FIXED),
]


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused[0][:50])
def test_a_wrong_table_is_refused(refused: tuple[str, ...]) -> None:
    text, place, *words = refused
    message = refuse(text)
    assert message.startswith(f"tune.space{place}: ")
    assert not [word for word in words if word not in message.removeprefix(f"tune.space{place}")]


@pytest.mark.parametrize(
    ("text", "place", "hint"),
    [
        ("batch_size = [16, 32]", "0", "use 18"),
        ("batch_size = { low = 16, high = 48 }", "low", "use 18"),
        ("batch_size = { low = 15, high = 45 }", "step", "multiple of 3"),
        ("batch_size = { low = 15, high = 47, step = 16 }", "step", "multiple of 3"),
        ("batch_size = { low = 15, high = 45, log = true }", "log", "step = 3"),
    ],
)
def test_batches_that_the_workers_cannot_share_are_refused(text: str, place: str, hint: str) -> None:
    message = refuse(text, TrainSettings(workers=3))
    assert message.startswith(f"tune.space.batch_size.{place}: ")
    assert "3 workers" in message
    assert hint in message
    read(text)


def test_batches_that_the_workers_can_share() -> None:
    space = read("batch_size = { low = 15, high = 45, step = 6 }", TrainSettings(workers=3))
    assert {params["batch_size"] for params in draw(space, 100)} == {15, 21, 27, 33, 39, 45}
    one = read("batch_size = { low = 15, high = 15, log = true }", TrainSettings(workers=3))
    assert draw(one, 1) == [{"batch_size": 15}]


def test_settings_that_exclude_each_other_may_be_searched_under_a_condition() -> None:
    text = 'sync_batchnorm = [true, false]\n[when."sync_batchnorm=false"]\nxla = [true, false]'
    for base in (BASE, TrainSettings(sync_batchnorm=True)):
        space = read(text, base)
        for params in draw(space, 50):
            space.settings(params, base)
        with pytest.raises(ConfigError, match=r"^sync_batchnorm: "):
            space.settings({"sync_batchnorm": True, "xla": True}, base)
    # Where xla is not searched, it is as the base has it.
    assert "sync_batchnorm=true: " in refuse(text, TrainSettings(xla=True))
    assert "xla=true: deterministic: " in refuse("xla = [true, false]", TrainSettings(deterministic=True))
    assert "xla=true: sync_batchnorm: " in refuse("xla = [true]", TrainSettings(sync_batchnorm=True))


def test_every_trial_has_a_size() -> None:
    text = 'flip = [true, false]\n[when."flip=true"]\nsize = "prepared"\n'
    assert read(text, TrainSettings(size=224)).fields == ("flip", "size")
    assert read(text, sizes=[224]).fields == ("flip", "size")
    assert read(text + '[when."flip=false"]\nsize = [224]').names == ("flip", "size@true", "size@false")


def test_the_backbone_comes_first_and_all_parameters_appear() -> None:
    space = read(FULL)
    trials = draw(space, 100)
    assert {next(iter(params)) for params in trials} == {"backbone"}
    assert {params["backbone"] for params in trials} == set(space.backbones)
    assert {name for params in trials for name in params} == set(space.names)


@pytest.mark.parametrize(
    ("choices", "condition", "held"),
    [
        ("batch_size = [16, 32]", "batch_size=32", {32}),
        ("batch_size = [16, 32, 64]", " batch_size = 64 | 16 ", {16, 64}),
        ("dropout = [0.1, 0.001]", "dropout=1e-3", {0.001}),
        ("dropout = [0, 0.1]", "dropout=0", {0.0}),
        ("flip = [true, false]", "flip=false", {False}),
        ("ema = [0.9, 'null']", "ema=null", {None}),
        ("ema = [0.9, 'null']", "ema=none", {None}),
        ("weights = ['none', 'imagenet']", "weights=none", {"none"}),
        ("weights = ['runs/a=b.h5', 'imagenet']", "weights=runs/a=b.h5", {"runs/a=b.h5"}),
        ("weights = ['1', 'imagenet']", "weights=1", {"1"}),
        ("dense = [[], [512,256]]", "dense=[512,256]", {(512, 256)}),
        ("size = 'prepared'", "size=320", {320}),
    ],
)
def test_spellings_of_conditions(choices: str, condition: str, held: set[Any]) -> None:
    space = read(f'{choices}\n[when."{condition}"]\nmomentum = [0.5, 0.6]')
    field = space.fields[0]
    values = [space.values(params) for params in draw(space, 100)]
    assert {one[field] for one in values if "momentum" in one} == held
    assert {one[field] for one in values if "momentum" not in one}.isdisjoint(held)


def test_values_have_the_types_of_the_settings_and_conditions_hold() -> None:
    space = read(FULL)
    kinds: dict[str, type] = {"size": int, "batch_size": int, "frozen_epochs": int, "plateau_patience": int}
    kinds |= {"warmup_epochs": float, "dropout": float, "dense": tuple, "flip": bool, "weights": str}
    seen: dict[str, set[Any]] = {}
    for params in draw(space, 300):
        assert all(value is None or type(value) in (bool, int, float, str) for value in params.values())
        sgd, resnet = params["optimizer"] == "sgd", params["backbone"] == "ResNet50"
        conditions = {"momentum": sgd, "clip_norm": not sgd, "dense": resnet, "zoom": params["ema"] is None}
        conditions |= {"rotation@ResNet50": resnet, "rotation@DenseNet121|TinyCNN": not resnet}
        assert {name: name in params for name in conditions} == conditions
        values = space.values(params)
        assert list(values) == [field for field in space.fields if field in values]
        assert values["rotation"] <= (10 if resnet else 5)
        for field, value in values.items():
            seen.setdefault(field, set()).add(value)
            assert type(value) is kinds.get(field, type(value))
        chosen = space.settings(params, TrainSettings(epochs=3))
        assert chosen.epochs == 3
        assert {field: getattr(chosen, field) for field in values} == values
    assert seen["dropout"] == {0.0, 0.1, 0.2, 0.3, 0.4, 0.5}
    assert seen["dense"] == {(), (256,), (512, 256)}
    assert seen["ema"] == {None, 0.99, 0.999}
    assert seen["size"] == {224, 320}
    assert seen["plateau_patience"] == {1, 3, 5, 7, 9}
    assert seen["frozen_epochs"] <= set(range(1, 9))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"droput": 0.1}, ["droput", "'dropout'"]),
        ({"batch_size": 17}, ["batch_size", "17", "16, 32, 64"]),
        ({"dense": "[1]"}, ["dense", "'[1]'", "[], [256], [512, 256]"]),
        ({"dropout": "x"}, ["dropout", "'x'"]),
        ({"dropout": None}, ["dropout", "None"]),
        ({"dropout": math.nan}, ["dropout", "nan"]),
        ({"rotation@ResNet50": 1.0, "rotation@DenseNet121|TinyCNN": 1.0}, ["rotation@DenseNet121|TinyCNN"]),
    ],
)
def test_values_of_another_space_are_refused(params: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read(FULL).values(params)
    assert str(caught.value).startswith(f"parameter {words[0]}: ")
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("workers", range(1, 6))
@pytest.mark.parametrize("sizes", [(224,), (224, 320), (64, 96, 128)])
def test_every_trial_of_the_default_space_is_valid(workers: int, sizes: tuple[int, ...]) -> None:
    base = TrainSettings(workers=workers, batch_size=32 * workers, size=sizes[0])
    space = Space.read({}, base, sizes)
    for params in draw(space, 20):
        chosen = space.settings(params, base)
        assert chosen.batch_size % workers == 0
        assert chosen.size in sizes
        assert chosen.idle() == []
        assert space.point(space.values(params), "here")[0] == pytest.approx(params)


FIELDS = st.sampled_from([*TrainSettings.model_fields, "when", "droput", ""])
WORDS = ["none", "prepared", "ResNet50", "TinyCNN", "adam", "sgd"]
NUMBERS = [10**400, -(10**400), 2**53, math.inf, math.nan, 1e308, 5e-324, 0, 1, 8, 0.1, 0.5]
SCALARS = st.booleans() | st.integers() | st.floats() | st.text() | st.dates() | st.sampled_from([*NUMBERS, *WORDS])
LISTS = st.lists(SCALARS | st.lists(SCALARS, max_size=2), max_size=3)
ENDS = {"low": SCALARS, "high": SCALARS}
RANGES = st.fixed_dictionaries(ENDS, optional={"log": st.booleans() | SCALARS, "step": SCALARS, "x": SCALARS})
WILD = st.dictionaries(FIELDS, SCALARS | LISTS | RANGES, max_size=1)
GOOD = tomllib.loads(FULL)
WHENS = GOOD.pop("when")
DECIDING = {field: GOOD[field] for field in ("backbone", "optimizer", "ema")}
CONDITIONS = st.tuples(FIELDS, st.sampled_from(["true", "none", "ResNet50", "sgd|adam", "1e-3", "[]", ""])).map(
    "=".join
)


def some(table: Mapping[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.lists(st.sampled_from(list(table.items())), max_size=6).map(dict)


def merge(*parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(*parts).map(lambda tables: {key: value for table in tables for key, value in table.items()})


def read_or_refuse(table: dict[str, Any], base: TrainSettings) -> tuple[Space | None, str]:
    try:
        return Space.read(table, base, SIZES), ""
    except ConfigError as error:
        return None, str(error)


@settings(max_examples=100)
@given(
    merge(st.sampled_from([{}, DECIDING]), some(GOOD), WILD),
    some(WHENS)
    | st.dictionaries(
        st.sampled_from(list(WHENS)) | CONDITIONS | st.text(), merge(some(GOOD), WILD) | SCALARS, max_size=2
    ),
    st.integers(1, 3),
)
def test_any_table_gives_valid_settings_or_one_line(table: dict[str, Any], whens: dict[str, Any], workers: int) -> None:
    base = TrainSettings(workers=workers)
    space, message = read_or_refuse({**table, "when": whens} if whens else table, base)
    if space is None:
        assert len(message.splitlines()) == 1
        return
    json.dumps(space.describe())
    for params in draw(space, 3):
        space.settings(params, base)


@settings(max_examples=50)
@given(st.integers(0, 50), st.integers(1, 400), st.integers(0, 40), st.sampled_from([10, 100, 1000]), st.integers(0))
def test_a_range_has_any_number_of_whole_steps(first: int, stride: int, count: int, scale: int, chosen: int) -> None:
    low, step, high = first / scale, stride / scale, (first + count * stride) / scale
    space = Space.read({"warmup_epochs": {"low": low, "high": high, "step": step}}, BASE, SIZES)
    value = (first + chosen % (count + 1) * stride) / scale
    params, _ = space.point({"warmup_epochs": value}, "here")
    assert space.values(params) == {"warmup_epochs": value}
    study = new_study()
    study.enqueue_trial(params)
    for _ in range(3):
        trial = study.ask()
        space.suggest(trial)
        assert low <= space.values(trial.params)["warmup_epochs"] <= high
    assert study.trials[0].params == params


def test_default_space() -> None:
    space = Space.read({}, BASE, SIZES)
    assert space == Space.read(default_space(BASE, SIZES), BASE, SIZES)
    assert space.backbones == ("ResNet50", "DenseNet121")
    assert space.conditional
    assert space.names == space.fields
    assert {"size", "batch_size", "dense", "weight_decay", "focal_gamma"} < set(space.fields)
    for params in draw(space, 100):
        values = space.values(params)
        assert ("weight_decay" in values) == (values["optimizer"] == "adamw")
        assert ("focal_gamma" in values) == (values["loss"] == "focal")
        assert ("dense" in values) == (values["backbone"] == "ResNet50")
    assert "size" not in Space.read({}, BASE, [224]).fields
    assert default_space(TrainSettings(workers=32), SIZES)["batch_size"] == [32, 64]
    assert "batch_size" not in Space.read({}, TrainSettings(workers=3), SIZES).fields


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known["backbone"])
def test_known_configurations_are_points_of_the_default_space(known: Mapping[str, Any]) -> None:
    space = Space.read({}, BASE, SIZES)
    params, left_out = space.point(known, "known")
    assert left_out == []
    assert space.values(params) == known
    BASE.replace(**known)
    params, left_out = read("optimizer = ['sgd']\nloss = ['bce', 'weighted_bce']").point(known, "x", strict=False)
    assert params == {"loss": known["loss"]}
    assert left_out == [field for field in known if field != "loss"]


POINT = {
    "dense": [512, 256],  # before the backbone that decides whether it is searched
    "backbone": "ResNet50",
    "rotation": 3,
    "dropout": 0.3,
    "ema": "none",
    "zoom": 0.05,
    "batch_size": 64,
    "learning_rate": 1e-5,
    "flip": False,
}


def test_the_next_trial_has_the_values_of_an_enqueued_point() -> None:
    space = read(FULL)
    params, left_out = space.point(POINT, "here")
    assert left_out == []
    expected = {**POINT, "dense": "[512, 256]", "ema": None, "rotation@ResNet50": 3.0}
    del expected["rotation"]
    assert params == expected
    assert type(params["rotation@ResNet50"]) is float
    assert space.point({**POINT, "ema": None}, "here")[0] == params
    study = new_study()
    for _ in range(2):
        study.enqueue_trial(params)
        trial = study.ask()
        space.suggest(trial)
        assert params.items() <= trial.params.items()
        assert space.values(trial.params).items() >= {**POINT, "dense": (512, 256), "ema": None}.items()
        study.tell(trial, 0.5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"droput": 0.1}, "'dropout'"),
        ({"epochs": 3}, ""),
        ({"momentum": 0.9}, "optimizer=sgd"),
        ({"momentum": 0.9, "optimizer": "adam"}, "optimizer=sgd"),
        ({"momentum": 0.4, "optimizer": "sgd"}, "0.5 to"),
        ({"momentum": 1.5, "optimizer": "sgd"}, "1.5"),
        ({"rotation": 11}, "0.0 to 10.0"),
        ({"batch_size": 48}, "16, 32, 64"),
        ({"dropout": 0.25}, "0.0 to 0.5 in steps of 0.1"),
        ({"dense": [256, 512]}, "[], [256], [512, 256]"),
        ({"dense": 256}, "256"),
        ({"clip_norm": None, "optimizer": "adam"}, "none"),
        ({"size": 300}, "224, 320"),
        ({"size": None}, "none"),
        ({"a\nb": 1}, "a b"),
    ],
)
def test_a_point_outside_the_space_is_refused_or_left_out(changes: dict[str, Any], words: str) -> None:
    space = read(FULL)
    values = {**POINT, **changes}
    bad = next(iter(changes))
    with pytest.raises(ConfigError) as caught:
        space.point(values, "runs/a")
    message = str(caught.value)
    assert message.splitlines() == [message]
    assert message.startswith(f"runs/a: {bad}".replace("\n", " "))
    assert words in message
    params, left_out = space.point(values, "runs/a", strict=False)
    assert left_out == [bad]
    assert set(space.values(params)) == set(values) - {bad}
    # Dense layers are searched with a ResNet50 only.
    params, left_out = read(FULL).point({"dense": [256], "backbone": "ResNet50V2"}, "here", strict=False)
    assert (params, left_out) == ({}, ["dense", "backbone"])


def test_equal_spaces_have_equal_descriptions() -> None:
    description = read(FULL).describe()
    assert json.loads(json.dumps(description)) == description
    assert list(description) == list(read(FULL).names)
    other = (
        FULL.replace('"prepared"', "[320, 224]")
        .replace("low = 0, high = 2 }", "high = 2.0, low = 0.0, log = false }")
        .replace('"none", 0.99', '"null", 0.99')
        .replace("adam|adamw", "adamw | adam")
        .replace("frozen_epochs = { low = 1,", "frozen_epochs = { low = 1.0,")
    )
    assert other != FULL
    assert read(other).describe() == description
    assert read(other) == read(FULL)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[16, 32, 64]", "[16, 32]"),
        ("[16, 32, 64]", "[16, 64, 32]"),
        ("high = 0.5, step = 0.1", "high = 0.4, step = 0.1"),
        (", step = 0.1", ""),
        ("3e-3, log = true", "3e-3"),
        ("adam|adamw", "adamw"),
        ('"prepared"', "[224]"),
        ("zoom", "shift"),
    ],
)
def test_other_spaces_have_other_descriptions(old: str, new: str) -> None:
    assert FULL.count(old) == 1
    assert read(FULL.replace(old, new)).describe() != read(FULL).describe()
