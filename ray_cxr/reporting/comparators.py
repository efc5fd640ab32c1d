"""Compare scores with reference standards and comparators: radiologists' labels and boxes, other scores, papers.

Each result states its source, the images it covers, and how many were left out and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from ray_cxr.data.boxes import read_boxes
from ray_cxr.data.consensus import ConsensusLabels, read_consensus
from ray_cxr.errors import InputError
from ray_cxr.evaluation.localisation import Localisation, LocalisationSettings, measure_localisation
from ray_cxr.evaluation.paired import PairedAuroc, PairedFinding, paired_findings
from ray_cxr.imaging.overlays import FOLDER, WHOLE, HeatMap, read_heatmaps
from ray_cxr.labels import FINDINGS, LABELS, NO_FINDING
from ray_cxr.reporting.evaluation_set import EvaluationSet
from ray_cxr.reporting.leakage import LeakCheck, check_leakage
from ray_cxr.reporting.measures import BootstrapSettings, EvaluationResult, ModelOutputs, evaluate
from ray_cxr.reporting.scores import Scores, count_patients, read_scores
from ray_cxr.storage import remote

#: Side in cells of a heat map projected onto an image that the model saw cropped or padded.
_PROJECTED_SIDE = 256


def _find(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the position of each wanted image in `ids`, -1 if missing."""
    return np.asarray(pd.Index(ids).get_indexer(pd.Index(wanted)))


@dataclass(frozen=True)
class Population:
    """The images that reference standards are compared on: the evaluation set, or without labels all scored images.

    `rows` are int [n] into `Scores`, `patients` ids [n] or None.
    """

    rows: np.ndarray
    patients: np.ndarray
    split: str | None
    description: str

    @classmethod
    def select(cls, table: Scores, evaluated: EvaluationSet | None, split: str | None, label: str | None) -> Population:
        if evaluated is None:
            rows = np.flatnonzero(table.ok)
            return cls(rows, table.patients[rows], None, "all scored images of any split")
        return cls(evaluated.rows, evaluated.patients, split, label or "")

    def count_missing(self, table: Scores, ids: np.ndarray) -> dict[str, int]:

        rows = _find(table.ids, ids)
        scored = rows[rows >= 0]
        return {
            "not_scored": int((rows < 0).sum()),
            "failed": int((~table.ok[scored]).sum()),
            "outside_split": int((~np.isin(scored, self.rows) & table.ok[scored]).sum()),
        }


@dataclass(frozen=True)
class ConsensusResult:
    """Metrics against a consensus table.

    `parts` counts evaluated images by the table's own split, `counts` evaluated images and those left out by reason;
    `scales` is `calibrated` or `raw` for each scored composite.
    """

    table: str
    images: str
    reference: ConsensusLabels
    parts: dict[str, int]
    n_images: int
    n_patients: int
    scales: dict[str, str]
    counts: dict[str, int]
    leak_check: LeakCheck
    evaluation: EvaluationResult

    def to_json(self) -> dict[str, Any]:
        reference = self.reference
        composites = reference.composites.items()
        return {
            "source": reference.source,
            "kind": reference.kind,
            "table": self.table,
            "digest": reference.digest,
            **{name: getattr(self, name) for name in ("images", "parts", "n_images", "n_patients")},
            "composites": {
                name: {"findings": list(members), "scores": self.scales.get(name)} for name, members in composites
            },
            "notes": list(reference.notes),
            "left_out": dict(reference.left_out),
            "counts": self.counts,
            "leak_check": self.leak_check.to_json(),
            **self.evaluation.to_json(),
        }


def compare_with_consensus(
    table: Scores, population: Population, path: str, prevalences: Mapping[str, float], bootstrap: BootstrapSettings
) -> ConsensusResult:
    """Evaluate the images that a consensus table labels."""
    reference = read_consensus(path)
    places = _find(table.ids[population.rows], reference.image_ids)
    kept = places >= 0
    counts = {"labelled": len(reference), "evaluated": int(kept.sum())}
    counts |= population.count_missing(table, reference.image_ids)
    if not kept.any():
        raise InputError(
            f"--consensus {path}: none of its {len(reference):,} images is evaluated here "
            f"({counts['not_scored']:,} have no score, {counts['failed']:,} failed, {counts['outside_split']:,} are in "
            "no or another split). Score them, or evaluate their split."
        )
    rows, patients = population.rows[places[kept]], population.patients[places[kept]]
    patients = np.where([patient is None for patient in patients], reference.patient_ids[kept], patients)
    checked = check_leakage(table, rows, patients, population.split, "the consensus table")
    names = [name for name in (*LABELS, *reference.composites) if name in reference.labels]
    labels = {name: reference.labels[name][kept] for name in names}
    outputs, scales = ModelOutputs.select(table, rows).add_composites(reference.composites)
    return ConsensusResult(
        table=str(path),
        images=population.description,
        reference=reference,
        parts=dict(sorted(Counter(str(part) for part in reference.parts[kept] if part is not None).items())),
        n_images=len(rows),
        n_patients=count_patients(patients),
        scales=scales,
        counts=counts,
        leak_check=checked,
        evaluation=evaluate(outputs, labels, patients, prevalences=prevalences, bootstrap=bootstrap),
    )


@dataclass(frozen=True)
class ScoreComparison:
    """AUROC of two score tables on the same images; `macro.columns` index `findings`."""

    other: str
    models: tuple[str, ...]
    images: str
    n_images: int
    n_patients: int
    left_out: int
    leak_check: LeakCheck
    findings: dict[str, PairedFinding]
    macro: PairedAuroc

    def to_json(self) -> dict[str, Any]:
        names = list(self.findings)
        macro = asdict(self.macro)
        macro["findings"] = [names[column] for column in macro.pop("columns")]
        return {
            "other": self.other,
            "models": list(self.models),
            **{name: getattr(self, name) for name in ("images", "n_images", "n_patients", "left_out")},
            "difference": "this less the other",
            "leak_check": self.leak_check.to_json(),
            "findings": {name: asdict(one) for name, one in self.findings.items()},
            "macro": macro,
        }


def compare_with_scores(
    table: Scores,
    evaluated: EvaluationSet,
    path: str,
    split: str | None,
    description: str,
    bootstrap: BootstrapSettings,
) -> ScoreComparison:
    """Compare AUROC with another score table's, finding by finding, in the same resamples of patients."""
    other = read_scores(path)
    rows = _find(other.ids, table.ids[evaluated.rows])
    shared = rows >= 0
    shared[shared] = other.ok[rows[shared]]
    names = [f for f in table.findings if f in other.findings and (evaluated.labels[f][shared] >= 0).any()]
    if not names:
        lacking = "no evaluated image" if not shared.any() else "no labelled finding"
        raise InputError(f"--compare {path}: {lacking} is in both score tables; score the same images with both")
    patients = evaluated.patients[shared]
    checked = check_leakage(other, rows[shared], patients, split, "the compared images")
    labels = np.column_stack([evaluated.labels[f][shared] for f in names])
    p = np.column_stack([table.p[f][evaluated.rows[shared]] for f in names])
    other_p = np.column_stack([other.p[f][rows[shared]] for f in names])
    macro = np.array([f != NO_FINDING for f in names])
    n, seed = bootstrap.n_resamples, bootstrap.seed
    paired = paired_findings(labels, p, other_p, patients, n_resamples=n, seed=seed, macro=macro)
    return ScoreComparison(
        other=str(path),
        models=other.model_digests,
        images=description,
        n_images=int(shared.sum()),
        n_patients=count_patients(patients),
        left_out=int((~shared).sum()),
        leak_check=checked,
        findings=dict(zip(names, paired.findings, strict=True)),
        macro=paired.macro,
    )


@dataclass(frozen=True)
class BoxResult:
    """Agreement of heat maps with radiologists' boxes; `counts` are boxed images evaluated or left out by reason."""

    source: str
    table: str
    digest: str
    images: str
    counts: dict[str, int]
    leak_check: LeakCheck
    localisation: Localisation

    def to_json(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("source", "table", "digest", "images", "counts")},
            "leak_check": self.leak_check.to_json(),
            **self.localisation.to_json(),
        }


class _ProjectedMaps(Mapping[tuple[str, str], np.ndarray]):
    """Heat maps by image and finding, each projected onto the whole image when it is read."""

    def __init__(self, maps: Mapping[tuple[str, str], HeatMap]) -> None:
        self._maps = maps

    def __getitem__(self, key: tuple[str, str]) -> np.ndarray:
        heatmap = self._maps[key]
        # A map of the whole image keeps the model's own cells.
        return heatmap.cells if heatmap.area == WHOLE else heatmap.project((_PROJECTED_SIDE, _PROJECTED_SIDE))

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)


def compare_with_boxes(table: Scores, population: Population, path: str, bootstrap: BootstrapSettings) -> BoxResult:
    """Measure the heat maps of `score --heatmaps` against boxes that radiologists drew."""
    boxes = read_boxes(path)
    if table.run_folder is None or not (remote.to_path(table.run_folder) / FOLDER).is_dir():
        command = f"`ray-cxr score ... --heatmaps {len(FINDINGS)}`"
        raise InputError(f"--boxes {path}: {table.source} holds no heat maps. Draw them first: {command}")
    places = _find(table.ids[population.rows], boxes.image_ids)
    kept = places >= 0
    images = np.unique(boxes.image_ids.astype(str))
    if not kept.any():
        none = f"none of its {len(images):,} images is evaluated here"
        raise InputError(f"--boxes {path}: {none}. Score them, or evaluate their split.")
    rows, patients = population.rows[places[kept]], population.patients[places[kept]]
    checked = check_leakage(table, np.unique(rows), patients, population.split, "the boxed images")
    measured = measure_localisation(
        _ProjectedMaps(read_heatmaps(table.run_folder, set(boxes.image_ids[kept]))),
        boxes.image_ids[kept],
        boxes.findings[kept],
        boxes.xywh[kept],
        patients,
        settings=LocalisationSettings(image_side=boxes.image_side),
        n_resamples=bootstrap.n_resamples,
        seed=bootstrap.seed,
    )
    counts = {"boxed_images": len(images), "evaluated": len(np.unique(rows))}
    return BoxResult(
        source=boxes.source,
        table=str(path),
        digest=boxes.digest,
        images=population.description,
        counts=counts | population.count_missing(table, images.astype(object)),
        leak_check=checked,
        localisation=measured,
    )
