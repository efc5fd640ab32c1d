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
from studies import get_refusal

from ray_cxr.config import TrainSettings
from ray_cxr.errors import ConfigError
from ray_cxr.tuning import space_table
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


def names(space: Space) -> tuple[str, ...]:
    return tuple(one.name for one in space.parameters)


def refuse(text: str, base: TrainSettings = BASE) -> str:
    """Return the one line with which a table is refused."""
    return get_refusal(ConfigError, read, text, base)


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
    assert names(space) == (*always.split(), "rotation@ResNet50", "rotation@DenseNet121|TinyCNN", "zoom")
    assert space.fields == (*always.split(), "rotation", "zoom")
    assert space.backbones == ("ResNet50", "DenseNet121", "TinyCNN")
    small = read("momentum = [0, 0.9]", TrainSettings(backbone="TinyCNN", optimizer="sgd"))
    assert names(small) == small.fields == ("momentum",)
    assert small.backbones == ("TinyCNN",)
    # Names have no slash and differ.
    text = 'weights = ["runs/a", "runs%2Fa", "runs/b"]\n'
    for dropout, weights in enumerate(("runs/a", "runs%2Fa", "runs/b"), 1):
        text += f'[when."weights={weights}"]\ndropout = [0.{dropout}]\n'
    assert names(read(text)) == ("weights", "dropout@runs%2Fa", "dropout@runs%252Fa", "dropout@runs%2Fb")


FLIP, IF_TRUE, IF_ANY = "flip = [true, false]\n", '[when."flip=true"]\n', '[when."flip=true|false"]\n'
#: A table, the key that the message names first, and what else it names.
REFUSED: list[tuple[str, ...]] = [
    ("droput = [0.1]", ".droput", "'dropout'"),
    ('"drop\\nout" = [0.1]', ".drop out", "'dropout'"),
    ("[when]", ""),
    ("dropout = 0.3", ".dropout", "[train]"),
    ("dropout = []", ".dropout", "empty"),
    ("dropout = [0, 0.0]", ".dropout.1", "0.0"),
    ("dense = [512, 256]", ".dense.0", "512", "dense = [[], [256]]"),
    ("dense = [[], [0]]", ".dense.1.0", "0"),
    (f"frozen_epochs = [1, {2**53 + 1}]", ".frozen_epochs.1", str(2**53)),
    ("frozen_epochs = [1, 0x" + "f" * 5000 + "]", ".frozen_epochs.1"),
    ("dropout = { low = 0 }", ".dropout", "low", "high"),
    ("dropout = { low = 0.5, high = 0.1 }", ".dropout", "0.5", "0.1"),
    ("dropout = { low = 0, hihg = 0.1 }", ".dropout", "'hihg'", "'high'"),
    ("dropout = { low = 0, high = 1 }", ".dropout.high", "1"),
    ("dropout = { low = nan, high = 0.5 }", ".dropout.low"),
    ('dropout = { low = "0", high = 0.5 }', ".dropout.low", "'0'"),
    ("dropout = { low = 0, high = 0.5, step = true }", ".dropout.step", "True"),
    ("dropout = { low = 0, high = 0.5, step = 0 }", ".dropout.step", "0"),
    ("dropout = { low = 0, high = 0.5, step = nan }", ".dropout.step", "nan"),
    ("dropout = { low = 0, high = 0.5, step = 1e-9 }", ".dropout.step", "1000000"),
    ("dropout = { low = 0, high = 0.5, step = 0.2 }", ".dropout.step", "0.4 or 0.6"),
    ("dropout = { low = 0, high = 0.5, log = 1 }", ".dropout.log", "true or false"),
    ("dropout = { low = 0, high = 0.5, log = true }", ".dropout.low", "0.0"),
    ("dropout = { low = 0.1, high = 0.5, log = true, step = 0.1 }", ".dropout", "log", "step"),
    ("flip = { low = 0, high = 1 }", ".flip", "choices"),
    ("frozen_epochs = { low = 0.5, high = 3 }", ".frozen_epochs.low"),
    ("frozen_epochs = { low = 0, high = 3, step = 1.5 }", ".frozen_epochs.step", "1.5"),
    ("frozen_epochs = { low = 0, high = 3, step = 2 }", ".frozen_epochs.step", "2 or 4"),
    ("frozen_epochs = { low = 0, high = 10_000_000_000_000_000 }", ".frozen_epochs.high"),
    ("size = [224, 300]", ".size.1", "300", "224, 320"),
    ('size = "prepard"', ".size", '"prepared"'),
    ("when = 3", ".when"),
    ("flip = [true]\n[when]\ndropout = [0.1]", '.when."dropout"', "field=value"),
    ('flip = [true]\n[when."flip=true"]', '.when."flip=true"'),
    ('[when."backbone=ResNet50"]\ndropout = [0.1]', '.when."backbone=ResNet50"', "[tune.space]"),
    ('backbone = ["TinyCNN"]\n[when."bakcbone=x"]\ndropout = [0.1]', '.when."bakcbone=x"', "'backbone'"),
    ('backbone = ["TinyCNN"]\n[when."backbone=TinyCNM"]\ndropout = [0.1]', '.when."backbone=TinyCNM"', "(TinyCNN)"),
    ('backbone = ["TinyCNN"]\n[when."backbone=TinyCNN|"]\ndropout = [0.1]', '.when."backbone=TinyCNN|"', "''"),
    ('flip = [true]\n[when."flip=' + "[" * 3000 + '"]\ndropout = [0.1]', '.when."flip=' + "[" * 3000 + '"', "(true)"),
    ('zoom = { low = 0, high = 0.1 }\n[when."zoom=0.1"]\nflip = [true]', '.when."zoom=0.1"', "range"),
    ('ema = [0.9]\n[when."ema=0.9"]\nflip = [true]\n[when."flip=true"]\ndropout = [0.1]', '.when."flip=true"', "flip"),
    ('flip = [true]\n[when."flip=true".when."flip=true"]\ndropout = [0.1]', '.when."flip=true".when'),
    ('flip = [true]\n[when."flip=true"]\nbackbone = ["ResNet50"]', '.when."flip=true".backbone', "[tune.space]"),
    ('flip = [true]\nzoom = [0.1]\n[when."flip=true"]\nzoom = [0.2]', '.when."flip=true".zoom', "[tune.space]"),
    (f'{FLIP}ema = [0.9]\n{IF_TRUE}zoom = [0]\n[when."ema=0.9"]\nzoom = [0.1]', '.when."ema=0.9".zoom', '"flip=true"'),
    (f"{FLIP}{IF_ANY}zoom = [0]\n{IF_TRUE}zoom = [0.1]", '.when."flip=true".zoom', '"flip=true|false"'),
    ('flip = [true]\n[when."flip=true"]\nepoch = [1]', '.when."flip=true".epoch', "'epoch'"),
    ('flip = [true, false]\n[when."flip=true"]\nsize = "prepared"', ".when", "flip=false", "[train]"),
    (f"{FLIP}{IF_TRUE}sync_batchnorm = [true]\nxla = [true]", "", "flip=true, sync_batchnorm=true, xla=true"),
    *((f"{field} = [1, 2]", f".{field}", "[train]") for field in space_table.NOT_SEARCHABLE),
]


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused[0][:50])
def test_a_wrong_table_is_refused(refused: tuple[str, ...]) -> None:
    text, key, *words = refused
    message = refuse(text)
    assert message.startswith(f"tune.space{key}: ")
    assert not [word for word in words if word not in message.removeprefix(f"tune.space{key}")]


@pytest.mark.parametrize(
    ("batches", "key", "hint"),
    [
        ("[16, 32]", "0", "use 18"),
        ("{ low = 16, high = 48 }", "low", "use 18"),
        ("{ low = 15, high = 45 }", "step", "multiple of 3"),
        ("{ low = 15, high = 47, step = 16 }", "step", "multiple of 3"),
        ("{ low = 15, high = 45, log = true }", "log", "step = 3"),
        ("{ low = 15, high = 45, step = 6 }", "", {15, 21, 27, 33, 39, 45}),
        ("{ low = 15, high = 15, log = true }", "", {15}),
    ],
)
def test_batches_that_the_workers_cannot_share_are_refused(batches: str, key: str, hint: Any) -> None:
    text, three = f"batch_size = {batches}", TrainSettings(workers=3)
    if key:
        message = refuse(text, three)
        assert message.startswith(f"tune.space.batch_size.{key}: ")
        assert "3 workers" in message
        assert hint in message
        read(text)
    else:
        assert {params["batch_size"] for params in draw(read(text, three), 100)} == hint


def test_settings_that_exclude_each_other_may_be_searched_under_a_condition() -> None:
    text = 'sync_batchnorm = [true, false]\n[when."sync_batchnorm=false"]\nxla = [true, false]'
    for base in (BASE, TrainSettings(sync_batchnorm=True)):
        space = read(text, base)
        for params in draw(space, 50):
            base.replace(**space.values(params))
        with pytest.raises(ConfigError, match=r"^sync_batchnorm: "):
            base.replace(**space.values({"sync_batchnorm": True, "xla": True}))
    # Where xla is not searched, it is as the base has it.
    assert "sync_batchnorm=true: " in refuse(text, TrainSettings(xla=True))
    assert "xla=true: deterministic: " in refuse("xla = [true, false]", TrainSettings(deterministic=True))
    assert "xla=true: sync_batchnorm: " in refuse("xla = [true]", TrainSettings(sync_batchnorm=True))


def test_every_trial_has_a_size() -> None:
    text = 'flip = [true, false]\n[when."flip=true"]\nsize = "prepared"\n'
    assert read(text, TrainSettings(size=224)).fields == ("flip", "size")
    assert read(text, sizes=[224]).fields == ("flip", "size")
    assert names(read(text + '[when."flip=false"]\nsize = [224]')) == ("flip", "size@true", "size@false")


@pytest.mark.parametrize(
    ("choices", "condition", "held"),
    [
        ("batch_size = [16, 32, 64]", " batch_size = 64 | 16 ", {16, 64}),
        ("dropout = [0.1, 0.001]", "dropout=1e-3", {0.001}),
        ("ema = [0.9, 'null']", "ema=none", {None}),
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
    trials = draw(space, 300)
    assert {next(iter(params)) for params in trials} == {"backbone"}
    assert {name for params in trials for name in params} == set(names(space))
    for params in trials:
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
        chosen = TrainSettings(epochs=3).replace(**space.values(params))
        assert chosen.epochs == 3
        assert {field: getattr(chosen, field) for field in values} == values
    assert seen["dropout"] == {0.0, 0.1, 0.2, 0.3, 0.4, 0.5}
    assert (seen["dense"], seen["ema"]) == ({(), (256,), (512, 256)}, {None, 0.99, 0.999})
    assert (seen["size"], seen["backbone"]) == ({224, 320}, set(space.backbones))
    assert seen["plateau_patience"] == {1, 3, 5, 7, 9}
    assert seen["frozen_epochs"] <= set(range(1, 9))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"droput": 0.1}, ["droput", "'dropout'"]),
        ({"batch_size": 17}, ["batch_size", "17", "16, 32, 64"]),
        ({"dropout": "x"}, ["dropout", "'x'"]),
        ({"dropout": math.nan}, ["dropout", "nan"]),
        ({"rotation@ResNet50": 1.0, "rotation@DenseNet121|TinyCNN": 1.0}, ["rotation@DenseNet121|TinyCNN"]),
    ],
)
def test_values_of_another_space_are_refused(params: dict[str, Any], words: list[str]) -> None:
    message = get_refusal(ConfigError, read(FULL).values, params)
    assert message.startswith(f"parameter {words[0]}: ")
    assert all(word in message for word in words)


@pytest.mark.parametrize("workers", range(1, 6))
@pytest.mark.parametrize("sizes", [(224,), (224, 320), (64, 96, 128)])
def test_every_trial_of_the_default_space_is_valid(workers: int, sizes: tuple[int, ...]) -> None:
    base = TrainSettings(workers=workers, batch_size=32 * workers, size=sizes[0])
    space = Space.read({}, base, sizes)
    for params in draw(space, 20):
        chosen = base.replace(**space.values(params))
        assert chosen.batch_size % workers == 0
        assert chosen.size in sizes
        assert chosen.list_unused() == []
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
WANTED = st.sampled_from(["true", "none", "ResNet50", "sgd|adam", "1e-3", "[]", ""])
CONDITIONS = st.sampled_from(list(WHENS)) | st.tuples(FIELDS, WANTED).map("=".join) | st.text()


def some(table: Mapping[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.lists(st.sampled_from(list(table.items())), max_size=6).map(dict)


def merge(*parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(*parts).map(lambda tables: {key: value for table in tables for key, value in table.items()})


@settings(max_examples=100)
@given(
    merge(st.sampled_from([{}, DECIDING]), some(GOOD), WILD),
    some(WHENS) | st.dictionaries(CONDITIONS, merge(some(GOOD), WILD) | SCALARS, max_size=2),
    st.integers(1, 3),
)
def test_any_table_gives_valid_settings_or_one_line(table: dict[str, Any], whens: dict[str, Any], workers: int) -> None:
    base = TrainSettings(workers=workers)
    try:
        space = Space.read({**table, "when": whens} if whens else table, base, SIZES)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        return
    json.dumps(space.describe())
    for params in draw(space, 3):
        base.replace(**space.values(params))


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
    assert read("") == Space.read(default_space(BASE, SIZES), BASE, SIZES)
    assert {"size", "batch_size", "dense", "weight_decay", "focal_gamma"} < set(read("").fields)
    assert "size" not in read("", sizes=[224]).fields
    assert default_space(TrainSettings(workers=32), SIZES)["batch_size"] == [32, 64]
    assert "batch_size" not in read("", TrainSettings(workers=3)).fields


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known["backbone"])
def test_known_configurations_are_points_of_the_default_space(known: Mapping[str, Any]) -> None:
    space = read("")
    params, left_out = space.point(known, "known")
    assert left_out == []
    assert space.values(params) == known
    params, left_out = read("optimizer = ['sgd']\nloss = ['bce', 'weighted_bce']").point(known, "x", strict=False)
    assert params == {"loss": known["loss"]}
    assert left_out == [field for field in known if field != "loss"]


#: Dense layers stand before the backbone that decides whether they are searched.
POINT = {"dense": [512, 256], "backbone": "ResNet50", "rotation": 3, "dropout": 0.3, "ema": "none", "zoom": 0.05}
POINT |= {"batch_size": 64, "learning_rate": 1e-5, "flip": False}


def test_the_next_trial_has_the_values_of_an_enqueued_point() -> None:
    space = read(FULL)
    params, left_out = space.point(POINT, "here")
    assert left_out == []
    searched = {"dense": "[512, 256]", "ema": None, "rotation@ResNet50": 3.0}
    assert params == {name: value for name, value in POINT.items() if name != "rotation"} | searched
    assert type(params["rotation@ResNet50"]) is float
    assert space.point({**POINT, "ema": None}, "here")[0] == params
    assert space.point({"dense": [256], "backbone": "ResNet50V2"}, "", strict=False) == ({}, ["dense", "backbone"])
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
        ({"momentum": 0.9}, "optimizer=sgd"),
        ({"momentum": 0.4, "optimizer": "sgd"}, "0.5 to"),
        ({"momentum": 1.5, "optimizer": "sgd"}, "1.5"),
        ({"rotation": 11}, "0.0 to 10.0"),
        ({"dropout": 0.25}, "0.0 to 0.5 in steps of 0.1"),
        ({"dense": 256}, "256"),
        ({"clip_norm": None, "optimizer": "adam"}, "none"),
        ({"size": 300}, "224, 320"),
        ({"a\nb": 1}, "a b"),
    ],
)
def test_a_point_outside_the_space_is_refused_or_left_out(changes: dict[str, Any], words: str) -> None:
    space = read(FULL)
    values = {**POINT, **changes}
    bad = next(iter(changes))
    message = get_refusal(ConfigError, space.point, values, "runs/a")
    assert message.startswith(f"runs/a: {bad}".replace("\n", " "))
    assert words in message
    params, left_out = space.point(values, "runs/a", strict=False)
    assert left_out == [bad]
    assert set(space.values(params)) == set(values) - {bad}


@pytest.mark.parametrize(
    ("old", "new", "is_equal"),
    [
        ('"prepared"', "[320, 224]", True),
        ("low = 0, high = 2 }", "high = 2.0, low = 0.0, log = false }", True),
        ('"none", 0.99', '"null", 0.99', True),
        ("adam|adamw", "adamw | adam", True),
        ("[16, 32, 64]", "[16, 32]", False),
        ("[16, 32, 64]", "[16, 64, 32]", False),
        ("high = 0.5, step = 0.1", "high = 0.4, step = 0.1", False),
        (", step = 0.1", "", False),
        ("3e-3, log = true", "3e-3", False),
        ("adam|adamw", "adamw", False),
        ("zoom", "shift", False),
    ],
)
def test_equal_spaces_have_equal_descriptions(old: str, new: str, is_equal: bool) -> None:
    assert FULL.count(old) == 1
    space, other = read(FULL), read(FULL.replace(old, new))
    description = space.describe()
    assert json.loads(json.dumps(description)) == description
    assert list(description) == list(names(space))
    assert (other.describe() == description, other == space) == (is_equal, is_equal)
