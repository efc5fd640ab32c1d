"""What a run takes, stated before it starts: `--dry-run` of `prepare`, `train`, `tune` and `score`."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

#: Start and end of Ray and of its first actor, seconds, on two idle cores.
RAY_S = 8.0
#: Images to measure a rate with, and the seconds after which measuring stops.
PROBE_IMAGES, PROBE_S = 32, 3.0
#: An earlier run tells a rate if it took longer than this; a shorter one mostly measures the start of Ray.
MIN_RUN_S = 60.0
#: Source of a rate that nothing was measured for.
ASSUMED = "assumed"


@dataclass(frozen=True)
class Rate:
    """Images per second, and its source, such as `measured on 32 of the images`."""

    per_second: float
    source: str

    def describe(self, what: str) -> str:
        digits = 0 if self.per_second >= 20 else 1 if self.per_second >= 1 else 3
        return f"{what} {self.per_second:,.{digits}f} images/s ({self.source})"


@dataclass(frozen=True)
class Cost:
    """An estimate of what a run takes.

    Attributes:
        counts: the images to process, such as `540 images: train 280, val 108, test 152`.
        rates: the rate of each part of the run, by its name.
        seconds: duration of the run, shortest and longest; None if a rate is unknown.
        unknown: why `seconds` is None.
        sizes: bytes on disk by content.
    """

    counts: str
    rates: Mapping[str, Rate]
    seconds: tuple[float, float] | None
    sizes: Mapping[str, int]
    unknown: str = ""
    notes: list[str] = field(default_factory=list)

    def list_lines(self, out: str | Path) -> list[str]:
        """Describe the estimate for the terminal; `out` is the folder that the run would write."""
        rates = "; ".join(rate.describe(what) for what, rate in self.rates.items())
        if self.seconds is None:
            time = f"unknown: {self.unknown}"
        else:
            low, high = map(format_duration, self.seconds)
            time = f"about {high}" if low == high else f"{low} to {high}"
        total = sum(self.sizes.values())
        parts = ", ".join(f"{what} {format_bytes(size)}" for what, size in self.sizes.items() if size)
        disk = f"about {format_bytes(total)}" + (f" ({parts})" if total else "")
        free = find_free_bytes(out)
        lines = [self.counts, f"time: {time}" + (f"; {rates}" if rates else "")]
        lines.append(f"disk: {disk}" + ("" if free is None else f"; {format_bytes(free)} free"))
        if free is not None and total > free:
            lines.append(f"WARNING: {out}: the disk has too little space; free some, or choose another --out")
        return lines + self.notes


def add_seconds(parts: Mapping[Rate | None, float]) -> float | None:
    """Return the seconds for numbers of images at their rates; None if a rate is unknown."""
    total = 0.0
    for rate, images in parts.items():
        if images and rate is None:
            return None
        total += images / rate.per_second if rate is not None else 0.0
    return total


def count_cpus(limit: int | None = None) -> int:
    """Return the number of CPUs that a local Ray would use; `limit` is the setting ray.num_cpus."""
    return limit or len(os.sched_getaffinity(0))


def find_free_bytes(out: str | Path) -> int | None:
    """Return the free bytes on the disk that holds a folder, which need not exist; None for a bucket."""
    if "://" in str(out):
        return None
    path = Path(out).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def format_duration(seconds: float) -> str:
    """Format a duration with two digits: 45 s, 12 min, 3.5 hours."""
    if seconds < 99.5:
        return f"{max(1, math.ceil(seconds))} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} hours" if hours < 9.95 else f"{hours:,.0f} hours"


def format_bytes(size: float) -> str:
    """Format a size with two or three digits: 12 KB, 5.2 MB, 120 GB."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 999.5 or unit == "GB":
            break
        size /= 1000
    digits = 1 if unit != "bytes" and size < 9.95 else 0
    return f"{size:,.{digits}f} {unit}"
