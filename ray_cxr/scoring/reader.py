"""Read and decode the images of ranges, ahead of the model and in bounded memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ray_cxr import telemetry
from ray_cxr.config import InputSpec
from ray_cxr.errors import ImageError
from ray_cxr.imaging.sandbox import DecodedImage, Decoder, Failure
from ray_cxr.scoring.ranges import RangeState, RowLocation, ScoreJob
from ray_cxr.storage.archives import read_members
from ray_cxr.storage.pacs_workers import BYTES_AHEAD, PacsFetcher
from ray_cxr.storage.paths import split_member

_L = TypeVar("_L")
#: The path of an image, its contents, None for a row without a path, or the reason why an archive lacks it.
ImageSource = str | bytes | ImageError | None


class ImageReader:
    """Decoders in child processes, each with a thread that waits for it.

    Each image is resized to the model's input and to each of `specs`. `command` labels the metrics.
    """

    def __init__(self, job: ScoreJob, decoders: int, specs: Sequence[InputSpec] = (), command: str = "score") -> None:
        self._command, self._local = command, threading.local()
        local = self._local  # without a cycle through the pool, the threads end with their reader

        def make_decoder() -> None:
            max_pixels, timeout_s = job.settings.max_pixels, job.settings.decode_timeout_s
            local.decoder = Decoder(
                (job.spec, *specs), max_pixels=max_pixels, timeout_s=timeout_s, tags=True, digest=True
            )

        self._pool = ThreadPoolExecutor(decoders, thread_name_prefix="decode", initializer=make_decoder)
        self._fetcher = None if job.pacs is None else PacsFetcher(job.pacs, command)
        # At least 32 images ahead of the model, and two batches.
        self._ahead = max(32, 2 * job.batch_size) + decoders
        self._turn = threading.Lock()
        # The children start while the model is being compiled.
        barrier = threading.Barrier(decoders)
        for _ in range(decoders):
            self._pool.submit(self._start_decoder, barrier)

    def iter_images(self, states: Sequence[RangeState]) -> Iterator[tuple[RowLocation, DecodedImage | Failure]]:
        """Yield the image or failure of every row: first single files, then each archive's members in its order."""
        ahead: deque[tuple[RowLocation, int, Future[DecodedImage | Failure]]] = deque()
        waiting_bytes, max_bytes = 0, BYTES_AHEAD if self._fetcher is None else BYTES_AHEAD // 2
        # One caller reads at a time: two callers side by side would end together and leave the model idle.
        with self._turn:
            for location, source in self._iter_sources(states):
                size = len(source) if isinstance(source, bytes) else 0
                waiting_bytes += size
                ahead.append((location, size, self._pool.submit(self._load, source)))
                while len(ahead) >= self._ahead or (waiting_bytes > max_bytes and ahead):
                    first, size, future = ahead.popleft()
                    waiting_bytes -= size
                    yield first, future.result()
        while ahead:
            first, _, future = ahead.popleft()
            yield first, future.result()

    def _iter_sources(self, states: Sequence[RangeState]) -> Iterator[tuple[RowLocation, ImageSource]]:
        """Yield the source of every row's image; images of a PACS are fetched while earlier ones are decoded."""
        sources = iter_sources(_locate(states))
        return sources if self._fetcher is None else self._fetcher.fetch_ahead(sources)

    def _start_decoder(self, barrier: threading.Barrier) -> None:
        barrier.wait()  # so that each thread of the pool makes one call
        self._local.decoder.start()

    def _load(self, source: ImageSource) -> DecodedImage | Failure:
        if isinstance(source, ImageError):
            return Failure(source.code, source.message, None)
        decoder: Decoder = self._local.decoder
        outcome = decoder.load(source)
        if decoder.seconds:
            telemetry.add_decode(self._command, decoder.seconds)
        return outcome


def _locate(states: Sequence[RangeState]) -> Iterator[tuple[RowLocation, str | None]]:
    for range_position, state in enumerate(states):
        for row, path in enumerate(state.rows["path"].to_pylist()):
            yield RowLocation(range_position, row), path


def iter_sources(paths: Iterable[tuple[_L, str | None]]) -> Iterator[tuple[_L, ImageSource]]:
    """Yield the source of the image at each path in the order of reading: single files, then archive by archive.

    Args:
        paths: pairs of a location, which the result repeats, and a path.
    """
    members: dict[str, dict[str, list[_L]]] = {}
    for location, path in paths:
        inside = split_member(path)
        if inside is None:
            yield location, path
        else:
            members.setdefault(inside[0], {}).setdefault(inside[1], []).append(location)
    for archive, wanted in members.items():
        reason = ImageError("missing", "the archive holds no such member")
        try:
            for name, content in read_members(archive, frozenset(wanted)):
                for location in wanted.pop(name):
                    yield location, content
        except ImageError as error:
            reason = ImageError(error.code, f"the archive: {error.message}")
        for locations in wanted.values():
            for location in locations:
                yield location, reason
