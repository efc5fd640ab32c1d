"""Request and report of `score`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ray_cxr.config import ScoreSettings
from ray_cxr.errors import ConfigError
from ray_cxr.scoring.heatmaps import HeatMapReport
from ray_cxr.scoring.pool import ActorPlan


@dataclass(frozen=True)
class ScoreRequest:
    """One call of `score`.

    Attributes:
        model: folder of a bundle, on storage that all nodes share.
        out: folder for the scores, on storage that all nodes share.
        settings: the section `score` of the configuration.
        manifest, images: a manifest, or a folder or URI of images; exactly one of them is set.
        fresh: remove an earlier run in `out` first.
        retry_errors: score rows again whose error code is retryable.
        limit: score only the first rows, up to this number.
        dry_run: check everything and count; write nothing.
        use_gpu: give each actor one GPU.
        heatmaps: number of heat maps per image, drawn after scoring; None: no heat maps.
        started_at: start of the command, seconds since the epoch; None: now.

    Raises:
        ConfigError: both or neither of `manifest` and `images` are set.
    """

    model: str | Path
    out: str | Path
    settings: ScoreSettings
    manifest: str | None = None
    images: str | None = None
    fresh: bool = False
    retry_errors: bool = False
    limit: int | None = None
    dry_run: bool = False
    use_gpu: bool = False
    heatmaps: int | None = None
    started_at: float | None = None

    def __post_init__(self) -> None:
        if (self.manifest is None) == (self.images is None):
            raise ConfigError("score: pass either --manifest or --images")

    @property
    def origin(self) -> str:
        """The manifest or folder as the user named it."""
        return str(self.manifest or self.images)


@dataclass
class ScoreReport:
    """The state of the scores after a run.

    Attributes:
        rows: rows of the input.
        counts: rows by status (`ok` or an error code) in all files, those of earlier runs included.
        scored_now: rows written by this run.
        seconds: wall time of this run.
        start_up: seconds up to the first scored image, by stage; empty if nothing was scored.
        notes: sentences about files in the image folder that are not images.
        pool: actors that scored; None if nothing was scored.
        heatmaps: None unless requested.
    """

    rows: int
    counts: Counter[str] = field(default_factory=Counter)
    scored_now: int = 0
    seconds: float = 0.0
    start_up: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    pool: ActorPlan | None = None
    heatmaps: HeatMapReport | None = None

    @property
    def errors(self) -> int:
        return self.counts.total() - self.counts["ok"]

    @property
    def images_per_second(self) -> float | None:
        return self.scored_now / self.seconds if self.scored_now and self.seconds else None
