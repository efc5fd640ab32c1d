"""The leak check: did images of a report, or their patients, train the model?"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ray_cxr.data import identity
from ray_cxr.errors import LeakError
from ray_cxr.evaluation.usability import Warned, flag_any
from ray_cxr.imaging.demographics import PatientCount, count_of
from ray_cxr.reporting.scores import Scores, TrainingImages

#: Splits whose images train or tune a model.
_KNOWN = ("train", "val")
UNKNOWN_TRAINING = "not all images that trained the model are known"


@dataclass(frozen=True)
class LeakCheck:
    """Result of the leak check.

    Attributes:
        reason: why the check is incomplete; None if all training images are known.
        shared_images, shared_patients: number of training images and patients that are in the report too.
        shared_by_part: number of shared images by `train` or `val`.
        flagged_images, shared_flagged: number of flagged images in the report, and of those of them that are shared.
        related_images: number of other images of these patients in the report.
        unknown_patients: number of images in the report without a patient id.
        unknown_training_patients: number of training images without a patient id.
    """

    reason: str | None
    training_images: int | None = None
    training_patients: int | None = 0
    shared_images: int = 0
    shared_by_part: dict[str, int] = field(default_factory=dict)
    flagged_images: int = 0
    shared_flagged: int = 0
    shared_patients: int = 0
    related_images: int = 0
    unknown_patients: int = 0
    unknown_training_patients: int = 0

    def to_json(self) -> dict[str, Any]:
        known = {"reason": self.reason} if self.training_images is None else asdict(self)
        return {"checked": self.reason is None, **known}

    def describe(self, split: str | None) -> str:
        """Describe the result: `passed: ...`, `not possible: ...`, or how many images and patients are shared."""
        if self.training_images is None:
            return f"not possible: {self.reason}"
        if self.shared_images or self.shared_patients:
            parts = ", ".join(f"{count_of(n, f'{part} image')}" for part, n in self.shared_by_part.items())
            images = count_of(self.shared_images, "image") + (f" ({parts})" if parts else "")
            patients = count_of(self.shared_patients, "patient")
            text = f"{images} and {patients} trained or tuned the model"
            text += f", as expected for the {split} split" if split in _KNOWN else ""
        elif self.reason:
            text = f"not possible: {self.reason}; the known ones are not in this report"
        else:
            images = count_of(self.training_images, "training and validation image")
            patients = f" and none of their {self.training_patients:,} patients" if self.training_patients else ""
            text = f"passed: none of the {images}{patients} is in this report"
        for count, kind in ((self.unknown_patients, ""), (self.unknown_training_patients, "training ")):
            if count:
                have = "has" if count == 1 else "have"
                text += f"; {count_of(count, f'{kind}image')} {have} no patient id: compared by image id alone"
        return text


def check_leakage(
    table: Scores,
    rows: np.ndarray,
    patients: np.ndarray,
    split: str | None,
    population: str,
    *,
    has_manifest: bool = True,
) -> LeakCheck:
    """Compare the evaluated rows [n] and patient ids [n] with those that trained the model.

    An evaluation of `train` or `val` may share images with the training. `population` names the images in the error,
    whose remedy depends on whether a manifest was passed.

    Raises:
        LeakError: images or patients are shared, and `split` is neither `train` nor `val`.
    """
    found = compare_training(table, rows, patients)
    if split not in _KNOWN and (found.shared_images or found.shared_patients):
        option = "--split test" if has_manifest else "--manifest M.parquet --split test"
        remedies = {
            "test": "Use a manifest whose test split excludes them",
            None: f"Add `{option}`, use a table that excludes them, or report without labels",
        }
        remedy = remedies.get(split, "Leave them out")
        if not found.shared_images:
            # Two hospitals that number their patients from 1 have the same ids for different patients.
            remedy += "; if these are other people with the same ids, add a prefix to your ids"
        raise LeakError(
            f"{table.source}: {found.shared_images:,} images and {found.shared_patients:,} patients of {population} "
            f"trained this model. {remedy} (`--split train` or `--split val` evaluates training images as such)."
        )
    return found


def compare_training(table: Scores, rows: np.ndarray, patients: np.ndarray) -> LeakCheck:
    """Count the images in these rows [n], and of these patients [n], that trained the model."""
    return count_shared(
        table.training,
        table.ids[rows],
        patients,
        table.patients[rows],
        flag_any(table.flags, len(table.ids))[rows] == 1,
        is_complete=_is_complete(table),
    )


def find_parts(table: Scores) -> list[str]:
    """Return the split in which the model had each image: `train`, `val`, an empty text for none, or `unknown`."""
    rest = "" if table.training is not None and _is_complete(table) else "unknown"
    parts = [rest] * len(table.ids)
    if table.training is not None:
        for place, part in zip(identity.find_ids(table.training.images, table.ids), table.training.parts, strict=True):
            if place >= 0:
                parts[place] = str(part)
    return parts


def _is_complete(table: Scores) -> bool:
    return table.provenance.get("lineage") != "unknown"


def count_shared(
    training: TrainingImages | None,
    ids: np.ndarray,
    patients: np.ndarray,
    scored_patients: np.ndarray,
    flagged: np.ndarray,
    *,
    is_complete: bool,
) -> LeakCheck:
    """Count the training images among images [n]; their patients as in the labels, and as in the scores.

    Args:
        flagged: bool [n].
        is_complete: whether all images that trained the model are known.
    """
    if training is None:
        return LeakCheck(UNKNOWN_TRAINING)
    places = identity.find_ids(training.images, ids)
    same = places >= 0
    trained = PatientCount.of(training.patients)
    known = set(training.patients) - {None}
    # Scores and labels may spell one patient differently, and the training may have used either spelling.
    patients, scored_patients = (identity.unify_patients(ids, p) for p in (patients, scored_patients))
    shared = {patient for patient in (*patients, *scored_patients) if patient in known}
    related = np.array([a in shared or b in shared for a, b in zip(patients, scored_patients, strict=True)], bool)
    related[places[same]] = False
    return LeakCheck(
        None if is_complete else UNKNOWN_TRAINING,
        training_images=len(training.images),
        training_patients=trained.number,
        shared_images=int(same.sum()),
        shared_by_part=dict(sorted(Counter(str(part) for part in training.parts[same]).items())),
        flagged_images=int(flagged.sum()),
        shared_flagged=int(flagged[places[same]].sum()),
        shared_patients=len(shared),
        related_images=int(related.sum()),
        unknown_patients=sum(a is None and b is None for a, b in zip(patients, scored_patients, strict=True)),
        unknown_training_patients=trained.without_id,
    )


def warn_of_training(found: LeakCheck, n: int) -> list[Warned]:
    """Warn if some of `n` images without labels, or their patients, trained or tuned the model."""
    if not found.shared_images and not found.shared_patients:
        return []
    related, all_images = found.related_images, count_of(n, "image")
    verb, rest = "was" if found.shared_images == 1 else "were", "is" if related == 1 else "are"
    if found.shared_images:
        text = f"{found.shared_images:,} of {all_images}"
        if found.flagged_images:
            text += f", and {found.shared_flagged:,} of the {count_of(found.flagged_images, 'flagged image')},"
        text += f" {verb} used to train or tune this model"
        text += f"; {related:,} more {rest} of the same patients." if related else "."
    else:
        text = f"{related:,} of {all_images} {rest} of patients whose other images trained or tuned this model."
    advice = (
        "Their scores do not show how the model does on new patients. The worklist of the report marks these images."
    )
    return [Warned("training_images", text, advice)]
