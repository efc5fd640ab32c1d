"""The parts of a bundle that describe its images and its validation, against pandas and scikit-learn."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from ray_cxr.evaluation.calibration import fit_rules
from ray_cxr.labels import FINDINGS, LABELS, NO_FINDING
from ray_cxr.training import provenance

N = 240
COMMON, RARE, UNLABELLED = FINDINGS[0], FINDINGS[1], FINDINGS[2]
NAMES = (COMMON, RARE, UNLABELLED, NO_FINDING)


def table(seed: int = 0) -> pd.DataFrame:
    """Return two images of each patient; RARE is positive twice, UNLABELLED is never labelled."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"patient_id": [str(i // 2) for i in range(N)], "follow_up": np.arange(N) % 2})
    frame["sex"] = np.where(np.arange(N) // 2 % 3, "M", "F").astype(object)
    frame["age"] = rng.integers(10, 90, N).astype(float)
    frame["view"] = np.where(rng.random(N) < 0.5, "PA", "AP").astype(object)
    frame["follow_up"] = frame["follow_up"].astype("Int32")
    frame.loc[:19, "sex"] = None
    frame.loc[:9, "age"] = np.nan
    for name in LABELS:
        frame[name] = pd.array((rng.random(N) < 0.4).astype(int), dtype="Int8")
    frame.loc[5:8, COMMON] = pd.NA
    frame[RARE] = pd.array([1, 0] * 2 + [0] * (N - 4), dtype="Int8")
    frame[UNLABELLED] = pd.array([pd.NA] * N, dtype="Int8")
    return frame


def scores(frame: pd.DataFrame, seed: int = 1) -> np.ndarray:
    y = frame[list(NAMES)].to_numpy(dtype=float, na_value=0.0)
    return (1 / (1 + np.exp(-(y + np.random.default_rng(seed).normal(size=y.shape))))).astype(np.float32)


def evaluate(frame: pd.DataFrame, p: np.ndarray) -> dict:
    rules = fit_rules(frame[list(NAMES)].to_numpy(dtype=float, na_value=np.nan), p, NAMES)
    return provenance.evaluate_validation(frame, p, NAMES, rules, method="platt", min_positives=5)


def test_numbers_are_those_of_scikit_learn() -> None:
    frame = table()
    p = scores(frame)
    evaluated = evaluate(frame, p)
    for name in (COMMON, RARE):
        cell = evaluated["findings"][name]
        known = frame[name].notna().to_numpy()
        y, s = frame.loc[known, name].to_numpy(dtype=int), p[known, NAMES.index(name)]
        assert (cell["n"], cell["positives"]) == (known.sum(), y.sum())
        assert cell["auroc"] == pytest.approx(roc_auc_score(y, s), abs=1e-12)
        assert cell["average_precision"] == pytest.approx(average_precision_score(y, s), abs=1e-9)
        assert cell["auroc_low"] < cell["auroc"] < cell["auroc_high"]
    common, rare, unlabelled = (evaluated["findings"][name] for name in (COMMON, RARE, UNLABELLED))
    assert 0 < common["ece_calibrated"] < common["ece_raw"]
    assert rare["small"]
    assert (rare["sensitivity"], rare["rates_reason"], rare["ece_calibrated"]) == (None, "no operating point", None)
    assert (unlabelled["n"], unlabelled["auroc"], unlabelled["reason"]) == (0, None, "no labelled images")
    assert (unlabelled["ece_raw"], unlabelled["average_precision"]) == (None, None)
    # No Finding is in no mean.
    aurocs = {name: cell["auroc"] for name, cell in evaluated["findings"].items()}
    assert aurocs[NO_FINDING] is not None
    mean = evaluated["means"]["auroc"]
    assert (mean["findings"], mean["value"]) == ([COMMON, RARE], pytest.approx((aurocs[COMMON] + aurocs[RARE]) / 2))


def test_a_finding_that_is_missed_in_one_group_is_named() -> None:
    frame = table()
    p = scores(frame)
    missed = ((frame["sex"] == "F") & (frame[COMMON] == 1).fillna(False)).to_numpy(dtype=bool)
    p[missed, 0] = 0.001
    found = evaluate(frame, p)
    assert found["comparisons"] >= len(found["differences"]) >= 1
    groups = {(group["attribute"], group["value"]): group for group in found["groups"]}
    assert groups["sex", "unknown"]["n"] == 20
    assert groups["sex", "M"]["own"]["sensitivity"]["findings"] == [COMMON]
    missed_in = next(difference for difference in found["differences"] if difference["attribute"] == "sex")
    named = [missed_in[key] for key in ("finding", "value", "reference", "quantity")]
    assert named == [COMMON, "F", "M", "sensitivity"]
    assert missed_in["high"] < -0.3
    # Plain values, and the same ones each time.
    assert json.loads(json.dumps(found, allow_nan=False)) == found == evaluate(frame, p)


def test_demographics_count_images_and_patients_also_where_nothing_describes_them() -> None:
    frame = table()
    counts = provenance.describe_images(frame)
    assert (counts["images"], counts["patients"]) == (N, N // 2)
    assert counts["sex"] == {"F": (frame["sex"] == "F").sum(), "M": (frame["sex"] == "M").sum(), "unknown": 20}
    assert counts["age"]["median"] == frame["age"].median()
    assert counts["age_band"]["unknown"] == 10
    assert counts["follow_up"] == {"first image": N // 2, "later image": N // 2}
    assert counts["findings"][COMMON] == {"n": N - 4, "positives": int(frame[COMMON].sum())}
    assert counts["findings"][UNLABELLED] == {"n": 0, "positives": 0}
    json.dumps(counts, allow_nan=False)
    frame = frame.assign(sex=None, age=np.nan, view=None, follow_up=pd.array([pd.NA] * N, dtype="Int32"))
    counts = provenance.describe_images(frame)
    assert counts["sex"] == counts["age_band"] == counts["view"] == counts["follow_up"] == {"unknown": N}
    assert counts["age"] == {"q1": None, "median": None, "q3": None}
