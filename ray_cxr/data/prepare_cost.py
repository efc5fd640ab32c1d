"""What `prepare` takes, from a sample of the user's images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa

from ray_cxr.config import PacsSettings, PrepareSettings
from ray_cxr.costs import RAY_S, Cost
from ray_cxr.data import prepared
from ray_cxr.data.manifest import SPLITS
from ray_cxr.data.partition import plan_units
from ray_cxr.data.shards import shard_name
from ray_cxr.imaging.sample import decode_sample
from ray_cxr.storage import remote

#: Bytes per row of a shard and of the frozen manifest, without the image.
ROW_BYTES = 200
#: Seconds per image and size to write the shard.
WRITE_S = 0.0005


def estimate_prepare(
    manifest: str | Path, out: str | Path, settings: PrepareSettings, cpus: int, pacs: PacsSettings | None = None
) -> Cost:
    """Make the checks of `prepare`, decode a few images, and write nothing.

    Args:
        cpus: CPUs that Ray would use.
        pacs: how to reach a PACS that has images; None: the default settings.

    Raises:
        TableError, OutputError: as `prepare`.
    """
    folder = remote.to_path(out)
    pacs = pacs or PacsSettings()
    table, _ = prepared.check(manifest, folder, settings, pacs)
    units = plan_units(table["path"], settings.rows_per_shard)
    missing = [
        range_
        for unit in units
        for range_ in unit.ranges
        if not all((folder / str(size) / shard_name(range_.index)).exists() for size in settings.sizes)
    ]
    pending = sum(range_.rows for range_ in missing)
    specs = [settings.spec(size) for size in settings.sizes]
    sample = decode_sample(
        table["path"] if pending else table["path"].slice(0, 0), specs, timeout_s=settings.decode_timeout_s
    )
    rate = sample.rate(min(cpus, len(units)))
    seconds = RAY_S + pending / rate.per_second + pending * WRITE_S * len(specs) if rate else RAY_S
    rates = {f"decode and resize with {min(cpus, len(units))} processes": rate} if rate else {}
    notes = sample.list_notes()
    if transfer := sample.estimate_transfer(pacs, pending):
        rates["PACS"], seconds = transfer.rate, max(seconds, RAY_S + transfer.seconds)
        notes.append(transfer.describe())
    return Cost(
        counts=f"{describe_splits(table)}; {pending:,} of them to prepare",
        rates=rates,
        seconds=(seconds, seconds) if rate or not pending else None,
        unknown="none of the images that were tried could be read",
        sizes={f"{size} pixels": pending * (size * size + ROW_BYTES) for size in settings.sizes},
        notes=notes,
    )


def describe_splits(table: pa.Table) -> str:
    """Return the number of images, by split: `540 images: train 280, val 108, test 152`."""
    counts = Counter(table["split"].to_pylist())
    parts = [f"{split} {counts[split]:,}" for split in SPLITS if counts[split]]
    if parts and counts[None]:
        parts.append(f"no split {counts[None]:,}")
    return f"{len(table):,} images" + (f": {', '.join(parts)}" if parts else "")
