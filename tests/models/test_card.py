"""The model card shows the facts in a bundle, and which are unknown."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_bundle import BF16, FP32

from ray_cxr.evaluation.calibration import fit_rules
from ray_cxr.labels import FINDINGS, LABELS, NO_FINDING
from ray_cxr.models.card import model_card
from ray_cxr.training import provenance

N = 300
UNLABELLED, RARE = FINDINGS[0], FINDINGS[1]


def frame() -> pd.DataFrame:
    rng, i = np.random.default_rng(0), np.arange(N)
    labels = {name: pd.array(rng.random(N) < 0.3, dtype="Int8") for name in LABELS}
    labels |= {UNLABELLED: pd.array([pd.NA] * N, dtype="Int8"), RARE: pd.array(i < 3, dtype="Int8")}
    people = {
        "patient_id": [str(patient) for patient in i // 2],
        "sex": np.where(i // 2 % 3, "M", "F").astype(object),
        "age": np.repeat(rng.integers(5, 90, N // 2), 2).astype(float),
        "view": np.where(rng.random(N) < 0.3, "AP", "PA").astype(object),
        "follow_up": i % 2,
    }
    return pd.DataFrame(people | labels)


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """Entries of bundle.json as `train` writes them."""
    table = frame()
    y = table[list(FINDINGS)].to_numpy(dtype=float, na_value=0.0)
    p = (1 / (1 + np.exp(-(y + np.random.default_rng(1).normal(size=y.shape))))).astype(np.float32)
    p[y[:, 4] == 1, 4] = np.where(table["sex"] == "F", 0.01, 0.99)[y[:, 4] == 1]  # missed in all women
    rules = fit_rules(table[list(FINDINGS)].to_numpy(dtype=float, na_value=np.nan), p, FINDINGS, rule="youden")
    fit = {"method": "platt", "min_positives": 5}
    measured = provenance.evaluate_validation(table, p, FINDINGS, rules, **fit)
    return {
        "backbone": "DenseNet121",
        "input_spec": {"size": 224, "aspect": "stretch", "interpolation": "area"},
        "findings": list(FINDINGS),
        "calibration": rules.calibration,
        "operating_points": rules.operating_points,
        "expected_flag_rates": rules.expected_flag_rates,
        "rule_notes": rules.rule_notes,
        "provenance": {
            "origin": "trained by ray-cxr train on 300 images",
            "initial_weights": "random",
            "best_epoch": 2,
            "prepared_digest": "d1" * 32,
            "split": {"kind": "patient", "seed": 3, "fractions": [0.7, 0.1, 0.2], "tables": {"t.csv": "e2" * 32}},
            "images": {name: {"images": N, "patients": N // 2} for name in ("train", "val")},
            "age_range": [5.0, 89.0],
            "demographics": {name: provenance.describe_images(table) for name in ("train", "val")},
            "validation": {"findings": measured["findings"]},
            "evaluation": measured,
        },
    }


def section(card: str, title: str) -> str:
    found = re.search(rf"^## {title}.*?(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title}"
    return found[0]


def row(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def assert_no_value_of_python(card: str) -> None:
    assert not re.search(r"\b(None(?! by pixels)|nan|NaN)\b|[{}]", card)


def test_card_shows_provenance_and_people(whole: dict[str, Any]) -> None:
    card = model_card(whole, [{"epoch": 1}])
    assert_no_value_of_python(card)
    assert "**For research only. Not a medical device; not for diagnosis.**" in card.split("## ")[0]
    train = whole["provenance"]["demographics"]["train"]
    assert f"{train['age_band']['0-17']} of 300 images of known age" in section(card, "Intended use")
    for part in ("random by patient, seed 3", "d1" * 32, f"t.csv: SHA-256 {'e2' * 32}"):
        assert part in section(card, "Data")
    people, women, ages = section(card, "Demographics"), train["sex"]["F"], frame()["age"]
    assert row(people, "sex: F")[1:] == [f"{women} ({women / N:.1%})"] * 2
    assert f"| {UNLABELLED} |" not in people
    assert row(people, RARE)[1:] == ["3 of 300"] * 2
    assert f"| {ages.median():.0f} ({ages.quantile(0.25):.0f} to {ages.quantile(0.75):.0f}) |" in people


def test_card_states_unknown_patients(whole: dict[str, Any]) -> None:
    nobody = whole["provenance"]["evaluation"] | {"groups": []}
    for counts, text in (
        ({"images": 300, "patients": 0}, "300 images, patients unknown."),  # as older versions wrote it
        ({"images": 300, "patients": None, "images_without_patient": 300}, "300 images, patients unknown."),
        (
            {"images": 9, "patients": 4, "images_without_patient": 2},
            "9 images of 4 patients (2 images without a patient",
        ),
    ):
        source = whole["provenance"] | {"images": {"train": counts}, "evaluation": nobody}
        assert f"- train: {text}" in model_card(whole | {"provenance": source}, [])
    unknown = frame().assign(patient_id=None)
    assert provenance.describe_images(unknown)["patients"] is None


def test_card_shows_metrics_with_intervals_and_reasons(whole: dict[str, Any]) -> None:
    card = model_card(whole, [])
    measured = whole["provenance"]["evaluation"]
    table, cell = section(card, "Validation"), measured["findings"][FINDINGS[2]]
    auroc = f"{cell['auroc']:.3f} ({cell['auroc_low']:.3f} to {cell['auroc_high']:.3f})"
    assert row(table, FINDINGS[2])[3:5] == [auroc, f"{cell['average_precision']:.3f}"]
    assert row(table, UNLABELLED)[1:5] == ["0", "0", "undefined", "undefined"]
    assert f"- No AUROC for {UNLABELLED}: no labelled images." in table
    assert "†" in row(table, RARE)[3]
    groups = section(card, "Subgroups")
    group = next(group for group in measured["groups"] if (group["attribute"], group["value"]) == ("sex", "F"))
    images, patients, mean = row(groups, "sex: F")[1:4]
    assert (images, patients) == (str(group["n"]), str(group["n_patients"]))
    assert f"({group['own']['auroc']['low']:.3f} to {group['own']['auroc']['high']:.3f}), " in mean
    assert f"- {FINDINGS[4]}, sex F against M: -" in groups
    text, rule = section(card, "Calibration"), whole["calibration"][FINDINGS[2]]
    numbers = [rule["slope"], rule["intercept"], cell["ece_raw"], cell["ece_calibrated"]]
    assert row(text, FINDINGS[2])[1:] == ["platt", *(f"{number:.4f}" for number in numbers)]
    assert f"| {RARE} |" not in text
    assert "- Flags by the rule youden (sensitivity + specificity is highest)" in table
    points = {
        name: point and point | {"rule": "any_flag_rate=0.3"} for name, point in whole["operating_points"].items()
    }
    points[NO_FINDING] = {**whole["operating_points"][FINDINGS[2]], "rule": "youden"}  # has a rule of its own
    table = section(model_card(whole | {"operating_points": points}, []), "Validation")
    assert "any_flag_rate=0.3 (the share of images with any flag is at most 0.3)" in table


def test_recalibrated_card_drops_numbers_of_older_thresholds(whole: dict[str, Any]) -> None:
    made = {"from": "f3" * 32, "images": 50, "patients": 40, "created": "now", "method": "platt", "rule": "youden"}
    made["before"] = {"operating_points": whole["operating_points"]}
    made["findings"] = {name: {"n": 50, "positives": 5, "flag_rate_before": None} for name in FINDINGS}
    card = model_card(whole | {"provenance": whole["provenance"] | {"recalibrated": made}}, [])
    assert_no_value_of_python(card)
    assert "sensitivity" not in section(card, "Validation in training")
    assert "mean sensitivity" not in section(card, "Subgroups")
    assert "error after" not in section(card, "Calibration")


@pytest.mark.parametrize("without", [("evaluation",), ("demographics", "images")])
def test_card_of_an_older_bundle_states_what_is_unknown(whole: dict[str, Any], without: tuple[str, ...]) -> None:
    source = {name: value for name, value in whole["provenance"].items() if name not in without}
    card = model_card(whole | {"provenance": source}, [])
    assert_no_value_of_python(card)
    auroc = source["validation"]["findings"][FINDINGS[2]]["auroc"]
    assert row(section(card, "Validation"), FINDINGS[2])[3].startswith(f"{auroc:.3f}")
    assert ("Not measured" in section(card, "Subgroups")) == ("evaluation" in without)
    assert ("Children in training: unknown" in card) == ("demographics" in without)
    assert ("Images and patients in training: unknown" in card) == ("images" in without)


def test_card_of_an_imported_bundle_states_what_is_unknown_or_refused(whole: dict[str, Any]) -> None:
    tables = ("calibration", "operating_points", "expected_flag_rates")
    info = whole | {"rule_notes": {}, "quality": {"lacking": "too few images"}}
    info |= {name: dict.fromkeys(FINDINGS) for name in tables}
    info["provenance"] = {"origin": "imported", "initial_weights": "x.h5", "lineage": "unknown", "split": {}}
    for drift, accepted, of_bf16 in ((None, None, "bf16: not measured"), (0.5, False, "(0.02 allowed): **refused**")):
        bf16 = BF16 | {"largest_drift": drift, "accepted": accepted}
        card = model_card(info | {"runtimes": {"fp32": FP32, "bf16": bf16}}, [])
        assert_no_value_of_python(card)
        for title, words in (
            ("Data", "Not all training images are known"),
            ("Validation", "no validation"),
            ("Subgroups", "Not measured"),
            ("Calibration", "Not calibrated"),
            ("Findings without calibration", ", ".join(FINDINGS)),
            ("Precisions", "- fp32: moves probabilities by at most 0 (0.001 allowed)."),
            ("Precisions", of_bf16),
            ("Quality flags", "too few images"),
        ):
            assert words in section(card, title)
    assert "no OpenVINO graph: off by 1" in model_card(info | {"runtimes_refused": "off by 1"}, [])


def test_card_names_findings_that_calibration_made_worse(whole: dict[str, Any]) -> None:
    cells = {name: cell | {"ece_raw": 0.02, "ece_calibrated": 0.01} for name, cell in cells_of(whole).items()}
    worse = [name for name, rule in whole["calibration"].items() if rule][1:3]
    for name in worse:
        cells[name] |= {"ece_calibrated": 0.03}
    for name in (UNLABELLED, RARE):
        cells[name] |= {"ece_raw": None, "ece_calibrated": None}

    def note(cells: dict[str, Any]) -> str | None:
        evaluation = whole["provenance"]["evaluation"] | {"findings": cells}
        card = model_card(whole | {"provenance": whole["provenance"] | {"evaluation": evaluation}}, [])
        text = section(card, "Calibration")
        found = re.search(r"^The error is larger after calibration for (.*?):", text, re.MULTILINE)
        return found and found[1]

    assert note(cells) == ", ".join(worse)
    assert note({name: cell | {"ece_calibrated": cell["ece_raw"]} for name, cell in cells.items()}) is None


def cells_of(whole: dict[str, Any]) -> dict[str, Any]:
    return whole["provenance"]["evaluation"]["findings"]


def test_card_names_operating_points_that_flag_no_positive(whole: dict[str, Any]) -> None:
    named = FINDINGS[2]
    cells = {name: cell | {"sensitivity": float(name != named)} for name, cell in cells_of(whole).items()}
    evaluation = whole["provenance"]["evaluation"] | {"findings": cells}
    text = section(
        model_card(whole | {"provenance": whole["provenance"] | {"evaluation": evaluation}}, []), "Validation"
    )
    (line,) = [line for line in text.splitlines() if "No validation image" in line]
    assert [name for name in FINDINGS if name in line] == [named]
