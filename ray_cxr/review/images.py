"""Decode the images of a review for the browser, ahead of the reader and in bounded memory.

Child processes decode, as in `score`, so a damaged file costs one image. Threads wait for them: the image that the
reader looks at comes first, then the small images of a list, then the images of the next studies. Nothing is written to
the disk, and the files for the browser have no metadata.
"""

from __future__ import annotations

import html
import itertools
import queue
import textwrap
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal

import cv2
import numpy as np

from ray_cxr.imaging.overlays import encode_jpeg, scale_to_side
from ray_cxr.imaging.pixels import MAX_PIXELS
from ray_cxr.imaging.sandbox import Decoder, Failure
from ray_cxr.review.words import describe_code

#: Longer side of a small image, pixels.
THUMBNAIL = 96
#: Bytes of encoded images in memory: about 100 images of 2,000 x 2,500 pixels.
CACHE_BYTES = 256 * 1024 * 1024
_DECODERS = 2  # and one for images of the next studies, so that none of them delays an image that is looked at
Kind = Literal["image", "thumbnail"]
_Job = tuple[Kind, int]
_Queue = queue.PriorityQueue[tuple[int, int, _Job, "Future[bytes | Failure]"]]
#: Order of the queue.
_NOW, _SMALL = 0, 1
#: 5 million pixels: 43 ms and 2.2 MB. The default strategy takes 95 ms, lossless WebP 250 ms.
_PNG = (
    cv2.IMWRITE_PNG_COMPRESSION,
    1,
    cv2.IMWRITE_PNG_STRATEGY,
    cv2.IMWRITE_PNG_STRATEGY_RLE,
    cv2.IMWRITE_PNG_FILTER,
    cv2.IMWRITE_PNG_FILTER_UP,
)


class ImageStore:
    """Encoded images by row.

    Args:
        paths: the path of a row, None if it has none.
        errors: the code and the message of a row that could not be scored, otherwise None.
        settings: `max_pixels` and `decode_timeout_s` of the run of `score`.
    """

    def __init__(
        self,
        paths: Callable[[int], str | None],
        errors: Callable[[int], Failure | None],
        settings: dict[str, Any],
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._paths, self._errors = paths, errors
        self._max_pixels = int(settings.get("max_pixels", MAX_PIXELS))
        self._timeout_s = float(settings.get("decode_timeout_s", 60.0))
        self._cache_bytes, self._bytes = cache_bytes, 0
        self._cache: OrderedDict[_Job, bytes] = OrderedDict()
        self._jobs: dict[_Job, Future[bytes | Failure]] = {}
        self._ahead: dict[_Job, Future[bytes | Failure]] = {}  # those that nobody requested yet
        self._queue: _Queue = queue.PriorityQueue()
        self._ahead_queue: _Queue = queue.PriorityQueue()
        self._counter = itertools.count()
        self._lock = threading.Lock()
        self._has_threads = False

    def get_image(self, row: int) -> bytes | Failure:
        """Return the PNG of an image in its original size, uint8 [H,W] of the decoder, or why it cannot be read."""
        return self._get(("image", row), _NOW)

    def get_thumbnail(self, row: int) -> bytes | Failure:
        """Return a JPEG whose longer side has `THUMBNAIL` pixels, or why the image cannot be read."""
        return self._get(("thumbnail", row), _SMALL)

    def prefetch(self, rows: Sequence[int]) -> None:
        """Decode images before they are requested, the first first; drops earlier requests that still wait."""
        with self._lock:
            for job, future in self._ahead.items():
                if future.cancel():
                    self._jobs.pop(job, None)
            self._ahead = {}
            for row in rows:
                job = ("image", row)
                if job not in self._cache and job not in self._jobs and self._errors(row) is None:
                    self._ahead[job] = self._submit(job, self._ahead_queue, _NOW)

    def _get(self, job: _Job, priority: int) -> bytes | Failure:
        if (error := self._errors(job[1])) is not None:
            return error
        with self._lock:
            if (data := self._cache.get(job)) is not None:
                self._cache.move_to_end(job)
                return data
            future = self._jobs.get(job)
            if future is None:
                future = self._submit(job, self._queue, priority)
            elif self._ahead.pop(job, None) is not None:
                # Requested before its turn: the queue that is faster decodes it.
                self._queue.put((priority, next(self._counter), job, future))
        return future.result()

    def _submit(self, job: _Job, jobs: _Queue, priority: int) -> Future[bytes | Failure]:
        if not self._has_threads:
            self._has_threads = True
            for served in (*[self._queue] * _DECODERS, self._ahead_queue):
                # A daemon, so that an image that takes long does not delay the end of the server.
                decoder = Decoder((None,), max_pixels=self._max_pixels, timeout_s=self._timeout_s)
                arguments = (weakref.ref(self), served, decoder)
                threading.Thread(target=_work, args=arguments, name="decode", daemon=True).start()
        future: Future[bytes | Failure] = Future()
        self._jobs[job] = future
        jobs.put((priority, next(self._counter), job, future))
        return future

    def _run(self, job: _Job, future: Future[bytes | Failure], decoder: Decoder) -> None:
        with self._lock:
            # The other queue was faster, or `prefetch` dropped it.
            if future.done() or future.running() or not future.set_running_or_notify_cancel():
                return
        result: bytes | Failure
        try:
            decoded = decoder.load(self._paths(job[1]))
            result = decoded if isinstance(decoded, Failure) else _encode(job[0], decoded.images[0])
        except BaseException as error:
            self._forget(job)
            future.set_exception(error)
            return
        with self._lock:
            if isinstance(result, bytes):
                self._cache[job] = result
                self._bytes += len(result)
                # The oldest go; the newest stays, however large.
                while self._bytes > self._cache_bytes and len(self._cache) > 1:
                    self._bytes -= len(self._cache.popitem(last=False)[1])
        self._forget(job)
        future.set_result(result)

    def _forget(self, job: _Job) -> None:
        with self._lock:
            self._jobs.pop(job, None)
            self._ahead.pop(job, None)


def _work(store: weakref.ref[ImageStore], jobs: _Queue, decoder: Decoder) -> None:
    """Decode the images of a queue until the store is gone."""
    with decoder:
        while True:
            try:
                _, _, job, future = jobs.get(timeout=5.0)
            except queue.Empty:
                if store() is None:
                    return
                continue
            if (found := store()) is None:
                return
            found._run(job, future, decoder)
            del found


def draw_failure(code: str) -> str:
    """Return a small image, SVG, with the words for the code of an image that cannot be read."""
    lines = textwrap.wrap(f"Not readable: {describe_code(code)}", 15)
    spans = "".join(f'<tspan x="48" dy="16">{html.escape(line)}</tspan>' for line in lines)
    text = f'<text y="{44 - 8 * len(lines)}" fill="#a0a8b0" font-family="sans-serif" font-size="11.5">{spans}</text>'
    size = f'width="{THUMBNAIL}" height="{THUMBNAIL}" viewBox="0 0 96 96" text-anchor="middle"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{text}</svg>'


def _encode(kind: Kind, pixels: np.ndarray) -> bytes:
    if kind == "image":
        return bytes(cv2.imencode(".png", pixels, _PNG)[1])
    return encode_jpeg(scale_to_side(pixels, THUMBNAIL))
