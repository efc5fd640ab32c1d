"""The worklist: one row per study, highest priority first, failed images last."""

from __future__ import annotations

import csv
import io
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
    codes, places = sort_studies(table)
    n_studies, every = len(places), np.arange(len(codes))
    abnormality, priority, top = table.ranking.rank_groups(codes, n_studies, every, table.priority)
    images = _to_sort_values(table.ranking.order_groups(every, len(every), every, table.priority))
    studies: list[list[int]] = [[] for _ in range(n_studies)]
    for row, code in enumerate(codes):
        studies[code].append(row)
    names, unranked = _list_flagged(table)
    lines = []
    for study, rows in enumerate(studies):
        best = min(rows, key=lambda row: (images[row], table.ids[row]))
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
    order = sorted(range(n_studies), key=lambda study: (places[study], *(lines[study][key] for key in _ORDER)))
    return [lines[study] for study in order]


def sort_studies(table: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Return the study of each row, int64 [n], and the value by which the worklist sorts each study, float64.

    The smallest is first. The value is infinite without a probability. Studies of equal values are ordered by ids.
    """
    codes, n_studies = group_studies(table.patients, table.studies)
    urgency = table.ranking.order_groups(codes, n_studies, np.arange(len(codes)), table.priority)
    names, left_out = _list_flagged(table)
    others, unranked = np.zeros((2, n_studies), dtype=bool)
    for finding in names:
        (unranked if finding in left_out else others)[codes[table.flags[finding] == 1]] = True
    others &= ~unranked & ~np.isnan(urgency)
    floor = float(np.median(urgency[others])) if others.any() else np.inf
    return codes, _to_sort_values(np.where(unranked, np.fmax(urgency, floor), urgency))


def _list_flagged(table: Scores) -> tuple[list[str], tuple[str, ...]]:
    """Return the findings with flags, and the findings that the priority leaves out."""
    names = [f for f in table.findings if f in table.flags and f != NO_FINDING]
    return names, table.ranking.findings.left_out if table.ranking.weights is not None else ()


def _to_sort_values(urgency: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(urgency), np.inf, -urgency)


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
