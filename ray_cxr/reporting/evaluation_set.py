"""The evaluation set: the images that have both scores and labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ray_cxr.errors import InputError, TableError
from ray_cxr.labels import LABELS
from ray_cxr.reporting.scores import Scores, read_floats, read_texts


@dataclass(frozen=True)
class JoinCounts:
    """How many images of the labels and of the scores the evaluation uses or leaves out."""

    labelled: int
    evaluated: int
    labelled_not_scored: int
    labelled_errors: int
    scored_not_labelled: int
    scored_other_split: int


@dataclass(frozen=True)
class EvaluationSet:
    """Scored and labelled images in the labels' order; one entry per image in every array [n].

    `rows` are int into `Scores`, `labels` int8 with -1 for null. `age` (years) and `follow_up` (number of the image)
    are float with NaN for unknown; the others are objects, None if unknown.
    """

    rows: np.ndarray
    labels: dict[str, np.ndarray]
    patients: np.ndarray
    sex: np.ndarray
    age: np.ndarray
    view: np.ndarray
    follow_up: np.ndarray
    counts: JoinCounts


def describe_split(split: str | None, info: Mapping[str, Any]) -> str:
    """Describe the evaluated split (None: all rows) with the kind and seed in the manifest's metadata."""
    if split is None:
        return "all labelled images of any split"
    kind = info.get("kind")
    if kind == "official":
        return f"official {split} split"
    if kind == "patient":
        return f"{split} split of a random patient split, seed {info.get('seed')}"
    if kind == "given":
        return f"{split} split as given in the tables"
    return f"{split} split of unknown origin"


def join_labels(table: Scores, manifest: pa.Table, path: str | Path, split: str | None) -> EvaluationSet:
    """Join scores with the manifest's rows of a split, or with all rows."""
    path = str(path)
    ids = read_texts(manifest, "image_id", path)
    if not len(ids):
        raise InputError(f"--labels {path}: holds no rows; make it again with `ray-cxr manifest`")
    chosen = _select_split(read_texts(manifest, "split", path), split, path)
    rows = pd.Index(table.ids).get_indexer(pd.Index(ids[chosen]))
    scored = rows >= 0
    if not scored.any():
        where = f"the {split} split of {path}" if split else path
        raise InputError(
            f"{table.source} and {where} have no image in common; "
            f"compare their image_id, such as {table.ids[0]!r} and {ids[chosen][0]!r}"
        )
    failed = np.zeros(len(rows), dtype=bool)
    failed[scored] = ~table.ok[rows[scored]]
    kept = scored & ~failed
    counts = JoinCounts(
        labelled=int(chosen.sum()),
        evaluated=int(kept.sum()),
        labelled_not_scored=int((~scored).sum()),
        labelled_errors=int(failed.sum()),
        scored_not_labelled=int((~pd.Index(table.ids).isin(ids)).sum()),
        scored_other_split=int(pd.Index(table.ids).isin(ids[~chosen]).sum()),
    )
    labels = {}
    for finding in LABELS:
        known = manifest[finding].drop_null().unique().to_pylist()
        if not {0, 1}.issuperset(known):
            raise TableError(f"{path}: column {finding} holds {sorted(known)}; use 0, 1 and null (not labelled)")
        labels[finding] = pc.fill_null(manifest[finding], -1).to_numpy()[chosen][kept]
    patients, sex, view = (read_texts(manifest, name, path)[chosen][kept] for name in ("patient_id", "sex", "view"))
    age, follow_up = (read_floats(manifest, name, path)[chosen][kept] for name in ("age", "follow_up"))
    rows = rows[kept]
    # The score table may know a patient whom the manifest does not.
    patients = np.where([patient is None for patient in patients], table.patients[rows], patients)
    return EvaluationSet(rows, labels, patients, sex, age, view, follow_up, counts)


def _select_split(splits: np.ndarray, split: str | None, path: str | Path) -> np.ndarray:
    if split is None:
        return np.ones(len(splits), dtype=bool)
    if all(value is None for value in splits):
        raise InputError(f"--split {split}: {path} has no splits; omit --split, or use a manifest with splits")
    chosen = np.asarray(splits == split)
    if not chosen.any():
        known = ", ".join(sorted({value for value in splits if value is not None}))
        raise InputError(f"--split {split}: {path} has no such rows; its splits are {known}")
    return chosen
