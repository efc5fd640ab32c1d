"""Which radiographs a report shows."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ray_cxr.imaging.overlays import FOLDER, HeatMap, read_heatmaps
from ray_cxr.imaging.sandbox import Decoder, Failure
from ray_cxr.labels import FINDINGS, NO_FINDING
from ray_cxr.reporting import figures, plots
from ray_cxr.reporting.labelled import Evaluated
from ray_cxr.reporting.scores import Scores, number
from ray_cxr.storage import remote

_EXAMPLES = 4
_RADIOGRAPHS = 12
#: On the page of heat maps, per band.
_CASES = 3


def examples(table: Scores, evaluated: Evaluated, seed: int) -> list[tuple[str, list[plots.Example]]]:
    """A seeded random draw of hits, misses and false alarms: typical ones, not the prettiest or the worst.

    A band goes round the findings, one image of each, before a second of any; no image is shown twice.
    """
    rng = np.random.default_rng(seed)
    names = [f for f in table.findings if f != NO_FINDING]
    kinds = (("True positives", 1, 1), ("Missed", 1, 0), ("False alarms", 0, 1))
    called = {f: table.flags[f][evaluated.rows] for f in names if f in table.flags}
    if not any((flags >= 0).any() for flags in called.values()):
        # No operating points: the outer tenths of each finding's scores stand for called and not called.
        kinds = (
            ("Positives that score high", 1, 1),
            ("Positives that score low", 1, 0),
            ("Negatives that score high", 0, 1),
        )
        called = {f: _tenths(table.p[f][evaluated.rows]) for f in names}
    names = [f for f in names if f in called]
    shown: set[int] = set()
    groups: list[tuple[str, list[tuple[str, int]]]] = []
    for title, label, flag in kinds:
        queues: list[tuple[str, list[int]]] = []
        for position in rng.permutation(len(names)):
            finding = names[position]
            cases = np.flatnonzero((evaluated.labels[finding] == label) & (called[finding] == flag))
            queues.append((finding, [int(case) for case in rng.permutation(cases)[:50]]))
        chosen: list[tuple[str, int]] = []
        while len(chosen) < _EXAMPLES and any(queue for _, queue in queues):
            for finding, queue in queues:
                while queue and queue[0] in shown:
                    queue.pop(0)
                if queue and len(chosen) < _EXAMPLES:
                    case = queue.pop(0)
                    shown.add(case)
                    chosen.append((finding, case))
        groups.append((title, chosen))
    with Decoder([None]) as decoder:
        return [
            (title, [_example(table, evaluated, finding, case, decoder) for finding, case in chosen])
            for title, chosen in groups
        ]


def _tenths(p: np.ndarray) -> np.ndarray:
    """1 for the highest tenth of the scores, 0 for the lowest, -1 between and where there is no score."""
    known = p[~np.isnan(p)]
    if not known.size:
        return np.full(len(p), -1)
    low, high = np.quantile(known, [0.1, 0.9])
    return np.where(p >= high, 1, np.where(p <= low, 0, -1))


def _example(table: Scores, evaluated: Evaluated, heading: str, case: int, decoder: Decoder) -> plots.Example:
    row = evaluated.rows[case]
    picture, code = _load(table.paths[row], decoder)
    points = table.model.get("operating_points") or {}
    ranked = sorted(
        ((f, float(table.p[f][row])) for f in table.findings if f != NO_FINDING and not np.isnan(table.p[f][row])),
        key=lambda pair: -pair[1],
    )
    return plots.Example(
        picture=picture,
        code=code,
        heading=heading,
        true=tuple(f for f in FINDINGS if evaluated.labels[f][case] == 1),
        flagged=tuple(f for f in FINDINGS if f in table.flags and table.flags[f][row] == 1),
        bars=tuple((f, p, number((points.get(f) or {}).get("threshold"))) for f, p in ranked[:3]),
    )


def _load(path: str | None, decoder: Decoder) -> tuple[np.ndarray | None, str | None]:
    """Load an image in its own size, or return why that fails; in a child process, which a damaged file may end."""
    found = decoder.load(path)
    return (None, found.code) if isinstance(found, Failure) else (found.images[0], None)


def radiographs(table: Scores, evaluated: Evaluated, seed: int) -> list[figures.Radiograph]:
    """A seeded random draw of the evaluated images, as they were given."""
    chosen = np.random.default_rng(seed).permutation(len(evaluated.rows))[:_RADIOGRAPHS]
    tiles = []
    with Decoder([None]) as decoder:
        for case in sorted(int(one) for one in chosen):
            picture, code = _load(table.paths[evaluated.rows[case]], decoder)
            judged = any(evaluated.labels[f][case] >= 0 for f in FINDINGS)
            known = tuple(f for f in FINDINGS if evaluated.labels[f][case] == 1) if judged else None
            tiles.append(figures.Radiograph(picture, code, known, _note(evaluated, case)))
    return tiles


def _note(evaluated: Evaluated, case: int) -> str:
    """View, sex and age, as far as they are known."""
    age = evaluated.age[case]
    parts = (evaluated.view[case], evaluated.sex[case], None if np.isnan(age) else f"{age:.0f} years")
    return ", ".join(part for part in parts if part)


def heatmap_cases(table: Scores, evaluated: Evaluated) -> list[tuple[str, list[figures.HeatmapExample]]]:
    """The best and the worst predictions with their heat maps; nothing where the scores hold none.

    Best: positives that are flagged with the highest scores. Worst: positives missed with the lowest, negatives
    flagged with the highest. One of each finding before a second of any. Heat maps are drawn for an image's highest
    findings, so those missed by far have none; cases with a map come first.
    """
    if table.home is None or not (remote.path(table.home) / FOLDER).is_dir():
        return []
    maps = read_heatmaps(table.home, set(table.ids[evaluated.rows]))
    bands = (("Best: found with the highest scores", 1, 1, -1.0), ("Missed with the lowest scores", 1, 0, 1.0),
             ("False alarms with the highest scores", 0, 1, -1.0))  # fmt: skip
    shown: set[int] = set()
    groups: list[tuple[str, list[tuple[str, int]]]] = []
    for title, label, flag, sign in bands:
        ranked = []
        for finding in table.findings:
            if finding == NO_FINDING or finding not in table.flags:
                continue
            p = table.p[finding][evaluated.rows]
            flags = table.flags[finding][evaluated.rows]
            for case in np.flatnonzero((evaluated.labels[finding] == label) & (flags == flag)):
                lacking = (table.ids[evaluated.rows[case]], finding) not in maps
                ranked.append((lacking, sign * float(p[case]), finding, int(case)))
        groups.append((title, _one_of_each(sorted(ranked), shown)))
    with Decoder([None]) as decoder:
        return [
            (title, [_with_map(table, evaluated, maps, finding, case, decoder) for finding, case in chosen])
            for title, chosen in groups
        ]


def _one_of_each(ranked: list[tuple[bool, float, str, int]], shown: set[int]) -> list[tuple[str, int]]:
    """The first few, no finding twice while there are others, and no image twice."""
    chosen: list[tuple[str, int]] = []
    for again in (False, True):
        for _, _, finding, case in ranked:
            if len(chosen) == _CASES:
                return chosen
            if case not in shown and (again or finding not in {name for name, _ in chosen}):
                shown.add(case)
                chosen.append((finding, case))
    return chosen


def _with_map(
    table: Scores,
    evaluated: Evaluated,
    maps: dict[tuple[str, str], HeatMap],
    finding: str,
    case: int,
    decoder: Decoder,
) -> figures.HeatmapExample:
    example = _example(table, evaluated, finding, case, decoder)
    row = evaluated.rows[case]
    found, score = maps.get((table.ids[row], finding)), float(table.p[finding][row])
    if found is None:
        why = "its score is not among the image's highest"
        return figures.HeatmapExample(example, finding, None, why, score)
    if found.evidence == 0:
        return figures.HeatmapExample(example, finding, None, "nothing in the picture speaks for it", score)
    try:
        with Image.open(found.overlay) as picture:
            overlay = np.asarray(picture.convert("RGB"))
    except OSError:
        return figures.HeatmapExample(example, finding, None, f"{found.overlay.name} cannot be read", score)
    return figures.HeatmapExample(example, finding, overlay, score=score)
