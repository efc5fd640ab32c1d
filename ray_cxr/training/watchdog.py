"""End a worker that waits for an exchange which never ends, so that Ray Train restarts all workers.

TensorFlow notices within seconds that the process of another worker is stopped, from missing heartbeats. A worker that
waits in its main thread, for a disk or a device, still sends them: the others wait for it, and nothing else notices.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from pathlib import Path
from typing import Any, Self

from ray_cxr.errors import RayCxrError
from ray_cxr.storage import atomic, remote

#: In RUN, one file per worker that ended itself: `{"rank": 0, "workers": 2, "seconds": 900.0, "lost": []}`. `lost` are
#: workers without heartbeats.
STALLED = "stalled-{}.json"
_NO_HEARTBEAT = "stopped sending heartbeats"
#: Exit code of a worker that ended itself.
EXIT_CODE = 75


class Watchdog:
    """A context that ends this process if `beat` is not called for `timeout_s` seconds; None never ends it.

    Args:
        out: address of RUN, where the worker states that it ended itself.
        rank, workers: number of this worker, and the number of all workers.
    """

    def __init__(self, timeout_s: float | None, out: Path, rank: int, workers: int) -> None:
        self._timeout_s, self._out, self._rank, self._workers = timeout_s, out, rank, workers
        self._beat_at, self._stopped = time.monotonic(), threading.Event()

    def __enter__(self) -> Self:
        if self._timeout_s is not None:
            threading.Thread(target=self._watch, args=(self._timeout_s,), name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()

    def beat(self) -> None:
        """State that the worker makes progress."""
        self._beat_at = time.monotonic()

    def _watch(self, timeout_s: float) -> None:
        interval, checked_at = min(1.0, timeout_s / 10), time.monotonic()
        while not self._stopped.wait(interval):
            now = time.monotonic()
            if now - checked_at > 10 * interval + 5:
                self._beat_at = now  # this worker itself was stopped or starved: the others decide
            checked_at = now
            if now - self._beat_at > timeout_s:
                self._end(now - self._beat_at)

    def _end(self, seconds: float) -> None:
        """Leave a note in RUN, and end the process, because its main thread waits in native code."""
        record = {"rank": self._rank, "workers": self._workers, "seconds": round(seconds, 1), "lost": []}
        path = self._out / STALLED.format(self._rank)
        writer = threading.Thread(target=atomic.write_json, args=(path, record), daemon=True)
        writer.start()
        writer.join(timeout=30)  # the storage may be what hangs
        os._exit(EXIT_CODE)


def record_lost(error: Exception, out: Path, rank: int, workers: int) -> None:
    """Leave a note in RUN if TensorFlow missed the heartbeats of other workers."""
    _, found, rest = str(error).partition(_NO_HEARTBEAT)
    lost = sorted({int(number) for number in re.findall(r"/task:(\d+)", rest)} - {rank})
    if found and lost:
        with contextlib.suppress(RayCxrError):  # only for the log
            record = {"rank": rank, "workers": workers, "seconds": 0.0, "lost": lost}
            atomic.write_json(out / STALLED.format(rank), record)


def read_stalled(out: Path) -> list[dict[str, Any]]:
    """Return and remove the notes of workers that ended themselves."""
    from ray_cxr.storage.run_folder import read_json

    notes = []
    for path in sorted(out.glob(STALLED.format("*"))):
        notes.append(read_json(path))
        remote.remove_files([path])
    return [note for note in notes if note]


def explain_stalled(notes: list[dict[str, Any]]) -> str:
    """Return the line about workers that waited in vain, from their notes."""
    if lost := sorted({int(rank) for note in notes for rank in note["lost"]}):
        names = ", ".join(map(str, lost))
        return f"a worker failed or was lost: {names} stopped answering (its process or machine hangs, or is gone)"
    waited = sorted(int(note["rank"]) for note in notes)
    missing = sorted(set(range(int(notes[0]["workers"]))) - set(waited))
    seconds = min(note["seconds"] for note in notes)
    if missing:
        names = ", ".join(map(str, missing))
        who = f"worker {names} did" if len(missing) == 1 else f"workers {names} did"
        return f"{who} not answer the others for {seconds:.0f} s; its process or machine hangs"
    return f"no worker finished a step in {seconds:.0f} s; storage or network hangs, or step_timeout_s is too low"
