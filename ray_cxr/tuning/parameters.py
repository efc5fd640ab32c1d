"""Parameters of a search space: choices and ranges, each perhaps under a condition."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from ray_cxr.config import make_error, shorten_repr

if TYPE_CHECKING:
    from optuna.trial import BaseTrial


@dataclass(frozen=True)
class Condition:
    """A condition on a trial's settings: `field` has one of `values`."""

    field: str
    values: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.field}={'|'.join(map(format_value, self.values))}"

    def holds(self, settings: Mapping[str, Any]) -> bool:
        return self.field in settings and settings[self.field] in self.values


@dataclass(frozen=True)
class _Searched:
    """A searched field of the settings; `name` is the parameter's name in Optuna."""

    name: str
    field: str
    condition: Condition | None

    def applies(self, settings: Mapping[str, Any]) -> bool:
        """Return whether a trial with these settings has the parameter."""
        return self.condition is None or self.condition.holds(settings)


@dataclass(frozen=True)
class Choices(_Searched):
    """A parameter with a list of values."""

    choices: tuple[Any, ...]

    def __str__(self) -> str:
        return ", ".join(map(format_value, self.choices))

    def __contains__(self, value: Any) -> bool:
        return value in self.choices

    def suggest(self, trial: BaseTrial) -> Any:
        return self.decode(trial.suggest_categorical(self.name, [self.encode(choice) for choice in self.choices]))

    def encode(self, value: Any) -> Any:
        """Return a choice in a type that Optuna can store."""
        return json.dumps(list(value)) if isinstance(value, tuple) else value

    def decode(self, value: Any) -> Any:
        for choice in self.choices:
            if self.encode(choice) == value:
                return choice
        raise make_error(f"parameter {self.name}: {shorten_repr(value)} is not one of its choices ({self})")

    def describe(self) -> dict[str, Any]:
        return {"choices": [list(choice) if isinstance(choice, tuple) else choice for choice in self.choices]}


@dataclass(frozen=True)
class Range(_Searched):
    """A parameter from `low` to `high`, both included; its values are integers if `whole`."""

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
        steps = 0 if self.step is None else (value - self.low) / self.step
        return abs(steps - round(steps)) < 1e-8  # Optuna's tolerance

    def suggest(self, trial: BaseTrial) -> Any:
        if self.whole:
            low, high, step = int(self.low), int(self.high), int(self.step or 1)
            return self.decode(trial.suggest_int(self.name, low, high, step=step, log=self.log))
        return self.decode(trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log))

    def decode(self, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise make_error(f"parameter {self.name}: {shorten_repr(value)} is not a number")
        if self.whole and value == int(value):
            return int(value)
        if self.step is None or value not in self:
            return value
        # Optuna returns 0.30000000000000004, which would appear in every report.
        steps = round((value - self.low) / self.step)
        return float(Decimal(str(self.low)) + steps * Decimal(str(self.step)))

    encode = decode

    def describe(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "step": self.step, "log": self.log}


Parameter = Choices | Range


def format_value(value: Any) -> str:
    """Return a value as a condition spells it."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def matches_text(text: str, value: Any) -> bool:
    """Return whether the text of a condition means this value."""
    if isinstance(value, str):
        return text == value
    try:
        parsed = None if text == "none" else json.loads(text)
    except (ValueError, RecursionError):
        return False
    return bool((tuple(parsed) if isinstance(parsed, list) else parsed) == value)
