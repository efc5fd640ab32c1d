"""Read the table `[tune.space]` and refuse what cannot be searched."""

from __future__ import annotations

import dataclasses
import itertools
import math
import types
import typing
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
_DEPENDENT = ("xla", "deterministic", "sync_batchnorm")
#: Optuna stores integers as floats, which are exact up to here.
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
    placed = _read_table(table, base, sizes)
    _check_overlaps(placed)
    _check_every_trial_has_size(placed, base, sizes)
    parameters = _rename_duplicates([parameter for _, parameter in placed])
    _check_combinations(parameters, base)
    return parameters


def validate(field: str, value: Any, place: str) -> Any:
    """Return a value of one field as `TrainSettings` holds it, or raise ConfigError with `place` in front."""
    if value in ("none", "null") and _accepts(field, types.NoneType):
        value = None
    try:
        value = getattr(_DEFAULTS.replace(**{field: value}), field)
    except ConfigError as error:
        text = str(error)
        raise make_error(place + text.removeprefix(field) if text.startswith(field) else f"{place}: {text}") from None
    if isinstance(value, int) and abs(value) > _MAX_INTEGER:
        raise make_error(f"{place}: number too large; use at most {_MAX_INTEGER}")
    return value


def _read_table(table: Mapping[str, Any], base: TrainSettings, sizes: Sequence[int]) -> list[tuple[str, Parameter]]:
    """Return every parameter with its place in the file; all are still named after their fields."""
    tops = {field: raw for field, raw in table.items() if field != "when"}
    whens = table.get("when", {})
    if not isinstance(whens, Mapping):
        raise make_error(
            f'{_ROOT}.when: must be a table of conditions: write [{_ROOT}.when."field=value"] and its keys below it'
        )
    if not tops and not whens:
        raise make_error(f"{_ROOT}: no settings; name settings to search, or remove the table to use the default")
    # Other parameters may depend on the backbone, and readers of a list of trials look for it first.
    placed = [
        (place := f"{_ROOT}.{field}", _read_parameter(field, tops[field], place, None, base, sizes))
        for field in sorted(tops, key=lambda field: field != "backbone")
    ]
    always = {parameter.field: parameter for _, parameter in placed}
    inner = {field for fields in whens.values() if isinstance(fields, Mapping) for field in fields}
    for text, fields in whens.items():
        at = f'{_ROOT}.when."{text}"'
        condition = _read_condition(text, at, always, inner)
        if not isinstance(fields, Mapping) or not fields:
            raise make_error(f"{at}: no settings; write the settings to search below it, or remove it")
        for field, raw in fields.items():
            place = f"{at}.{field}"
            if field == "when":
                raise make_error(f"{place}: conditions cannot be nested; use field=value of [{_ROOT}]")
            if field == "backbone":
                raise make_error(f"{place}: the backbone cannot be conditional; move it to [{_ROOT}]")
            if field in always:
                raise make_error(f"{place}: {field} is also under [{_ROOT}], which applies to all trials; remove one")
            placed.append((place, _read_parameter(field, raw, place, condition, base, sizes)))
    return placed


def _read_condition(text: str, place: str, always: Mapping[str, Parameter], inner: set[str]) -> Condition:
    field, equals, wanted = (part.strip() for part in text.partition("="))
    if not equals:
        raise make_error(f"{place}: write the condition as field=value")
    parameter = always.get(field)
    if parameter is None:
        if field not in TrainSettings.model_fields:
            raise make_error(f"{place}: unknown setting {field!r}{labels.suggest(field, always)}")
        if field in inner:
            raise make_error(f"{place}: {field} is conditional itself; use a field of [{_ROOT}]")
        raise make_error(f"{place}: {field} is not searched; list its choices under [{_ROOT}], or drop the condition")
    if not isinstance(parameter, Choices):
        raise make_error(f"{place}: {field} is searched over a range; use a field with choices")
    indices = set()
    for word in map(str.strip, wanted.split("|")):
        index = next((i for i, choice in enumerate(parameter.choices) if matches_text(word, choice)), None)
        if index is None:
            near = labels.suggest(word, map(format_value, parameter.choices))
            raise make_error(f"{place}: {word!r} is not one of the choices of {field} ({parameter}){near}")
        indices.add(index)
    return Condition(field, tuple(parameter.choices[index] for index in sorted(indices)))


def _read_parameter(
    field: str, raw: Any, place: str, condition: Condition | None, base: TrainSettings, sizes: Sequence[int]
) -> Parameter:
    """Return the parameter that one key of the table describes."""
    if field not in TrainSettings.model_fields:
        near = labels.suggest(field, TrainSettings.model_fields.keys() - NOT_SEARCHABLE.keys())
        raise make_error(f"{place}: unknown setting {field!r}{near}")
    if field in NOT_SEARCHABLE:
        raise make_error(f"{place}: cannot be searched because {NOT_SEARCHABLE[field]}; set it under [train]")
    if field == "size":
        return _read_sizes(raw, place, condition, sizes)
    if isinstance(raw, Mapping):
        span = _read_range(field, raw, place, condition)
        if field == "batch_size":
            _check_batch_range(span, place, base.workers)
        return span
    if not isinstance(raw, (list, tuple)):
        raise make_error(
            f"{place}: a single value; set it under [train], or write a list of choices "
            "or a range { low = ..., high = ... }"
        )
    parameter = _read_choices(field, raw, place, condition)
    if field == "batch_size":
        for i, size in enumerate(parameter.choices):
            _check_batch_size(size, f"{place}.{i}", base.workers)
    return parameter


def _read_choices(field: str, raw: Sequence[Any], place: str, condition: Condition | None) -> Choices:
    if not raw:
        raise make_error(f"{place}: the list is empty; name the choices")
    choices: list[Any] = []
    for i, item in enumerate(raw):
        at = f"{place}.{i}"
        if _accepts(field, tuple) and not isinstance(item, (list, tuple)):
            raise make_error(f"{at}: each choice must be a list, as in {field} = [[], [256]] ({shorten_repr(item)})")
        value = validate(field, item, at)
        if value in choices:
            raise make_error(f"{at}: {format_value(value)} is listed twice; remove one")
        choices.append(value)
    return Choices(field, field, condition, tuple(choices))


def _read_sizes(raw: Any, place: str, condition: Condition | None, sizes: Sequence[int]) -> Choices:
    prepared = sorted(set(sizes))
    if raw == "prepared":
        raw = prepared
    if not isinstance(raw, (list, tuple)):
        raise make_error(
            f'{place}: write "prepared" for every prepared size, or a list of sizes; a single size goes under [train]'
        )
    parameter = _read_choices("size", raw, place, condition)
    for i, size in enumerate(parameter.choices):
        if size not in prepared:
            have = ", ".join(map(str, prepared))
            raise make_error(f"{place}.{i}: size {format_value(size)} is not prepared; use one of {have}")
    # Sorted, so that "prepared" and the list of all sizes describe the same space.
    return dataclasses.replace(parameter, choices=tuple(sorted(parameter.choices)))


def _read_range(field: str, raw: Mapping[str, Any], place: str, condition: Condition | None) -> Range:
    whole = not _accepts(field, float)
    if whole and not _accepts(field, int):
        raise make_error(f"{place}: {field} is not a number, so it cannot have a range; write a list of choices")
    known = ("low", "high", "log", "step")
    for key in raw:
        if key not in known:
            raise make_error(f"{place}: unknown key {key!r}{labels.suggest(str(key), known)}")
    if "low" not in raw or "high" not in raw:
        raise make_error(f"{place}: a range needs both ends; write {{ low = ..., high = ... }}")
    for key in ("low", "high", "step"):
        if key in raw and (isinstance(raw[key], bool) or not isinstance(raw[key], (int, float))):
            raise make_error(f"{place}.{key}: must be a number (got {shorten_repr(raw[key])})")
    low, high = (validate(field, raw[end], f"{place}.{end}") for end in ("low", "high"))
    log, step = raw.get("log", False), raw.get("step")
    if not isinstance(log, bool):
        raise make_error(f"{place}.log: use true or false (got {shorten_repr(log)})")
    if low > high:
        raise make_error(f"{place}: low ({low}) is above high ({high}); swap them")
    if log and step is not None:
        raise make_error(f"{place}: log and step exclude each other; remove one")
    if log and low <= 0:
        raise make_error(f"{place}.low: a log range must start above 0 (got {low})")
    if step is not None:
        step = _check_step(step, low, high, place, whole)
    elif whole and not log:
        step = 1
    return Range(field, field, condition, low, high, step, log, whole)


def _check_step(step: float, low: float, high: float, place: str, whole: bool) -> float:
    """Return a step that leads exactly from `low` to `high`; Optuna would silently shorten the range."""
    at = f"{place}.step"
    if not 0 < step <= _MAX_INTEGER:
        raise make_error(f"{at}: must be above 0 and finite (got {shorten_repr(step)})")
    if whole and step != int(step):
        raise make_error(f"{at}: must be an integer, as the setting is (got {step})")
    step = int(step) if whole else float(step)
    first, stride = Decimal(str(low)), Decimal(str(step))
    count = (Decimal(str(high)) - first) / stride
    if count > _MAX_STEPS:
        raise make_error(f"{at}: {step} makes more than {_MAX_STEPS} steps; leave it out")
    if count != int(count):
        last = first + int(count) * stride
        raise make_error(f"{at}: steps of {step} from {low} miss {high}; set high to {last} or {last + stride}")
    return step


def _check_batch_size(size: int, place: str, workers: int) -> None:
    if size % workers:
        raise make_error(
            f"{place}: {size} cannot be divided among {workers} workers; use {math.ceil(size / workers) * workers}"
        )


def _check_batch_range(span: Range, place: str, workers: int) -> None:
    """Check that the workers can share every batch size of a range."""
    _check_batch_size(int(span.low), f"{place}.low", workers)
    if workers == 1 or span.low == span.high:
        return
    if span.log or int(span.step or 1) % workers:
        key, remedy = ("log", f"step = {workers}, or a list") if span.log else ("step", f"a multiple of {workers}")
        raise make_error(f"{place}.{key}: yields sizes that {workers} workers cannot divide equally; use {remedy}")


def _check_overlaps(placed: Sequence[tuple[str, Parameter]]) -> None:
    """Check that no two conditions of one field can hold together."""
    for (_, one), (place, other) in itertools.combinations(placed, 2):
        if one.field != other.field or one.condition is None or other.condition is None:
            continue
        if one.condition.field != other.condition.field or any(map(other.condition.values.count, one.condition.values)):
            raise make_error(
                f'{place}: {one.field} is also under "{one.condition}", and both conditions can hold; '
                "use values of one field, each in one condition"
            )


def _check_every_trial_has_size(
    placed: Sequence[tuple[str, Parameter]], base: TrainSettings, sizes: Sequence[int]
) -> None:
    """Check that a trial without a searched size has one from elsewhere."""
    conditions = [one.condition for _, one in placed if one.field == "size" and one.condition is not None]
    if not conditions or base.size is not None or len(set(sizes)) <= 1:
        return
    # The conditions of one field are values of one other field, each used once.
    deciding = next(one for _, one in placed if one.field == conditions[0].field)
    assert isinstance(deciding, Choices)
    rest = [value for value in deciding.choices if not any(value in condition.values for condition in conditions)]
    if rest:
        raise make_error(
            f"{_ROOT}.when: several sizes are prepared, and trials with {Condition(deciding.field, tuple(rest))} have "
            "none; set one under [train], or search it there too"
        )


def _check_combinations(parameters: Sequence[Parameter], base: TrainSettings) -> None:
    """Check that `TrainSettings` allows every combination of the fields that depend on each other."""
    dependent = [one for one in parameters if isinstance(one, Choices) and one.field in _DEPENDENT]
    deciding = {one.condition.field for one in dependent if one.condition is not None}
    first = [
        one
        for one in parameters
        if isinstance(one, Choices) and one.condition is None and (one in dependent or one.field in deciding)
    ]
    for outer in itertools.product(*(one.choices for one in first)):
        values = {one.field: value for one, value in zip(first, outer, strict=True)}
        then = [one for one in dependent if one.condition is not None and one.condition.holds(values)]
        for inner in itertools.product(*(one.choices for one in then)):
            every = {**values, **{one.field: value for one, value in zip(then, inner, strict=True)}}
            try:
                base.replace(**{field: value for field, value in every.items() if field in _DEPENDENT})
            except ConfigError as error:
                combination = ", ".join(f"{field}={format_value(value)}" for field, value in every.items())
                raise make_error(f"{_ROOT}: a trial may have {combination}: {error}") from None


def _rename_duplicates(parameters: Sequence[Parameter]) -> tuple[Parameter, ...]:
    """Give parameters of the same field different names, without slashes.

    Conditions of one field exclude each other, so their values distinguish its parameters.
    """
    fields = [one.field for one in parameters]
    renamed = []
    for one in parameters:
        if fields.count(one.field) > 1 and one.condition is not None:
            values = "|".join(map(format_value, one.condition.values)).replace("%", "%25").replace("/", "%2F")
            one = dataclasses.replace(one, name=f"{one.field}@{values}")
        renamed.append(one)
    return tuple(renamed)


def _accepts(field: str, kind: type) -> bool:
    """Return whether a field's annotation names this type, alone or in a union."""
    annotation = TrainSettings.model_fields[field].annotation
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return any(
        kind in (one, typing.get_origin(one)) for one in (typing.get_args(annotation) if union else [annotation])
    )
