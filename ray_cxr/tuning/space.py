"""The search space of `tune`: which settings are searched, over what, and under which conditions.

It is read from the table `[tune.space]`, whose keys are fields of `TrainSettings`:

    backbone = ["ResNet50", "DenseNet121"]                       choices
    dense = [[], [256], [512, 256]]                              choices that are lists
    ema = ["none", 0.99, 0.999]                                  null, where the field may be
    size = "prepared"                                            every prepared size
    learning_rate = { low = 1e-5, high = 3e-3, log = true }      a range, of whole numbers where the field is one
    dropout = { low = 0.0, high = 0.5, step = 0.1 }
    [when."optimizer=sgd"]                                       asked only where that holds; a|b: one of them
    momentum = { low = 0.5, high = 0.99 }

A condition names a field of choices that is always asked. Under several conditions that exclude each other, a field may
have several ranges.

An Optuna parameter has its field's name, and `field@value` where the field has several. Ray splits names at slashes, so
none has one.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from ray_cxr import labels
from ray_cxr.config import TrainSettings
from ray_cxr.errors import ConfigError

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

_BUDGET = "it is part of the budget, which is the same for every trial"
_HOW = "it says how a trial runs, not what it trains"
_NETWORK = "it does not change the network"
#: Fields that are never searched, and why.
_FIXED: dict[str, str] = {
    "epochs": _BUDGET,
    "steps_per_epoch": _BUDGET,
    "patience": _BUDGET,
    "seed": "a search over seeds picks luck",
    "workers": _HOW,
    "cpus_per_worker": _HOW,
    "gpus_per_worker": _HOW,
    "max_failures": _HOW,
    "checkpoint_steps": _HOW,
    "deterministic": _HOW,
    "findings": "AUROCs of other findings cannot be compared",
    "calibration": _NETWORK,
    "operating_point": _NETWORK,
    "min_positives": _NETWORK,
}
#: Fields of which `TrainSettings` refuses some combinations.
_TOGETHER = ("xla", "deterministic", "sync_batchnorm")
#: Optuna computes with whole numbers as floats, which are exact up to here.
_LARGEST = 2**53
_MOST_STEPS = 1_000_000

_ROOT = "tune.space"
_DEFAULTS = TrainSettings()

#: What the two projects that this one grew out of trained, as points of a space.
KNOWN: tuple[Mapping[str, Any], ...] = (
    {
        "backbone": "ResNet50",
        "learning_rate": 1e-4,
        "optimizer": "adam",
        "loss": "bce",
        "dense": (512,),
        "dropout": 0.5,
        "pooling": "avg",
        "label_smoothing": 0.0,
        "schedule": "constant",
        "batch_size": 32,
        "rotation": 0.0,
        "contrast": 0.0,
        "shift": 0.0,
    },
    {
        "backbone": "DenseNet121",
        "learning_rate": 1e-4,
        "optimizer": "adam",
        "loss": "weighted_bce",
        "dropout": 0.0,
        "pooling": "avg",
        "label_smoothing": 0.0,
        "schedule": "constant",
        "batch_size": 32,
        "rotation": 0.0,
        "contrast": 0.0,
        "shift": 0.0,
    },
)


def default_space(base: TrainSettings, sizes: Sequence[int]) -> dict[str, Any]:
    """The table that stands for an empty `[tune.space]`.

    Args:
        base: its `workers` decide which batch sizes can be had.
        sizes: the prepared sizes, pixels; searched if there are several.
    """
    batches = [size for size in (16, 32, 64) if size % base.workers == 0]
    return {
        "backbone": ["ResNet50", "DenseNet121"],
        **({"size": "prepared"} if len(set(sizes)) > 1 else {}),
        "learning_rate": {"low": 1e-5, "high": 3e-3, "log": True},
        "optimizer": ["adam", "adamw"],
        "schedule": ["constant", "cosine"],
        **({"batch_size": batches} if batches else {}),
        "loss": ["bce", "weighted_bce", "focal"],
        "label_smoothing": {"low": 0.0, "high": 0.1, "step": 0.02},
        "pooling": ["avg", "max", "avgmax"],
        "dropout": {"low": 0.0, "high": 0.5, "step": 0.1},
        "rotation": {"low": 0.0, "high": 10.0, "step": 1.0},
        "shift": {"low": 0.0, "high": 0.1},
        "contrast": {"low": 0.0, "high": 0.3},
        "when": {
            "backbone=ResNet50": {"dense": [[], [512], [512, 256]]},
            "optimizer=adamw": {"weight_decay": {"low": 1e-6, "high": 1e-2, "log": True}},
            "loss=focal": {"focal_gamma": {"low": 0.5, "high": 4.0}},
        },
    }


@dataclass(frozen=True)
class _Condition:
    """Holds where `field` has one of `values`."""

    field: str
    values: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.field}={'|'.join(map(_spelled, self.values))}"

    def holds(self, values: Mapping[str, Any]) -> bool:
        return self.field in values and values[self.field] in self.values


@dataclass(frozen=True)
class _Choices:
    name: str
    field: str
    condition: _Condition | None
    choices: tuple[Any, ...]

    def __str__(self) -> str:
        return ", ".join(map(_spelled, self.choices))

    def __contains__(self, value: Any) -> bool:
        return value in self.choices

    def ask(self, trial: BaseTrial) -> Any:
        return self.decode(trial.suggest_categorical(self.name, [_plain(choice) for choice in self.choices]))

    def encode(self, value: Any) -> Any:
        return _plain(value)

    def decode(self, value: Any) -> Any:
        for choice in self.choices:
            if _plain(choice) == value:
                return choice
        raise _refusal(f"parameter {self.name}: {_shown(value)} is none of its choices ({self})")

    def describe(self) -> dict[str, Any]:
        return {"choices": [list(choice) if isinstance(choice, tuple) else choice for choice in self.choices]}


@dataclass(frozen=True)
class _Range:
    """`low` to `high`, both included; whole numbers if `whole`."""

    name: str
    field: str
    condition: _Condition | None
    low: float
    high: float
    step: float | None
    log: bool
    whole: bool

    def __str__(self) -> str:
        return f"{self.low} to {self.high}" + (f" in steps of {self.step}" if self.step else "")

    def __contains__(self, value: Any) -> bool:
        if value is None or not self.low <= value <= self.high:
            return False
        # The tolerance is Optuna's own.
        return self.step is None or abs((value - self.low) / self.step - self._steps(value, self.step)) < 1e-8

    def _steps(self, value: float, step: float) -> int:
        return round((value - self.low) / step)

    def ask(self, trial: BaseTrial) -> Any:
        if self.whole:
            low, high, step = int(self.low), int(self.high), int(self.step or 1)
            return self.decode(trial.suggest_int(self.name, low, high, step=step, log=self.log))
        return self.decode(trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log))

    def encode(self, value: Any) -> Any:
        return self.decode(value)

    def decode(self, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise _refusal(f"parameter {self.name}: {_shown(value)} is no number")
        if self.whole and value == int(value):
            return int(value)
        if self.step is None or value not in self:
            return value
        # Optuna says 0.30000000000000004, which would stand in every report.
        return float(Decimal(str(self.low)) + self._steps(value, self.step) * Decimal(str(self.step)))

    def describe(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "step": self.step, "log": self.log}


_Parameter = _Choices | _Range


@dataclass(frozen=True)
class Space:
    """A search space, to be asked one trial at a time.

    Attributes:
        parameters: in the order in which they are asked, the conditional last.
        backbones: the choices of the backbone, or the one that every trial has.
    """

    parameters: tuple[_Parameter, ...]
    backbones: tuple[str, ...]

    @classmethod
    def read(cls, table: Mapping[str, Any], base: TrainSettings, sizes: Sequence[int]) -> Space:
        """The space that a table `[tune.space]` spells; an empty table stands for `default_space`.

        Args:
            table: as TOML gives it.
            base: the settings that every trial has unless they are searched.
            sizes: the prepared sizes, pixels.

        Raises:
            ConfigError: a setting that is unknown or cannot be searched, a value that it cannot have, a condition that
                cannot hold, or values that cannot stand together.
        """
        placed = _read(table or default_space(base, sizes), base, sizes)
        _check_overlaps(placed)
        _check_sizes(placed, base, sizes)
        parameters = _named([parameter for _, parameter in placed])
        _check_together(parameters, base)
        return cls(
            parameters,
            next(
                (one.choices for one in parameters if isinstance(one, _Choices) and one.field == "backbone"),
                (base.backbone,),
            ),
        )

    @property
    def fields(self) -> tuple[str, ...]:
        """The settings that are searched, each once."""
        return tuple(dict.fromkeys(one.field for one in self.parameters))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all Optuna parameters."""
        return tuple(one.name for one in self.parameters)

    @property
    def conditional(self) -> bool:
        """Whether some parameters are asked only in some trials."""
        return any(one.condition is not None for one in self.parameters)

    @property
    def categorical(self) -> tuple[str, ...]:
        """The names of the Optuna parameters that are choices."""
        return tuple(one.name for one in self.parameters if isinstance(one, _Choices))

    def suggest(self, trial: BaseTrial) -> None:
        """Ask a trial for every parameter whose condition holds; asked again, it gives the same."""
        values: dict[str, Any] = {}
        for one in self.parameters:
            if one.condition is None or one.condition.holds(values):
                values[one.field] = one.ask(trial)

    def values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Optuna's values, by parameter, as values of settings, by field.

        Raises:
            ConfigError: a parameter or a choice that is not in the space, or two parameters of one field.
        """
        by_name = {one.name: one for one in self.parameters}
        values: dict[str, Any] = {}
        for name, value in params.items():
            if name not in by_name:
                raise _refusal(f"parameter {name}: is not in the search space{labels.suggestion(name, by_name)}")
            field = by_name[name].field
            if field in values:
                raise _refusal(f"parameter {name}: {field} has a value already; a trial has one of each field")
            values[field] = by_name[name].decode(value)
        return values

    def settings(self, params: Mapping[str, Any], base: TrainSettings) -> TrainSettings:
        """The settings of the trial with these Optuna values; `base` has the rest.

        Raises:
            ConfigError: see `values`, or values that `base` does not allow.
        """
        return base.replace(**self.values(params))

    def point(self, values: Mapping[str, Any], where: str, *, strict: bool = True) -> tuple[dict[str, Any], list[str]]:
        """A known configuration as Optuna's values, for `study.enqueue_trial`.

        Args:
            values: settings by field; those that are missing are left to the sampler.
            where: the place to name in an error.
            strict: refuse what cannot be asked for; else leave it out.

        Returns:
            the values by parameter, and the fields left out.

        Raises:
            ConfigError: strict, and a field is not in the space, or not asked beside the others, or its value is not in
                the space.
        """
        checked: dict[str, Any] = {}
        params: dict[str, Any] = {}
        placed: set[str] = set()
        for field, value in values.items():
            try:
                checked[field] = self._checked(field, value, where)
            except ConfigError:
                if strict:
                    raise
        # Only now: whether a field is asked may hang on one that stands after it.
        for field, value in checked.items():
            try:
                asked = self._asked(field, checked, where)
            except ConfigError:
                if strict:
                    raise
                continue
            params[asked.name] = asked.encode(value)
            placed.add(field)
        return params, [field for field in values if field not in placed]

    def _checked(self, field: str, value: Any, where: str) -> Any:
        if field not in self.fields:
            raise _refusal(f"{where}: {field} is not in the search space{labels.suggestion(field, self.fields)}")
        return _valid(field, value, f"{where}: {field}")

    def _asked(self, field: str, values: Mapping[str, Any], where: str) -> _Parameter:
        """The parameter that is asked for a field beside these values, and can have its value."""
        mine = [one for one in self.parameters if one.field == field]
        asked = next((one for one in mine if one.condition is None or one.condition.holds(values)), None)
        if asked is None:
            conditions = " or ".join(str(one.condition) for one in mine)
            raise _refusal(f"{where}: {field} is asked only with {conditions}; give that too, or leave {field} out")
        if values[field] not in asked:
            raise _refusal(f"{where}: {field}: {_spelled(values[field])} is not in the search space, which has {asked}")
        return asked

    def describe(self) -> dict[str, Any]:
        """What the space is, as JSON can hold it: equal spaces have equal descriptions, however they were written.

        The order of choices counts, as it does to Optuna; that of the keys does not, so sort them before a digest.
        """
        return {
            one.name: {
                "field": one.field,
                "when": None if one.condition is None else str(one.condition),
                **one.describe(),
            }
            for one in self.parameters
        }


def _read(table: Mapping[str, Any], base: TrainSettings, sizes: Sequence[int]) -> list[tuple[str, _Parameter]]:
    """Every parameter with its place in the file, in the order of asking, with the field for a name."""
    tops = {field: raw for field, raw in table.items() if field != "when"}
    whens = table.get("when", {})
    if not isinstance(whens, Mapping):
        raise _refusal(f'{_ROOT}.when: is a table of conditions: write [{_ROOT}.when."field=value"] and its keys below')
    if not tops and not whens:
        raise _refusal(f"{_ROOT}: asks for nothing; name settings to search, or remove the table for the default space")
    # Everything else may depend on the backbone, and a reader of a list of trials looks for it first.
    order = sorted(tops, key=lambda field: field != "backbone")
    placed = []
    for field in order:
        place = f"{_ROOT}.{field}"
        placed.append((place, _parameter(field, tops[field], place, None, base, sizes)))
    always = {parameter.field: parameter for _, parameter in placed}
    inner = {field for fields in whens.values() if isinstance(fields, Mapping) for field in fields}
    for text, fields in whens.items():
        at = f'{_ROOT}.when."{text}"'
        condition = _condition(text, at, always, inner)
        if not isinstance(fields, Mapping) or not fields:
            raise _refusal(f"{at}: asks for nothing; write the settings that are searched under it, or remove it")
        for field, raw in fields.items():
            place = f"{at}.{field}"
            if field == "when":
                raise _refusal(f"{place}: conditions cannot stand inside one another; use field=value of [{_ROOT}]")
            if field == "backbone":
                raise _refusal(f"{place}: the backbone is asked first of all; write it under [{_ROOT}]")
            if field in always:
                raise _refusal(f"{place}: {field} stands under [{_ROOT}] too, where it is always asked; remove one")
            placed.append((place, _parameter(field, raw, place, condition, base, sizes)))
    return placed


def _condition(text: str, place: str, always: Mapping[str, _Parameter], inner: set[str]) -> _Condition:
    field, equals, wanted = (part.strip() for part in text.partition("="))
    if not equals:
        raise _refusal(f"{place}: write the condition as field=value")
    asked = always.get(field)
    if asked is None:
        if field not in TrainSettings.model_fields:
            raise _refusal(f"{place}: unknown setting {field!r}{labels.suggestion(field, always)}")
        if field in inner:
            raise _refusal(f"{place}: {field} is itself asked under a condition; name a field that is always asked")
        raise _refusal(f"{place}: {field} is not searched; list its choices under [{_ROOT}], or drop the condition")
    if not isinstance(asked, _Choices):
        raise _refusal(f"{place}: {field} is searched over a range; name a field of choices")
    found = []
    for word in wanted.split("|"):
        index = next((i for i, choice in enumerate(asked.choices) if _spells(word.strip(), choice)), None)
        if index is None:
            near = labels.suggestion(word.strip(), map(_spelled, asked.choices))
            raise _refusal(f"{place}: {word.strip()!r} is none of the choices of {field} ({asked}){near}")
        found.append(index)
    return _Condition(field, tuple(asked.choices[index] for index in sorted(set(found))))


def _parameter(
    field: str,
    raw: Any,
    place: str,
    condition: _Condition | None,
    base: TrainSettings,
    sizes: Sequence[int],
) -> _Parameter:
    """What one key says, with the field for a name.

    Raises:
        ConfigError: it cannot be searched so.
    """
    if field not in TrainSettings.model_fields:
        near = labels.suggestion(field, TrainSettings.model_fields.keys() - _FIXED.keys())
        raise _refusal(f"{place}: unknown setting {field!r}{near}")
    if field in _FIXED:
        raise _refusal(f"{place}: cannot be searched, because {_FIXED[field]}; set it under [train]")
    if field == "size":
        return _sizes(raw, place, condition, sizes)
    if isinstance(raw, Mapping):
        ranged = _range(field, raw, place, condition)
        if field == "batch_size":
            _check_batches(ranged, place, base.workers)
        return ranged
    if not isinstance(raw, (list, tuple)):
        raise _refusal(
            f"{place}: one value is no search; set it under [train], or write a list of choices "
            "or a range { low = ..., high = ... }"
        )
    listed = _choices(field, raw, place, condition)
    if field == "batch_size":
        for i, size in enumerate(listed.choices):
            _check_shares(size, f"{place}.{i}", base.workers)
    return listed


def _choices(field: str, raw: Sequence[Any], place: str, condition: _Condition | None) -> _Choices:
    if not raw:
        raise _refusal(f"{place}: the list is empty; name the choices")
    found: list[Any] = []
    for i, item in enumerate(raw):
        at = f"{place}.{i}"
        if _takes(field, tuple) and not isinstance(item, (list, tuple)):
            raise _refusal(f"{at}: each choice is a list itself, as in {field} = [[], [256]] (got {_shown(item)})")
        value = _valid(field, item, at)
        if value in found:
            raise _refusal(f"{at}: {_spelled(value)} stands twice; name each choice once")
        found.append(value)
    return _Choices(field, field, condition, tuple(found))


def _sizes(raw: Any, place: str, condition: _Condition | None, sizes: Sequence[int]) -> _Choices:
    there = sorted(set(sizes))
    if raw == "prepared":
        raw = there
    if not isinstance(raw, (list, tuple)):
        raise _refusal(f'{place}: write "prepared" for every prepared size, or a list of them; one: under [train]')
    listed = _choices("size", raw, place, condition)
    for i, size in enumerate(listed.choices):
        if size not in there:
            raise _refusal(f"{place}.{i}: {_spelled(size)} is not prepared; there are {', '.join(map(str, there))}")
    # Sorted, so that "prepared" and the list of all are one space.
    return dataclasses.replace(listed, choices=tuple(sorted(listed.choices)))


def _range(field: str, raw: Mapping[str, Any], place: str, condition: _Condition | None) -> _Range:
    whole = not _takes(field, float)
    if whole and not _takes(field, int):
        raise _refusal(f"{place}: {field} is no number and has no range; write a list of choices")
    known = ("low", "high", "log", "step")
    for key in raw:
        if key not in known:
            raise _refusal(f"{place}: unknown key {key!r}{labels.suggestion(str(key), known)}")
    if "low" not in raw or "high" not in raw:
        raise _refusal(f"{place}: a range needs both ends; write {{ low = ..., high = ... }}")
    for key in ("low", "high", "step"):
        if key in raw and (isinstance(raw[key], bool) or not isinstance(raw[key], (int, float))):
            raise _refusal(f"{place}.{key}: is no number (got {_shown(raw[key])})")
    low, high = (_valid(field, raw[end], f"{place}.{end}") for end in ("low", "high"))
    log, step = raw.get("log", False), raw.get("step")
    if not isinstance(log, bool):
        raise _refusal(f"{place}.log: use true or false (got {_shown(log)})")
    if low > high:
        raise _refusal(f"{place}: low is {low} and high only {high}; exchange them")
    if log and step is not None:
        raise _refusal(f"{place}: log and step exclude each other; remove one")
    if log and low <= 0:
        raise _refusal(f"{place}.low: a log range begins above 0 (got {low})")
    if step is not None:
        step = _step(step, low, high, place, whole)
    elif whole and not log:
        step = 1
    return _Range(field, field, condition, low, high, step, log, whole)


def _step(step: float, low: float, high: float, place: str, whole: bool) -> float:
    """A step that leads from one end to the other. Optuna would end the range early.

    Raises:
        ConfigError: it does not.
    """
    at = f"{place}.step"
    if not 0 < step <= _LARGEST:
        raise _refusal(f"{at}: must be above 0, and finite (got {_shown(step)})")
    if whole and step != int(step):
        raise _refusal(f"{at}: must be a whole number, as the setting is (got {step})")
    step = int(step) if whole else float(step)
    first, stride = Decimal(str(low)), Decimal(str(step))
    count = (Decimal(str(high)) - first) / stride
    if count > _MOST_STEPS:
        raise _refusal(f"{at}: {step} makes more than {_MOST_STEPS} steps; leave it out")
    if count != int(count):
        last = first + int(count) * stride
        raise _refusal(f"{at}: steps of {step} from {low} miss {high}; set high to {last} or {last + stride}")
    return step


def _check_shares(size: int, place: str, workers: int) -> None:
    if size % workers:
        raise _refusal(
            f"{place}: {size} cannot be shared equally by {workers} workers; use {math.ceil(size / workers) * workers}"
        )


def _check_batches(ranged: _Range, place: str, workers: int) -> None:
    """Every batch size of a range can be shared by the workers.

    Raises:
        ConfigError: one cannot.
    """
    _check_shares(int(ranged.low), f"{place}.low", workers)
    if workers == 1 or ranged.low == ranged.high:
        return
    if ranged.log:
        raise _refusal(
            f"{place}.log: gives sizes that {workers} workers cannot share equally; use step = {workers}, or a list"
        )
    if int(ranged.step or 1) % workers:
        raise _refusal(
            f"{place}.step: gives sizes that {workers} workers cannot share equally; use a multiple of {workers}"
        )


def _check_overlaps(placed: Sequence[tuple[str, _Parameter]]) -> None:
    """No trial asks for a field twice.

    Raises:
        ConfigError: two conditions of a field can hold together.
    """
    for (_, one), (place, other) in itertools.combinations(placed, 2):
        if one.field != other.field or one.condition is None or other.condition is None:
            continue
        apart = one.condition.field == other.condition.field and not any(
            value in other.condition.values for value in one.condition.values
        )
        if not apart:
            raise _refusal(
                f'{place}: {one.field} stands under "{one.condition}" too, and both can hold; '
                "use values of one field, each in one condition"
            )


def _check_sizes(placed: Sequence[tuple[str, _Parameter]], base: TrainSettings, sizes: Sequence[int]) -> None:
    """A trial that is not asked for its size has one.

    Raises:
        ConfigError: there are several sizes, and it has none.
    """
    conditions = [one.condition for _, one in placed if one.field == "size" and one.condition is not None]
    if not conditions or base.size is not None or len(set(sizes)) <= 1:
        return
    # The conditions of one field are values of one other, each named once.
    deciding = next(one for _, one in placed if one.field == conditions[0].field)
    assert isinstance(deciding, _Choices)
    rest = [value for value in deciding.choices if not any(value in condition.values for condition in conditions)]
    if rest:
        raise _refusal(
            f"{_ROOT}.when: with {_Condition(deciding.field, tuple(rest))} no size is asked and several are prepared; "
            "set one under [train], or search it there too"
        )


def _check_together(parameters: Sequence[_Parameter], base: TrainSettings) -> None:
    """Every combination that can be asked of the fields that depend on each other is allowed.

    Raises:
        ConfigError: one is not.
    """
    chosen = [one for one in parameters if isinstance(one, _Choices) and one.field in _TOGETHER]
    deciding = {one.condition.field for one in chosen if one.condition is not None}
    first = [
        one
        for one in parameters
        if isinstance(one, _Choices) and one.condition is None and (one in chosen or one.field in deciding)
    ]
    for outer in itertools.product(*(one.choices for one in first)):
        values = {one.field: value for one, value in zip(first, outer, strict=True)}
        then = [one for one in chosen if one.condition is not None and one.condition.holds(values)]
        for inner in itertools.product(*(one.choices for one in then)):
            every = {**values, **{one.field: value for one, value in zip(then, inner, strict=True)}}
            try:
                base.replace(**{field: value for field, value in every.items() if field in _TOGETHER})
            except ConfigError as error:
                said = ", ".join(f"{field}={_spelled(value)}" for field, value in every.items())
                raise _refusal(f"{_ROOT}: a trial may have {said}: {error}") from None


def _named(parameters: Sequence[_Parameter]) -> tuple[_Parameter, ...]:
    """The parameters with the names that Optuna sees: no two are equal, and none has a slash.

    The conditions of one field exclude each other, so their values tell its parameters apart.
    """
    fields = [one.field for one in parameters]
    named = []
    for one in parameters:
        if fields.count(one.field) > 1 and one.condition is not None:
            values = "|".join(map(_spelled, one.condition.values)).replace("%", "%25").replace("/", "%2F")
            one = dataclasses.replace(one, name=f"{one.field}@{values}")
        named.append(one)
    return tuple(named)


def _valid(field: str, value: Any, place: str) -> Any:
    """A value of one field as `TrainSettings` holds it.

    Raises:
        ConfigError: the field cannot have it.
    """
    if value in ("none", "null") and _takes(field, types.NoneType):
        value = None
    try:
        value = getattr(_DEFAULTS.replace(**{field: value}), field)
    except ConfigError as error:
        text = str(error)
        raise _refusal(place + text.removeprefix(field) if text.startswith(field) else f"{place}: {text}") from None
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise _refusal(f"{place}: is too large a number; use at most {_LARGEST}")
    return value


def _takes(field: str, kind: type) -> bool:
    """Whether a field's annotation names this type, alone or in a union."""
    annotation = TrainSettings.model_fields[field].annotation
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return any(
        kind in (one, typing.get_origin(one)) for one in (typing.get_args(annotation) if union else [annotation])
    )


def _plain(value: Any) -> Any:
    """A choice as Optuna can store it."""
    return json.dumps(list(value)) if isinstance(value, tuple) else value


def _spelled(value: Any) -> str:
    """A value as a condition spells it."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def _spells(text: str, value: Any) -> bool:
    if text == _spelled(value):
        return True
    if isinstance(value, str):
        return False
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return bool((tuple(said) if isinstance(said, list) else said) == value)


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 100 else text[:97] + "..."


def _refusal(text: str) -> ConfigError:
    """The error with `text` on one line, whatever the user's own text holds."""
    return ConfigError(" ".join(text.split()))
