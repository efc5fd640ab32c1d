"""The search space of `tune`: which settings are searched, over which values, and under which conditions.

docs/tuning.md explains the table `[tune.space]`, whose keys are fields of `TrainSettings`. A field may have several
parameters, under conditions that exclude each other. An Optuna parameter has its field's name, or `field@value` if the
field has several parameters. Names contain no slash, because Ray splits names at slashes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_cxr import labels
from ray_cxr.config import TrainSettings, make_error
from ray_cxr.errors import ConfigError
from ray_cxr.tuning.parameters import Choices, Parameter, format_value
from ray_cxr.tuning.space_table import read_parameters, validate

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

#: The settings of the two projects that this one grew out of.
_SHARED_SETTINGS: Mapping[str, Any] = {
    "learning_rate": 1e-4,
    "optimizer": "adam",
    "pooling": "avg",
    "label_smoothing": 0.0,
    "schedule": "constant",
    "batch_size": 32,
    "rotation": 0.0,
    "contrast": 0.0,
    "shift": 0.0,
}
KNOWN: tuple[Mapping[str, Any], ...] = (
    {"backbone": "ResNet50", "loss": "bce", "dense": (512,), "dropout": 0.5, **_SHARED_SETTINGS},
    {"backbone": "DenseNet121", "loss": "weighted_bce", "dropout": 0.0, **_SHARED_SETTINGS},
)


def default_space(base: TrainSettings, sizes: Sequence[int]) -> dict[str, Any]:
    """Return the table that replaces an empty `[tune.space]`, without the fields that are set in `base`.

    `base.workers` limits the batch sizes.
    """
    batches = [size for size in (16, 32, 64) if size % base.workers == 0]
    table: dict[str, Any] = {
        "backbone": ["ResNet50", "DenseNet121"],
        **({"size": "prepared"} if len(set(sizes)) > 1 else {}),
        "learning_rate": {"low": 1e-5, "high": 3e-3, "log": True},
        "optimizer": ["adam", "adamw"],
        # Without cosine, which early stopping cannot compare fairly.
        "schedule": ["constant", "plateau"],
        **({"batch_size": batches} if batches else {}),
        "loss": ["bce", "weighted_bce", "focal"],
        "label_smoothing": {"low": 0.0, "high": 0.1, "step": 0.02},
        "pooling": ["avg", "max", "avgmax"],
        "dropout": {"low": 0.0, "high": 0.5, "step": 0.1},
        "rotation": {"low": 0.0, "high": 10.0, "step": 1.0},
        "shift": {"low": 0.0, "high": 0.1},
        "contrast": {"low": 0.0, "high": 0.3},
    }
    fixed, whens = base.model_fields_set, {}
    for field, value, name, entry in (
        ("backbone", "ResNet50", "dense", [[], [512], [512, 256]]),
        ("optimizer", "adamw", "weight_decay", {"low": 1e-6, "high": 1e-2, "log": True}),
        ("loss", "focal", "focal_gamma", {"low": 0.5, "high": 4.0}),
    ):
        if name not in fixed and field not in fixed:
            whens[f"{field}={value}"] = {name: entry}
        elif name not in fixed and getattr(base, field) == value:
            table[name] = entry
    return {name: entry for name, entry in table.items() if name not in fixed} | ({"when": whens} if whens else {})


@dataclass(frozen=True)
class Space:
    """A search space.

    Attributes:
        parameters: the parameters in the order of suggestion, the conditional ones last.
        backbones: the choices of the backbone, or the only backbone.
    """

    parameters: tuple[Parameter, ...]
    backbones: tuple[str, ...]

    @classmethod
    def read(cls, table: Mapping[str, Any], base: TrainSettings, sizes: Sequence[int]) -> Space:
        """Return the space of a table `[tune.space]`, or `default_space` for an empty one; see `read_parameters`."""
        parameters = read_parameters(table or default_space(base, sizes), base, sizes)
        for parameter in parameters:
            if isinstance(parameter, Choices) and parameter.field == "backbone":
                return cls(parameters, parameter.choices)
        return cls(parameters, (base.backbone,))

    @property
    def fields(self) -> tuple[str, ...]:
        """The searched fields of the settings, each once."""
        return tuple(dict.fromkeys(parameter.field for parameter in self.parameters))

    def suggest(self, trial: BaseTrial) -> None:
        """Suggest every parameter whose condition holds; repeated calls yield the same values."""
        values: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.applies(values):
                values[parameter.field] = parameter.suggest(trial)

    def values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Convert values by Optuna parameter to values by field.

        Raises:
            ConfigError: a parameter or choice is not in the space, or two parameters set one field.
        """
        by_name = {parameter.name: parameter for parameter in self.parameters}
        values: dict[str, Any] = {}
        for name, value in params.items():
            if name not in by_name:
                raise make_error(f"parameter {name}: not in the search space{labels.suggest(name, by_name)}")
            field = by_name[name].field
            if field in values:
                raise make_error(f"parameter {name}: another parameter sets {field} too; remove one")
            values[field] = by_name[name].decode(value)
        return values

    def point(self, values: Mapping[str, Any], where: str, *, strict: bool = True) -> tuple[dict[str, Any], list[str]]:
        """Convert values by field to values by Optuna parameter; return them, and the fields left out.

        A field or value outside the space raises ConfigError, which starts with `where`; without `strict` the field is
        left out. The sampler chooses the values of the fields left out.
        """
        checked: dict[str, Any] = {}
        params: dict[str, Any] = {}
        converted: set[str] = set()
        ignored = () if strict else (ConfigError,)
        for field, value in values.items():
            with contextlib.suppress(*ignored):
                if field not in self.fields:
                    near = labels.suggest(field, self.fields)
                    raise make_error(f"{where}: {field} is not in the search space{near}")
                checked[field] = validate(field, value, f"{where}: {field}")
        # In a second pass, because a condition may depend on a later field.
        for field, value in checked.items():
            with contextlib.suppress(*ignored):
                parameter = self._select_parameter(field, checked, where)
                params[parameter.name] = parameter.encode(value)
                converted.add(field)
        return params, [field for field in values if field not in converted]

    def _select_parameter(self, field: str, values: Mapping[str, Any], where: str) -> Parameter:
        """Return the parameter of a field whose condition holds and whose range contains its value."""
        candidates = [parameter for parameter in self.parameters if parameter.field == field]
        selected = next((parameter for parameter in candidates if parameter.applies(values)), None)
        if selected is None:
            conditions = " or ".join(str(parameter.condition) for parameter in candidates)
            raise make_error(f"{where}: {field} is searched only with {conditions}; add it, or leave {field} out")
        if values[field] not in selected:
            raise make_error(f"{where}: {field}: {format_value(values[field])} is not in the search space: {selected}")
        return selected

    def describe(self) -> dict[str, Any]:
        """Return the space in JSON types; equal spaces have equal descriptions, however they were written.

        As in Optuna, the order of choices matters. The order of keys does not: sort them before hashing.
        """
        return {
            parameter.name: {
                "field": parameter.field,
                "when": parameter.condition and str(parameter.condition),
                **parameter.describe(),
            }
            for parameter in self.parameters
        }
