"""Schema of bundle.json, which is checked when a bundle is opened. Imports no Keras, so that this is fast."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import ConfigDict, Field, StrictBool, field_validator, model_validator

from ray_cxr.config import Backbone, InputSpec, Settings, TrainSettings

_Normalization: TypeAlias = tuple[tuple[float, float], ...]


class Architecture(Settings):
    """Everything that rebuilds a model without executing code from a bundle.

    The backbone `graph` stands for a bundle that holds an OpenVINO graph and no layers, see `graphs`.
    """

    backbone: Backbone | Literal["graph"]
    size: int = Field(ge=32, le=2048)
    findings: tuple[str, ...] = Field(min_length=1)
    pooling: Literal["avg", "max", "avgmax"] = "avg"
    dense: tuple[Annotated[int, Field(ge=1, le=8192)], ...] = ()
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    #: (scale, offset) per input channel: the backbone gets gray * scale + offset. None: as for its ImageNet weights.
    normalization: _Normalization | None = None

    @field_validator("normalization")
    @classmethod
    def _check_channels(cls, value: _Normalization | None) -> _Normalization | None:
        if value is not None and not (len(value) in (1, 3) and np.isfinite(value).all()):
            raise ValueError("needs finite (scale, offset) of one or three channels")
        return value

    @classmethod
    def of(cls, settings: TrainSettings, size: int) -> Architecture:
        """Return the architecture of training settings at an image size in pixels."""
        same = settings.model_dump(include={"backbone", "pooling", "dense", "dropout"})
        return cls(size=size, findings=settings.finding_names(), **same)


#: Default of an entry that may be missing, but not null.
_MISSING: Any = None
_Number = Annotated[float, Field(strict=True, ge=0)]


class _Entry(Settings):
    """An object in bundle.json. Other keys are allowed."""

    model_config = ConfigDict(extra="ignore", validate_default=False)


class Point(_Entry):
    threshold: Annotated[float, Field(strict=True, gt=0, lt=1)]


class Precision(_Entry):
    largest_drift: _Number | None
    tolerance: _Number
    accepted: StrictBool | None

    @model_validator(mode="after")
    def _check_drift(self) -> Precision:
        if self.accepted is not None and self.largest_drift is None:
            raise ValueError("accepted is not null, but largest_drift is")
        return self


class Runtimes(_Entry):
    model_config = ConfigDict(extra="forbid")

    fp32: Precision
    bf16: Precision
    int8: Precision = _MISSING


class FittedQuality(_Entry):
    expected_rates: dict[str, _Number]
    train_images: _Number
    held_out_images: _Number


class LackingQuality(_Entry):
    lacking: str


class Provenance(_Entry):
    age_range: tuple[float, float] | None = None


class BundleInfo(_Entry):
    """The entries of bundle.json that this package relies on; those with a default are missing in older bundles."""

    findings: tuple[str, ...]
    architecture: Architecture
    input_spec: InputSpec
    calibration: dict[str, dict[str, Any] | None]
    operating_points: dict[str, Point | None]
    expected_flag_rates: dict[str, float | None]
    operating_alternatives: dict[str, dict[str, Point | None]] = _MISSING
    rule_notes: dict[str, str | None] = _MISSING
    provenance: Provenance
    runtimes: Runtimes = _MISSING
    runtimes_refused: str = ""
    quality: FittedQuality | LackingQuality | None = None
