"""What a bundle keeps of the images that made it: who was in them, and how good it was on validation, and for whom.

All of it is numbers over many images, in the form that bundle.json takes, for the model card and for reports.
Validation chose the epoch, the calibration and the operating points, so none of it is a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from ray_cxr.evaluation import calibration, drift, metrics, subgroups
from ray_cxr.evaluation.calibration import FittedRules
from ray_cxr.labels import LABELS, NO_FINDING

#: Columns of a manifest that this needs.
COLUMNS = ("patient_id", "sex", "age", "view", "follow_up", *LABELS)
#: Of all intervals here: the export waits for them.
N_RESAMPLES = 200
_WHOLE = "all"


def describe_images(table: pd.DataFrame) -> dict[str, Any]:
    """Who and what is in the images of one split: `subgroups.describe`, and under `findings` n and positives of each.

    Args:
        table: with `COLUMNS`; null is unknown.
    """
    told = subgroups.describe(*_about(table), table["patient_id"].to_numpy(dtype=object))
    told["findings"] = {
        name: {"n": int(table[name].notna().sum()), "positives": int((table[name] == 1).sum())} for name in LABELS
    }
    return told


def compute_score_quantiles(probabilities: np.ndarray, findings: Sequence[str]) -> dict[str, dict[str, Any] | None]:
    """Deciles of the raw probabilities [N,F], by finding; see `drift.score_quantiles`."""
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
    """How good the network is on validation images, whole and by sex, age band, view and follow-up.

    Args:
        table: the images, with `COLUMNS`.
        probabilities: float32 [N,F], raw.
        findings: F names; means leave No_Finding out.
        rules: what was fitted on these images; sensitivity and specificity are at its operating points.
        method, min_positives: as the calibration was fitted.
        n_resamples: of patients, for every interval.
        seed: of the resamples.

    Returns:
        split, n_resamples and seed; `findings`: per finding a `subgroups.Cell` with average_precision, and the expected
        calibration error as it is (`ece_raw`) and after calibrating on other patients (`ece_calibrated`, None where
        there is no calibration); `means`: a `subgroups.Means` of all images; `groups` and `differences`: lists of
        objects, the latter of sensitivity alone, by finding and without small cells, where the interval excludes 0;
        `comparisons`: out of how many.
    """
    labels = table[list(findings)].to_numpy(dtype=np.float64, na_value=np.nan)
    y = np.where(np.isnan(labels), -1, labels).astype(np.int8)
    patients = table["patient_id"].to_numpy(dtype=object)
    whole = subgroups.Group(_WHOLE, _WHOLE, np.ones(len(table), dtype=bool))
    found = subgroups.measure(
        [whole, *subgroups.groups(*_about(table), crossings=False)],
        y,
        probabilities,
        _flags(probabilities, findings, rules),
        patients,
        findings,
        n_resamples=n_resamples,
        seed=seed,
        macro=np.array([name != NO_FINDING for name in findings]),
    )
    first, *others = found.as_dict()["groups"]
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
    underdiagnosis = [
        one for one in found.differences if one.quantity == "sensitivity" and one.finding is not None and not one.small
    ]
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


def _about(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sex, age, view and follow-up as `subgroups.groups` takes them."""
    sex, age, view, follow_up = (table[name].to_numpy(dtype=object) for name in ("sex", "age", "view", "follow_up"))
    return sex, age, view, follow_up


def _flags(probabilities: np.ndarray, findings: Sequence[str], rules: FittedRules) -> np.ndarray:
    """int8 [N,F], -1 where there is no operating point."""
    flags = np.full(probabilities.shape, -1, dtype=np.int8)
    for j, name in enumerate(findings):
        point = rules.operating_points[name]
        if point is not None:
            flags[:, j] = calibration.flags(probabilities[:, j], point["threshold"])
    return flags
