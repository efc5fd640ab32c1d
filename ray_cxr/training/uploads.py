"""Store the checkpoints of a run while training continues.

Rank 0 writes a checkpoint to its local disk and trains on. Another thread copies it to RUN/ray/NAME, file by file, and
then Ray Train adds it to its list. So a kill during a copy leaves files that nothing reads, and a run continues from
the last complete checkpoint. The worker ends when all its checkpoints are stored.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from ray_cxr import ray_api
from ray_cxr.errors import InputError, RayCxrError, to_record
from ray_cxr.storage import atomic, remote
from ray_cxr.tasks import sanitize_error

#: In RUN: the error of a worker that a restart would only repeat.
FAILURE = "failure.json"
#: Checkpoints on the local disk that are not stored yet, at most. With slower storage, training waits for it.
MAX_PENDING = 2
#: Seconds before each further attempt to store a checkpoint, after the attempts of the storage's own client.
RETRY_AFTER_S = (5.0, 20.0, 60.0, 240.0)
_POLL_S = 0.05
#: Start of the names of temporary folders; the process number follows.
_PREFIX = f"ray_cxr-{socket.gethostname()}-"


class Uploads:
    """The checkpoints of one worker.

    Args:
        out: RUN.
        is_any: returns whether a flag is true on any worker; all workers call it together.
        on_wait: is called again and again while training waits for the storage.
    """

    def __init__(
        self, out: Path, is_any: Callable[[bool], bool] = bool, on_wait: Callable[[], object] = lambda: None
    ) -> None:
        self._out, self._is_any, self._on_wait = out, is_any, on_wait
        self._pending: list[Path] = []
        _remove_folders_of_dead_processes()

    def make_folder(self) -> Path:
        """Make a temporary folder for a checkpoint, which is removed after its upload or when this process ends."""
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder

    def report(self, metrics: dict[str, Any], folder: Path | None, *, wait: bool = False) -> None:
        """Report metrics to Ray Train, with a checkpoint from rank 0, and wait until all workers report.

        With `wait`, the call returns when the checkpoint is stored.
        """
        import ray.train

        checkpoint = None
        # All workers wait here, where they count as alive, and not in Ray Train.
        self.wait(MAX_PENDING - 1)
        if folder is not None:
            self._pending.append(folder)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray_api.report(metrics, checkpoint, wait=wait, upload=self.upload)

    def wait(self, limit: int = 0) -> None:
        """Wait until at most `limit` checkpoints are not stored; Ray Train removes the folder of a stored one."""
        while self._is_any(self._count_pending() > limit):
            self._on_wait()
            time.sleep(_POLL_S)

    def _count_pending(self) -> int:
        self._pending = [folder for folder in self._pending if folder.exists()]
        return len(self._pending)

    def upload(self, checkpoint: Any, name: str) -> Any:
        """Copy a checkpoint to RUN/ray/NAME, and return it there.

        Raises:
            RayCxrError: the storage refused it, or failed in all attempts. A restart would train until the next
                checkpoint only to fail too, so failure.json, if it can be written, prevents that.
        """
        target = self._out / "ray" / name
        for seconds in (*RETRY_AFTER_S, None):
            try:
                target.mkdir(parents=True, exist_ok=True)
                for file in sorted(Path(checkpoint.path).iterdir()):
                    atomic.write(target / file.name, functools.partial(shutil.copyfile, file))
                break
            except (RayCxrError, OSError) as error:
                if seconds is None or isinstance(error, InputError):
                    failure = sanitize_error(error, "train")
                    with contextlib.suppress(RayCxrError, OSError):
                        atomic.write_json(self._out / FAILURE, to_record(failure))
                    raise failure from None
                time.sleep(seconds)
        store, path = remote.to_arrow(target)
        return type(checkpoint)(path, filesystem=store)


def _remove_folders_of_dead_processes() -> None:
    """Remove the checkpoints that killed workers of this machine left on its disk."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        number = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if number.isdecimal() and not psutil.pid_exists(int(number)):
            shutil.rmtree(folder, ignore_errors=True)
