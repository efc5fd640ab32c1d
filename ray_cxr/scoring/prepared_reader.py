"""Read the images of ranges from a prepared set, without decoding."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from ray_cxr.costs import PROBE_IMAGES
from ray_cxr.data.prepared import PreparedSet
from ray_cxr.data.shards import Pixels, ShardRows
from ray_cxr.errors import OutputError
from ray_cxr.imaging.sample import Sample
from ray_cxr.imaging.sandbox import DecodedImage, Failure
from ray_cxr.scoring.ranges import PreparedSource, RangeState, RowLocation, ScoreJob

#: Images per read.
_BLOCK = 64
#: Shards that stay open; an actor reads one range after another.
_OPEN = 4


@dataclass(frozen=True)
class _Slice:
    """Consecutive rows of a range that lie in one shard: rows of the range from `row`, of the shard from `first`."""

    shard: int
    row: int
    first: int
    count: int


class PreparedReader:
    """Reads images and failures of ranges whose rows are those of a prepared set, in its order."""

    def __init__(self, job: ScoreJob) -> None:
        assert job.prepared is not None
        self._source: PreparedSource = job.prepared
        self._data = PreparedSet(self._source.path, self._source.size)
        self._open = functools.lru_cache(maxsize=_OPEN)(self._open_shard)
        # One caller reads at a time, as in `ImageReader`.
        self._turn = threading.Lock()

    def iter_images(self, states: Sequence[RangeState]) -> Iterator[tuple[RowLocation, DecodedImage | Failure]]:
        """Yield the image or failure of every row."""
        with self._turn:
            for position, state in enumerate(states):
                for piece in _cut(self._source.starts, state.start, len(state.rows)):
                    for row, outcome in self._read(state, piece):
                        yield RowLocation(position, row), outcome

    def _read(self, state: RangeState, piece: _Slice) -> Iterator[tuple[int, DecodedImage | Failure]]:
        shard, pixels = self._open(piece.shard)
        rows = shard.table.slice(piece.first, piece.count)
        if not rows["image_id"].equals(state.rows["image_id"].slice(piece.row, piece.count).combine_chunks()):
            raise OutputError(
                f"{self._source.path}: {self._data.shard_names[piece.shard]} holds other rows than when the run "
                "started; score into another --out"
            )
        codes, errors, details = rows["error_code"].to_pylist(), rows["error"].to_pylist(), shard.details or {}
        for start in range(0, piece.count, _BLOCK):
            block = np.arange(start, min(start + _BLOCK, piece.count))
            good = [i for i in block.tolist() if codes[i] is None]
            images = dict(zip(good, pixels[np.array(good, int) + piece.first], strict=True))
            for i in block.tolist():
                found = details.get(piece.first + i)
                fields = found.fields if found else None
                if codes[i] is None:
                    flags = tuple(found.flags) if found else ()
                    yield piece.row + i, DecodedImage((images[i],), fields, flags=flags)
                else:
                    yield piece.row + i, Failure(codes[i], errors[i] or "", fields)

    def _open_shard(self, index: int) -> tuple[ShardRows, Pixels]:
        return self._data.read_rows(index, ["image_id", "error_code", "error"])


def read_sample(source: PreparedSource) -> Sample:
    """Read the first images of a prepared set, to state before a run how long it takes."""
    started = time.monotonic()
    shard, pixels = PreparedSet(source.path, source.size).read_rows(0, ["error_code"])
    rows = np.arange(min(PROBE_IMAGES, len(pixels)))
    good = rows[pc.is_null(shard.table["error_code"].slice(0, len(rows))).to_numpy(zero_copy_only=False)]
    images = [DecodedImage((image,), None) for image in pixels[good]]
    return Sample(images, len(rows) - len(good), (time.monotonic() - started) / max(len(rows), 1))


def _cut(starts: Sequence[int], start: int, count: int) -> Iterator[_Slice]:
    """Cut rows of the set at the borders of shards; `starts` as in `PreparedSource`."""
    end = start + count
    shard = int(np.searchsorted(starts, start, side="right")) - 1
    row = 0
    while start < end:
        taken = min(end, starts[shard + 1]) - start
        yield _Slice(shard, row, start - starts[shard], taken)
        start, row, shard = start + taken, row + taken, shard + 1
