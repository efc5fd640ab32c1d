"""The model card: what a bundle knows stands in it, and what it does not know is said to be unknown."""

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
    """bundle.json as `train` writes it."""
    table = frame()
    y = table[list(FINDINGS)].to_numpy(dtype=float, na_value=0.0)
    p = (1 / (1 + np.exp(-(y + np.random.default_rng(1).normal(size=y.shape))))).astype(np.float32)
    p[(table["sex"] == "F").to_numpy() & (y[:, 4] == 1), 4] = 0.01  # missed in all women
    rules = fit_rules(table[list(FINDINGS)], p, FINDINGS)
    told = provenance.evaluation(table, p, FINDINGS, rules, method="platt", min_positives=5, n_resamples=100)
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
                "macro_auroc": told["means"]["auroc"]["value"],
                "findings": {
                    name: {key: cell[key] for key in ("n", "positives", "auroc")}
                    for name, cell in told["findings"].items()
                },
            },
            "evaluation": told,
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
    """Tables have as many cells in every row, stand apart from text, and nothing of Python shows."""
    lines = card.splitlines()
    assert not re.search(r"\b(None|nan|NaN)\b|[{}]", card)
    for above, line in pairwise(lines):
        if line.startswith("|") and above.startswith("|"):
            assert above.count("|") == line.count("|"), line
        elif line.startswith(("|", "## ")):
            assert above == "", line


def test_says_for_what_it_is_and_for_what_it_is_not(whole: dict[str, Any]) -> None:
    card = model_card(whole, [{"epoch": 1}])
    assert_well_formed(card)
    assert "**For research only. Not a medical device; not for diagnosis.**" in card.split("## ")[0]
    use = section(card, "Intended use")
    assert "Not meant for: diagnosis" in use
    children = whole["provenance"]["demographics"]["train"]["age_band"]["0-17"]
    assert f"{children} of 300 images of known age are of patients under 18" in use


def test_data_names_every_digest_and_the_split(whole: dict[str, Any]) -> None:
    data = section(model_card(whole, []), "Data")
    assert "random by patient, seed 3" in data
    assert "d1" * 32 in data
    assert f"t.csv: SHA-256 {'e2' * 32}" in data


def test_people_are_counted_in_both_splits(whole: dict[str, Any]) -> None:
    people = section(model_card(whole, []), "Who is in the images")
    women = whole["provenance"]["demographics"]["train"]["sex"]["F"]
    assert row(people, "sex: F")[1:] == [f"{women} ({women / N:.1%})"] * 2
    assert f"| {UNLABELLED} |" not in people  # in neither split
    assert row(people, RARE)[1:] == ["3 of 300"] * 2
    ages = frame()["age"]
    assert f"| {ages.median():.0f} ({ages.quantile(0.25):.0f} to {ages.quantile(0.75):.0f}) |" in people


def test_metrics_have_intervals_and_what_is_undefined_says_why(whole: dict[str, Any]) -> None:
    table = section(model_card(whole, []), "Validation")
    cell = whole["provenance"]["evaluation"]["findings"][FINDINGS[2]]
    assert row(table, FINDINGS[2])[3] == f"{cell['auroc']:.3f} ({cell['auroc_low']:.3f} to {cell['auroc_high']:.3f})"
    assert row(table, FINDINGS[2])[4] == f"{cell['average_precision']:.3f}"
    assert row(table, UNLABELLED)[1:5] == ["0", "0", "undefined", "undefined"]
    assert f"- No AUROC for {UNLABELLED}: no labelled images." in table
    assert "†" in row(table, RARE)[3]
    assert "† Fewer than 10 patients" in table
    assert "not a test" in table.splitlines()[0]


def test_subgroups_and_who_is_missed(whole: dict[str, Any]) -> None:
    text = section(model_card(whole, []), "Subgroups")
    group = next(g for g in whole["provenance"]["evaluation"]["groups"] if (g["attribute"], g["value"]) == ("sex", "F"))
    mean = group["own"]["auroc"]
    expected = f"({mean['low']:.3f} to {mean['high']:.3f}), {len(mean['findings'])}"
    assert row(text, "sex: F")[1:3] == [str(group["n"]), str(group["n_patients"])]
    assert row(text, "sex: F")[3].endswith(expected)
    assert f"- {FINDINGS[4]}, sex F against M: -" in text
    assert "by chance alone" in text


def test_calibration_shows_its_error_on_other_patients(whole: dict[str, Any]) -> None:
    text = section(model_card(whole, []), "Calibration")
    rule, cell = whole["calibration"][FINDINGS[2]], whole["provenance"]["evaluation"]["findings"][FINDINGS[2]]
    assert row(text, FINDINGS[2])[1:] == [
        "platt",
        f"{rule['slope']:.4f}",
        f"{rule['intercept']:.4f}",
        f"{cell['ece_raw']:.4f}",
        f"{cell['ece_calibrated']:.4f}",
    ]
    assert f"| {RARE} |" not in text


def test_after_a_recalibration_numbers_of_older_thresholds_are_gone(whole: dict[str, Any]) -> None:
    info = copy.deepcopy(whole)
    rules = {name: info[name] for name in ("calibration", "operating_points", "expected_flag_rates")}
    entry = {"n": 50, "positives": 5, "flag_rate_before": None, "brier": None}
    info["provenance"]["recalibrated"] = {
        "from": "f3" * 32,
        "images": 50,
        "patients": 40,
        "created": "2026-02-03",
        "method": "platt",
        "rule": "youden",
        "before": rules,
        "findings": dict.fromkeys(FINDINGS, entry),
    }
    card = model_card(info, [])
    assert_well_formed(card)
    assert "sensitivity" not in section(card, "Validation in training")
    assert "Macro AUROC" in section(card, "Validation in training")
    assert "was not measured" in section(card, "Subgroups")
    assert "mean sensitivity" not in section(card, "Subgroups")
    assert "error after" not in section(card, "Calibration")


@pytest.mark.parametrize("without", [("evaluation",), ("demographics",), ("evaluation", "demographics", "images")])
def test_cards_of_older_bundles_say_what_they_do_not_know(whole: dict[str, Any], without: tuple[str, ...]) -> None:
    info = copy.deepcopy(whole)
    for name in without:
        del info["provenance"][name]
    card = model_card(info, [])
    assert_well_formed(card)
    if "evaluation" in without:
        assert "Not measured" in section(card, "Subgroups")
        assert row(section(card, "Validation"), FINDINGS[2])[3] == (
            f"{info['provenance']['validation']['findings'][FINDINGS[2]]['auroc']:.3f}"
        )
    if "demographics" in without:
        assert "unknown" in section(card, "Who is in the images")
        assert "Children in training: unknown" in card
    if "images" in without:
        assert "Images and patients in training: unknown" in card


def test_an_imported_bundle_knows_nothing_and_says_so() -> None:
    nothing = dict.fromkeys(FINDINGS)
    info = {
        "backbone": "DenseNet121",
        "input_spec": SPEC,
        "findings": list(FINDINGS),
        "calibration": nothing,
        "operating_points": nothing,
        "expected_flag_rates": nothing,
        "provenance": {
            "origin": "imported from x.h5; the images that trained it are unknown",
            "initial_weights": "the file x.h5",
            "lineage": "unknown",
            "split": {},
            "age_range": None,
            "versions": {},
        },
    }
    card = model_card(info, [])
    assert_well_formed(card)
    assert "may be among them" in section(card, "Data")
    assert "holds no validation" in section(card, "Validation")
    assert "Not measured" in section(card, "Subgroups")
    assert "There is none" in section(card, "Calibration")


def test_the_tiny_bundles_card_is_whole(tiny_bundle: Any) -> None:
    card = (tiny_bundle.path / "MODEL_CARD.md").read_text()
    for title in ("Intended use", "Data", "Who is in the images", "Validation", "Subgroups", "Calibration", "Limits"):
        section(card, title)
    assert "SHA256SUMS" in section(card, "Versions")
