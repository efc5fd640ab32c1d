"""Scores joined with labels, and the guard against images and patients that trained the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ray_cxr.errors import InputError, LeakError, TableError
from ray_cxr.labels import LABELS
from ray_cxr.reporting.scores import Scores, floats, provenance, strings

UNKNOWN_TRAINING = "not all images that trained the model are known"


@dataclass(frozen=True)
class Evaluated:
    """The images with both scores and labels, in the labels' order; one entry per image in every array [n].

    Attributes:
        rows: their rows in `Scores`.
        labels: per finding int8, -1 where it is not labelled.
        patients: object ids, None where nobody knows.
        sex, view: object, None where not known.
        age, follow_up: float, years and number of the image, NaN where not known.
    """

    rows: np.ndarray
    labels: dict[str, np.ndarray]
    patients: np.ndarray
    sex: np.ndarray
    age: np.ndarray
    view: np.ndarray
    follow_up: np.ndarray


def describe_split(split: str | None, info: Mapping[str, Any]) -> str:
    """The split in words, for every place where a number stands.

    Args:
        split: the evaluated part, or None for all rows.
        info: what the manifest's metadata says: kind and seed.
    """
    if split is None:
        return "all labelled images, whatever their split"
    kind = info.get("kind")
    if kind == "official":
        return f"official {split} split"
    if kind == "patient":
        return f"{split} split of a random patient split, seed {info.get('seed')}"
    if kind == "given":
        return f"{split} split as the tables gave it"
    return f"{split} split of unknown origin"


def join(table: Scores, labelled: pa.Table, path: str | Path, split: str | None, counts: dict[str, Any]) -> Evaluated:
    ids = strings(labelled, "image_id", str(path))
    if not len(ids):
        raise InputError(f"--labels {path}: holds no rows; make it again with `ray-cxr manifest`")
    splits = strings(labelled, "split", str(path))
    chosen = np.ones(len(ids), dtype=bool)
    if split is not None:
        if all(value is None for value in splits):
            raise InputError(f"--split {split}: {path} has no splits; leave --split out, or give it splits")
        chosen = splits == split
        if not chosen.any():
            there = ", ".join(sorted({value for value in splits if value is not None}))
            raise InputError(f"--split {split}: {path} has no such rows; its splits are {there}")
    rows = pd.Index(table.ids).get_indexer(pd.Index(ids[chosen]))
    both = rows >= 0
    if not both.any():
        where = f"the {split} split of {path}" if split else str(path)
        raise InputError(
            f"{table.source} and {where} have no image in common; "
            f"compare their image_id, such as {table.ids[0]!r} and {ids[chosen][0]!r}"
        )
    failed = np.zeros(len(rows), dtype=bool)
    failed[both] = ~table.ok[rows[both]]
    elsewhere = pd.Index(table.ids).isin(ids[~chosen])
    counts.update(
        labelled=int(chosen.sum()),
        evaluated=int((both & ~failed).sum()),
        labelled_not_scored=int((~both).sum()),
        labelled_errors=int(failed.sum()),
        scored_not_labelled=int((~pd.Index(table.ids).isin(ids)).sum()),
        scored_other_split=int(elsewhere.sum()),
    )
    kept = both & ~failed
    rows = rows[kept]
    values = {}
    for finding in LABELS:
        known = labelled[finding].drop_null().unique().to_pylist()
        if not {0, 1}.issuperset(known):
            raise TableError(f"{path}: column {finding} holds {sorted(known)}; use 0, 1 and null (not labelled)")
        values[finding] = pc.fill_null(labelled[finding], -1).to_numpy()[chosen][kept]
    patients = strings(labelled, "patient_id", str(path))[chosen][kept]
    # Where the labels do not know the patient, the score table may.
    patients = np.where([patient is None for patient in patients], table.patients[rows], patients)
    return Evaluated(
        rows,
        values,
        patients,
        sex=strings(labelled, "sex", str(path))[chosen][kept],
        age=floats(labelled, "age", str(path))[chosen][kept],
        view=strings(labelled, "view", str(path))[chosen][kept],
        follow_up=floats(labelled, "follow_up", str(path))[chosen][kept],
    )


def guard(table: Scores, rows: np.ndarray, patients: np.ndarray, split: str | None, among: str) -> dict[str, Any]:
    """Whether images, or their patients, trained the model.

    Args:
        table: whose model.
        rows: int [n], of the table.
        patients: ids [n].
        split: the evaluated split; images of `train` and `val` may have trained the model, and are labelled so.
        among: what the images are, for the error.

    Raises:
        LeakError: some did, in an evaluation of `test` or of no named split.
    """
    if table.trained is None:
        return {"checked": False, "reason": UNKNOWN_TRAINING}
    training = table.trained
    same = pd.Index(training.images).isin(table.ids[rows])
    known = {patient for patient in training.patients if patient is not None}
    # Two tables may write one patient in two ways, and either may be the training's.
    theirs = table.patients[rows]
    shared = {patient for patient in (*patients, *theirs) if patient in known}
    if split not in ("train", "val") and (same.any() or shared):
        remedy = (
            "use a manifest whose test split excludes them"
            if split
            else "add `--labels M.parquet` with `--split test`, or use a table that excludes them"
        )
        raise LeakError(
            f"{table.source}: {int(same.sum()):,} images and {len(shared):,} patients of {among} trained this model; "
            f"{remedy} (`--split train` or `--split val` evaluates training images as such)"
        )
    known_all = provenance(table).get("lineage") != "unknown"
    return {
        "checked": known_all,
        "reason": None if known_all else UNKNOWN_TRAINING,
        "training_images": len(training.images),
        "training_patients": len(known),
        "shared_images": int(same.sum()),
        "shared_by_part": dict(sorted(Counter(str(part) for part in training.parts[same]).items())),
        "shared_patients": len(shared),
        "unknown_patients": sum(a is None and b is None for a, b in zip(patients, theirs, strict=True)),
    }


def leak_words(found: Mapping[str, Any], split: str | None) -> str:
    """What the guard saw, in a sentence's end: `passed: ...`, or `not possible: ...`."""
    if "shared_images" not in found:
        return f"not possible: {found['reason']}"
    unknown = found["unknown_patients"]
    rest = f"; of {unknown:,} images nobody knows the patient, so only the images themselves were looked for"
    if found["shared_images"] or found["shared_patients"]:
        parts = ", ".join(f"{n:,} as its {part} images" for part, n in found["shared_by_part"].items())
        words = (
            f"{found['shared_images']:,} images{f' ({parts})' if parts else ''} and {found['shared_patients']:,} "
            f"patients here trained the model, as the named split {split} says"
        )
    elif not found["checked"]:
        words = f"not possible: {found['reason']}; none of those known is in this evaluation"
    else:
        words = (
            f"passed: none of the {found['training_images']:,} training images and their "
            f"{found['training_patients']:,} patients is in this evaluation"
        )
    return words + (rest if unknown else "")
