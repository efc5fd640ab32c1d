"""Warnings where results cannot be used: missing and useless thresholds, too many flags, AUROCs from few patients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ray_cxr.evaluation import usability
from ray_cxr.labels import FINDINGS, NO_FINDING


def build_model(rates: dict[str, float], positives: dict[str, int], n: int = 100, **more: Any) -> dict[str, Any]:
    """Return bundle.json of a model on n validation images, with thresholds that flag these shares of them."""
    findings = [*FINDINGS, NO_FINDING]
    counts = {name: {"n": n, "positives": positives.get(name, 20)} for name in findings}
    points = {name: {"flag_rate": rates[name], **counts[name]} if name in rates else None for name in findings}
    provenance = {"validation": {"findings": counts}, "settings": {"min_positives": 5}}
    return {"findings": findings, "operating_points": points, "provenance": provenance, **more}


def test_findings_without_a_threshold_are_grouped_by_reason() -> None:
    rates = dict.fromkeys(FINDINGS, 0.2)
    assert usability.warn_of_model(build_model(rates, {})) == [], "No_Finding needs no threshold"
    for name in ("Edema", "Hernia", "Mass"):
        del rates[name]
    notes = {"Edema": "3 positives, needs 5", "Mass": "no calibration: none; no operating point: npv=0.99 needs more"}
    (warned,) = usability.warn_of_model(build_model(rates, {"Edema": 3, "Hernia": 98}, rule_notes=notes))
    assert (warned.kind, warned.findings) == ("no_threshold", ("Edema", "Hernia", "Mass"))
    assert "3 of 14" in warned.text
    for part in ("5 positives among the validation images (Edema)", "5 negatives", "needs more (Mass)"):
        assert part in warned.reasons
        assert part not in warned.text, "the summary names findings, the section the reasons"
    assert "calibration" not in warned.reasons
    assert "images with Edema, Hernia" in warned.advice  # Mass has enough
    # A model that can flag few findings
    few = build_model(dict.fromkeys(("Infiltration", "Pleural_Thickening"), 0.2), {})
    assert usability.warn_of_model(few)[0].text.startswith(
        "Only Infiltration and Pleural Thickening can be flagged; 12 findings cannot: Atelectasis, "
    )
    # A recalibrated bundle: the counts of its own images and its own minimum.
    model = build_model(rates, {})
    site = {"findings": {"Mass": {"n": 50, "positives": 9}}, "min_positives": 10}
    model["provenance"]["recalibrated"] = site
    (warned,) = usability.warn_of_model(model)
    assert "fewer than 10 positives among the images of the recalibration (Mass)" in warned.reasons
    # Without any operating point
    (warned,) = usability.warn_of_model({"findings": FINDINGS, "operating_points": dict.fromkeys(FINDINGS)})
    assert len(warned.findings) == 14
    assert "recalibrate" in warned.advice


@pytest.mark.parametrize(("rate", "positives", "warns"), [(0.93, 15, True), (0.5, 5, False), (0.9, 50, False)])
def test_a_threshold_that_flags_nearly_everything_is_useless(rate: float, positives: int, warns: bool) -> None:
    rates = {**dict.fromkeys(FINDINGS, 0.1), "Nodule": rate}
    found = usability.warn_of_model(build_model(rates, {"Nodule": positives}))
    assert [(warned.kind, warned.findings) for warned in found] == [("flags_most", ("Nodule",))] * warns
    assert all("93%" in warned.text and "15%" in warned.text for warned in found)


def test_most_images_flagged() -> None:
    n = 120
    nodule = (np.arange(n) < 116).astype(np.int8)
    flags = {"Mass": (np.arange(n) < 10).astype(np.int8), "Nodule": nodule, NO_FINDING: np.ones(n, np.int8)}
    (warned,) = usability.warn_of_flags(flags)
    assert (warned.kind, warned.findings) == ("most_images_flagged", ("Nodule",))
    assert "116 of 120 images (96.7%) are flagged, almost all for Nodule" in warned.text
    # Images without a score do not count; half of the images is not most of them.
    missing = np.full(80, -1, np.int8)
    half = {name: np.concatenate([values[-8:], missing]) for name, values in flags.items()}
    assert usability.warn_of_flags(half) == []
    assert usability.warn_of_flags({"Nodule": np.ones(3, np.int8)}) == []
    assert usability.warn_of_flags({}) == []
    for rule, advice in ((None, ""), ("youden", "any_flag_rate=0.3"), ("any_flag_rate=0.3", "recalibrate")):
        assert advice in usability.warn_of_flags(flags, rule)[0].advice


def test_flags_that_are_no_better_than_chance_are_named() -> None:
    flags = {"Mass": np.array([1, 1, 0, 0]), "Edema": np.array([0, 0, 1, -1]), "Hernia": np.array([0, 0, 0, 0])}
    known = {"Mass": (0.6, 0.45, 0.75), "Edema": (0.9, 0.8, 0.95), "Hernia": (0.4, 0.3, 0.5)}
    (warning,) = usability.warn_of_chance(flags, known, "these images")
    assert (warning.kind, warning.findings) == ("chance", ("Mass",))
    assert "2 of 3 flagged images" in warning.text
    (warning,) = usability.warn_of_chance(flags, {"Mass": known["Mass"]}, "these images")
    assert "Unknown" in warning.text
    assert "Edema" in warning.text
    assert "Hernia" not in warning.text  # it has no flags
    assert usability.warn_of_chance(flags, {"Mass": (None, None, None)}, "these images") == []
    assert usability.warn_of_chance({}, known, "these images") == []


def test_a_headline_needs_patients_in_half_of_the_findings() -> None:
    assert usability.explain_headline([]) is None
    assert usability.explain_headline([5, 5, 4, 4]) is None
    reason = usability.explain_headline([5, 4, 4, 0])
    assert reason is not None
    assert "3 of 4 findings" in reason
    rows = {name: {"n": 3, "positives": 1, "auroc": 0.5} for name in ("Mass", "Nodule")}
    assert "2 of 2" in str(usability.explain_validation({**rows, NO_FINDING: {"n": 30, "positives": 9, "auroc": 0.5}}))
    assert usability.explain_validation({"Mass": {"n": 3, "positives": 0, "auroc": None}}) is None
