"""Read the checkpoints that Ray Train keeps of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ray_cxr.storage import remote
from ray_cxr.training.worker import PROGRESS, UNSCORED

#: In RUN/ray: Ray Train's own list of its checkpoints.
SNAPSHOT = "checkpoint_manager_snapshot.json"


def find_best_checkpoint(out: Path) -> Any:
    """Return Ray Train's checkpoint of the best epoch that a run has finished; None if it has finished none."""
    if not (out / "ray" / SNAPSHOT).exists():
        return None
    scored = [pair for pair in read_result(out).best_checkpoints if pair[1]["selection"] > UNSCORED]
    return max(scored, key=lambda pair: pair[1]["selection"])[0] if scored else None


def read_result(out: Path) -> Any:
    """Return the result that Ray Train keeps of a run, finished or not."""
    from ray.train import Result

    # Absolute, because Ray takes a relative path for an address.
    store, path = remote.to_arrow((out / "ray").resolve())
    return Result.from_path(path, storage_filesystem=store)


def read_progress(checkpoint: Any) -> dict[str, Any]:
    """Return the fields of `loop.TrainState` in a checkpoint."""
    with checkpoint.as_directory() as folder:
        return dict(json.loads((Path(folder) / PROGRESS).read_text(encoding="utf-8")))
