"""Decode a few of a user's images, to state before a run how long it takes and how much it writes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ray_cxr.config import InputSpec
from ray_cxr.costs import PROBE_IMAGES, PROBE_S, Rate
from ray_cxr.errors import ImageError
from ray_cxr.imaging.pixels import MAX_PIXELS
from ray_cxr.imaging.sandbox import DecodedImage, Decoder
from ray_cxr.storage.archives import read_members
from ray_cxr.storage.paths import is_image_name, split_member


@dataclass(frozen=True)
class Sample:
    """Images that were decoded, the number of files that failed, and the seconds per file, with one process."""

    images: list[DecodedImage]
    failed: int
    seconds: float

    @property
    def count(self) -> int:
        return len(self.images) + self.failed

    def rate(self, processes: int) -> Rate | None:
        """Return the rate of decoding with this number of processes; None without a file."""
        return Rate(processes / self.seconds, f"measured on {self.count} of the images") if self.seconds else None


def decode_sample(
    paths: pa.ChunkedArray,
    specs: Sequence[InputSpec | None],
    *,
    max_pixels: int = MAX_PIXELS,
    timeout_s: float = 60.0,
) -> Sample:
    """Decode images from all parts of a table, or the first of one archive, for about three seconds at most."""
    images: list[DecodedImage] = []
    times: list[float] = []
    failed, started = 0, time.monotonic()
    decoder = Decoder(specs, max_pixels=max_pixels, timeout_s=min(timeout_s, PROBE_S), tags=True)
    try:
        for source in _choose(paths):
            outcome = None if isinstance(source, ImageError) else decoder.load(source)
            if isinstance(outcome, DecodedImage):
                images.append(outcome)
                times.append(decoder.seconds)
            else:
                failed += 1
            if time.monotonic() - started > PROBE_S:
                break
    finally:
        decoder.close()
    # The first file of a decoder also loads libraries.
    return Sample(images, failed, float(np.mean(times[1:] or times)) if times else 0.0)


class _Images:
    """The images of any archive."""

    def __contains__(self, name: object) -> bool:
        return is_image_name(str(name))


def _choose(paths: pa.ChunkedArray) -> Iterator[str | bytes | ImageError]:
    """Yield sources of at most `PROBE_IMAGES` images: single files, or if there are none, members of an archive."""
    if not len(paths):
        return
    rows = np.unique(np.linspace(0, len(paths) - 1, PROBE_IMAGES).astype(int))
    known = [path for row in rows if (path := paths[row].as_py()) is not None]
    archives = [inside[0] for inside in map(split_member, known) if inside]
    if len(archives) < len(known):
        yield from (path for path in known if split_member(path) is None)
    elif archives:
        try:
            for _, (_, content) in zip(range(PROBE_IMAGES), read_members(archives[0], _Images()), strict=False):
                yield content
        except ImageError:
            return
