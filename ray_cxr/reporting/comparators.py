"""Compare scores with reference standards and comparators: radiologists' labels and boxes, other scores, papers.

Each result states its source, the images it covers, and how many were left out and why.
"""

from __future__ import annotations

from collections import Counter, UserDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ray_cxr.data import identity
from ray_cxr.data.boxes import read_boxes
from ray_cxr.data.consensus import ConsensusLabels, read_consensus
from ray_cxr.errors import InputError
from ray_cxr.evaluation.localisation import Localisation, measure_localisation
from ray_cxr.evaluation.paired import PairedAuroc, PairedFinding, paired_findings
from ray_cxr.imaging.demographics import PatientCount
from ray_cxr.imaging.overlays import WHOLE, Area, HeatMap, has_heatmaps, read_heatmaps
from ray_cxr.labels import FINDINGS, LABELS, NO_FINDING
from ray_cxr.reporting.cases import Box
from ray_cxr.reporting.evaluation_set import EvaluationSet, Population
from ray_cxr.reporting.leakage import LeakCheck, check_leakage
from ray_cxr.reporting.measures import BootstrapSettings, EvaluationResult, ModelOutputs, evaluate
from ray_cxr.reporting.scores import Scores, read_scores

#: Side in cells of a heat map projected onto an image that the model saw cropped or padded.
_PROJECTED_SIDE = 256


@dataclass(frozen=True)
class ConsensusResult:
    """Metrics against a consensus table.

    Attributes:
        parts: number of evaluated images by the table's own split.
        scales: `calibrated` or `raw` for each scored composite.
        counts: number of evaluated images, and of images left out by reason.
    """

    table: str
    images: str
    reference: ConsensusLabels
    parts: dict[str, int]
    n_images: int
    patients: PatientCount
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
            **{name: getattr(self, name) for name in ("images", "parts", "n_images")},
            "n_patients": self.patients.number,
            "images_without_patient": self.patients.without_id,
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
    kept, rows, patients, missing = population.match(table, reference.image_ids, f"--consensus {path}")
    patients = np.where([patient is None for patient in patients], reference.patient_ids[kept], patients)
    checked = check_leakage(
        table,
        rows,
        patients,
        population.split,
        "the consensus table",
        has_manifest=isinstance(population, EvaluationSet),
    )
    names = [name for name in (*LABELS, *reference.composites) if name in reference.labels]
    labels = {name: reference.labels[name][kept] for name in names}
    outputs, scales = ModelOutputs.select(table, rows).add_composites(reference.composites)
    return ConsensusResult(
        table=str(path),
        images=population.description,
        reference=reference,
        parts=dict(sorted(Counter(str(part) for part in reference.parts[kept] if part is not None).items())),
        n_images=len(rows),
        patients=PatientCount.of(patients),
        scales=scales,
        counts={"labelled": len(reference), "evaluated": len(rows), **missing},
        leak_check=checked,
        evaluation=evaluate(outputs, labels, patients, prevalences=prevalences, bootstrap=bootstrap),
    )


@dataclass(frozen=True)
class ScoreComparison:
    """AUROC of two score tables on the same images; `macro.columns` are positions in `findings`."""

    other: str
    models: tuple[str, ...]
    images: str
    n_images: int
    patients: PatientCount
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
            **{name: getattr(self, name) for name in ("images", "n_images", "left_out")},
            "n_patients": self.patients.number,
            "images_without_patient": self.patients.without_id,
            "difference": "this less the other",
            "leak_check": self.leak_check.to_json(),
            "findings": {name: asdict(paired) for name, paired in self.findings.items()},
            "macro": macro,
        }


def compare_with_scores(
    table: Scores, evaluated: EvaluationSet, path: str, bootstrap: BootstrapSettings
) -> ScoreComparison:
    """Compare AUROC with another score table's, finding by finding, in the same resamples of patients."""
    other = read_scores(path)
    rows = identity.find_ids(table.ids[evaluated.rows], other.ids)
    shared = (rows >= 0) & other.ok[rows]
    names = [f for f in table.findings if f in other.findings and (evaluated.labels[f][shared] >= 0).any()]
    if not names:
        lacking = "no evaluated image" if not shared.any() else "no labelled finding"
        raise InputError(f"--compare {path}: {lacking} is in both score tables; score the same images with both")
    patients = evaluated.patients[shared]
    checked = check_leakage(other, rows[shared], patients, evaluated.split, "the compared images")
    labels = np.column_stack([evaluated.labels[f][shared] for f in names])
    p = np.column_stack([table.p[f][evaluated.rows[shared]] for f in names])
    other_p = np.column_stack([other.p[f][rows[shared]] for f in names])
    macro = np.array([f != NO_FINDING for f in names])
    n, seed = bootstrap.n_resamples, bootstrap.seed
    paired = paired_findings(labels, p, other_p, patients, n_resamples=n, seed=seed, macro=macro)
    return ScoreComparison(
        other=str(path),
        models=other.model_digests,
        images=evaluated.description,
        n_images=int(shared.sum()),
        patients=PatientCount.of(patients),
        left_out=int((~shared).sum()),
        leak_check=checked,
        findings=dict(zip(names, paired.findings, strict=True)),
        macro=paired.macro,
    )


@dataclass(frozen=True)
class BoxResult:
    """Agreement of heat maps with radiologists' boxes.

    Attributes:
        counts: the numbers of images with boxes: all, those evaluated, and those left out by reason.
        boxes: the boxes by image id.
    """

    source: str
    table: str
    digest: str
    images: str
    counts: dict[str, int]
    leak_check: LeakCheck
    localisation: Localisation
    boxes: Mapping[str, list[Box]]

    def to_json(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("source", "table", "digest", "images", "counts")},
            "leak_check": self.leak_check.to_json(),
            **self.localisation.to_json(),
        }


class _ProjectedMaps(UserDict[tuple[str, str], Any]):
    """Heat maps by image and finding, each projected onto the whole image when it is read."""

    def __getitem__(self, key: tuple[str, str]) -> np.ndarray:
        heatmap: HeatMap = self.data[key]
        # A map of the whole image keeps the model's own cells.
        return heatmap.cells if heatmap.area == WHOLE else heatmap.project((_PROJECTED_SIDE, _PROJECTED_SIDE))


def check_heatmaps(table: Scores, path: str) -> None:
    """Raise InputError if there are no heat maps to compare with the boxes in `path`."""
    if not any(map(has_heatmaps, table.folders)):
        command = f"`ray-cxr score ... --heatmaps {len(FINDINGS)}`"
        raise InputError(f"--boxes {path}: {table.source} holds no heat maps. Draw them first: {command}")


def compare_with_boxes(table: Scores, population: Population, path: str, bootstrap: BootstrapSettings) -> BoxResult:
    """Measure the heat maps of `score --heatmaps`, after `check_heatmaps`, against boxes that radiologists drew.

    Raises:
        NotEvaluatedError: no boxed image is in the population.
    """
    boxes = read_boxes(path)
    kept, rows, patients, missing = population.match(table, boxes.image_ids, f"--boxes {path}")
    images, first = np.unique(rows, return_index=True)  # an image can have several boxes
    checked = check_leakage(
        table,
        images,
        patients[first],
        population.split,
        "the boxed images",
        has_manifest=isinstance(population, EvaluationSet),
    )
    ids = table.ids[rows]  # the maps' spelling, which can be another Unicode form than that of the boxes
    maps: dict[tuple[str, str], HeatMap] = {}
    for folder, found in table.group_by_folder(set(ids)).items():
        maps |= read_heatmaps(folder, found) if has_heatmaps(folder) else {}
    measured = measure_localisation(
        _ProjectedMaps(maps),
        ids,
        boxes.findings[kept],
        boxes.xywh[kept],
        patients,
        image_side=boxes.image_side,
        n_resamples=bootstrap.n_resamples,
        seed=bootstrap.seed,
    )
    drawn: dict[str, list[Box]] = {}
    for image_id, finding, (left, top, width, height) in zip(
        ids, boxes.findings[kept], boxes.xywh[kept] / boxes.image_side, strict=True
    ):
        drawn.setdefault(image_id, []).append(Box(finding, Area(top, left, top + height, left + width)))
    return BoxResult(
        source=boxes.source,
        table=str(path),
        digest=boxes.digest,
        images=population.description,
        counts={"boxed_images": len(np.unique(boxes.image_ids)), "evaluated": len(images), **missing},
        leak_check=checked,
        localisation=measured,
        boxes=drawn,
    )
