"""Read the checkpoints that Ray Train keeps of a run."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from ray_cxr.errors import RayCxrError
from ray_cxr.ray_api import CHECKPOINT_LIST
from ray_cxr.storage import remote
from ray_cxr.training.worker import PROGRESS, UNSCORED


def has_checkpoint(out: Path) -> bool:
    """Return whether a run has a complete checkpoint."""
    return (out / "ray" / CHECKPOINT_LIST).exists()


def find_best_checkpoint(out: Path) -> Any:
    """Return Ray Train's checkpoint of the best epoch that a run has finished; None if it has finished none."""
    if not has_checkpoint(out):
        return None
    scored = [pair for pair in read_result(out).best_checkpoints if pair[1]["selection"] > UNSCORED]
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
