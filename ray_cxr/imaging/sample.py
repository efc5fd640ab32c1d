"""Decode a few of a user's images, to state before a run how long it takes and how much it writes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from ray_cxr.config import InputSpec, PacsSettings
from ray_cxr.costs import PROBE_IMAGES, PROBE_S, Rate, format_size
from ray_cxr.errors import ImageError
from ray_cxr.imaging.demographics import count_of
from ray_cxr.imaging.pixels import MAX_PIXELS
from ray_cxr.imaging.sandbox import DecodedImage, Decoder
from ray_cxr.progress import format_duration
from ray_cxr.storage.archives import read_members
from ray_cxr.storage.files import read_bytes
from ray_cxr.storage.paths import is_dicomweb, is_image_name, split_member


@dataclass(frozen=True)
class Transfer:
    """What it takes to fetch images of a PACS, one request each: bytes in total, and the rate that the limits allow."""

    requests: int
    size: float
    rate: Rate

    @property
    def seconds(self) -> float:
        return self.requests / self.rate.per_second

    def describe(self) -> str:
        return (
            f"PACS: {count_of(self.requests, 'request')}, about {format_size(self.size)}, at least "
            f"{format_duration(self.seconds)} with these limits"
        )


@dataclass(frozen=True)
class Sample:
    """Images that were decoded.

    Attributes:
        failed: number of files that could not be read.
        seconds: per file, to decode with one process.
        fetched: number of images that a PACS sent, with their mean size in bytes and seconds per request.
        codes: number of these files by error code, if known.
    """

    images: list[DecodedImage]
    failed: int
    seconds: float
    fetched: int = 0
    fetched_size: float = 0.0
    fetch_seconds: float = 0.0
    codes: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        return len(self.images) + self.failed

    def rate(self, processes: int) -> Rate | None:
        """Return the rate of decoding with this number of processes; None without a file."""
        return Rate(processes / self.seconds, f"measured on {self.count} of the images") if self.seconds else None

    def list_notes(self) -> list[str]:
        """Return a sentence on the files that could not be read; nothing without any."""
        if not self.failed:
            return []
        codes = ", ".join(f"{code} {n}" for code, n in self.codes.most_common())
        line = f"{self.failed} of {self.count} images that were tried could not be read"
        return [f"{line}: {codes}" if codes else line]

    def estimate_transfer(self, pacs: PacsSettings, requests: int) -> Transfer | None:
        """Return what it takes to fetch this number of images; None if no image of the sample came from a PACS."""
        if not self.fetched or not requests:
            return None
        rate = min(pacs.per_second, pacs.parallel / self.fetch_seconds)
        limits = f"with {pacs.parallel} requests at a time and {pacs.per_second:g} per second"
        source = f"{limits}, measured on {self.fetched} of the images"
        return Transfer(requests, requests * self.fetched_size, Rate(rate, source))


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
    transfers: list[tuple[int, float]] = []
    codes: Counter[str] = Counter()
    failed, started = 0, time.monotonic()
    decoder = Decoder(specs, max_pixels=max_pixels, timeout_s=min(timeout_s, PROBE_S), tags=True)
    try:
        for chosen in _choose(paths):
            source = chosen
            if isinstance(chosen, str) and is_dicomweb(chosen):
                source = _fetch(chosen, transfers)
            outcome = source if isinstance(source, ImageError) else decoder.load(source)
            if isinstance(outcome, DecodedImage):
                images.append(outcome)
                times.append(decoder.seconds)
            else:
                failed += 1
                codes[outcome.code] += 1
            if time.monotonic() - started > PROBE_S:
                break
    finally:
        decoder.close()
    # The first file of a decoder also loads libraries.
    seconds = float(np.mean(times[1:] or times)) if times else 0.0
    sizes, waits = zip(*(transfers[1:] or transfers or [(0, 0.0)]), strict=True)  # the first also connects
    return Sample(images, failed, seconds, len(transfers), float(np.mean(sizes)), float(np.mean(waits)), codes)


def _fetch(path: str, transfers: list[tuple[int, float]]) -> bytes | ImageError:
    """Return an instance of a PACS, and record its bytes and seconds."""
    started = time.monotonic()
    try:
        content = read_bytes(path)
    except ImageError as error:
        return error
    transfers.append((len(content), max(1e-6, time.monotonic() - started)))
    return content


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
