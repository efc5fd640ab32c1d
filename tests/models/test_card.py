"""The model card shows what a bundle knows, and what is unknown."""

from __future__ import annotations

import copy
import re
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ray_cxr.evaluation.calibration import fit_rules
from ray_cxr.labels import FINDINGS, LABELS
from ray_cxr.models.card import model_card
from ray_cxr.training import provenance

N = 300
UNLABELLED, RARE = FINDINGS[0], FINDINGS[1]
SPEC = {"size": 224, "aspect": "stretch", "interpolation": "area"}


def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "patient_id": [str(i // 2) for i in range(N)],
            "sex": np.where(np.arange(N) // 2 % 3, "M", "F").astype(object),
            "age": np.repeat(rng.integers(5, 90, N // 2), 2).astype(float),
            "view": np.where(rng.random(N) < 0.3, "AP", "PA").astype(object),
            "follow_up": np.arange(N) % 2,
        }
    )
    labels = pd.DataFrame({name: pd.array(rng.random(N) < 0.3, dtype="Int8") for name in LABELS})
    labels[UNLABELLED] = pd.array([pd.NA] * N, dtype="Int8")
    labels[RARE] = pd.array([1] * 3 + [0] * (N - 3), dtype="Int8")
    return pd.concat([table, labels], axis=1)


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """Entries of bundle.json as `train` writes them."""
    table = frame()
    y = table[list(FINDINGS)].to_numpy(dtype=float, na_value=0.0)
    p = (1 / (1 + np.exp(-(y + np.random.default_rng(1).normal(size=y.shape))))).astype(np.float32)
    p[(table["sex"] == "F").to_numpy() & (y[:, 4] == 1), 4] = 0.01  # missed in all women
    rules = fit_rules(table[list(FINDINGS)], p, FINDINGS)
    measured = provenance.evaluation(table, p, FINDINGS, rules, method="platt", min_positives=5, n_resamples=100)
    return {
        "backbone": "DenseNet121",
        "input_spec": SPEC,
        "findings": list(FINDINGS),
        "calibration": rules.calibrations,
        "operating_points": rules.operating_points,
        "expected_flag_rates": rules.expected_flag_rates,
        "rule_notes": rules.reasons,
        "provenance": {
            "origin": "trained by ray-cxr train on 300 images",
            "initial_weights": "random",
            "lineage": "known",
            "created": "2026-01-02T03:04:05+00:00",
            "prepared_digest": "d1" * 32,
            "split": {"kind": "patient", "seed": 3, "fractions": [0.7, 0.1, 0.2], "tables": {"t.csv": "e2" * 32}},
            "images": {name: {"images": N, "patients": N // 2} for name in ("train", "val")},
            "age_range": [5.0, 89.0],
            "demographics": {name: provenance.demographics(table) for name in ("train", "val")},
            "best_epoch": 2,
            "validation": {
                "macro_auroc": measured["means"]["auroc"]["value"],
                "findings": {
                    name: {key: cell[key] for key in ("n", "positives", "auroc")}
                    for name, cell in measured["findings"].items()
                },
            },
            "evaluation": measured,
            "versions": {"ray-cxr": "1.2.3"},
        },
    }


def section(card: str, title: str) -> str:
    found = re.search(rf"^## {title}.*?(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title}"
    return found[0]


def row(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def assert_well_formed(card: str) -> None:
    """Check that tables are rectangular and apart from text, and that no Python value shows."""
    lines = card.splitlines()
    assert not re.search(r"\b(None|nan|NaN)\b|[{}]", card)
    for above, line in pairwise(lines):
        if line.startswith("|") and above.startswith("|"):
            assert above.count("|") == line.count("|"), line
        elif line.startswith(("|", "## ")):
            assert above == "", line


def test_card_shows_provenance_and_people(whole: dict[str, Any]) -> None:
    card = model_card(whole, [{"epoch": 1}])
    assert_well_formed(card)
    assert "**For research only. Not a medical device; not for diagnosis.**" in card.split("## ")[0]
    train = whole["provenance"]["demographics"]["train"]
    assert f"{train['age_band']['0-17']} of 300 images of known age" in section(card, "Intended use")
    data = section(card, "Data")
    for part in ("random by patient, seed 3", "d1" * 32, f"t.csv: SHA-256 {'e2' * 32}"):
        assert part in data
    people = section(card, "Who is in the images")
    women = train["sex"]["F"]
    assert row(people, "sex: F")[1:] == [f"{women} ({women / N:.1%})"] * 2
    assert f"| {UNLABELLED} |" not in people
    assert row(people, RARE)[1:] == ["3 of 300"] * 2
    ages = frame()["age"]
    assert f"| {ages.median():.0f} ({ages.quantile(0.25):.0f} to {ages.quantile(0.75):.0f}) |" in people


def test_card_shows_metrics_with_intervals_and_reasons(whole: dict[str, Any]) -> None:
    card = model_card(whole, [])
    measured = whole["provenance"]["evaluation"]
    table, cell = section(card, "Validation"), measured["findings"][FINDINGS[2]]
    assert row(table, FINDINGS[2])[3] == f"{cell['auroc']:.3f} ({cell['auroc_low']:.3f} to {cell['auroc_high']:.3f})"
    assert row(table, FINDINGS[2])[4] == f"{cell['average_precision']:.3f}"
    assert row(table, UNLABELLED)[1:5] == ["0", "0", "undefined", "undefined"]
    assert f"- No AUROC for {UNLABELLED}: no labelled images." in table
    assert "†" in row(table, RARE)[3]
    groups = section(card, "Subgroups")
    group = next(one for one in measured["groups"] if (one["attribute"], one["value"]) == ("sex", "F"))
    mean = group["own"]["auroc"]
    assert row(groups, "sex: F")[1:3] == [str(group["n"]), str(group["n_patients"])]
    assert row(groups, "sex: F")[3].endswith(f"({mean['low']:.3f} to {mean['high']:.3f}), {len(mean['findings'])}")
    assert f"- {FINDINGS[4]}, sex F against M: -" in groups
    text, rule = section(card, "Calibration"), whole["calibration"][FINDINGS[2]]
    numbers = [rule["slope"], rule["intercept"], cell["ece_raw"], cell["ece_calibrated"]]
    assert row(text, FINDINGS[2])[1:] == ["platt", *(f"{number:.4f}" for number in numbers)]
    assert f"| {RARE} |" not in text


def test_recalibrated_card_drops_numbers_of_older_thresholds(whole: dict[str, Any]) -> None:
    info = copy.deepcopy(whole)
    entry = {"n": 50, "positives": 5, "flag_rate_before": None, "brier": None}
    info["provenance"]["recalibrated"] = {
        "from": "f3" * 32,
        "images": 50,
        "patients": 40,
        "created": "2026-02-03",
        "method": "platt",
        "rule": "youden",
        "before": {name: info[name] for name in ("calibration", "operating_points", "expected_flag_rates")},
        "findings": dict.fromkeys(FINDINGS, entry),
    }
    card = model_card(info, [])
    assert_well_formed(card)
    validation = section(card, "Validation in training")
    assert "sensitivity" not in validation
    assert "Macro AUROC" in validation
    assert "was not measured" in section(card, "Subgroups")
    assert "mean sensitivity" not in section(card, "Subgroups")
    assert "error after" not in section(card, "Calibration")


@pytest.mark.parametrize("without", [("evaluation",), ("demographics",), ("evaluation", "demographics", "images")])
def test_card_of_an_older_bundle_states_what_is_unknown(whole: dict[str, Any], without: tuple[str, ...]) -> None:
    info = copy.deepcopy(whole)
    for name in without:
        del info["provenance"][name]
    card = model_card(info, [])
    assert_well_formed(card)
    auroc = info["provenance"]["validation"]["findings"][FINDINGS[2]]["auroc"]
    assert row(section(card, "Validation"), FINDINGS[2])[3].startswith(f"{auroc:.3f}")
    assert ("Not measured" in section(card, "Subgroups")) == ("evaluation" in without)
    assert ("unknown" in section(card, "Who is in the images").splitlines()[2]) == ("demographics" in without)
    assert ("Children in training: unknown" in card) == ("demographics" in without)
    assert ("Images and patients in training: unknown" in card) == ("images" in without)


def test_card_of_an_imported_bundle_states_that_all_is_unknown(whole: dict[str, Any]) -> None:
    info = copy.deepcopy(whole) | {"rule_notes": {}}
    for name in ("calibration", "operating_points", "expected_flag_rates"):
        info[name] = dict.fromkeys(FINDINGS)
    info["provenance"] = {
        "origin": "imported from x.h5",
        "initial_weights": "the file x.h5",
        "lineage": "unknown",
        "split": {},
        "age_range": None,
        "versions": {},
    }
    card = model_card(info, [])
    assert_well_formed(card)
    for title, words in (
        ("Data", "may be among them"),
        ("Validation", "no validation"),
        ("Subgroups", "Not measured"),
        ("Calibration", "There is none"),
        ("Findings without calibration", ", ".join(FINDINGS)),
    ):
        assert words in section(card, title)


def test_card_shows_precisions_and_missing_quality(whole: dict[str, Any]) -> None:
    fp32 = {"largest_drift": 1e-6, "tolerance": 0.001, "accepted": True}
    for drift, accepted, words in (
        (None, None, "not measured"),
        (0.5, False, "than 0.5, of 0.02 allowed: **refused**"),
    ):
        bf16 = {"largest_drift": drift, "tolerance": 0.02, "accepted": accepted}
        info = {**whole, "runtimes": {"fp32": fp32, "bf16": bf16}, "quality": {"lacking": "too few images"}}
        card = model_card(info, [])
        assert "- fp32: moves no probability by more than 1e-06, of 0.001 allowed." in card
        assert words in next(line for line in card.splitlines() if line.startswith("- bf16: "))
        assert "too few images" in section(card, "Quality flags")
