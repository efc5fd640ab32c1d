"""Read the table `[tune.space]`, and refuse fields and values that cannot be searched."""

from __future__ import annotations

import dataclasses
import itertools
import math
import types
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from ray_cxr import labels
from ray_cxr.config import TrainSettings, make_error, shorten_repr
from ray_cxr.errors import ConfigError
from ray_cxr.tuning.parameters import Choices, Condition, Parameter, Range, format_value, matches_text

_BUDGET = "it is part of the budget, which is the same for every trial"
_EXECUTION = "it changes how a trial runs, not what it trains"
_NO_EFFECT = "it does not change the model"
#: Fields that cannot be searched, and why.
NOT_SEARCHABLE: dict[str, str] = {
    **dict.fromkeys(("epochs", "steps_per_epoch", "patience"), _BUDGET),
    "seed": "a search over seeds selects luck",
    **dict.fromkeys(("workers", "cpus_per_worker", "gpus_per_worker", "max_failures"), _EXECUTION),
    **dict.fromkeys(("checkpoint_steps", "deterministic"), _EXECUTION),
    "findings": "AUROCs of different findings cannot be compared",
    **dict.fromkeys(("calibration", "operating_point", "min_positives"), _NO_EFFECT),
}
#: Fields of which `TrainSettings` refuses some combinations.
_DEPENDENT = {"xla", "deterministic", "sync_batchnorm"}
#: Optuna stores integers as floats, which are exact up to this number.
_MAX_INTEGER = 2**53
_MAX_STEPS = 1_000_000
_ROOT = "tune.space"
_DEFAULTS = TrainSettings()


def read_parameters(table: Mapping[str, Any], base: TrainSettings, sizes: Sequence[int]) -> tuple[Parameter, ...]:
    """Return the parameters of a table in the order of suggestion, the conditional ones last.

    Raises:
        ConfigError: a setting is unknown or cannot be searched, a value is invalid, a condition can never hold, or
            values exclude each other.
    """
    entries = _read_table(table, base, sizes)
    _check_overlaps(entries)
    parameters = [parameter for _, parameter in entries]
    _check_every_trial_has_size(parameters, base, sizes)
    _check_combinations(parameters, base)
    return tuple(parameters)


def validate(field: str, value: Any, key: str) -> Any:
    """Return a value of a field as `TrainSettings` holds it, or raise ConfigError with `key` in front."""
    if value in ("none", "null") and accepts(field, types.NoneType):
        value = None
    try:
        value = getattr(_DEFAULTS.replace(**{field: value}), field)
    except ConfigError as error:
        text = str(error)
        raise make_error(key + text.removeprefix(field) if text.startswith(field) else f"{key}: {text}") from None
    if isinstance(value, int) and abs(value) > _MAX_INTEGER:
        raise make_error(f"{key}: number too large; use at most {_MAX_INTEGER}")
    return value


def accepts(field: str, kind: type) -> bool:
    """Return whether the annotation of a field names this type, alone or in a union."""
    annotation = TrainSettings.model_fields[field].annotation
    parts = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return any(kind in (part, typing.get_origin(part)) for part in parts)


def _read_table(table: Mapping[str, Any], base: TrainSettings, sizes: Sequence[int]) -> list[tuple[str, Parameter]]:
    """Return each parameter after its key in the file."""
    tops = {field: raw for field, raw in table.items() if field != "when"}
    whens = table.get("when", {})
    if not isinstance(whens, Mapping):
        raise make_error(f'{_ROOT}.when: must be a table; write [{_ROOT}.when."field=value"] and its keys below it')
    if not tops and not whens:
        raise make_error(f"{_ROOT}: no settings; name settings to search, or remove the table to use the default")
    # Other parameters may depend on the backbone, and readers of a list of trials look for it first.
    entries = [
        (key := f"{_ROOT}.{field}", _read_parameter(field, tops[field], key, base, sizes))
        for field in sorted(tops, key=lambda field: field != "backbone")
    ]
    unconditional = {parameter.field: parameter for _, parameter in entries}
    conditional = Counter(field for fields in whens.values() if isinstance(fields, Mapping) for field in fields)
    for text, fields in whens.items():
        when = f'{_ROOT}.when."{text}"'
        condition = _read_condition(text, when, unconditional, conditional)
        if not isinstance(fields, Mapping) or not fields:
            raise make_error(f"{when}: no settings; write the settings to search below it, or remove it")
        for field, raw in fields.items():
            key = f"{when}.{field}"
            if field == "when":
                raise make_error(f"{key}: conditions cannot be nested; use field=value of [{_ROOT}]")
            if field == "backbone":
                raise make_error(f"{key}: the backbone cannot be conditional; move it to [{_ROOT}]")
            if field in unconditional:
                raise make_error(f"{key}: {field} is also under [{_ROOT}], which applies to all trials; remove one")
            # Conditions of one field exclude each other, so their values distinguish its parameters.
            values = "|".join(map(format_value, condition.values)).replace("%", "%25").replace("/", "%2F")
            name = f"{field}@{values}" if conditional[field] > 1 else field
            parameter = _read_parameter(field, raw, key, base, sizes)
            entries.append((key, dataclasses.replace(parameter, name=name, condition=condition)))
    return entries


def _read_condition(
    text: str, key: str, unconditional: Mapping[str, Parameter], conditional: Mapping[str, int]
) -> Condition:
    field, equals, wanted = (part.strip() for part in text.partition("="))
    if not equals:
        raise make_error(f"{key}: write the condition as field=value")
    parameter = unconditional.get(field)
    if parameter is None:
        if field not in TrainSettings.model_fields:
            raise make_error(f"{key}: unknown setting {field!r}{labels.suggest(field, unconditional)}")
        if field in conditional:
            raise make_error(f"{key}: {field} is conditional itself; use a field of [{_ROOT}]")
        raise make_error(f"{key}: {field} is not searched; list its choices under [{_ROOT}], or drop the condition")
    if not isinstance(parameter, Choices):
        raise make_error(f"{key}: {field} is searched over a range; use a field with choices")
    indices = set()
    for word in map(str.strip, wanted.split("|")):
        index = next((i for i, choice in enumerate(parameter.choices) if matches_text(word, choice)), None)
        if index is None:
            near = labels.suggest(word, map(format_value, parameter.choices))
            raise make_error(f"{key}: {word!r} is not one of the choices of {field} ({parameter}){near}")
        indices.add(index)
    return Condition(field, tuple(parameter.choices[index] for index in sorted(indices)))


def _read_parameter(field: str, raw: Any, key: str, base: TrainSettings, sizes: Sequence[int]) -> Parameter:
    """Return the parameter that one key of the table describes, without a condition."""
    if field not in TrainSettings.model_fields:
        near = labels.suggest(field, TrainSettings.model_fields.keys() - NOT_SEARCHABLE.keys())
        raise make_error(f"{key}: unknown setting {field!r}{near}")
    if field in NOT_SEARCHABLE:
        raise make_error(f"{key}: cannot be searched because {NOT_SEARCHABLE[field]}; set it under [train]")
    if field == "size":
        return _read_sizes(raw, key, sizes)
    parameter: Parameter
    if isinstance(raw, Mapping):
        parameter = _read_range(field, raw, key)
    elif isinstance(raw, (list, tuple)):
        parameter = _read_choices(field, raw, key)
    else:
        raise make_error(f"{key}: a single value; set it under [train], or write a list or {{ low = ..., high = ... }}")
    if field == "batch_size":
        _check_batch_sizes(parameter, key, base.workers)
    return parameter


def _read_choices(field: str, raw: Sequence[Any], key: str) -> Choices:
    if not raw:
        raise make_error(f"{key}: the list is empty; name the choices")
    choices: list[Any] = []
    for i, item in enumerate(raw):
        if accepts(field, tuple) and not isinstance(item, (list, tuple)):
            example = f"{field} = [[], [256]]"
            raise make_error(f"{key}.{i}: each choice must be a list, as in {example} ({shorten_repr(item)})")
        value = validate(field, item, f"{key}.{i}")
        if value in choices:
            raise make_error(f"{key}.{i}: {format_value(value)} is listed twice; remove one")
        choices.append(value)
    return Choices(field, field, None, tuple(choices))


def _read_sizes(raw: Any, key: str, sizes: Sequence[int]) -> Choices:
    prepared = sorted(set(sizes))
    if raw == "prepared":
        raw = prepared
    if not isinstance(raw, (list, tuple)):
        raise make_error(f'{key}: write "prepared" or a list of sizes; set a single size under [train]')
    parameter = _read_choices("size", raw, key)
    for i, size in enumerate(parameter.choices):
        if size not in prepared:
            have = ", ".join(map(str, prepared))
            raise make_error(f"{key}.{i}: size {format_value(size)} is not prepared; use one of {have}")
    # Sorted, so that "prepared" and the list of all sizes describe the same space.
    return dataclasses.replace(parameter, choices=tuple(sorted(parameter.choices)))


def _read_range(field: str, raw: Mapping[str, Any], key: str) -> Range:
    whole = not accepts(field, float)
    if whole and not accepts(field, int):
        raise make_error(f"{key}: {field} is not a number, so it cannot have a range; write a list of choices")
    known = ("low", "high", "log", "step")
    for name in raw:
        if name not in known:
            raise make_error(f"{key}: unknown key {name!r}{labels.suggest(str(name), known)}")
    if "low" not in raw or "high" not in raw:
        raise make_error(f"{key}: a range needs both ends; write {{ low = ..., high = ... }}")
    for name in ("low", "high", "step"):
        if name in raw and (isinstance(raw[name], bool) or not isinstance(raw[name], (int, float))):
            raise make_error(f"{key}.{name}: must be a number (got {shorten_repr(raw[name])})")
    low, high = (validate(field, raw[name], f"{key}.{name}") for name in ("low", "high"))
    log, step = raw.get("log", False), raw.get("step")
    if not isinstance(log, bool):
        raise make_error(f"{key}.log: use true or false (got {shorten_repr(log)})")
    if low > high:
        raise make_error(f"{key}: low ({low}) is above high ({high}); swap them")
    if log and step is not None:
        raise make_error(f"{key}: log and step exclude each other; remove one")
    if log and low <= 0:
        raise make_error(f"{key}.low: a log range must start above 0 (got {low})")
    if step is not None:
        step = _check_step(step, low, high, f"{key}.step", whole)
    elif whole and not log:
        step = 1
    return Range(field, field, None, low, high, step, log, whole)


def _check_step(step: float, low: float, high: float, key: str, whole: bool) -> float:
    """Return a step that leads exactly from `low` to `high`; Optuna would silently shorten the range."""
    if not 0 < step <= _MAX_INTEGER:
        raise make_error(f"{key}: must be above 0 and finite (got {shorten_repr(step)})")
    if whole and step != int(step):
        raise make_error(f"{key}: must be an integer, as the setting is (got {step})")
    step = int(step) if whole else float(step)
    first, stride = Decimal(str(low)), Decimal(str(step))
    count = (Decimal(str(high)) - first) / stride
    if count > _MAX_STEPS:
        raise make_error(f"{key}: {step} makes more than {_MAX_STEPS} steps; leave it out")
    if count != int(count):
        last = first + int(count) * stride
        raise make_error(f"{key}: steps of {step} from {low} miss {high}; set high to {last} or {last + stride}")
    return step


def _check_batch_sizes(parameter: Parameter, key: str, workers: int) -> None:
    """Check that the workers can share every batch size."""
    listed = enumerate(parameter.choices) if isinstance(parameter, Choices) else [("low", int(parameter.low))]
    for name, size in listed:
        if size % workers:
            remedy = f"use {math.ceil(size / workers) * workers}"
            raise make_error(f"{key}.{name}: {size} cannot be divided among {workers} workers; {remedy}")
    if isinstance(parameter, Choices) or workers == 1 or parameter.low == parameter.high:
        return
    if parameter.log or int(parameter.step or 1) % workers:
        name = "log" if parameter.log else "step"
        remedy = f"step = {workers}, or a list" if parameter.log else f"a multiple of {workers}"
        raise make_error(f"{key}.{name}: yields sizes that {workers} workers cannot divide equally; use {remedy}")


def _check_overlaps(entries: Sequence[tuple[str, Parameter]]) -> None:
    """Check that no two conditions of one field can hold together."""
    for (_, first), (key, second) in itertools.combinations(entries, 2):
        if first.field != second.field or first.condition is None or second.condition is None:
            continue
        shared = any(value in second.condition.values for value in first.condition.values)
        if first.condition.field != second.condition.field or shared:
            raise make_error(
                f'{key}: {first.field} is also under "{first.condition}", and both conditions can hold; '
                "use values of one field, each in one condition"
            )


def _check_every_trial_has_size(parameters: Sequence[Parameter], base: TrainSettings, sizes: Sequence[int]) -> None:
    """Check that trials without a searched size have the size of `[train]` or the only prepared one."""
    conditions = [parameter.condition for parameter in parameters if parameter.field == "size"]
    if conditions[:1] in ([], [None]) or base.size is not None or len(set(sizes)) <= 1:
        return
    without = [values for values in _combine(parameters, {"size"}) if "size" not in values]
    if without:
        (field,) = without[0]
        missing = Condition(field, tuple(values[field] for values in without))
        raise make_error(
            f"{_ROOT}.when: several sizes are prepared, and trials with {missing} have none; set one under [train], or "
            "search it there too"
        )


def _check_combinations(parameters: Sequence[Parameter], base: TrainSettings) -> None:
    """Check that `TrainSettings` allows every combination of the fields that depend on each other."""
    for values in _combine(parameters, _DEPENDENT):
        try:
            base.replace(**{field: value for field, value in values.items() if field in _DEPENDENT})
        except ConfigError as error:
            combination = ", ".join(f"{field}={format_value(value)}" for field, value in values.items())
            raise make_error(f"{_ROOT}: a trial may have {combination}: {error}") from None


def _combine(parameters: Sequence[Parameter], fields: set[str]) -> list[dict[str, Any]]:
    """Return every combination of choices of these fields and of the fields that their conditions name."""
    named = {parameter.condition.field for parameter in parameters if parameter.field in fields and parameter.condition}
    combinations: list[dict[str, Any]] = [{}]
    for parameter in parameters:
        if not isinstance(parameter, Choices) or parameter.field not in fields | named:
            continue
        extended = []
        for values in combinations:
            if parameter.applies(values):
                extended += [{**values, parameter.field: choice} for choice in parameter.choices]
            else:
                extended.append(values)
        combinations = extended
    return combinations
