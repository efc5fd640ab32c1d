"""The description of a network, as a bundle keeps it; free of Keras, so that reading one is quick."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ray_cxr.config import Backbone, Settings, TrainSettings


class Architecture(Settings):
    """All that is needed to build a network again without running anybody's code."""

    backbone: Backbone
    size: int = Field(ge=32, le=2048)
    findings: tuple[str, ...] = Field(min_length=1)
    pooling: Literal["avg", "max", "avgmax"] = "avg"
    dense: tuple[Annotated[int, Field(ge=1, le=8192)], ...] = ()
    dropout: float = Field(0.0, ge=0.0, lt=1.0)

    @classmethod
    def of(cls, settings: TrainSettings, size: int) -> Architecture:
        """The architecture that training settings ask for, at an image size in pixels."""
        return cls(
            backbone=settings.backbone,
            size=size,
            findings=settings.finding_names(),
            pooling=settings.pooling,
            dense=settings.dense,
            dropout=settings.dropout,
        )
