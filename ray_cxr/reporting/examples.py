"""Select the radiographs that a report shows."""

from __future__ import annotations

import itertools

import numpy as np
from PIL import Image

from ray_cxr.imaging.overlays import HeatMap, has_heatmaps, read_heatmaps
from ray_cxr.imaging.sandbox import Decoder, Failure
from ray_cxr.labels import FINDINGS, NO_FINDING
from ray_cxr.reporting.evaluation_set import EvaluationSet
from ray_cxr.reporting.image_figures import Example, HeatmapExample, Radiograph
from ray_cxr.reporting.scores import Scores

#: Number of tiles in a band of examples, in a band of heat maps, and on the page of radiographs.
_EXAMPLES, _HEATMAPS, _RADIOGRAPHS = 4, 3, 12
#: Two keys to sort by, a finding, and the position of an image in the evaluation set.
_Candidate = tuple[float, float, str, int]


def sample_examples(table: Scores, evaluated: EvaluationSet, seed: int) -> list[tuple[str, list[Example]]]:
    """Draw a seeded random sample of true positives, missed positives and false alarms, one band for each kind.

    A band takes one image per finding before a second image of a finding. No image is shown twice. Without operating
    points, the highest tenth of a finding's scores counts as flagged, and the lowest tenth as not flagged.
    """
    rng = np.random.default_rng(seed)
    names = [f for f in table.findings if f != NO_FINDING]
    kinds = (("True positives", 1, 1), ("Missed", 1, 0), ("False alarms", 0, 1))
    flagged = {f: table.flags[f][evaluated.rows] for f in names if f in table.flags}
    if not any((flags >= 0).any() for flags in flagged.values()):
        kinds = (("High-scoring positives", 1, 1), ("Low-scoring positives", 1, 0), ("High-scoring negatives", 0, 1))
        flagged = {f: _mark_tenths(table.p[f][evaluated.rows]) for f in names}
    names = [f for f in names if f in flagged]
    bands: list[tuple[str, list[_Candidate]]] = []
    for title, label, flag in kinds:
        drawn: list[_Candidate] = []
        for position, index in enumerate(rng.permutation(len(names))):
            finding = names[index]
            cases = np.flatnonzero((evaluated.labels[finding] == label) & (flagged[finding] == flag))
            drawn += [(row, position, finding, case) for row, case in enumerate(rng.permutation(cases)[:50].tolist())]
        bands.append((title, drawn))
    with Decoder([None]) as decoder:
        return [
            (title, [_build_example(table, evaluated, finding, case, decoder) for finding, case in chosen])
            for title, chosen in _choose_cases(bands, _EXAMPLES)
        ]


def _mark_tenths(p: np.ndarray) -> np.ndarray:
    """Return 1 for the highest tenth of the scores, 0 for the lowest tenth, and -1 for all others."""
    known = p[~np.isnan(p)]
    low, high = np.quantile(known, [0.1, 0.9]) if known.size else (np.nan, np.nan)
    return np.where(p >= high, 1, np.where(p <= low, 0, -1))


def _build_example(table: Scores, evaluated: EvaluationSet, heading: str, case: int, decoder: Decoder) -> Example:
    row = evaluated.rows[case]
    image, code = load_image(table.paths[row], decoder)
    ranked = sorted(
        ((f, float(table.p[f][row])) for f in table.findings if f != NO_FINDING and not np.isnan(table.p[f][row])),
        key=lambda pair: -pair[1],
    )
    return Example(
        image=image,
        code=code,
        heading=heading,
        true=tuple(f for f in FINDINGS if evaluated.labels[f][case] == 1),
        flagged=tuple(f for f in FINDINGS if f in table.flags and table.flags[f][row] == 1),
        bars=tuple((f, p, table.threshold(f)) for f, p in ranked[:3]),
    )


def load_image(path: str | None, decoder: Decoder) -> tuple[np.ndarray | None, str | None]:
    """Return an image in its own size, or its error code. A damaged file can crash only the decoder's child process."""
    decoded = decoder.load(path)
    return (None, decoded.code) if isinstance(decoded, Failure) else (decoded.images[0], None)


def sample_radiographs(table: Scores, evaluated: EvaluationSet, seed: int) -> list[Radiograph]:
    """Draw a seeded random sample of the evaluated images."""
    chosen = np.random.default_rng(seed).permutation(len(evaluated.rows))[:_RADIOGRAPHS]
    tiles = []
    with Decoder([None]) as decoder:
        for case in sorted(chosen.tolist()):
            image, code = load_image(table.paths[evaluated.rows[case]], decoder)
            labelled = any(evaluated.labels[f][case] >= 0 for f in FINDINGS)
            positive = tuple(f for f in FINDINGS if evaluated.labels[f][case] == 1) if labelled else None
            tiles.append(Radiograph(image, code, positive, _describe_patient(evaluated, case)))
    return tiles


def _describe_patient(evaluated: EvaluationSet, case: int) -> str:
    """Return view, sex and age, as far as they are known."""
    age = evaluated.age[case]
    parts = (evaluated.view[case], evaluated.sex[case], None if np.isnan(age) else f"{age:.0f} years")
    return ", ".join(part for part in parts if part)


def select_heatmap_examples(table: Scores, evaluated: EvaluationSet) -> list[tuple[str, list[HeatmapExample]]]:
    """Select the best and worst predictions with heat maps; none if the scores have no heat maps.

    The best predictions are flagged positives with the highest scores. The worst are missed positives with the lowest
    scores and flagged negatives with the highest scores. A band takes one case per finding before a second case of a
    finding. Cases with a heat map come first, because maps are drawn for an image's highest findings only.
    """
    if table.run_folder is None or not has_heatmaps(table.run_folder):
        return []
    maps = read_heatmaps(table.run_folder, set(table.ids[evaluated.rows]))
    kinds = (
        ("Found, highest scores", 1, 1, -1.0),
        ("Missed, lowest scores", 1, 0, 1.0),
        ("False alarms, highest scores", 0, 1, -1.0),
    )
    bands: list[tuple[str, list[_Candidate]]] = []
    for title, label, flag, sign in kinds:
        ranked: list[_Candidate] = []
        for finding in (f for f in table.findings if f in table.flags and f != NO_FINDING):
            p, flags = table.p[finding][evaluated.rows], table.flags[finding][evaluated.rows]
            for case in np.flatnonzero((evaluated.labels[finding] == label) & (flags == flag)):
                lacking = (table.ids[evaluated.rows[case]], finding) not in maps
                ranked.append((lacking, sign * float(p[case]), finding, int(case)))
        bands.append((title, ranked))
    with Decoder([None]) as decoder:
        return [
            (title, [_build_heatmap_tile(table, evaluated, maps, finding, case, decoder) for finding, case in chosen])
            for title, chosen in _choose_cases(bands, _HEATMAPS)
        ]


def _choose_cases(bands: list[tuple[str, list[_Candidate]]], count: int) -> list[tuple[str, list[tuple[str, int]]]]:
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


def _build_heatmap_tile(
    table: Scores,
    evaluated: EvaluationSet,
    maps: dict[tuple[str, str], HeatMap],
    finding: str,
    case: int,
    decoder: Decoder,
) -> HeatmapExample:
    example = _build_example(table, evaluated, finding, case, decoder)
    row = evaluated.rows[case]
    heatmap = maps.get((table.ids[row], finding))
    overlay, reason = None, ""
    if heatmap is None:
        reason = "its score is not among the image's highest"
    elif heatmap.evidence == 0:
        reason = "no positive evidence in the image"
    elif heatmap.overlay is None:
        reason = "not drawn over the image"
    else:
        try:
            with Image.open(heatmap.overlay) as image:
                overlay = np.asarray(image.convert("RGB"))
        except OSError:
            reason = f"{heatmap.overlay.name} cannot be read"
    return HeatmapExample(example, float(table.p[finding][row]), overlay, reason)
