"""CSV files that spreadsheets and data frames read: worklist.csv, and scores.csv of `report --csv`."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

import numpy as np

from ray_cxr.labels import NO_FINDING
from ray_cxr.reporting.evaluation_set import EvaluationSet, Population
from ray_cxr.reporting.leakage import find_parts
from ray_cxr.reporting.scores import Scores

#: A spreadsheet runs a cell that starts with one of these as a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def format_csv(columns: Mapping[str, Sequence[str | None] | np.ndarray]) -> str:
    """Return columns as CSV: sequences of text, arrays of floats, and int8 arrays with -1 for null.

    A text that a spreadsheet would run as a formula gets an apostrophe. Null is an empty cell.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*map(_to_cells, columns.values()), strict=True))
    return buffer.getvalue()


def _to_cells(values: Sequence[str | None] | np.ndarray) -> list[str]:
    if not isinstance(values, np.ndarray):
        return [f"'{text}" if text and text.startswith(_FORMULA) else text or "" for text in values]
    if values.dtype == np.int8:
        texts, missing = values.astype(str), values < 0
    else:  # float32, as in the scores: the shortest text that keeps the value
        texts, missing = values.astype(np.float32).astype(str), np.isnan(values)
    return list(np.where(missing, "", texts).tolist())


def _list_flagged(images: Scores) -> list[str]:
    """Return the flagged findings of each image, as in worklist.csv."""
    names = [finding for finding in images.flags if finding != NO_FINDING]
    return ["|".join(f for f in names if images.flags[f][row] == 1) for row in range(len(images.ids))]


def format_scores(table: Scores, population: Population) -> str:
    """Return scores.csv: one row per image of a report, failed or not, in the order of the score table."""
    rows = population.listed
    images = table.select(rows)
    columns: dict[str, Sequence[str | None] | np.ndarray] = {
        "image_id": images.ids.tolist(),
        "patient_id": images.patients.tolist(),
        "study_id": images.studies.tolist(),
        "status": np.where(images.ok, "ok", "error").tolist(),
        "error_code": images.codes.tolist(),
        "quality_flag": images.quality_flags.tolist(),
        "used_in_training": find_parts(images),
        "top_finding": images.top_findings.tolist(),
        "flagged": _list_flagged(images),
        **({} if images.night is None else {"night": [images.nights[night].name for night in images.night]}),
        "abnormality": images.abnormality,
        "priority": images.priority,
        **{f"p_{finding}": values for finding, values in images.p.items()},
        **{f"c_{finding}": values for finding, values in images.c.items()},
        **{f"flag_{finding}": values for finding, values in images.flags.items()},
    }
    if isinstance(population, EvaluationSet):
        order = np.argsort(np.concatenate([population.rows, population.failed]), kind="stable")
        columns["patient_id"] = [
            *np.concatenate([population.patients, table.patients[population.failed]])[order].tolist()
        ]
        for finding, values in population.labels.items():
            columns[f"label_{finding}"] = np.concatenate([values, population.failed_labels[finding]])[order]
    return format_csv(columns)
