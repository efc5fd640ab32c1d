"""Read a study as users see it: its files, and errors of one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pyarrow.parquet as pq
import pytest

from ray_cxr.ray_api import CHECKPOINT_LIST


def get_refusal(error: type[Exception], function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Return the message of the error that a call raises, which must be one line."""
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert message.splitlines() == [message]
    return message


def read_rows(out: Path) -> pd.DataFrame:
    return pq.read_table(out / "trials.parquet").to_pandas().set_index("number")


def load_study(out: Path) -> optuna.Study:
    storage = f"sqlite:///{out / 'study.db'}"
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage)


def read_validated_epoch(folder: Path) -> int:
    """Return the epoch of the validation that `store_checkpoints` wrote, or of a copy."""
    with np.load(folder / "validation.npz") as arrays:
        return int(arrays["probabilities"])


def store_checkpoints(folder: Path, scores: Mapping[int, float], *, within: int | None = None) -> None:
    """List checkpoints of these epochs with their selection scores, as Ray Train does: the two best and the latest.

    `read_validated_epoch` reads the epoch of each. `within` is the epoch of a latest checkpoint that does not end it.
    """
    from ray_cxr.training.worker import UNSCORED, VALIDATION

    reports = [{"epoch": epoch, "loss": 0.5, "selection": score} for epoch, score in scores.items()]
    if within is not None:
        reports.append({"epoch": within, "selection": UNSCORED})
    results = [{"checkpoint_dir_name": f"checkpoint_{n}", "metrics": report} for n, report in enumerate(reports)]
    ranked = sorted(results, key=lambda result: result["metrics"]["selection"])
    kept = [result for n, result in enumerate(ranked) if n >= len(ranked) - 2 or result is results[-1]]
    for result in kept:
        checkpoint = folder / "ray" / result["checkpoint_dir_name"]
        checkpoint.mkdir(parents=True, exist_ok=True)
        np.savez(checkpoint / VALIDATION, probabilities=result["metrics"]["epoch"], image_ids=["no image"])
    state: dict[str, Any] = {"checkpoint_results": kept, "checkpoint_report_indices": [*range(len(kept))]}
    state |= {"latest_checkpoint_result": results[-1], "current_report_index": len(results)}
    empty = ["pending_training_results", "pending_validation_specs"]
    empty += [f"{kind}_checkpoint_dir_names" for kind in ("validated", "timed_out_validation", "failed_validation")]
    state |= {name: [] for name in empty}
    (folder / "ray" / CHECKPOINT_LIST).write_text(json.dumps(state), encoding="utf-8")
