"""The description of a model in a bundle. Imports no Keras, so that reading one is fast."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ray_cxr.config import Backbone, Settings, TrainSettings


class Architecture(Settings):
    """Everything that rebuilds a model without executing code from a bundle."""

    backbone: Backbone
    size: int = Field(ge=32, le=2048)
    findings: tuple[str, ...] = Field(min_length=1)
    pooling: Literal["avg", "max", "avgmax"] = "avg"
    dense: tuple[Annotated[int, Field(ge=1, le=8192)], ...] = ()
    dropout: float = Field(0.0, ge=0.0, lt=1.0)

    @classmethod
    def of(cls, settings: TrainSettings, size: int) -> Architecture:
        """Return the architecture of training settings at an image size in pixels."""
        return cls(
            backbone=settings.backbone,
            size=size,
            findings=settings.finding_names(),
            pooling=settings.pooling,
            dense=settings.dense,
            dropout=settings.dropout,
        )
