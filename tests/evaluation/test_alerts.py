"""Alert budget and reading order against counts by hand and plain definitions."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from ray_cxr.evaluation import alerts, reading_order
from ray_cxr.evaluation.bootstrap import resample_patients
from ray_cxr.evaluation.intervals import percentile_interval

PATIENTS = np.array(["a", "a", "b", "b", "c", "d", "e", None], dtype=object)
FLAGS = np.array([[1, 0], [0, 0], [1, 1], [0, 0], [0, 0], [0, 1], [0, 0], [1, 1]], dtype=np.int8)
LABELS = np.array([[1, 0], [0, 0], [0, 0], [0, 0], [0, 1], [-1, -1], [0, 0], [1, -1]], dtype=np.int8)
ABNORMAL = np.array([1, 0, 0, 0, 1, -1, 0, 1], dtype=np.int8)


def test_find_abnormal() -> None:
    labels = {
        "Mass": [1, 0, 0, 0, -1, -1, -1, 0],
        "Edema": [0, 0, -1, 1, -1, -1, 1, -1],
        "Hernia": [-1] * 8,  # labelled nowhere, so it is not needed to know that an image is normal
        "No_Finding": [-1, -1, -1, -1, 1, 0, 1, 1],
    }
    found = alerts.find_abnormal({name: np.array(values, dtype=np.int8) for name, values in labels.items()})
    assert found.tolist() == [1, 0, -1, 1, 0, 1, 1, 0]
    del labels["No_Finding"]
    found = alerts.find_abnormal({name: np.array(values, dtype=np.int8) for name, values in labels.items()})
    assert found.tolist() == [1, 0, -1, 1, -1, -1, 1, -1]


def test_alerts_of_eight_images() -> None:
    none = np.full_like(FLAGS, -1)
    rules = {"youden": FLAGS, "npv=0.99": none}
    found = alerts.measure_rules(rules, LABELS, ABNORMAL, PATIENTS, n_resamples=200, seed=0)
    shares = {key: (share.value, share.n) for key, share in found["youden"].items()}
    assert shares == {
        "images_flagged": (4 / 8, 8),
        "images_flagged_without_finding": (1 / 4, 4),
        "images_flagged_with_finding": (pytest.approx(2 / 3), 3),
        # The image without an id is no known patient. Patient a has a finding, all images of b and e are normal.
        "patients_flagged": (3 / 5, 5),
        "patients_flagged_without_finding": (1 / 2, 2),
        "patients_flagged_with_finding": (1 / 2, 2),
        "flags_per_image": (6 / 8, 8),
        "flag_ppv": (2 / 4, 4),
        "any_flag_ppv": (pytest.approx(2 / 3), 3),
    }
    assert all(share.low < share.value < share.high for share in found["youden"].values())
    for key, share in found["npv=0.99"].items():
        assert (share.value, share.n, share.low) == (None, 0, None)
        assert share.reason == alerts.MEASURES[key]
    # Without labels and ids, only what is known.
    unknown = np.full_like(FLAGS, -1)
    found = alerts.measure_rules({"youden": FLAGS}, unknown, unknown[:, 0], np.full(8, None), n_resamples=200, seed=0)[
        "youden"
    ]
    assert {key for key, share in found.items() if share.value is not None} == {"images_flagged", "flags_per_image"}


def test_no_flag_at_all_has_an_interval() -> None:
    found = alerts.measure_rules(
        {"youden": np.zeros((20, 1), dtype=np.int8)}, np.zeros((20, 1), dtype=np.int8), np.zeros(20, dtype=np.int8),
        np.repeat(np.arange(10), 2), n_resamples=50, seed=0,
    )["youden"]  # fmt: skip
    share = found["images_flagged"]
    assert (share.value, share.low) == (0.0, 0.0)
    assert share.high == pytest.approx(0.27753, abs=1e-5)  # Wilson's limit for 0 of 10 patients
    assert (found["flag_ppv"].value, found["flag_ppv"].reason) == (None, alerts.MEASURES["flag_ppv"])


def test_reading_order_of_five_studies() -> None:
    priority = np.array([0.1, 0.9, 0.7, 0.5, 0.5])
    abnormal = np.array([-1, 1, 0, 1, 0], dtype=np.int8)
    labels = np.array([[-1, -1], [1, 0], [0, 0], [0, -1], [0, 0]], dtype=np.int8)
    found = reading_order.measure_reading_order(
        priority, abnormal, labels, ["Mass", "Edema"], np.arange(5), n_resamples=200, seed=0
    )
    # Positions are 0.1, 0.3, twice 0.6 (a tie), and 0.9.
    assert (found.studies, found.abnormal, found.best_position) == (5, 2, 0.2)
    assert found.position.value == pytest.approx((0.1 + 0.6) / 2)
    assert found.normal_position.value == pytest.approx((0.3 + 0.6) / 2)
    assert found.minutes_sooner.value == pytest.approx((0.5 - 0.35) * 100 * 2)
    assert found.findings["Mass"].value == pytest.approx(0.1)
    assert (found.findings["Edema"].value, found.findings["Edema"].n) == (None, 0)
    assert {k: share.value for k, share in found.read.items()} == pytest.approx({"10": 0.25, "20": 0.5, "30": 0.5})
    curve = dict(zip(found.curve["list_read"], found.curve["abnormal_read"], strict=True))
    assert [curve[x] for x in (0.0, 0.4, 0.6, 0.8, 1.0)] == pytest.approx([0.0, 0.5, 0.75, 1.0, 1.0])
    nothing = reading_order.measure_reading_order(
        priority, abnormal * 0, labels, ["Mass", "Edema"], np.arange(5), n_resamples=50, seed=0
    )
    assert isinstance(nothing, str)


def test_reading_order_equals_its_definition() -> None:
    rng = np.random.default_rng(5)
    m, patients = 90, rng.integers(0, 40, 90)
    abnormal = (rng.random(m) < 0.3).astype(np.int8)
    priority = np.round(rng.random(m) + 0.3 * abnormal, 1)  # with ties
    labels = (rng.random((m, 2)) < 0.2).astype(np.int8)

    def compute_position(rows: np.ndarray, chosen: np.ndarray) -> float:
        return float(((rankdata(-priority[rows]) - 0.5) / len(rows))[chosen[rows] == 1].mean())

    found = reading_order.measure_reading_order(
        priority, abnormal, labels, ["Mass", "Edema"], patients, n_resamples=60, seed=3
    )
    share, auroc = abnormal.mean(), roc_auc_score(abnormal, priority)
    # A pair's order decides which is read first; half of the abnormal studies come before one of them.
    assert found.position.value == pytest.approx(share / 2 + (1 - share) * (1 - auroc), abs=1e-12)
    draws = np.vstack([counts for _, counts in resample_patients(len(np.unique(patients)), m, 60, 3)])
    codes = {patient: code for code, patient in enumerate(dict.fromkeys(patients.tolist()))}
    weights = draws[:, [codes[patient] for patient in patients.tolist()]]
    for result, chosen in ((found.position, abnormal), (found.findings["Edema"], labels[:, 1])):
        values = np.array([compute_position(np.repeat(np.arange(m), row), chosen) for row in weights])
        interval = percentile_interval(values)
        assert (result.low, result.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
