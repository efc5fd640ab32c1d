"""The worklist: one row per study, highest priority first, failed images last."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ray_cxr.labels import NO_FINDING
from ray_cxr.reporting.scores import Scores

#: A spreadsheet runs a cell that starts with one of these as a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
#: Columns that order studies of equal priority.
_ORDER = ("patient_id", "study_id", "image_id")


def build_worklist(table: Scores) -> list[dict[str, str]]:
    """Return one row per study, or per image without a study id, highest priority first and failures last."""
    studies: dict[tuple[str, ...], list[int]] = {}
    for row, study in enumerate(table.studies):
        key = ("image", table.ids[row]) if study is None else ("study", table.patients[row] or "", study)
        studies.setdefault(key, []).append(row)
    names = [f for f in table.findings if f in table.flags and f != NO_FINDING]
    lines = []
    for rows in studies.values():
        best = min(rows, key=lambda row: (_sort_value(float(table.priority[row])), table.ids[row]))
        priority = float(table.priority[best])
        line = {
            "priority": "" if np.isnan(priority) else str(np.float32(priority)),
            "top_finding": table.top_findings[best] or "",
            "flagged": "|".join(f for f in names if any(table.flags[f][row] == 1 for row in rows)),
            "patient_id": table.patients[best] or "",
            "study_id": table.studies[best] or "",
            "image_id": table.ids[best],
            "n_images": str(len(rows)),
            "n_errors": str(sum(not table.ok[row] for row in rows)),
            "errors": _join(table.codes[row] or "unknown" for row in rows if not table.ok[row]),
            "quality_flags": _join(table.quality_flags[row] for row in rows),
        }
        lines.append((_sort_value(priority), line))
    return [line for _, line in sorted(lines, key=lambda pair: (pair[0], *(pair[1][key] for key in _ORDER)))]


def _sort_value(priority: float) -> float:
    return math.inf if np.isnan(priority) else -priority


def _join(values: Any) -> str:
    return "|".join(sorted({value for value in values if value}))


def format_csv(lines: Sequence[Mapping[str, str]]) -> str:
    """Return the rows as CSV; a text that a spreadsheet would run as a formula gets an apostrophe."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({k: f"'{v}" if k != "priority" and v.startswith(_FORMULA) else v for k, v in line.items()})
    return buffer.getvalue()
