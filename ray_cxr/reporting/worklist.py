"""The worklist: one row per study.

Studies with a flag come first, then those that need a look for another reason, which are images with a quality flag or
without a score. Each part is in order of priority.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_cxr.labels import NO_FINDING
from ray_cxr.reporting.leakage import find_parts
from ray_cxr.reporting.ranking import find_highest, group_studies
from ray_cxr.reporting.scores import Scores
from ray_cxr.reporting.spreadsheets import format_csv


@dataclass(frozen=True, eq=False)
class Worklist:
    """One entry per study, or per image without a study id, in the order of `sort_studies`.

    Attributes:
        lines: the columns of text of worklist.csv.
        rows: the rows of each study in the score table; the first is the image of the line.
        priority, abnormality: float32 [n], NaN without a probability.
        combines: whether the priority combines the probabilities of all findings; else it is a column of the scores.
        p, c: per finding, the study's highest raw and calibrated probability, float64 [n], NaN for null.
    """

    lines: list[dict[str, str]]
    rows: list[list[int]]
    priority: np.ndarray
    abnormality: np.ndarray
    combines: bool
    p: dict[str, np.ndarray]
    c: dict[str, np.ndarray]

    def to_csv(self) -> str:
        """Return worklist.csv."""
        return format_csv(self.to_columns())

    def to_columns(self) -> dict[str, Any]:
        """Return the columns of worklist.csv, lists of text and arrays of numbers."""
        return {
            "priority": self.priority,
            "abnormality": self.abnormality,
            **{name: [line[name] for line in self.lines] for name in self.lines[0]},
            **{f"p_{finding}": values for finding, values in self.p.items()},
            **{f"c_{finding}": values for finding, values in self.c.items()},
        }


def is_doubtful(line: dict[str, str]) -> bool:
    """Return whether a line needs a look, although none of its images has a flag."""
    return not line["flagged"] and bool(line["quality_flags"] or line["errors"])


def build_worklist(table: Scores) -> Worklist:
    """List the studies of a score table; `flagged_unranked` names flags of findings that the priority leaves out."""
    codes, studies, order = order_studies(table)
    n_studies = len(studies)
    abnormality, priority, top = table.ranking.rank_groups(codes, n_studies, np.arange(len(codes)), table.priority)
    names, unranked = _list_flagged(table)
    parts = find_parts(table)
    lines = []
    for study, rows in enumerate(studies):
        best = rows[0]
        flagged = [f for f in names if any(table.flags[f][row] == 1 for row in rows)]
        line = {
            "top_finding": (table.top_findings[best] if table.ranking.weights is None else top[study]) or "",
            "flagged": "|".join(flagged),
            "flagged_unranked": "|".join(f for f in flagged if f in unranked),
            "patient_id": table.patients[best] or "",
            "study_id": table.studies[best] or "",
            "image_id": table.ids[best],
            "n_images": str(len(rows)),
            "n_errors": str(sum(not table.ok[row] for row in rows)),
            "errors": _join(table.codes[row] or "unknown" for row in rows if not table.ok[row]),
            "quality_flags": _join(table.quality_flags[row] for row in rows),
            "used_in_training": _join(parts[row] for row in rows),
        }
        if table.night is not None:
            line["night"] = "|".join(table.nights[night].name for night in sorted({*table.night[rows].tolist()}))
        lines.append(line)
    return Worklist(
        lines=[lines[study] for study in order],
        rows=[studies[study] for study in order],
        priority=priority[order].astype(np.float32),
        abnormality=abnormality[order].astype(np.float32),
        combines=table.ranking.weights is not None,
        p={finding: find_highest(p, codes, n_studies)[order] for finding, p in table.p.items()},
        c={finding: find_highest(c, codes, n_studies)[order] for finding, c in table.c.items()},
    )


def order_studies(table: Scores) -> tuple[np.ndarray, list[list[int]], list[int]]:
    """Return the order of the worklist.

    Returns:
        The study of each row, int64 [n]; the rows of each study, the one with the highest priority first; and the
        studies, the one to read first at the front.
    """
    codes, places = sort_studies(table)
    parts = _find_parts(table, codes, len(places))
    every = np.arange(len(codes))
    images = _to_sort_values(table.ranking.order_groups(every, len(every), every, table.priority))
    studies: list[list[int]] = [[] for _ in range(len(places))]
    for row, code in enumerate(codes):
        studies[code].append(row)
    for rows in studies:
        best = min(rows, key=lambda row: (images[row], table.ids[row]))
        rows.sort(key=lambda row: row != best)

    def sort_key(study: int) -> tuple[int, float, str, str, str]:
        # Studies of equal priority are ordered by their ids.
        row = studies[study][0]
        return parts[study], places[study], table.patients[row] or "", table.studies[row] or "", table.ids[row]

    return codes, studies, sorted(range(len(studies)), key=sort_key)


def sort_studies(table: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Return the study of each row, int64 [n], and the place of each study in the worklist, float64.

    The smallest is first: studies with a flag, also of a finding that the priority leaves out, then those that need a
    look for another reason, then the others; each part in order of priority, highest first. Studies with equal places
    are ordered by ids. The place is infinite without a flag and a probability, as of failed images.
    """
    codes, n_studies = group_studies(table.patients, table.studies)
    urgency = _to_sort_values(table.ranking.order_groups(codes, n_studies, np.arange(len(codes)), table.priority))
    parts = _find_parts(table, codes, n_studies)
    _, places = np.unique(np.column_stack([parts, urgency]), axis=0, return_inverse=True)
    # A probability of 1 has the urgency -inf here, a missing one +inf.
    return codes, np.where((parts > 0) & np.isposinf(urgency), np.inf, places.reshape(-1).astype(float))


def _find_parts(table: Scores, codes: np.ndarray, n_studies: int) -> np.ndarray:
    """Return the part of the worklist of each study: 0 with a flag, 1 for a quality flag or a failed image, else 2."""
    parts = np.full(n_studies, 2)
    parts[codes[~table.ok | table.quality_flags.astype(bool)]] = 1
    for finding in _list_flagged(table)[0]:
        parts[codes[table.flags[finding] == 1]] = 0
    return parts


def _list_flagged(table: Scores) -> tuple[list[str], tuple[str, ...]]:
    """Return the findings with flags, and the findings that the priority leaves out."""
    names = [f for f in table.findings if f in table.flags and f != NO_FINDING]
    return names, table.ranking.findings.left_out if table.ranking.weights is not None else ()


def _to_sort_values(urgency: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(urgency), np.inf, -urgency)


def _join(values: Any) -> str:
    return "|".join(sorted({value for value in values if value}))
