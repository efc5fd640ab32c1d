"""Score rows from probabilities, compared with values computed manually."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_cxr.errors import RayCxrError
from ray_cxr.evaluation.calibration import Calibration
from ray_cxr.labels import FINDINGS
from ray_cxr.models import predictions
from ray_cxr.models.predictions import Rules

MODEL_COLUMNS = ("top_finding", "abnormality", "priority", "quality_flag", "model_digest")


def rules(findings: tuple[str, ...], thresholds: Mapping[str, float | None] | None = None, **changes: Any) -> Rules:
    none = dict.fromkeys(findings)
    values = {"calibrations": none, "thresholds": none | dict(thresholds or {}), "age_range": None, "digest": "d1"}
    return Rules(findings=findings, **(values | changes))


def rows(count: int, **columns: Any) -> pa.Table:
    none = pa.nulls(count, pa.string())
    image_id, path = (pa.array([f"{where}{i}.png" for i in range(count)], pa.string()) for where in ("", "/x/"))
    return pa.table({"image_id": image_id, "path": path, "patient_id": none, "study_id": none, **columns})


def make_row(probabilities: list[float], given_rules: Rules, **columns: Any) -> dict[str, Any]:
    table = predictions.assemble(rows(1, **columns), np.array([probabilities], np.float32), {}, given_rules)
    return table.to_pylist()[0]


def test_schema_keeps_the_order_of_the_findings() -> None:
    schema = predictions.schema(["Nodule", "Mass"])
    assert schema.names == [
        *("image_id", "path", "patient_id", "study_id", "status", "error_code", "error"),
        *("p_Nodule", "p_Mass", "c_Nodule", "c_Mass", "flag_Nodule", "flag_Mass"),
        *("top_finding", "abnormality", "priority", "quality_flag", "model_digest", "age", "sex", "view"),
        *("sop_instance_uid", "content_digest"),
    ]
    kinds = {
        "p_Mass": "float",
        "c_Mass": "float",
        "flag_Mass": "bool",
        "abnormality": "float",
        "priority": "float",
        "age": "double",
    }
    assert {name: str(schema.field(name).type) for name in kinds} == kinds


#: Leaves every probability as it is.
IDENTITY = Calibration(1.0, 0.0)


def test_abnormality_and_priority_equal_manual_results() -> None:
    """1 - 0.5 * 0.8 = 0.6; with weight 2 for the first finding 1 - 0.5^2 * 0.8 = 0.8."""
    names = ("Mass", "Nodule")
    row = make_row([0.5, 0.2], rules(names, {"Mass": 0.9}, calibrations=dict.fromkeys(names, IDENTITY)))
    assert (row["top_finding"], row["flag_Mass"], row["flag_Nodule"]) == ("Mass", False, None)
    assert row["abnormality"] == row["priority"] == pytest.approx(0.6, abs=1e-6)
    assert (row["p_Mass"], row["p_Nodule"]) == (pytest.approx(0.5), pytest.approx(0.2))
    assert (row["status"], row["error_code"], row["error"], row["model_digest"]) == ("ok", None, None, "d1")
    assert (row["image_id"], row["path"]) == ("0.png", "/x/0.png")
    for weights, priority in (({"Mass": 2.0}, 0.8), ({"Mass": 0.0}, 0.2), ({"Nodule": 0.5}, 1 - 0.5 * 0.8**0.5)):
        weighted = make_row([0.5, 0.2], rules(names, calibrations=dict.fromkeys(names, IDENTITY), weights=weights))
        assert weighted["priority"] == pytest.approx(priority, abs=1e-6)
        assert (weighted["top_finding"], weighted["abnormality"]) == ("Mass", row["abnormality"])
    # Ties go to the first finding.
    assert make_row([0.3, 0.3], rules(names))["top_finding"] == "Mass"


def test_findings_are_ranked_by_calibrated_probabilities() -> None:
    """c = sigmoid(logit(p) - ln 9) = p / (9 - 8 p): 0.9 becomes 0.5."""
    given = rules(
        ("Infiltration", "Hernia"), calibrations={"Infiltration": Calibration(1.0, -np.log(9)), "Hernia": IDENTITY}
    )
    row = make_row([0.9, 0.6], given)
    assert (row["top_finding"], row["abnormality"]) == ("Hernia", pytest.approx(1 - 0.5 * 0.4, abs=1e-6))


def test_findings_without_calibration_are_left_out_unless_none_has_one() -> None:
    names = ("Mass", "Nodule", "Hernia")
    some = rules(names, calibrations={"Mass": None, "Nodule": IDENTITY, "Hernia": IDENTITY})
    row = make_row([0.9, 0.5, 0.2], some)
    assert (row["top_finding"], row["abnormality"]) == ("Nodule", pytest.approx(0.6, abs=1e-6))
    assert (some.ranked.left_out, "Mass" in (some.ranked.note or "")) == (("Mass",), True)
    none = rules(names)
    row = make_row([0.9, 0.5, 0.2], none)
    assert (row["top_finding"], row["abnormality"]) == ("Mass", pytest.approx(1 - 0.1 * 0.5 * 0.8, abs=1e-6))
    assert (none.ranked.left_out, none.ranked.is_calibrated) == ((), False)
    for chosen, order in ((some, [1, 2, 0]), (none, [0, 1, 2])):
        assert predictions.order_findings(np.float32([[0.9, 0.5, 0.2]]), chosen).tolist() == [order]


def test_no_finding_takes_no_part_in_the_priority() -> None:
    row = make_row([0.1, 0.99], rules(("Mass", "No_Finding"), {"Mass": 0.5, "No_Finding": 0.5}))
    assert (row["top_finding"], row["priority"]) == ("Mass", pytest.approx(0.1))
    assert row["flag_No_Finding"] is True
    alone = make_row([0.99], rules(("No_Finding",)))
    assert (alone["top_finding"], alone["abnormality"], alone["priority"]) == (None, None, None)
    assert alone["p_No_Finding"] == pytest.approx(0.99)


def test_calibrated_columns_and_flags_are_null_without_a_rule() -> None:
    """sigmoid(2 logit(0.8) - 1) = sigmoid(2 ln 4 - 1) = 16 / (16 + e)."""
    calibrations = {"Mass": Calibration(2.0, -1.0), "Nodule": None}
    row = make_row([0.8, 0.25], rules(("Mass", "Nodule"), {"Nodule": 0.5}, calibrations=calibrations))
    assert row["c_Mass"] == pytest.approx(16 / (16 + np.e), abs=1e-6)
    assert (row["c_Nodule"], row["flag_Mass"], row["flag_Nodule"]) == (None, None, False)


def test_error_rows_have_no_model_columns() -> None:
    findings = ("Mass", "No_Finding")
    calibrations = {"Mass": Calibration(1.0, 0.0), "No_Finding": None}
    given = rules(findings, dict.fromkeys(findings, 0.5), calibrations=calibrations, age_range=(1.0, 2.0))
    table = predictions.assemble(
        rows(3, view=pa.array(["PA", "LATERAL", None]), age=pa.array([1.0, 99.0, None])),
        np.array([[0.9, 0.1], [np.nan, 7.0], [0.2, 0.3]], np.float32),
        {1: ("truncated", "the file ends early")},
        given,
    )
    good, bad, last = table.to_pylist()
    assert table.schema.equals(predictions.schema(findings))
    assert (bad["image_id"], bad["path"]) == ("1.png", "/x/1.png")
    assert (bad["status"], bad["error_code"], bad["error"]) == ("error", "truncated", "the file ends early")
    of_model = [name for name in table.column_names if name.startswith(("p_", "c_", "flag_")) or name in MODEL_COLUMNS]
    assert len(of_model) == 11
    assert {name: bad[name] for name in of_model} == dict.fromkeys(of_model)
    assert [(row["status"], row["error_code"], row["model_digest"]) for row in (good, last)] == [("ok", None, "d1")] * 2
    only_errors = predictions.assemble(rows(1), np.float32([[np.nan, np.nan]]), {0: ("missing", "x")}, given)
    assert only_errors["error_code"].to_pylist() == ["missing"]
    assert only_errors["priority"].null_count == only_errors["p_Mass"].null_count == 1
    empty = predictions.assemble(rows(0), np.zeros((0, 2), np.float32), {}, given)
    assert (len(empty), empty.schema) == (0, table.schema)


def test_impossible_probabilities_are_refused() -> None:
    for value in (np.nan, -0.001, 1.001, np.inf):
        with pytest.raises(RayCxrError, match=r"^0\.png: "):
            make_row([0.5, value], rules(("Mass", "Nodule")))
    with pytest.raises(ValueError, match=r"\(1, 1\), expected \(1, 2\)"):
        make_row([0.5], rules(("Mass", "Nodule")))


def test_quality_flags() -> None:
    for view, age, judged, flag in (
        ("AP", 10.0, None, None),
        ("PA", 90.0, None, None),
        ("PA", 9.9, None, "age_outside_training"),
        ("PA", 90.1, None, "age_outside_training"),
        ("LATERAL", 5.0, None, "lateral"),
        ("OBLIQUE", 50.0, None, "not_frontal_chest"),
        ("left lateral", 50.0, None, "lateral"),
        ("p.a.", None, "lateral", None),
        ("DECUBITUS", 50.0, None, None),
        (None, None, None, None),
        (None, None, "lateral", "lateral"),
        ("PA", None, "lateral", None),
        ("AP", None, "inverted", "inverted"),
    ):
        about = rows(1, view=pa.array([view], pa.string()), age=pa.array([age], pa.float64()))
        given = rules(("Mass",), age_range=(10.0, 90.0))
        table = predictions.assemble(about, np.float32([[0.5]]), {}, given, [judged] if judged else None)
        assert table["quality_flag"].to_pylist() == [flag]
        # Neither the columns nor the range are needed.
        assert make_row([0.5], rules(("Mass",), age_range=(10.0, 90.0)))["quality_flag"] is None
        assert make_row([0.5], rules(("Mass",)), age=pa.array([200.0]))["quality_flag"] is None


def test_quality_flags_from_headers() -> None:
    about = rows(4, view=pa.array(["PA", "PA", "LATERAL", "PA"], pa.string()))
    headers = {
        0: ("burned_in_annotation", "display_fallback"),
        1: ("burned_in_annotation", "reoriented"),
        2: ("reoriented",),
    }
    judged = [None, "out_of_distribution", None, "lateral"]
    table = predictions.assemble(about, np.full((4, 1), 0.5, np.float32), {}, rules(("Mass",)), judged, headers)
    assert table["quality_flag"].to_pylist() == ["display_fallback", "reoriented", "lateral", None]


PROBABILITY = st.floats(0, 1, width=32)
#: `operating_point` returns float32, strictly inside 0..1.
THRESHOLD = st.floats(2.0**-100, 1, width=32, exclude_max=True)


@settings(max_examples=100)
@given(st.lists(st.tuples(PROBABILITY, st.one_of(THRESHOLD, st.none())), min_size=1, max_size=14), st.data())
def test_flags_and_priority_of_any_probabilities(pairs, data: st.DataObject) -> None:
    p, t = (list(column) for column in zip(*pairs, strict=True))
    if t[0] is not None and data.draw(st.booleans(), label="neighbour of the threshold"):
        side = data.draw(st.sampled_from([-np.inf, np.inf]))
        p[0] = float(np.clip(np.nextafter(np.float32(t[0]), np.float32(side)), 0, 1))
    names = FINDINGS[: len(p)]
    row = make_row(p, rules(names, dict(zip(names, t, strict=True))))
    expected = [None if b is None else bool(np.float32(a) >= np.float32(b)) for a, b in zip(p, t, strict=True)]
    assert [row[f"flag_{name}"] for name in names] == expected
    assert np.float32(max(p)) <= row["abnormality"] <= min(1.0, np.float32(sum(p)) * (1 + 1e-6))
    assert row[f"p_{row['top_finding']}"] == max(row[f"p_{name}"] for name in names)
