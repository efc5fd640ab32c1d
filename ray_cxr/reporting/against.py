"""Scores against others' judgement: radiologists' labels and boxes, another system's scores, published figures.

Each function gives an entry for metrics.json that says whose judgement it is, of how many images, and how many were
left out and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from ray_cxr.data.boxes import read_boxes
from ray_cxr.data.consensus import ConsensusLabels, read_consensus
from ray_cxr.errors import InputError
from ray_cxr.evaluation import comparison, localisation, published
from ray_cxr.imaging.overlays import FOLDER, WHOLE, HeatMap, read_heatmaps
from ray_cxr.labels import FINDINGS, LABELS, NO_FINDING
from ray_cxr.reporting.labelled import Evaluated, guard
from ray_cxr.reporting.measures import Measured, columns, composed, measure
from ray_cxr.reporting.scores import Scores, n_patients, read_scores
from ray_cxr.storage import remote

#: Cells along a side of a heat map that is laid over a picture of which the network saw a part, or more than all.
_LAID_SIDE = 256


@dataclass(frozen=True)
class Population:
    """The images that anything may be measured on.

    Attributes:
        rows: int [n], of `Scores`, all of them scored.
        patients: ids [n], None where nobody knows.
        split: the evaluated split, or None for whatever images there are.
        words: which they are, to stand beside every number.
    """

    rows: np.ndarray
    patients: np.ndarray
    split: str | None
    words: str

    @classmethod
    def of(cls, table: Scores, evaluated: Evaluated | None, split: str | None, words: str | None) -> Population:
        """The evaluated images, or without labels all that were scored."""
        if evaluated is None:
            rows = np.flatnonzero(table.ok)
            return cls(rows, table.patients[rows], None, "all scored images, whatever their split")
        return cls(evaluated.rows, evaluated.patients, split, words or "")

    def places(self, table: Scores, ids: np.ndarray) -> np.ndarray:
        """Where in `rows` these images are, int [k]; -1 where they are not."""
        return np.asarray(pd.Index(table.ids[self.rows]).get_indexer(pd.Index(ids)))

    def absent(self, table: Scores, ids: np.ndarray) -> dict[str, int]:
        """Why images are not among these: how many have no row, failed, or lie outside of the evaluated split."""
        rows = np.asarray(pd.Index(table.ids).get_indexer(pd.Index(ids)))
        there = rows[rows >= 0]
        inside = np.isin(there, self.rows)
        return {
            "not_scored": int((rows < 0).sum()),
            "failed": int((~table.ok[there]).sum()),
            "outside_split": int((~inside & table.ok[there]).sum()),
        }


def against_consensus(
    table: Scores,
    population: Population,
    path: str,
    *,
    prevalences: Mapping[str, float],
    n_resamples: int,
    seed: int,
) -> tuple[dict[str, Any], Measured]:
    """All numbers of the images that a consensus table judges.

    Raises:
        TableError: as `data.consensus.read_consensus`.
        InputError: it judges none of the images.
        LeakError: some of them trained the model, and the split does not say so.
    """
    found = read_consensus(path)
    places = population.places(table, found.image_ids)
    there = places >= 0
    counts = {"labelled": len(found), "evaluated": int(there.sum()), **population.absent(table, found.image_ids)}
    if not there.any():
        raise InputError(
            f"--consensus {path}: none of its {len(found):,} images is evaluated here "
            f"({counts['not_scored']:,} have no score, {counts['failed']:,} failed, {counts['outside_split']:,} are in "
            "no or another split); score them, or name their split"
        )
    rows = population.rows[places[there]]
    patients = _filled(population.patients[places[there]], found.patient_ids[there])
    checked = guard(table, rows, patients, population.split, "the consensus table")
    labels = _ordered(found, there)
    scored, scales = composed(columns(table, rows), found.composites)
    measured = measure(
        scored,
        labels,
        patients,
        prevalences=prevalences,
        n_resamples=n_resamples,
        seed=seed,
    )
    entry = {
        "source": found.source,
        "kind": found.kind,
        "table": str(path),
        "digest": found.digest,
        "images": population.words,
        "parts": dict(sorted(Counter(str(part) for part in found.parts[there] if part is not None).items())),
        "n_images": len(rows),
        "n_patients": n_patients(patients),
        "composites": {
            name: {"findings": list(members), "scores": scales.get(name)} for name, members in found.composites.items()
        },
        "notes": list(found.notes),
        "left_out": dict(found.left_out),
        "counts": counts,
        "leak_check": checked,
        "findings": measured.findings,
        "macro": measured.macro,
        "weighted": measured.weighted,
    }
    return entry, measured


def _ordered(found: ConsensusLabels, there: np.ndarray) -> dict[str, np.ndarray]:
    names = [name for name in (*LABELS, *found.composites) if name in found.labels]
    return {name: found.labels[name][there] for name in names}


def _filled(known: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.where([value is None for value in known], other, known)


def against_scores(
    table: Scores, evaluated: Evaluated, other_path: str, split: str | None, words: str, *, n_resamples: int, seed: int
) -> dict[str, Any]:
    """Another score table of the same images, compared finding by finding in the same resamples of patients.

    Raises:
        InputError: no image, or no finding, is in both.
        LeakError: some of the images trained the other model, and the split does not say so.
    """
    other = read_scores(other_path)
    rows = np.asarray(pd.Index(other.ids).get_indexer(pd.Index(table.ids[evaluated.rows])))
    both = rows >= 0
    both[both] = other.ok[rows[both]]
    names = [f for f in table.findings if f in other.findings and (evaluated.labels[f][both] >= 0).any()]
    if not names:
        why = "no evaluated image" if not both.any() else "no labelled finding"
        raise InputError(f"--compare {other_path}: {why} is in both score tables; score the same images with both")
    patients = evaluated.patients[both]
    checked = guard(other, rows[both], patients, split, "the images compared")
    found = comparison.paired_findings(
        np.column_stack([evaluated.labels[f][both] for f in names]),
        np.column_stack([table.p[f][evaluated.rows[both]] for f in names]),
        np.column_stack([other.p[f][rows[both]] for f in names]),
        patients,
        n_resamples=n_resamples,
        seed=seed,
        macro=np.array([f != NO_FINDING for f in names]),
    )
    macro = asdict(found.macro)
    macro["findings"] = [names[column] for column in macro.pop("columns")]
    return {
        "other": str(other_path),
        "models": list(other.model_digests),
        "images": words,
        "n_images": int(both.sum()),
        "n_patients": n_patients(patients),
        "left_out": int((~both).sum()),
        "difference": "this less the other",
        "leak_check": checked,
        "findings": {name: asdict(one) for name, one in zip(names, found.findings, strict=True)},
        "macro": macro,
    }


class _ProjectedMaps:
    """Heat maps by image and finding, each over the whole picture, as boxes are."""

    def __init__(self, found: Mapping[tuple[str, str], HeatMap]) -> None:
        self.found = found

    def get(self, key: tuple[str, str]) -> np.ndarray | None:
        one = self.found.get(key)
        if one is None:
            return None
        # As it is where it can be: each cell then is exactly what the network gave.
        return one.cells if one.area == WHOLE else one.project((_LAID_SIDE, _LAID_SIDE))


def against_boxes(
    table: Scores, population: Population, path: str, *, n_resamples: int, seed: int
) -> tuple[dict[str, Any], localisation.Localisation]:
    """Heat maps of `score --heatmaps` against boxes that radiologists drew.

    Raises:
        TableError: as `data.boxes.read_boxes` and `data.heatmaps.read_heatmaps`.
        InputError: there are no heat maps, or none of the boxed images is evaluated.
        LeakError: some of them trained the model, and the split does not say so.
    """
    found = read_boxes(path)
    if table.home is None or not (remote.path(table.home) / FOLDER).is_dir():
        raise InputError(
            f"--boxes {path}: {table.source} holds no heat maps; draw them first: `ray-cxr score ... --heatmaps "
            f"{len(FINDINGS)}`"
        )
    places = population.places(table, found.image_ids)
    there = places >= 0
    images = np.unique(found.image_ids.astype(str))
    if not there.any():
        raise InputError(
            f"--boxes {path}: none of its {len(images):,} images is evaluated here; score them, or name their split"
        )
    rows = population.rows[places[there]]
    patients = population.patients[places[there]]
    checked = guard(table, np.unique(rows), patients, population.split, "the boxed images")
    maps = read_heatmaps(table.home, set(found.image_ids[there]))
    measured = localisation.measure(
        _ProjectedMaps(maps),  # type: ignore[arg-type]  # it is asked with `get` alone
        found.image_ids[there],
        found.findings[there],
        found.xywh[there],
        patients,
        image_side=found.image_side,
        n_resamples=n_resamples,
        seed=seed,
    )
    return {
        "source": found.source,
        "table": str(path),
        "digest": found.digest,
        "images": population.words,
        "counts": {
            "boxed_images": len(images),
            "evaluated": len(np.unique(rows)),
            **population.absent(table, images.astype(object)),
        },
        "leak_check": checked,
        **measured.as_dict(),
    }, measured


def against_published(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What others have published, each with the reason why it is not comparable, or None where it is."""
    pairs = published.beside(
        result["split"], result["split_kind"], n_images=result["n_images"], findings=result["macro"]["findings"]
    )
    return [{**one.as_dict(), "comparable": reason is None, "reason": reason} for one, reason in pairs]
