"""Select the radiographs that a report shows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from ray_cxr.imaging.sandbox import Decoder
from ray_cxr.labels import NO_FINDING
from ray_cxr.reporting.cases import Band, Case, CaseBuilder, HeatMapReader, add_heatmap
from ray_cxr.reporting.comparators import BoxResult
from ray_cxr.reporting.evaluation_set import EvaluationSet
from ray_cxr.reporting.result import ReportResult
from ray_cxr.reporting.scores import Scores

#: Number of cases in a band of examples, in a band of heat maps, and on the page of radiographs.
_EXAMPLES, _HEATMAPS, _RADIOGRAPHS = 3, 3, 12
#: Two keys to sort by, a finding, and the position of an image in the evaluation set or in the table.
_Candidate = tuple[float, float, str, int]


def select_cases(table: Scores, result: ReportResult, seed: int, maps: HeatMapReader) -> dict[str, list[Band]]:
    """Select the cases of the figures `examples`, `heatmaps` and `radiographs`, and of `localisation`.

    A figure without a case, or of which no image can be shown, is left out. `heatmaps` is empty if there are heat maps,
    but none of a labelled positive or flagged finding.
    """
    images = result.labelled.images if result.labelled else None
    with Decoder([None]) as decoder:
        builder = CaseBuilder(table, result.boxes.boxes if result.boxes else {}, decoder)
        bands: dict[str, list[Band]] = {}
        if images is not None:
            bands["examples"] = sample_examples(table, images, builder, seed)
            bands["heatmaps"] = select_heatmaps(table, images, builder, maps)
            bands["radiographs"] = sample_radiographs(images, builder, seed)
        if result.boxes is not None:
            bands["localisation"] = select_localised(table, images, result.boxes, builder, maps)
    shown = {name: [(title, cases) for title, cases in found if cases] for name, found in bands.items()}
    return {
        name: found
        for name, found in shown.items()
        if any(case.image is not None or case.overlay is not None for _, cases in found for case in cases)
        or (name == "heatmaps" and not found and maps.has_maps)
    }


def sample_examples(table: Scores, images: EvaluationSet, builder: CaseBuilder, seed: int) -> list[Band]:
    """Draw a seeded random sample of true positives, missed positives and false alarms, one band for each kind.

    A band takes one image per finding before a second image of a finding. No image is shown twice. Without operating
    points, the highest tenth of a finding's scores counts as flagged, and the lowest tenth as not flagged.
    """
    rng = np.random.default_rng(seed)
    names = [f for f in table.findings if f != NO_FINDING]
    kinds = (("True positives", 1, 1), ("Missed", 1, 0), ("False alarms", 0, 1))
    flagged = {f: table.flags[f][images.rows] for f in names if f in table.flags}
    if not any((flags >= 0).any() for flags in flagged.values()):
        kinds = (("High-scoring positives", 1, 1), ("Low-scoring positives", 1, 0), ("High-scoring negatives", 0, 1))
        flagged = {f: _mark_tenths(table.p[f][images.rows]) for f in names}
    names = [f for f in names if f in flagged]
    bands: list[tuple[str, list[_Candidate]]] = []
    for title, label, flag in kinds:
        drawn: list[_Candidate] = []
        for position, index in enumerate(rng.permutation(len(names))):
            finding = names[index]
            cases = np.flatnonzero((images.labels[finding] == label) & (flagged[finding] == flag))
            drawn += [(row, position, finding, case) for row, case in enumerate(rng.permutation(cases)[:50].tolist())]
        bands.append((title, drawn))
    return [
        (title, [builder.build(images.rows[case], finding, _labels_of(images, case)) for finding, case in chosen])
        for title, chosen in _choose_cases(bands, _EXAMPLES)
    ]


def _mark_tenths(p: np.ndarray) -> np.ndarray:
    """Return 1 for the highest tenth of the scores, 0 for the lowest tenth, and -1 for all others."""
    known = p[~np.isnan(p)]
    low, high = np.quantile(known, [0.1, 0.9]) if known.size else (np.nan, np.nan)
    return np.where(p >= high, 1, np.where(p <= low, 0, -1))


def _labels_of(images: EvaluationSet, case: int) -> dict[str, int]:
    return {finding: int(labels[case]) for finding, labels in images.labels.items()}


def sample_radiographs(images: EvaluationSet, builder: CaseBuilder, seed: int) -> list[Band]:
    """Draw a seeded random sample of the evaluated images."""
    chosen = np.random.default_rng(seed).permutation(len(images.rows))[:_RADIOGRAPHS]
    cases = []
    for case in sorted(chosen.tolist()):
        note = _describe_patient(images, case)
        cases.append(builder.build(images.rows[case], None, _labels_of(images, case), note))
    return [("", cases)]


def _describe_patient(images: EvaluationSet, case: int) -> str:
    """Return view, sex and age, as far as they are known."""
    age = images.age[case]
    parts = (images.view[case], images.sex[case], None if np.isnan(age) else f"{age:.0f} years")
    return ", ".join(part for part in parts if part)


def select_heatmaps(table: Scores, images: EvaluationSet, builder: CaseBuilder, reader: HeatMapReader) -> list[Band]:
    """Select the best and worst predictions among those whose heat map shows evidence.

    The best predictions are flagged positives with the highest scores. The worst are missed positives with the lowest
    scores and flagged negatives with the highest scores. A band takes one case per finding before a second case of a
    finding. Maps exist for an image's highest findings only.
    """
    maps = reader.read(table.ids[images.rows])
    kinds = (
        ("Found, highest scores", 1, 1, -1.0),
        ("Missed, lowest scores among images with a map", 1, 0, 1.0),
        ("False alarms, highest scores", 0, 1, -1.0),
    )
    bands: list[tuple[str, list[_Candidate]]] = []
    for title, label, flag, sign in kinds:
        ranked: list[_Candidate] = []
        for finding in (f for f in table.findings if f in table.flags and f != NO_FINDING):
            p, flags = table.p[finding][images.rows], table.flags[finding][images.rows]
            for case in np.flatnonzero((images.labels[finding] == label) & (flags == flag)).tolist():
                heatmap = maps.get((table.ids[images.rows[case]], finding))
                if heatmap is not None and heatmap.evidence:
                    ranked.append((0.0, sign * float(p[case]), finding, case))
        bands.append((title, ranked))
    groups = []
    for title, chosen in _choose_cases(bands, _HEATMAPS):
        cases = []
        for finding, case in chosen:
            built = builder.build(images.rows[case], finding, _labels_of(images, case))
            cases.append(add_heatmap(built, maps.get((built.image_id, finding))))
        groups.append((title, cases))
    return groups


def select_localised(
    table: Scores, images: EvaluationSet | None, boxes: BoxResult, builder: CaseBuilder, reader: HeatMapReader
) -> list[Band]:
    """Select boxed images with the highest scores, those whose heat map hits a box and those whose map does not."""
    rows = {image_id: row for row, image_id in enumerate(table.ids.tolist())}
    positions = {} if images is None else {row: case for case, row in enumerate(images.rows.tolist())}
    maps = reader.read(boxes.boxes)
    bands: list[tuple[str, list[_Candidate]]] = []
    for title, is_hit in (("The highest cell is in a box", True), ("The highest cell is outside the boxes", False)):
        ranked = [
            (0.0, -float(table.p[finding][rows[image_id]]), finding, rows[image_id])
            for (image_id, finding), hit in boxes.localisation.hits.items()
            if (hit >= 0.5) == is_hit and finding in table.p and maps[image_id, finding].evidence
        ]
        bands.append((title, ranked))
    groups = []
    for title, chosen in _choose_cases(bands, _HEATMAPS):
        cases: list[Case] = []
        for finding, row in chosen:
            labels = _labels_of(images, positions[row]) if images is not None and row in positions else None
            built = builder.build(row, finding, labels)
            cases.append(add_heatmap(built, maps.get((built.image_id, finding))))
        groups.append((title, cases))
    return groups


def _choose_cases(bands: Sequence[tuple[str, list[_Candidate]]], count: int) -> list[tuple[str, list[tuple[str, int]]]]:
    """Take the first `count` cases of each band, no image twice, and no finding twice while other findings remain."""
    shown: set[int] = set()
    groups = []
    for title, candidates in bands:
        chosen: list[tuple[str, int]] = []
        for repeats, (_, _, finding, case) in itertools.product((False, True), sorted(candidates)):
            if len(chosen) < count and case not in shown and (repeats or finding not in dict(chosen)):
                shown.add(case)
                chosen.append((finding, case))
        groups.append((title, chosen))
    return groups
