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

MODEL_COLUMNS = ("top_finding", "priority", "quality_flag", "model_digest")


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
        *("top_finding", "priority", "quality_flag", "model_digest", "age", "sex", "view"),
    ]
    kinds = {"p_Mass": "float", "c_Mass": "float", "flag_Mass": "bool", "priority": "float", "age": "double"}
    assert {name: str(schema.field(name).type) for name in kinds} == kinds


def test_ranks_equal_manual_results() -> None:
    """t = 0.2: p = 0.1 is half way up to 0.5; p = 0.6 is half way from 0.5 to 1. No t: r = 0.49 p."""
    p = np.array([[0.1, 0.1], [0.2, 0.2], [0.6, 0.6], [0.0, 0.0], [1.0, 1.0], [np.nan, np.nan]])
    r = predictions.compute_ranks(p, np.array([0.2, np.nan]))
    expected = [[0.25, 0.049], [0.5, 0.098], [0.75, 0.294], [0.0, 0.0], [1.0, 0.49], [np.nan, np.nan]]
    np.testing.assert_allclose(r, expected, rtol=0, atol=1e-15)


def test_priority_equals_manual_results() -> None:
    """A rare finding just above its low operating point comes before a common one below its high one."""
    row = make_row([0.4, 0.1], rules(("Infiltration", "Hernia"), {"Infiltration": 0.5, "Hernia": 0.05}))
    assert (row["top_finding"], row["priority"]) == ("Hernia", pytest.approx(0.5 + 0.5 * 0.05 / 0.95, abs=1e-7))
    assert (row["flag_Infiltration"], row["flag_Hernia"]) == (False, True)
    assert (row["p_Infiltration"], row["p_Hernia"]) == (pytest.approx(0.4), pytest.approx(0.1))
    assert (row["status"], row["error_code"], row["error"], row["model_digest"]) == ("ok", None, None, "d1")
    assert (row["image_id"], row["path"]) == ("0.png", "/x/0.png")
    # Ties go to the first finding.
    assert make_row([0.3, 0.3], rules(("Mass", "Nodule")))["top_finding"] == "Mass"


def test_no_finding_takes_no_part_in_the_priority() -> None:
    row = make_row([0.1, 0.99], rules(("Mass", "No_Finding"), {"Mass": 0.5, "No_Finding": 0.5}))
    assert (row["top_finding"], row["priority"]) == ("Mass", pytest.approx(0.1))
    assert row["flag_No_Finding"] is True
    alone = make_row([0.99], rules(("No_Finding",)))
    assert (alone["top_finding"], alone["priority"]) == (None, None)
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
    assert len(of_model) == 10
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
def test_priority_is_half_or_more_exactly_where_a_finding_is_flagged(pairs, data: st.DataObject) -> None:
    p, t = (list(column) for column in zip(*pairs, strict=True))
    if t[0] is not None and data.draw(st.booleans(), label="neighbour of the threshold"):
        side = data.draw(st.sampled_from([-np.inf, np.inf]))
        p[0] = float(np.clip(np.nextafter(np.float32(t[0]), np.float32(side)), 0, 1))
    names = FINDINGS[: len(p)]
    row = make_row(p, rules(names, dict(zip(names, t, strict=True))))
    expected = [None if b is None else bool(np.float32(a) >= np.float32(b)) for a, b in zip(p, t, strict=True)]
    assert [row[f"flag_{name}"] for name in names] == expected
    assert 0 <= row["priority"] <= 1
    assert (row["priority"] >= 0.5) == any(expected)
    assert not any(expected) or row[f"flag_{row['top_finding']}"]
