"""Read the checkpoints that Ray Train keeps of a run."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

from ray_cxr.errors import OutputError, RayCxrError
from ray_cxr.ray_api import CHECKPOINT_LIST, LATEST_CHECKPOINT
from ray_cxr.storage import remote
from ray_cxr.storage.run_folder import read_json
from ray_cxr.training.monitor import read_metrics
from ray_cxr.training.worker import PROGRESS, UNSCORED

#: Seconds before each further attempt to read a list of checkpoints, which Ray Train may be rewriting.
_REWRITE_S = (0.1, 0.5, 2.0)


def has_checkpoint(out: Path) -> bool:
    """Return whether a run has a complete checkpoint."""
    return (out / "ray" / CHECKPOINT_LIST).exists()


def read_stored_epochs(out: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.csv up to the latest checkpoint: the epochs that a bundle can have.

    metrics.csv may be ahead: training continues while a checkpoint is being stored.

    Raises:
        OutputError: the list of checkpoints is damaged.
    """
    if not has_checkpoint(out):
        return []
    path = out / "ray" / CHECKPOINT_LIST
    for wait in (*_REWRITE_S, None):
        if latest := read_json(path).get(LATEST_CHECKPOINT):
            metrics = latest["metrics"]
            # A checkpoint within an epoch does not have that epoch.
            last = metrics["epoch"] - (metrics["selection"] == UNSCORED)
            return [point for point in read_metrics(out) if point["epoch"] <= last]
        if wait is not None:
            time.sleep(wait)
    raise OutputError(f"{path}: damaged, so this run cannot continue; remove {out / 'ray'} to train it again")


def find_best_checkpoint(out: Path, last: float = math.inf) -> Any:
    """Return Ray Train's checkpoint of the best epoch up to `last`; None if the run has finished none."""
    if not has_checkpoint(out):
        return None
    scored = [
        pair
        for pair in read_result(out).best_checkpoints
        if pair[1]["selection"] > UNSCORED and pair[1]["epoch"] <= last
    ]
    return max(scored, key=lambda pair: pair[1]["selection"])[0] if scored else None


def read_result(out: Path) -> Any:
    """Return the result that Ray Train keeps of a run, finished or not."""
    from ray.train import Result

    # Absolute, because Ray takes a relative path for an address.
    store, path = remote.to_arrow((out / "ray").resolve())
    return Result.from_path(path, storage_filesystem=store)


def remove_incomplete(out: Path) -> None:
    """Remove checkpoints whose upload was interrupted; call it when no worker runs."""
    result = read_result(out)
    complete = [Path(one.path).name for one in (result.checkpoint, *(pair[0] for pair in result.best_checkpoints))]
    with contextlib.suppress(RayCxrError, OSError):  # they are only in the way
        for folder in (out / "ray").glob("checkpoint_*"):
            if folder.name not in (*complete, CHECKPOINT_LIST):
                remote.remove_files(list(folder.iterdir()))
                folder.rmdir()


def read_progress(checkpoint: Any) -> dict[str, Any]:
    """Return the fields of `loop.TrainState` in a checkpoint."""
    with checkpoint.as_directory() as folder:
        return dict(json.loads((Path(folder) / PROGRESS).read_text(encoding="utf-8")))
