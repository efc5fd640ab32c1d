"""The order of images by abnormality and priority, from small tables with literal results."""

from __future__ import annotations

import numpy as np
import pytest

from ray_cxr.evaluation import metrics
from ray_cxr.evaluation.abnormality import RankedCases, measure_abnormality
from ray_cxr.evaluation.ranking import RankedFindings, combine


def test_combine_equals_manual_results() -> None:
    """1 - 0.5 * 0.8 = 0.6; with weights 2 and 1, 1 - 0.25 * 0.8 = 0.8; small values lose no digits."""
    nan = np.nan
    c = np.array([[0.5, 0.2], [1.0, 0.3], [0.0, 0.0], [nan, 0.3], [nan, nan], [1e-12, 1e-12]])
    np.testing.assert_allclose(combine(c), [0.6, 1.0, 0.0, 0.3, nan, 2e-12], rtol=1e-11)
    np.testing.assert_allclose(combine(c, [2, 1]), [0.8, 1.0, 0.0, 0.3, nan, 3e-12], rtol=1e-11)
    np.testing.assert_allclose(combine(c, [0, 1]), [0.2, 0.3, 0.0, 0.3, nan, 1e-12], rtol=1e-11)
    assert not np.signbit(combine(c[2:3])).any()


def test_weights_are_those_of_ranked_findings() -> None:
    chosen = RankedFindings.choose(["Mass", "Nodule", "No_Finding"], ["Nodule", "No_Finding"])
    assert (chosen.names, chosen.left_out) == (("Nodule",), ("Mass",))
    assert chosen.list_weights({"Nodule": 3, "Edema": 2}) == {"Nodule": 3.0}
    only_no_finding = RankedFindings.choose(["Mass", "No_Finding"], ["No_Finding"])
    assert (only_no_finding.names, only_no_finding.is_calibrated) == (("Mass",), False)


def test_order_equals_manual_results() -> None:
    """Images 0 and 1 have a Mass, 1 and 2 an Edema, 3 to 5 nothing; the status of 6 is unknown."""
    abnormal = np.array([1, 1, 1, 0, 0, 0, -1])
    abnormality = np.array([0.9, 0.8, 0.3, 0.5, 0.2, 0.1, 0.7])
    priority = np.array([0.9, 0.1, 0.3, 0.5, 0.2, 0.1, np.nan])
    labels = {"Mass": np.array([1, 1, 0, 0, 0, 0, -1]), "Edema": np.array([0, 1, 1, 0, 0, 0, -1])}
    scores = {"Mass": np.array([0.9, 0.4, 0.1, 0.5, 0.3, 0.2, 0.1])}
    top = np.array(["Mass", "Edema", "Mass", "Mass", None, "Edema", "Mass"], dtype=object)
    images = RankedCases(abnormal, abnormality, priority, np.arange(7))
    found = measure_abnormality(images, None, top, labels, scores).to_json()
    level = found["images"]
    assert (level["n"], level["abnormal"], level["share_abnormal"]) == (6, 3, 0.5)
    # Of 9 pairs, abnormality has 8 in order; priority has 3 + 0.5 + 2.
    assert level["abnormality_auroc"]["value"] == pytest.approx(8 / 9)
    assert level["priority_auroc"]["value"] == pytest.approx(5.5 / 9)
    assert level["abnormality_auroc"]["low"] < 8 / 9 < level["abnormality_auroc"]["high"]
    assert level["mean_abnormality"] == pytest.approx(2.8 / 6)
    assert level["calibration_error"] == metrics.expected_calibration_error(abnormal[:6], abnormality[:6])
    assert found["top_finding"]["value"] == pytest.approx(2 / 3)
    assert (found["most_common"], found["most_common_finding"], found["studies"]) == (
        pytest.approx(2 / 3),
        "Mass",
        None,
    )
    assert list(found["findings"]) == ["Mass"]
    # Mass: images 0 and 1 against 3, 4 and 5.
    assert found["findings"]["Mass"]["priority_auroc"]["value"] == pytest.approx(3.5 / 6)
    assert found["findings"]["Mass"]["own_auroc"]["value"] == pytest.approx(5 / 6)


def test_undefined_results_have_a_reason() -> None:
    empty = np.zeros(2)
    images = RankedCases(np.array([0, 0]), empty, empty, np.arange(2))
    found = measure_abnormality(images, images, np.array([None, None]), {"Mass": np.array([0, 0])}, {"Mass": empty})
    assert found.images.abnormality_auroc.value is None
    assert found.images.abnormality_auroc.reason == "no positive images"
    assert (found.top_finding.value, found.most_common, found.findings) == (None, None, {})
    assert found.top_finding.reason
