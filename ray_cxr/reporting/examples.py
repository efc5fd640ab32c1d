"""Which radiographs a report shows."""

from __future__ import annotations

import numpy as np

from ray_cxr.data import imaging
from ray_cxr.errors import ImageError
from ray_cxr.labels import FINDINGS, NO_FINDING
from ray_cxr.reporting import plots
from ray_cxr.reporting.labelled import Evaluated
from ray_cxr.reporting.scores import Scores, number

_EXAMPLES = 4


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
    groups = []
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
        groups.append((title, [_example(table, evaluated, finding, case) for finding, case in chosen]))
    return groups


def _tenths(p: np.ndarray) -> np.ndarray:
    """1 for the highest tenth of the scores, 0 for the lowest, -1 between and where there is no score."""
    known = p[~np.isnan(p)]
    if not known.size:
        return np.full(len(p), -1)
    low, high = np.quantile(known, [0.1, 0.9])
    return np.where(p >= high, 1, np.where(p <= low, 0, -1))


def _example(table: Scores, evaluated: Evaluated, heading: str, case: int) -> plots.Example:
    row = evaluated.rows[case]
    picture, code = _picture(table.paths[row])
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


def _picture(path: str | None) -> tuple[np.ndarray | None, str | None]:
    if path is None:
        return None, "missing"
    try:
        return imaging.load(path), None
    except ImageError as error:
        return None, error.code
