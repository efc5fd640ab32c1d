"""Statistics in a bundle's provenance: the images that made it, and its performance on validation, by subgroup too.

They go into bundle.json, for the model card and for reports. Validation chose the epoch, the calibration and the
operating points, so they are not test results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from ray_cxr.evaluation import calibration, drift, groups, metrics, subgroups
from ray_cxr.evaluation.calibration import FittedRules
from ray_cxr.evaluation.group_resamples import LabelledScores
from ray_cxr.labels import LABELS, NO_FINDING

#: Columns of a manifest that this module uses.
COLUMNS = ("patient_id", "sex", "age", "view", "follow_up", *LABELS)
#: Resamples per interval; few, because the export waits for them.
N_RESAMPLES = 200
_WHOLE = "all"


def describe_images(table: pd.DataFrame) -> dict[str, Any]:
    """Describe the images of one split: `groups.describe_population`, and under `findings` n and positives of each."""
    description = groups.describe_population(*_get_demographics(table), table["patient_id"].to_numpy(dtype=object))
    description["findings"] = {
        name: {"n": int(table[name].notna().sum()), "positives": int((table[name] == 1).sum())} for name in LABELS
    }
    return description


def compute_score_quantiles(
    probabilities: np.ndarray, findings: Sequence[str]
) -> dict[str, drift.ScoreQuantiles | None]:
    """Return deciles of the raw probabilities [N,F] by finding; see `drift.score_quantiles`."""
    return {name: drift.score_quantiles(probabilities[:, j]) for j, name in enumerate(findings)}


def evaluate_validation(
    table: pd.DataFrame,
    probabilities: np.ndarray,
    findings: Sequence[str],
    rules: FittedRules,
    *,
    method: str,
    min_positives: int,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate the model on validation images, overall and by sex, age band, view and follow-up.

    Args:
        table: the images, with `COLUMNS`.
        probabilities: float32 [N,F], raw.
        findings: F names; means exclude No_Finding.
        rules: fitted on these images; their operating points give sensitivity and specificity.
        n_resamples: of patients, per interval.

    Returns:
        split, n_resamples and seed; `findings`: per finding a `subgroups.Cell` with average_precision and the expected
        calibration error, raw (`ece_raw`) and calibrated on other patients (`ece_calibrated`, None without a
        calibration); `means`: a `subgroups.Means` of all images; `groups`; `differences`: those of a finding's
        sensitivity whose interval excludes 0, without small groups; `comparisons`: the number of such differences
        that were tested.
    """
    labels = table[list(findings)].to_numpy(dtype=np.float64, na_value=np.nan)
    y = np.where(np.isnan(labels), -1, labels).astype(np.int8)
    patients = table["patient_id"].to_numpy(dtype=object)
    whole = groups.Group(_WHOLE, _WHOLE, np.ones(len(table), dtype=bool))
    flags = _flags(probabilities, findings, rules)
    macro = np.array([name != NO_FINDING for name in findings])
    measured = subgroups.measure_groups(
        [whole, *groups.build_groups(*_get_demographics(table), crossings=False)],
        LabelledScores(y, probabilities, flags, patients, findings, macro),
        n_resamples=n_resamples,
        seed=seed,
    )
    first, *others = measured.to_json()["groups"]
    cells: dict[str, dict[str, Any]] = first["findings"]
    for j, name in enumerate(findings):
        known = y[:, j] >= 0
        one, p = y[known, j], probabilities[known, j]
        cells[name]["average_precision"] = metrics.average_precision(one, p)
        cells[name]["ece_raw"] = metrics.expected_calibration_error(one, p)
        cells[name]["ece_calibrated"] = None
        if rules.calibrations[name] is not None:
            cells[name]["ece_calibrated"] = calibration.cross_fitted_error(
                y[:, [j]], probabilities[:, [j]], patients, method=method, min_positives=min_positives
            )
    sensitivity = [one for one in measured.differences if one.quantity == "sensitivity"]
    underdiagnosis = [one for one in sensitivity if one.finding is not None and not one.small]
    return {
        "split": "val",
        "n_resamples": n_resamples,
        "seed": seed,
        "findings": cells,
        "means": first["own"],
        "groups": [{key: value for key, value in group.items() if key != "findings"} for group in others],
        "differences": [{**asdict(one), "findings": list(one.findings)} for one in underdiagnosis if one.excludes_zero],
        "comparisons": sum(one.excludes_zero is not None for one in underdiagnosis),
    }


def _get_demographics(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    sex, age, view, follow_up = (table[name].to_numpy(dtype=object) for name in ("sex", "age", "view", "follow_up"))
    return sex, age, view, follow_up


def _flags(probabilities: np.ndarray, findings: Sequence[str], rules: FittedRules) -> np.ndarray:
    """Return flags int8 [N,F], -1 without an operating point."""
    flags = np.full(probabilities.shape, -1, dtype=np.int8)
    for j, name in enumerate(findings):
        point = rules.operating_points[name]
        if point is not None:
            flags[:, j] = calibration.apply_threshold(probabilities[:, j], point["threshold"])
    return flags
