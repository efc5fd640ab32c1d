"""The leak check: did evaluated images, or their patients, train the model?"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from ray_cxr.errors import LeakError
from ray_cxr.reporting.scores import Scores

UNKNOWN_TRAINING = "not all images that trained the model are known"


@dataclass(frozen=True)
class LeakCheck:
    """Result of the leak check.

    Attributes:
        checked: all training images are known, so the check is complete.
        reason: why it is not complete, or None.
        shared_images, shared_patients: training images and patients that are evaluated too.
        shared_by_part: shared images by `train` or `val`.
        unknown_patients: evaluated images without a patient id.
    """

    checked: bool
    reason: str | None
    training_images: int | None = None
    training_patients: int = 0
    shared_images: int = 0
    shared_by_part: dict[str, int] = field(default_factory=dict)
    shared_patients: int = 0
    unknown_patients: int = 0

    def to_json(self) -> dict[str, Any]:
        if self.training_images is None:
            return {"checked": self.checked, "reason": self.reason}
        return asdict(self)

    def describe(self, split: str | None) -> str:
        """State the result in half a sentence: `passed: ...`, `not possible: ...`, or what is shared."""
        if self.training_images is None:
            return f"not possible: {self.reason}"
        if self.shared_images or self.shared_patients:
            parts = ", ".join(f"{n:,} of its {part} images" for part, n in self.shared_by_part.items())
            text = (
                f"{self.shared_images:,} images{f' ({parts})' if parts else ''} and {self.shared_patients:,} patients "
                f"trained the model, as expected for the {split} split"
            )
        elif not self.checked:
            text = f"not possible: {self.reason}; the known ones are not in this evaluation"
        else:
            text = (
                f"passed: none of the {self.training_images:,} training images and {self.training_patients:,} "
                "training patients is in this evaluation"
            )
        if self.unknown_patients:
            text += f"; {self.unknown_patients:,} images have no patient id and were compared by image id alone"
        return text


def check_leakage(
    table: Scores, rows: np.ndarray, patients: np.ndarray, split: str | None, population: str
) -> LeakCheck:
    """Compare evaluated images and patients with those that trained the model.

    Args:
        table: the model's score table.
        rows: int [n], evaluated rows of the table.
        patients: ids [n].
        split: the evaluated split; `train` and `val` may share images with the training.
        population: what the images are, for the error.

    Raises:
        LeakError: an image or patient is shared, and the evaluation is of `test` or of no named split.
    """
    training = table.training
    if training is None:
        return LeakCheck(checked=False, reason=UNKNOWN_TRAINING)
    same = pd.Index(training.images).isin(table.ids[rows])
    known = {patient for patient in training.patients if patient is not None}
    # Scores and labels may spell one patient differently, and the training may have used either spelling.
    scored_patients = table.patients[rows]
    shared = {patient for patient in (*patients, *scored_patients) if patient in known}
    if split not in ("train", "val") and (same.any() or shared):
        remedy = (
            "Use a manifest whose test split excludes them"
            if split
            else "Add `--labels M.parquet` with `--split test`, or use a table that excludes them"
        )
        raise LeakError(
            f"{table.source}: {int(same.sum()):,} images and {len(shared):,} patients of {population} trained this "
            f"model. {remedy} (`--split train` or `--split val` evaluates training images as such)."
        )
    complete = table.provenance.get("lineage") != "unknown"
    return LeakCheck(
        checked=complete,
        reason=None if complete else UNKNOWN_TRAINING,
        training_images=len(training.images),
        training_patients=len(known),
        shared_images=int(same.sum()),
        shared_by_part=dict(sorted(Counter(str(part) for part in training.parts[same]).items())),
        shared_patients=len(shared),
        unknown_patients=sum(a is None and b is None for a, b in zip(patients, scored_patients, strict=True)),
    )
