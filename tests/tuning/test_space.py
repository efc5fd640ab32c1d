"""The search space: read or refused with one line, asked in order, and every answer valid settings."""

from __future__ import annotations

import json
import math
import pickle
import tomllib
import warnings
from collections.abc import Iterator, Mapping, Sequence
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


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


def read(text: str, base: TrainSettings = BASE, sizes: Sequence[int] = SIZES) -> Space:
    return Space.read(tomllib.loads(text), base, sizes)


def refusal(text: str, base: TrainSettings = BASE, sizes: Sequence[int] = SIZES) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text, base, sizes)
    said = str(caught.value)
    assert said.splitlines() == [said]
    return said


def study(seed: int = 0, sampler: optuna.samplers.BaseSampler | None = None) -> optuna.Study:
    return optuna.create_study(direction="maximize", sampler=sampler or optuna.samplers.RandomSampler(seed=seed))


def asked(space: Space, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The Optuna values of so many random trials."""
    one = study(seed)
    found = []
    for _ in range(count):
        trial = one.ask()
        space.suggest(trial)
        found.append(trial.params)
    return found


def test_what_a_full_table_says() -> None:
    space = read(FULL)
    assert space.names == (
        "backbone",
        "learning_rate",
        "size",
        "dropout",
        "batch_size",
        "optimizer",
        "ema",
        "weights",
        "plateau_patience",
        "frozen_epochs",
        "warmup_epochs",
        "flip",
        "momentum",
        "clip_norm",
        "dense",
        "rotation@ResNet50",
        "rotation@DenseNet121|TinyCNN",
        "zoom",
    )
    assert space.fields == (*space.names[:15], "rotation", "zoom")
    assert space.categorical == (
        "backbone",
        "size",
        "batch_size",
        "optimizer",
        "ema",
        "weights",
        "flip",
        "dense",
    )
    assert space.backbones == ("ResNet50", "DenseNet121", "TinyCNN")
    assert space.conditional


def test_what_a_small_table_says() -> None:
    space = read("momentum = [0, 0.9]", TrainSettings(backbone="TinyCNN", optimizer="sgd"))
    assert (space.names, space.fields, space.categorical) == (("momentum",),) * 3
    assert space.backbones == ("TinyCNN",)
    assert not space.conditional


def test_a_field_under_one_condition_alone_keeps_its_name() -> None:
    text = 'backbone = ["ResNet50", "TinyCNN"]\n[when."backbone = TinyCNN"]\ndropout = [0.1, 0.2]'
    assert read(text).names == ("backbone", "dropout")


def test_names_have_no_slash_and_differ() -> None:
    text = """
    weights = ["runs/a", "runs%2Fa", "runs/b"]
    [when."weights=runs/a"]
    dropout = [0.1]
    [when."weights=runs%2Fa"]
    dropout = [0.2]
    [when."weights=runs/b"]
    dropout = [0.3]
    """
    names = read(text).names
    assert names == ("weights", "dropout@runs%2Fa", "dropout@runs%252Fa", "dropout@runs%2Fb")
    for space in (read(FULL), read("")):
        assert not any("/" in name for name in space.names)
        assert len(set(space.names)) == len(space.names)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # what is searched
        ("droput = [0.1]", "tune.space.droput: unknown setting 'droput'; did you mean 'dropout'?"),
        ("zzzz = [0.1]", "tune.space.zzzz: unknown setting 'zzzz'"),
        ('"drop\\nout" = [0.1]', "tune.space.drop out: unknown setting 'drop\\nout'; did you mean 'dropout'?"),
        ("[when]", "tune.space: asks for nothing; name settings to search, or remove the table"),
        ("seed = [1, 2]", "tune.space.seed: cannot be searched, because a search over seeds picks luck; set it under"),
        ("epochs = { low = 1, high = 9 }", "tune.space.epochs: cannot be searched, because it is part of the budget"),
        ("findings = [14, 15]", "tune.space.findings: cannot be searched, because AUROCs of other findings cannot"),
        ("deterministic = [true]", "tune.space.deterministic: cannot be searched, because it says how a trial runs"),
        ('calibration = ["platt"]', "tune.space.calibration: cannot be searched, because it does not change the net"),
        # choices
        ("dropout = 0.3", "tune.space.dropout: one value is no search; set it under [train], or write a list of"),
        ('backbone = "ResNet50"', "tune.space.backbone: one value is no search; set it under [train]"),
        ("flip = 1979-05-27", "tune.space.flip: one value is no search"),
        ("dropout = []", "tune.space.dropout: the list is empty; name the choices"),
        ("dropout = [0.1, 0.2, 0.1]", "tune.space.dropout.2: 0.1 stands twice; name each choice once"),
        ("dropout = [0, 0.0]", "tune.space.dropout.1: 0.0 stands twice"),
        ("dense = [[8], [8]]", "tune.space.dense.1: [8] stands twice"),
        ('ema = ["null", "none"]', "tune.space.ema.1: none stands twice"),
        ("dropout = [0.1, 1.0]", "tune.space.dropout.1: Input should be less than 1 (got 1.0)"),
        ('dropout = ["none"]', "tune.space.dropout.0: Input should be a valid number"),
        ("dropout = [{ low = 0, high = 0.1 }]", "tune.space.dropout.0: Input should be a valid number"),
        ('backbone = ["ResNet51"]', "tune.space.backbone.0: Input should be 'ResNet50', "),
        ("dense = [512, 256]", "tune.space.dense.0: each choice is a list itself, as in dense = [[], [256]] (got 512)"),
        ("dense = [[], [0]]", "tune.space.dense.1.0: Input should be greater than or equal to 1 (got 0)"),
        (f"frozen_epochs = [1, {2**53 + 1}]", "tune.space.frozen_epochs.1: is too large a number; use at most"),
        ("frozen_epochs = [1, 0x" + "f" * 5000 + "]", "tune.space.frozen_epochs.1: "),
        # ranges
        ("dropout = {}", "tune.space.dropout: a range needs both ends; write { low = ..., high = ... }"),
        ("dropout = { low = 0 }", "tune.space.dropout: a range needs both ends"),
        ("dropout = { low = 0.5, high = 0.1 }", "tune.space.dropout: low is 0.5 and high only 0.1; exchange them"),
        ("dropout = { low = 0, hihg = 0.1 }", "tune.space.dropout: unknown key 'hihg'; did you mean 'high'?"),
        ("dropout = { low = 0, high = 1 }", "tune.space.dropout.high: Input should be less than 1 (got 1)"),
        ("dropout = { low = -0.1, high = 0.5 }", "tune.space.dropout.low: Input should be greater than or equal to 0"),
        ("dropout = { low = nan, high = 0.5 }", "tune.space.dropout.low: Input should be "),
        ("warmup_epochs = { low = 0, high = inf }", "tune.space.warmup_epochs.high: Input should be a finite number"),
        ('dropout = { low = "0", high = 0.5 }', "tune.space.dropout.low: is no number (got '0')"),
        ("dropout = { low = false, high = 0.5 }", "tune.space.dropout.low: is no number (got False)"),
        ("dropout = { low = 0, high = 0.5, step = true }", "tune.space.dropout.step: is no number (got True)"),
        ("dropout = { low = 0, high = 0.5, step = 0 }", "tune.space.dropout.step: must be above 0, and finite (got 0)"),
        ("dropout = { low = 0, high = 0.5, step = nan }", "tune.space.dropout.step: must be above 0, and finite"),
        ("dropout = { low = 0, high = 0.5, step = inf }", "tune.space.dropout.step: must be above 0, and finite"),
        ("dropout = { low = 0, high = 0.5, step = 1e-9 }", "tune.space.dropout.step: 1e-09 makes more than 1000000"),
        (
            "dropout = { low = 0, high = 0.5, step = 0.2 }",
            "tune.space.dropout.step: steps of 0.2 from 0.0 miss 0.5; set high to 0.4 or 0.6",
        ),
        ("dropout = { low = 0, high = 0.5, log = 1 }", "tune.space.dropout.log: use true or false (got 1)"),
        (
            "dropout = { low = 0, high = 0.5, log = true }",
            "tune.space.dropout.low: a log range begins above 0 (got 0.0",
        ),
        (
            "dropout = { low = 0.1, high = 0.5, log = true, step = 0.1 }",
            "tune.space.dropout: log and step exclude each other; remove one",
        ),
        ("flip = { low = 0, high = 1 }", "tune.space.flip: flip is no number and has no range; write a list of choi"),
        ("backbone = { low = 0, high = 1 }", "tune.space.backbone: backbone is no number and has no range"),
        ("dense = { low = 0, high = 1 }", "tune.space.dense: dense is no number and has no range"),
        ("frozen_epochs = { low = 0.5, high = 3 }", "tune.space.frozen_epochs.low: Input should be a valid integer"),
        ("frozen_epochs = { low = 0, high = 2.5 }", "tune.space.frozen_epochs.high: Input should be a valid integer"),
        (
            "frozen_epochs = { low = 0, high = 3, step = 1.5 }",
            "tune.space.frozen_epochs.step: must be a whole number, as the setting is (got 1.5)",
        ),
        ("frozen_epochs = { low = 0, high = 3, step = 2 }", "tune.space.frozen_epochs.step: steps of 2 from 0 miss 3;"),
        ("frozen_epochs = { low = 0, high = 10_000_000_000_000_000 }", "tune.space.frozen_epochs.high: is too large"),
        # sizes
        ("size = [224, 300]", "tune.space.size.1: 300 is not prepared; there are 224, 320"),
        ('size = ["none"]', "tune.space.size.0: none is not prepared; there are 224, 320"),
        ('size = "prepard"', 'tune.space.size: write "prepared" for every prepared size, or a list of them'),
        ("size = 224", 'tune.space.size: write "prepared" for every prepared size, or a list of them'),
        ("size = { low = 224, high = 320 }", 'tune.space.size: write "prepared" for every prepared size'),
        ("size = []", "tune.space.size: the list is empty"),
        # conditions
        ("when = 3", "tune.space.when: is a table of conditions: write [tune.space.when."),
        ("flip = [true]\n[when]\ndropout = [0.1]", 'tune.space.when."dropout": write the condition as field=value'),
        ('flip = [true]\n[when."flip=true"]', 'tune.space.when."flip=true": asks for nothing; write the settings'),
        ('flip = [true]\n[when]\n"flip=true" = 3', 'tune.space.when."flip=true": asks for nothing; write the settings'),
        (
            '[when."backbone=ResNet50"]\ndropout = [0.1]',
            'tune.space.when."backbone=ResNet50": backbone is not searched; list its choices under [tune.space], or',
        ),
        (
            'backbone = ["ResNet50"]\n[when."bakcbone=ResNet50"]\ndropout = [0.1]',
            "tune.space.when.\"bakcbone=ResNet50\": unknown setting 'bakcbone'; did you mean 'backbone'?",
        ),
        (
            'backbone = ["ResNet50"]\n[when."backbone=ResNet51"]\ndropout = [0.1]',
            "tune.space.when.\"backbone=ResNet51\": 'ResNet51' is none of the choices of backbone (ResNet50); did you",
        ),
        ('backbone = ["ResNet50"]\n[when."backbone="]\ndropout = [0.1]', "'' is none of the choices of backbone"),
        ('backbone = ["ResNet50"]\n[when."backbone=ResNet50|"]\ndropout = [0.1]', "'' is none of the choices of"),
        ('flip = [true]\n[when."flip=' + "[" * 3000 + '"]\ndropout = [0.1]', "is none of the choices of flip (true)"),
        ('flip = [true]\n[when."flip\\n=x"]\ndropout = [0.1]', 'tune.space.when."flip =x": '),
        (
            'dropout = { low = 0, high = 0.5 }\n[when."dropout=0.1"]\nflip = [true]',
            'tune.space.when."dropout=0.1": dropout is searched over a range; name a field of choices',
        ),
        (
            'backbone = ["ResNet50"]\n[when."backbone=ResNet50"]\nflip = [true]\n[when."flip=true"]\ndropout = [0.1]',
            'tune.space.when."flip=true": flip is itself asked under a condition; name a field that is always asked',
        ),
        (
            'flip = [true]\n[when."flip=true".when."flip=true"]\ndropout = [0.1]',
            'tune.space.when."flip=true".when: conditions cannot stand inside one another',
        ),
        (
            'flip = [true]\n[when."flip=true"]\nbackbone = ["ResNet50"]',
            'tune.space.when."flip=true".backbone: the backbone is asked first of all; write it under [tune.space]',
        ),
        (
            'flip = [true]\ndropout = [0.1]\n[when."flip=true"]\ndropout = [0.2]',
            'tune.space.when."flip=true".dropout: dropout stands under [tune.space] too, where it is always asked',
        ),
        (
            'flip = [true, false]\nema = [0.9]\n[when."flip=true"]\ndropout = [0.2]\n[when."ema=0.9"]\ndropout = [0.3]',
            'tune.space.when."ema=0.9".dropout: dropout stands under "flip=true" too, and both can hold; use values of',
        ),
        (
            'flip = [true, false]\n[when."flip=true|false"]\ndropout = [0.2]\n[when."flip=true"]\ndropout = [0.3]',
            'tune.space.when."flip=true".dropout: dropout stands under "flip=true|false" too, and both can hold',
        ),
        ('flip = [true]\n[when."flip=true"]\nepoch = [1]', 'tune.space.when."flip=true".epoch: unknown setting'),
        (
            'flip = [true]\n[when."flip=true"]\nmomentum = { low = 0, high = 1 }',
            'tune.space.when."flip=true".momentum.high: Input should be less than 1 (got 1)',
        ),
        (
            'flip = [true, false]\n[when."flip=true"]\nsize = "prepared"',
            "tune.space.when: with flip=false no size is asked and several are prepared; set one under [train]",
        ),
        # what cannot stand together
        (
            "xla = [true, false]\nsync_batchnorm = [false, true]",
            "tune.space: a trial may have xla=true, sync_batchnorm=true: sync_batchnorm: statistics cannot be",
        ),
        (
            'xla = [true, false]\n[when."xla=true"]\nsync_batchnorm = [true]',
            "tune.space: a trial may have xla=true, sync_batchnorm=true: ",
        ),
        (
            'flip = [true, false]\n[when."flip=true"]\nsync_batchnorm = [true]\nxla = [true]',
            "tune.space: a trial may have flip=true, sync_batchnorm=true, xla=true: ",
        ),
    ],
)
def test_refusals(text: str, expected: str) -> None:
    said = refusal(text)
    assert expected in said
    assert said.startswith("tune.space")
    if expected.startswith("tune.space"):
        assert said.startswith(expected)


@pytest.mark.parametrize("field", module._FIXED)
def test_fields_that_are_never_searched(field: str) -> None:
    assert field in TrainSettings.model_fields
    assert refusal(f"{field} = [1, 2]").startswith(f"tune.space.{field}: cannot be searched, because ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("batch_size = [16, 32]", "tune.space.batch_size.0: 16 cannot be shared equally by 3 workers; use 18"),
        (
            "batch_size = { low = 16, high = 48 }",
            "tune.space.batch_size.low: 16 cannot be shared equally by 3 workers; use 18",
        ),
        (
            "batch_size = { low = 15, high = 45 }",
            "tune.space.batch_size.step: gives sizes that 3 workers cannot share equally; use a multiple of 3",
        ),
        (
            "batch_size = { low = 15, high = 47, step = 16 }",
            "tune.space.batch_size.step: gives sizes that 3 workers cannot share equally; use a multiple of 3",
        ),
        (
            "batch_size = { low = 15, high = 45, log = true }",
            "tune.space.batch_size.log: gives sizes that 3 workers cannot share equally; use step = 3, or a list",
        ),
    ],
)
def test_batches_that_the_workers_cannot_share(text: str, expected: str) -> None:
    assert refusal(text, TrainSettings(workers=3)) == expected
    read(text)


def test_batches_that_the_workers_can_share() -> None:
    base = TrainSettings(workers=3)
    space = read("batch_size = { low = 15, high = 45, step = 6 }", base)
    sizes = {space.settings(params, base).batch_size for params in asked(space, 100)}
    assert sizes == {15, 21, 27, 33, 39, 45}
    assert asked(read("batch_size = { low = 15, high = 15, log = true }", base), 1) == [{"batch_size": 15}]


def test_settings_that_exclude_each_other_may_be_searched_apart() -> None:
    text = 'sync_batchnorm = [true, false]\n[when."sync_batchnorm=false"]\nxla = [true, false]'
    for base in (BASE, TrainSettings(sync_batchnorm=True)):
        space = read(text, base)
        for params in asked(space, 50):
            space.settings(params, base)
    # Where xla is not asked, it is as the base has it.
    assert refusal(text, TrainSettings(xla=True)).startswith("tune.space: a trial may have sync_batchnorm=true: sync_")
    said = refusal("xla = [true, false]", TrainSettings(deterministic=True))
    assert said.startswith("tune.space: a trial may have xla=true: deterministic: XLA has no deterministic gradient")
    assert refusal("xla = [true]", TrainSettings(sync_batchnorm=True)).startswith("tune.space: a trial may have xla=")


def test_a_size_for_every_trial() -> None:
    text = 'flip = [true, false]\n[when."flip=true"]\nsize = "prepared"\n'
    assert read(text, TrainSettings(size=224)).fields == ("flip", "size")
    assert read(text, sizes=[224]).fields == ("flip", "size")
    assert read(text + '[when."flip=false"]\nsize = [224]').names == ("flip", "size@true", "size@false")


def test_the_backbone_is_asked_first_and_all_appear() -> None:
    for space in (read(FULL), read("")):
        found = asked(space, 100)
        assert {next(iter(params)) for params in found} == {"backbone"}
        assert {params["backbone"] for params in found} == set(space.backbones)
        assert {name for params in found for name in params} == set(space.names)


def test_conditions_are_asked_only_where_they_hold() -> None:
    space = read(FULL)
    for params in asked(space, 300):
        sgd, resnet = params["optimizer"] == "sgd", params["backbone"] == "ResNet50"
        assert ("momentum" in params) == sgd
        assert ("clip_norm" in params) == (not sgd)
        assert ("dense" in params) == resnet
        assert ("rotation@ResNet50" in params) == resnet
        assert ("rotation@DenseNet121|TinyCNN" in params) == (not resnet)
        assert ("zoom" in params) == (params["ema"] is None)
        values = space.values(params)
        assert values["rotation"] <= (10 if resnet else 5)
        assert list(values) == [field for field in space.fields if field in values]


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
def test_how_conditions_spell_values(choices: str, condition: str, held: set[Any]) -> None:
    space = read(f'{choices}\n[when."{condition}"]\nmomentum = [0.5, 0.6]')
    field = space.fields[0]
    values = [space.values(params) for params in asked(space, 100)]
    assert {one[field] for one in values if "momentum" in one} == held
    assert {one[field] for one in values if "momentum" not in one}.isdisjoint(held)


def test_values_are_those_of_the_settings() -> None:
    space = read(FULL)
    kinds = {
        "size": int,
        "batch_size": int,
        "frozen_epochs": int,
        "plateau_patience": int,
        "warmup_epochs": float,
        "dropout": float,
        "dense": tuple,
        "flip": bool,
        "weights": str,
    }
    seen: dict[str, set[Any]] = {}
    for params in asked(space, 300):
        for name, value in params.items():
            assert value is None or type(value) in (bool, int, float, str), name
        values = space.values(params)
        for field, value in values.items():
            seen.setdefault(field, set()).add(value)
            assert type(value) is kinds.get(field, type(value))
        chosen = space.settings(params, TrainSettings(epochs=3))
        assert chosen.epochs == 3
        assert {field: getattr(chosen, field) for field in values} == values
    assert seen["dropout"] == {0.0, 0.1, 0.2, 0.3, 0.4, 0.5}
    assert seen["dense"] == {(), (256,), (512, 256)}
    assert seen["ema"] == {None, 0.99, 0.999}
    assert seen["weights"] == {"none", "imagenet"}
    assert seen["size"] == {224, 320}
    assert seen["plateau_patience"] == {1, 3, 5, 7, 9}
    assert seen["frozen_epochs"] <= set(range(1, 9))


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"droput": 0.1}, "parameter droput: is not in the search space; did you mean 'dropout'?"),
        ({"batch_size": 17}, "parameter batch_size: 17 is none of its choices (16, 32, 64)"),
        ({"dense": "[1]"}, "parameter dense: '[1]' is none of its choices ([], [256], [512, 256])"),
        ({"dropout": "x"}, "parameter dropout: 'x' is no number"),
        ({"dropout": None}, "parameter dropout: None is no number"),
        ({"dropout": math.nan}, "parameter dropout: nan is no number"),
        (
            {"rotation@ResNet50": 1.0, "rotation@DenseNet121|TinyCNN": 1.0},
            "parameter rotation@DenseNet121|TinyCNN: rotation has a value already; a trial has one of each field",
        ),
    ],
)
def test_values_from_another_space_are_refused(params: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(FULL).values(params)
    assert str(caught.value) == expected


def test_settings_that_the_base_does_not_allow_are_refused() -> None:
    space = read("xla = [true, false]")
    with pytest.raises(ConfigError, match=r"^sync_batchnorm: "):
        space.settings({"xla": True}, TrainSettings(sync_batchnorm=True))
    with pytest.raises(ConfigError, match=r"^dropout: Input should be less than 1"):
        read(FULL).settings({"dropout": 1.5}, BASE)


class Drawn:
    """A trial whose values hypothesis draws, both ends of every range included."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.params: dict[str, Any] = {}

    def _say(self, name: str, strategy: st.SearchStrategy[Any]) -> Any:
        assert name not in self.params
        self.params[name] = self.data.draw(strategy)
        return self.params[name]

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._say(name, st.sampled_from(choices))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        return self._say(name, st.integers(0, (high - low) // step).map(lambda i: low + i * step))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        if step is None:
            return self._say(name, st.floats(low, high) | st.sampled_from([low, high]))
        return self._say(name, st.integers(0, round((high - low) / step)).map(lambda i: low + i * step))


@settings(deadline=None, max_examples=200)
@given(st.data(), st.integers(1, 5), st.sampled_from([(224,), (224, 320), (64, 96, 128)]))
def test_every_trial_of_the_default_space_is_valid(data: st.DataObject, workers: int, sizes: tuple[int, ...]) -> None:
    base = TrainSettings(workers=workers, batch_size=32 * workers, size=sizes[0])
    space = Space.read({}, base, sizes)
    trial = Drawn(data)
    space.suggest(trial)  # type: ignore[arg-type]
    chosen = space.settings(trial.params, base)
    assert chosen.batch_size % workers == 0
    assert chosen.size in sizes
    assert chosen.idle() == []
    assert space.point(space.values(trial.params), "here")[0] == pytest.approx(trial.params)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_every_trial_of_a_full_space_is_valid(data: st.DataObject) -> None:
    space = read(FULL)
    trial = Drawn(data)
    space.suggest(trial)  # type: ignore[arg-type]
    values = space.values(trial.params)
    assert space.settings(trial.params, BASE).replace(**values) == space.settings(trial.params, BASE)
    params, left_out = space.point(values, "here")
    assert space.values(params) == values
    assert left_out == []


FIELDS = st.sampled_from([*TrainSettings.model_fields, "when", "droput", ""])
SCALARS = st.one_of(
    st.booleans(),
    st.integers(),
    st.integers(0, 100),
    st.sampled_from([10**400, -(10**400), 2**53, math.inf, math.nan, 1e308, 5e-324, 0.1, 0.5]),
    st.floats(),
    st.text(),
    st.sampled_from(["none", "prepared", "ResNet50", "TinyCNN", "adam", "sgd"]),
    st.dates(),
)
RAW = st.one_of(
    SCALARS,
    st.lists(SCALARS | st.lists(SCALARS, max_size=2), max_size=3),
    st.fixed_dictionaries(
        {"low": SCALARS, "high": SCALARS}, optional={"log": st.booleans() | SCALARS, "step": SCALARS, "x": SCALARS}
    ),
)
WHOLE = tomllib.loads(FULL)
WHENS = WHOLE.pop("when")
DECIDING = {field: WHOLE[field] for field in ("backbone", "optimizer", "ema")}
CONDITIONS = st.tuples(FIELDS, st.sampled_from(["true", "none", "ResNet50", "sgd|adam", "1e-3", "[]", ""])).map(
    "=".join
)


def tables(*known: Mapping[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Some keys of good tables, and sometimes one of anything."""
    good = [pair for table in known for pair in table.items()]
    some = st.lists(st.sampled_from(good), max_size=6).map(dict)
    return some | st.tuples(some, st.dictionaries(FIELDS, RAW, max_size=1)).map(lambda both: {**both[0], **both[1]})


@settings(deadline=None, max_examples=300)
@given(
    st.tuples(st.sampled_from([{}, DECIDING]), tables(WHOLE)).map(lambda both: {**both[0], **both[1]}),
    st.lists(st.sampled_from(list(WHENS.items())), max_size=3).map(dict)
    | st.dictionaries(st.sampled_from(list(WHENS)) | CONDITIONS | st.text(), tables(*WHENS.values()), max_size=2)
    | st.dictionaries(CONDITIONS, SCALARS, max_size=1),
    st.integers(1, 3),
    st.data(),
)
def test_any_table_gives_valid_settings_or_one_line(
    table: dict[str, Any], whens: dict[str, Any], workers: int, data: st.DataObject
) -> None:
    base = TrainSettings(workers=workers)
    space, said = outcome({**table, "when": whens} if whens else table, base)
    assert len(said.splitlines()) == 1
    if space is None:
        return
    json.dumps(space.describe())
    trial = Drawn(data)
    space.suggest(trial)  # type: ignore[arg-type]
    space.settings(trial.params, base)
    for params in asked(space, 3):
        space.settings(params, base)


def outcome(table: dict[str, Any], base: TrainSettings) -> tuple[Space | None, str]:
    try:
        return Space.read(table, base, SIZES), "fine"
    except ConfigError as error:
        return None, str(error)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 50), st.integers(1, 400), st.integers(0, 40), st.sampled_from([10, 100, 1000]), st.data())
def test_any_number_of_whole_steps(first: int, stride: int, count: int, scale: int, data: st.DataObject) -> None:
    low, step, high = first / scale, stride / scale, (first + count * stride) / scale
    space = Space.read({"warmup_epochs": {"low": low, "high": high, "step": step}}, BASE, SIZES)
    chosen = data.draw(st.integers(0, count))
    value = (first + chosen * stride) / scale
    params, _ = space.point({"warmup_epochs": value}, "here")
    assert space.values(params) == {"warmup_epochs": value}
    one = study(chosen)
    one.enqueue_trial(params)
    for _ in range(5):
        trial = one.ask()
        space.suggest(trial)
        assert low <= space.values(trial.params)["warmup_epochs"] <= high
    assert one.trials[0].params == params


def test_default_space() -> None:
    space = Space.read({}, BASE, SIZES)
    assert space == Space.read(default_space(BASE, SIZES), BASE, SIZES)
    assert space.backbones == ("ResNet50", "DenseNet121")
    assert space.conditional
    assert space.names == space.fields
    assert {"size", "batch_size", "dense", "weight_decay", "focal_gamma"} < set(space.fields)
    for params in asked(space, 100):
        values = space.values(params)
        assert ("weight_decay" in values) == (values["optimizer"] == "adamw")
        assert ("focal_gamma" in values) == (values["loss"] == "focal")
        assert ("dense" in values) == (values["backbone"] == "ResNet50")


def test_default_space_follows_sizes_and_workers() -> None:
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
    "dense": [512, 256],  # before the backbone that decides whether it is asked
    "backbone": "ResNet50",
    "rotation": 3,
    "dropout": 0.3,
    "ema": "none",
    "zoom": 0.05,
    "batch_size": 64,
    "learning_rate": 1e-5,
    "flip": False,
}


def test_a_point_becomes_optunas_values() -> None:
    params, left_out = read(FULL).point(POINT, "here")
    assert left_out == []
    assert params == {
        "dense": "[512, 256]",
        "backbone": "ResNet50",
        "rotation@ResNet50": 3.0,
        "dropout": 0.3,
        "ema": None,
        "zoom": 0.05,
        "batch_size": 64,
        "learning_rate": 1e-5,
        "flip": False,
    }
    assert type(params["rotation@ResNet50"]) is float
    # What a run's own settings say, where null is None.
    assert read(FULL).point({**POINT, "ema": None}, "here")[0] == params


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"droput": 0.1}, "runs/a: droput is not in the search space; did you mean 'dropout'?"),
        ({"epochs": 3}, "runs/a: epochs is not in the search space"),
        ({"momentum": 0.9}, "runs/a: momentum is asked only with optimizer=sgd; give that too, or leave momentum out"),
        ({"momentum": 0.9, "optimizer": "adam"}, "runs/a: momentum is asked only with optimizer=sgd; give that too"),
        ({"momentum": 0.4, "optimizer": "sgd"}, "runs/a: momentum: 0.4 is not in the search space, which has 0.5 to"),
        ({"momentum": 1.5, "optimizer": "sgd"}, "runs/a: momentum: Input should be less than 1 (got 1.5)"),
        ({"rotation": 11}, "runs/a: rotation: 11.0 is not in the search space, which has 0.0 to 10.0"),
        ({"batch_size": 48}, "runs/a: batch_size: 48 is not in the search space, which has 16, 32, 64"),
        ({"dropout": 0.25}, "runs/a: dropout: 0.25 is not in the search space, which has 0.0 to 0.5 in steps of 0.1"),
        (
            {"dense": [256, 512]},
            "runs/a: dense: [256, 512] is not in the search space, which has [], [256], [512, 256]",
        ),
        ({"dense": 256}, "runs/a: dense: Input should be a valid tuple (got 256)"),
        ({"clip_norm": None, "optimizer": "adam"}, "runs/a: clip_norm: none is not in the search space, which has 0.1"),
        ({"size": 300}, "runs/a: size: 300 is not in the search space, which has 224, 320"),
        ({"size": None}, "runs/a: size: none is not in the search space"),
        ({"a\nb": 1}, "runs/a: a b is not in the search space"),
    ],
)
def test_a_point_outside_the_space(changes: dict[str, Any], expected: str) -> None:
    space = read(FULL)
    values = {**POINT, **changes}
    with pytest.raises(ConfigError) as caught:
        space.point(values, "runs/a")
    said = str(caught.value)
    assert said.splitlines() == [said]
    assert said.startswith(expected)
    params, left_out = space.point(values, "runs/a", strict=False)
    bad = next(iter(changes))
    assert left_out == [bad]
    assert bad not in {name.partition("@")[0] for name in params}
    assert set(space.values(params)) == set(values) - {bad}


def test_what_hangs_on_a_value_left_out_is_left_out_too() -> None:
    params, left_out = read(FULL).point({"dense": [256], "backbone": "ResNet50V2"}, "here", strict=False)
    assert (params, left_out) == ({}, ["dense", "backbone"])


def test_a_whole_run_as_a_point() -> None:
    run = TrainSettings(backbone="ResNet50", optimizer="sgd", momentum=0.8, size=320, dropout=0.2, clip_norm=1.0)
    params, left_out = read(FULL).point(run.model_dump(), "here", strict=False)
    assert read(FULL).values(params).items() <= run.model_dump().items()
    assert {"epochs", "clip_norm", "findings"} < set(left_out)
    assert set(params) >= {"momentum", "size", "dense", "ema", "zoom", "rotation@ResNet50"}


@pytest.mark.parametrize("group", [False, True])
def test_an_enqueued_point_is_what_the_next_trial_has(group: bool) -> None:
    space = read(FULL)
    one = study(sampler=tpe(group))
    for _ in range(2):
        params, _ = space.point(POINT, "here")
        one.enqueue_trial(params)
        trial = one.ask()
        space.suggest(trial)
        assert params.items() <= trial.params.items()
        values = space.values(trial.params)
        assert values.items() >= {**POINT, "dense": (512, 256), "ema": None}.items()
        one.tell(trial, 0.5)


def test_a_trial_that_is_asked_again_says_the_same() -> None:
    """As after a restart, when the study's storage has the trial and the process is another."""
    space = read(FULL)
    one = study(3)
    for _ in range(50):
        trial = one.ask()
        space.suggest(trial)
        before = trial.params
        again = optuna.trial.Trial(one, trial._trial_id)
        pickle.loads(pickle.dumps(space)).suggest(again)
        assert again.params == before
        frozen = optuna.trial.FixedTrial(before)
        space.suggest(frozen)
        assert frozen.params == before


def tpe(group: bool = True) -> optuna.samplers.TPESampler:
    with warnings.catch_warnings():
        # `group` may change, says Optuna.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(multivariate=True, group=group, seed=1, n_startup_trials=5)


@pytest.mark.parametrize("text", ["", FULL])
def test_the_sampler_takes_the_space(text: str) -> None:
    space = read(text)
    one = study(sampler=tpe())
    for _ in range(30):
        trial = one.ask()
        space.suggest(trial)
        one.tell(trial, -abs(math.log10(space.settings(trial.params, BASE).learning_rate) + 3.5))
    assert len(one.get_trials(states=[optuna.trial.TrialState.COMPLETE])) == 30
    assert one.best_value > -0.3


def test_equal_spaces_have_equal_descriptions() -> None:
    said = read(FULL).describe()
    assert json.loads(json.dumps(said)) == said
    assert list(said) == list(read(FULL).names)
    other = (
        FULL.replace('"prepared"', "[320, 224]")
        .replace("low = 0, high = 2 }", "high = 2.0, low = 0.0, log = false }")
        .replace('"none", 0.99', '"null", 0.99')
        .replace("adam|adamw", "adamw | adam")
        .replace("frozen_epochs = { low = 1,", "frozen_epochs = { low = 1.0,")
    )
    assert other != FULL
    assert read(other).describe() == said
    assert read(other) == read(FULL)
    assert Space.read({}, BASE, SIZES).describe() == Space.read(default_space(BASE, SIZES), BASE, SIZES).describe()


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
