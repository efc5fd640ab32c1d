"""Statistics in a bundle's provenance: its training images, and its performance on validation, also by subgroup.

They are stored in bundle.json, for the model card and for reports. They are not test results, because validation also
selected the epoch, the calibration and the operating points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from ray_cxr.evaluation import calibration, groups, metrics, subgroups
from ray_cxr.evaluation.calibration import FittedRules
from ray_cxr.evaluation.group_estimates import INTERVAL_METHOD, LabelledScores
from ray_cxr.labels import LABELS, NO_FINDING

#: Columns of a manifest that this module uses.
COLUMNS = ("patient_id", "sex", "age", "view", "follow_up", *LABELS)


def describe_images(table: pd.DataFrame) -> dict[str, Any]:
    """Describe the images of one split by `groups.describe_population`, and by n and positives of each finding."""
    description = groups.describe_population(*_get_demographics(table), table["patient_id"].to_numpy(dtype=object))
    description["findings"] = {
        name: {"n": int(table[name].notna().sum()), "positives": int((table[name] == 1).sum())} for name in LABELS
    }
    return description


def evaluate_validation(
    table: pd.DataFrame,
    probabilities: np.ndarray,
    findings: Sequence[str],
    rules: FittedRules,
    *,
    method: str,
    min_positives: int,
) -> dict[str, Any]:
    """Evaluate the model on validation images, overall and by sex, age band, view and follow-up.

    Args:
        table: the images, with `COLUMNS`.
        probabilities: float32 [N,F], raw.
        findings: F names; means exclude No_Finding.
        rules: fitted on these images; their operating points give sensitivity and specificity.

    Returns:
        `split` and `interval_method`. `findings`: per finding a `subgroups.Cell` with average_precision and the
        expected calibration error, raw (`ece_raw`) and calibrated on other patients (`ece_calibrated`, None without a
        calibration). `means`: a `subgroups.Means` of all images. `groups`: the means of each subgroup.
        `differences`: of a finding's sensitivity between groups that are not small, where the interval excludes 0.
        `comparisons`: how many such differences were tested.
    """
    labels = table[list(findings)].to_numpy(dtype=np.float64, na_value=np.nan)
    y = np.where(np.isnan(labels), -1, labels).astype(np.int8)
    patients = table["patient_id"].to_numpy(dtype=object)
    whole = groups.Group("all", "all", np.ones(len(table), dtype=bool))
    flags = np.full(probabilities.shape, -1, dtype=np.int8)  # without an operating point
    for j, name in enumerate(findings):
        if (point := rules.operating_points[name]) is not None:
            flags[:, j] = calibration.apply_threshold(probabilities[:, j], point["threshold"])
    macro = np.array([name != NO_FINDING for name in findings])
    measured = subgroups.measure_groups(
        [whole, *groups.build_groups(*_get_demographics(table), crossings=False)],
        LabelledScores.build(y, probabilities, flags, patients, findings, macro),
    )
    first, *others = measured.to_json()["groups"]
    cells: dict[str, dict[str, Any]] = first["findings"]
    for j, name in enumerate(findings):
        known = y[:, j] >= 0
        truth, p = y[known, j], probabilities[known, j]
        cells[name]["average_precision"] = metrics.average_precision(truth, p)
        cells[name]["ece_raw"] = metrics.expected_calibration_error(truth, p)
        cells[name]["ece_calibrated"] = None
        if rules.calibration[name] is not None:
            cells[name]["ece_calibrated"] = calibration.cross_fitted_error(
                y[:, [j]], probabilities[:, [j]], patients, method=method, min_positives=min_positives
            )
    sensitivity = [difference for difference in measured.differences if difference.quantity == "sensitivity"]
    tested = [difference for difference in sensitivity if difference.finding is not None and not difference.small]
    return {
        "split": "val",
        "interval_method": INTERVAL_METHOD,
        "findings": cells,
        "means": first["own"],
        "groups": [{key: value for key, value in group.items() if key != "findings"} for group in others],
        "differences": [{**asdict(found), "findings": list(found.findings)} for found in tested if found.excludes_zero],
        "comparisons": sum(difference.excludes_zero is not None for difference in tested),
    }


def _get_demographics(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    sex, age, view, follow_up = (table[name].to_numpy(dtype=object) for name in ("sex", "age", "view", "follow_up"))
    return sex, age, view, follow_up
