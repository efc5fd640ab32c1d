"""The images of a report: those with both scores and labels, or without labels all scored images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_cxr.data import identity, manifest, review_facts
from ray_cxr.errors import InputError, TableError
from ray_cxr.imaging.demographics import count_of
from ray_cxr.labels import LABELS
from ray_cxr.reporting.scores import Scores, read_floats, read_texts
from ray_cxr.storage import contents

#: A value of `--split`: images of another hospital, of any split in its tables.
EXTERNAL = "external"


@dataclass(frozen=True)
class JoinCounts:
    """How many images of the labels and of the scores the evaluation uses or leaves out."""

    labelled: int
    evaluated: int
    labelled_not_scored: int
    labelled_errors: int
    scored_not_labelled: int
    scored_other_split: int


class NotEvaluatedError(InputError):
    """A reference standard has no image of the population."""


@dataclass(frozen=True)
class Population:
    """Scored images: their rows in `Scores`, int [n], and their patients' ids [n] or None.

    `failed` are the rows of the images that belong to them and could not be scored, int [k]. `split` is None for images
    of any split; `description` names the images for readers. `splits` are those of the labels by image id.
    """

    rows: np.ndarray
    failed: np.ndarray
    patients: np.ndarray
    split: str | None
    description: str
    splits: Mapping[str, str | None] = field(default_factory=dict, kw_only=True)

    @classmethod
    def select_scored(cls, table: Scores) -> Population:
        rows = np.flatnonzero(table.ok)
        return cls(rows, np.flatnonzero(~table.ok), table.patients[rows], None, "all scored images of any split")

    @property
    def listed(self) -> np.ndarray:
        """Rows of all images, failed or not, in the order of the table."""
        return np.sort(np.concatenate([self.rows, self.failed]))

    def match(
        self, table: Scores, ids: np.ndarray, option: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, int]]:
        """Find the images `ids` [k] of a reference standard in the population.

        Returns:
            Whether each image is in the population, bool [k]; the rows in `table` and the patients of the images that
            are, [m]; and the number of images that are not, by reason.

        Raises:
            NotEvaluatedError: no image is in the population; `option` starts the message.
        """
        rows = identity.find_ids(np.unique(ids), table.ids)
        scored = rows[rows >= 0]
        missing = {
            "not_scored": int((rows < 0).sum()),
            "failed": int((~table.ok[scored]).sum()),
            "outside_split": int((~np.isin(scored, self.rows) & table.ok[scored]).sum()),
        }
        positions = identity.find_ids(ids, table.ids[self.rows])
        kept = positions >= 0
        if not kept.any():
            outside = table.ids[np.setdiff1d(scored[table.ok[scored]], self.rows)].tolist()
            counts = Counter(f"in split {split}" for split in map(self.splits.get, outside) if split)
            reasons = {"without a score": missing["not_scored"], "failed": missing["failed"], **counts}
            reasons["in no split"] = len(outside) - counts.total()
            found = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
            raise NotEvaluatedError(
                f"{option}: none of its {count_of(len(rows), 'image')} is evaluated here ({found}). Score them, or "
                "evaluate their split."
            )
        return kept, self.rows[positions[kept]], self.patients[positions[kept]], missing


@dataclass(frozen=True)
class EvaluationSet(Population):
    """Scored and labelled images in the labels' order; one entry per image in every array [n].

    Attributes:
        labels: per finding int8, -1 for null.
        failed_labels: the same of the images of `failed`.
        sex, view: objects, None if unknown.
        age, follow_up: float, years and the number of the image, NaN if unknown.
        info: the manifest's description of its split.
        caveats: what limits labels from readers' verdicts, a sentence each.
    """

    labels: dict[str, np.ndarray]
    failed_labels: dict[str, np.ndarray]
    sex: np.ndarray
    age: np.ndarray
    view: np.ndarray
    follow_up: np.ndarray
    counts: JoinCounts
    info: Mapping[str, Any]
    caveats: Sequence[str] = ()


def _describe_split(split: str | None, info: Mapping[str, Any]) -> str:
    """Describe the evaluated split (None: all rows) with the kind and seed in the manifest's metadata."""
    if split is None:
        return "all labelled images of any split"
    if split == EXTERNAL:
        return "external images: all labelled images, of any split in their tables"
    kinds = {
        "official": f"official {split} split",
        "patient": f"{split} split of a random patient split, seed {info.get('seed')}",
        "given": f"{split} split as given in the tables",
    }
    return kinds.get(info.get("kind", ""), f"{split} split of unknown origin")


def join_labels(table: Scores, path: str | Path, split: str | None) -> EvaluationSet:
    """Join scores with a manifest's rows of a split, or with all rows."""
    return join_table(table, manifest.read_manifest(path), str(path), split)


def join_table(table: Scores, labelled: pa.Table, path: str, split: str | None) -> EvaluationSet:
    """Join scores with the rows of a checked manifest; `path` names it in messages."""
    ids = read_texts(labelled, "image_id", path)
    if not len(ids):
        raise InputError(f"{path}: holds no rows; make it again with `ray-cxr manifest`")
    if all(labelled[name].null_count == len(ids) for name in LABELS):
        remedy = "no image has a label; make one from a table with labels"
        raise InputError(contents.explain(path, "a manifest with labels", remedy))
    all_splits = read_texts(labelled, "split", path)
    chosen = _select_split(all_splits, split, path)
    rows_of_labels = identity.find_ids(ids, table.ids)
    rows = rows_of_labels[chosen]
    scored = rows >= 0
    if not scored.any():
        where = f"the {split} split of {path}" if split in manifest.SPLITS else path
        raise InputError(
            f"{table.source} and {where} have no image in common; "
            f"compare their image_id, such as {table.ids[0]!r} and {ids[chosen][0]!r}"
        )
    failed = scored & ~table.ok[rows]
    kept = scored & ~failed
    counts = JoinCounts(
        labelled=int(chosen.sum()),
        evaluated=int(kept.sum()),
        labelled_not_scored=int((~scored).sum()),
        labelled_errors=int(failed.sum()),
        scored_not_labelled=len(table.ids) - int((rows_of_labels >= 0).sum()),
        scored_other_split=int((rows_of_labels[~chosen] >= 0).sum()),
    )
    labels, failed_labels = {}, {}
    for finding in LABELS:
        known = labelled[finding].drop_null().unique().to_pylist()
        if not {0, 1}.issuperset(known):
            raise TableError(f"{path}: column {finding} holds {sorted(known)}; use 0, 1 and null (not labelled)")
        values = pc.fill_null(labelled[finding], -1).to_numpy()[chosen]
        labels[finding], failed_labels[finding] = values[kept], values[failed]
    patients, sex, view = (read_texts(labelled, name, path)[chosen][kept] for name in ("patient_id", "sex", "view"))
    age, follow_up = (read_floats(labelled, name, path)[chosen][kept] for name in ("age", "follow_up"))
    rows, failed_rows = rows[kept], rows[failed]
    # The score table may know a patient whom the manifest does not.
    patients = np.where([patient is None for patient in patients], table.patients[rows], patients)
    patients = identity.unify_patients(table.ids[rows], patients)
    info = manifest.split_info(labelled)
    facts = review_facts.read_facts(labelled.schema.metadata)
    described = _describe_split(split, info)
    splits = dict(zip(table.ids[rows_of_labels[rows_of_labels >= 0]], all_splits[rows_of_labels >= 0], strict=True))
    return EvaluationSet(
        *(
            rows,
            failed_rows,
            patients,
            split,
            described,
            labels,
            failed_labels,
            sex,
            age,
            view,
            follow_up,
            counts,
            info,
        ),
        caveats=facts.describe() if facts else (),
        splits=splits,
    )


def _select_split(splits: np.ndarray, split: str | None, path: str | Path) -> np.ndarray:
    if split in (None, EXTERNAL):
        return np.ones(len(splits), dtype=bool)
    if all(value is None for value in splits):
        raise InputError(f"--split {split}: {path} has no splits; omit --split, or make it again with --split patient")
    chosen = np.asarray(splits == split)
    if not chosen.any():
        known = ", ".join(sorted({value for value in splits if value is not None}))
        raise InputError(f"--split {split}: {path} has no such rows; its splits are {known}")
    return chosen
