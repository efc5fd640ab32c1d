"""What a run takes, stated before it starts: `--dry-run` of `prepare`, `train`, `tune` and `score`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ray_cxr.progress import format_duration

#: Start and end of Ray and of its first actor, seconds, on two idle cores.
RAY_S = 8.0
#: Images to measure a rate with, and the seconds after which measuring stops.
PROBE_IMAGES, PROBE_S = 32, 3.0
#: Minimum duration of an earlier run whose rate is used; a shorter one mostly measures the start of Ray.
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
        return f"{what}: {self.per_second:,.{digits}f} images/s, {self.source}"


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
        lines = [self.counts]
        if self.seconds is None:
            lines.append(f"time: unknown, because {self.unknown}")
        elif self.seconds[1]:
            low, high = map(format_duration, self.seconds)
            lines.append(f"time: {f'about {high}' if low == high else f'{low} to {high}'}, start-up included")
            lines += [f"  {rate.describe(what)}" for what, rate in self.rates.items()]
        total, free = sum(self.sizes.values()), find_free_bytes(out)
        if total:
            lines.append(f"disk: about {format_size(total)}" + ("" if free is None else f", {format_size(free)} free"))
            lines.append("  " + ", ".join(f"{what} {format_size(size)}" for what, size in self.sizes.items() if size))
        if free is not None and total > free:
            lines.append(f"WARNING: {out}: the disk has too little space; free some, or choose another --out")
        return lines + self.notes


def count_cpus(limit: int | None = None) -> int:
    """Return the number of CPUs that this process may use; `limit` is the setting ray.num_cpus."""
    if limit:
        return limit
    # macOS has no sched_getaffinity.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_free_bytes(out: str | Path) -> int | None:
    """Return the free bytes on the disk that holds a folder, which need not exist; None for a bucket."""
    if "://" in str(out):
        return None
    path = Path(out).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def format_size(size: float) -> str:
    """Format a number of bytes: 540 B, 12 kB, 1.9 GB."""
    value, units = float(size), iter(["B", "kB", "MB", "GB"])
    unit = next(units)
    while value >= 1000 and unit != "GB":
        value, unit = value / 1000, next(units)
    return f"{value:,.1f} {unit}" if value < 10 and unit != "B" else f"{value:,.0f} {unit}"
