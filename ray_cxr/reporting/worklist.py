"""The worklist: one row per study, highest priority first, failed images last."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ray_cxr.labels import NO_FINDING
from ray_cxr.reporting.ranking import group_studies
from ray_cxr.reporting.scores import Scores

#: A spreadsheet runs a cell that starts with one of these as a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
#: Columns of numbers.
_NUMBERS = ("priority", "abnormality")
#: Columns that order studies of equal priority.
_ORDER = ("patient_id", "study_id", "image_id")


def build_worklist(table: Scores) -> list[dict[str, str]]:
    """Return one row per study, or per image without a study id, highest priority first and failures last.

    Flags of findings without calibration do not raise the priority. So a study that has one stands at least where the
    median of the studies with other flags stands, or first if there are none. `flagged_unranked` names the findings.
    """
    codes, n_studies = group_studies(table.patients, table.studies)
    every = np.arange(len(codes))
    abnormality, priority, top = table.ranking.rank_groups(codes, n_studies, every, table.priority)
    studies: list[list[int]] = [[] for _ in range(n_studies)]
    for row, code in enumerate(codes):
        studies[code].append(row)
    names = [f for f in table.findings if f in table.flags and f != NO_FINDING]
    unranked = table.ranking.findings.left_out if table.ranking.weights is not None else ()
    lines = []
    for study, rows in enumerate(studies):
        best = min(rows, key=lambda row: (_sort_value(float(table.priority[row])), table.ids[row]))
        flagged = [f for f in names if any(table.flags[f][row] == 1 for row in rows)]
        line = {
            "priority": _format(priority[study]),
            "abnormality": _format(abnormality[study]),
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
        }
        lines.append(line)
    places = _place(priority, lines)
    order = sorted(range(n_studies), key=lambda study: (places[study], *(lines[study][key] for key in _ORDER)))
    return [lines[study] for study in order]


def _place(priority: np.ndarray, lines: Sequence[Mapping[str, str]]) -> list[float]:
    """Return the value by which each study is sorted, the smallest first."""
    unranked = np.array([bool(line["flagged_unranked"]) for line in lines])
    others = np.array([bool(line["flagged"]) for line in lines]) & ~unranked
    floor = float(np.median(priority[others])) if others.any() else np.inf
    return [_sort_value(p) for p in np.where(unranked, np.fmax(priority, floor), priority).tolist()]


def _sort_value(priority: float) -> float:
    return math.inf if np.isnan(priority) else -priority


def _format(value: float) -> str:
    return "" if np.isnan(value) else str(np.float32(value))


def _join(values: Any) -> str:
    return "|".join(sorted({value for value in values if value}))


def format_csv(lines: Sequence[Mapping[str, str]]) -> str:
    """Return the rows as CSV; a text that a spreadsheet would run as a formula gets an apostrophe."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({k: f"'{v}" if k not in _NUMBERS and v.startswith(_FORMULA) else v for k, v in line.items()})
    return buffer.getvalue()
