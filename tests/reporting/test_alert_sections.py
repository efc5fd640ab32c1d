"""Alert budget and reading order in a report, against counts from the archive's own scores and labels."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import rankdata
from score_archive import FEW, Archive, Report, report

from ray_cxr.evaluation.alerts import Share
from ray_cxr.evaluation.reading_order import ReadingOrder
from ray_cxr.labels import NO_FINDING
from ray_cxr.reporting.alerts import is_order_worse, summarize_order

ALTERNATIVES = {
    "Cardiomegaly": {"specificity=0.9": {"threshold": 0.6}},
    "Effusion": {"specificity=0.9": {"threshold": 0.7}},
    "Hernia": {"specificity=0.9": None},
    NO_FINDING: {"specificity=0.9": {"threshold": 0.001}},  # not counted
}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Report:
    root = tmp_path_factory.mktemp("alerts")
    archive = Archive(root)
    archive.y[NO_FINDING] = 1 - np.max([archive.y[f] for f in FEW], axis=0)
    scores = archive.scores(operating_alternatives=ALTERNATIVES)
    return report(archive, root / "report", scores=scores, labels=archive.labels(), split="test")


def test_alerts_of_each_rule_are_counted(evaluated: Report) -> None:
    archive, found = evaluated.archive, evaluated.metrics["alerts"]
    tested = archive.tested
    abnormal = np.any([archive.y[f][tested] == 1 for f in FEW], axis=0)
    assert (found["n_with_finding"], found["n_without_finding"]) == (abnormal.sum(), (~abnormal).sum())
    chosen, other = found["rules"]
    thresholds = {"youden": dict.fromkeys(FEW, 0.3), "specificity=0.9": {"Cardiomegaly": 0.6, "Effusion": 0.7}}
    for rule, name, is_chosen in ((chosen, "youden", True), (other, "specificity=0.9", False)):
        assert (rule["rule"], rule["chosen"], rule["findings"]) == (name, is_chosen, len(thresholds[name]))
        flags = {f: archive.p[f][tested] >= t for f, t in thresholds[name].items()}
        flagged = np.any(list(flags.values()), axis=0)
        right = sum((flags[f] & (archive.y[f][tested] == 1)).sum() for f in flags)
        total = sum(map(np.sum, flags.values()))
        patients = np.array(archive.patient)[tested]
        expected = {
            "images_flagged": flagged.mean(),
            "images_flagged_without_finding": flagged[~abnormal].mean(),
            "images_flagged_with_finding": flagged[abnormal].mean(),
            "patients_flagged": len(set(patients[flagged])) / len(set(patients)),
            "flags_per_image": total / len(flagged),
            "flag_ppv": right / total,
            "any_flag_ppv": abnormal[flagged].mean(),
        }
        for key, value in expected.items():
            share = rule["shares"][key]
            assert share["value"] == pytest.approx(value)
            assert share["low"] <= share["value"] <= share["high"]
    assert f"With the rule youden, {100 * chosen['shares']['images_flagged']['value']:.0f}% of images" in evaluated.page
    table = pq.read_table(evaluated.out / "metrics.parquet").to_pandas()
    row = table[
        (table["section"] == "alerts") & (table["group"] == "specificity=0.9") & (table["metric"] == "flag_ppv")
    ]
    assert row["value"].item() == other["shares"]["flag_ppv"]["value"]


def test_reading_order_is_that_of_the_studies(evaluated: Report) -> None:
    found, archive = evaluated.metrics["reading_order"], evaluated.archive
    tested = np.flatnonzero(archive.tested)
    studies: dict[tuple[object, ...], list[int]] = {}
    for row in tested:
        study = archive.study[row]
        studies.setdefault((row,) if study is None else (archive.patient[row], study), []).append(row)
    # Two images of a study: the first study of the worklist is the first of the list.
    assert found["studies"] == len(studies)
    abnormal = [any(archive.y[f][row] for f in FEW for row in rows) for rows in studies.values()]
    assert found["abnormal"] == sum(abnormal)
    assert found["best_position"] == pytest.approx(sum(abnormal) / len(abnormal) / 2)
    assert found["best_position"] < found["position"]["value"] < 0.5 < found["normal_position"]["value"]
    assert found["minutes_sooner"]["value"] == pytest.approx((0.5 - found["position"]["value"]) * 200)
    with_effusion = sum(any(archive.y["Effusion"][row] for row in rows) for rows in studies.values())
    assert found["findings"]["Effusion"]["n"] == with_effusion
    assert set(found["findings"]) == {"Cardiomegaly", "Effusion"}  # Hernia has no positive


@pytest.mark.slow
def test_reading_order_is_that_of_the_worklist(tmp_path: Path) -> None:
    """Studies with a flag come first, also of Effusion, which has no calibration; then the priority decides."""
    archive = Archive(tmp_path)
    table = pq.read_table(f"{archive.scores()}/scores").drop_columns(["c_Effusion", "priority"])
    pq.write_table(table, tmp_path / "other.parquet")
    scores = str(tmp_path / "other.parquet")
    found = report(archive, tmp_path / "report", scores=scores, labels=archive.labels(), split="test")
    lines = [line for line in found.worklist() if line["priority"]]
    value = np.array([float(line["priority"]) for line in lines])
    flagged = np.array([line["flagged"] != "" for line in lines])
    assert sum(line["flagged"] == line["flagged_unranked"] == "Effusion" for line in lines) > 5
    rows = [archive.ids.index(line["image_id"]) for line in lines]
    studies = [(archive.patient[row], archive.study[row] or row) for row in rows]
    effusion = {(archive.patient[i], archive.study[i] or i) for i in np.flatnonzero(archive.y["Effusion"] * archive.ok)}
    with_effusion = np.array([study in effusion for study in studies])
    evaluated = archive.tested[rows]
    _, places = np.unique(np.column_stack([~flagged, -value]), axis=0, return_inverse=True)
    position = (rankdata(places.reshape(-1)[evaluated]) - 0.5) / evaluated.sum()
    order = found.metrics["reading_order"]
    assert order["studies"] == evaluated.sum()
    assert order["findings"]["Effusion"]["value"] == pytest.approx(position[with_effusion[evaluated]].mean())
    # Decisions on any finding name it, too. Without flags there is no decision.
    assert "abnormality leaves out Effusion" in found.page
    for section in ("calibration", "net_benefit", "selection"):
        assert found.metrics[section]["Effusion"] == {"reason": "not calibrated"}
    assert found.page.count("Not shown: Effusion (not calibrated)") == 3
    pq.write_table(
        table.select([name for name in table.column_names if "flag_" not in name]), tmp_path / "other.parquet"
    )
    found = report(archive, tmp_path / "unflagged", scores=scores, labels=archive.labels(), split="test")
    assert "flag" in found.metrics["selection"]["abnormality"]["reason"]


@pytest.mark.slow
def test_most_images_flagged_is_a_warning(evaluated: Report, tmp_path: Path) -> None:
    share = evaluated.metrics["alerts"]["rules"][0]["shares"]["images_flagged"]["value"]
    kinds = [warning["kind"] for warning in evaluated.metrics["warnings"]]
    assert ("most_images_flagged" in kinds) == (share > 0.5)
    archive = Archive(tmp_path, patients=20)
    archive.threshold = 0.02
    for rule, advised in (("youden", "any_flag_rate=0.3"), ("any_flag_rate=0.3", "recalibrate"), (None, "")):
        point = {"threshold": 0.02, "rule": rule}
        scores = archive.scores(operating_points=dict.fromkeys(archive.findings, point))
        if rule is None:
            pq.write_table(pq.read_table(f"{scores}/scores"), tmp_path / "other.parquet")
            scores = str(tmp_path / "other.parquet")
        found = report(archive, tmp_path / f"report {rule}", scores=scores)
        (warning,) = [one for one in found.metrics["warnings"] if one["kind"] == "most_images_flagged"]
        assert warning["text"] in found.page
        advice = warning["advice"]
        assert advised in advice
        assert advice in found.page
        assert ("any_flag_rate" in advice, "recalibrate" in advice) == (rule is not None, rule == "any_flag_rate=0.3")
        assert ("With the rule" in found.page) == (rule is not None)
    # More images have a finding than a limit of 10% allows to flag.
    archive.threshold = 0.95
    point = {"threshold": 0.95, "rule": "any_flag_rate=0.1"}
    scores = archive.scores(operating_points=dict.fromkeys(archive.findings, point))
    for every, warned in ((4, True), (20, False)):
        y = np.arange(archive.n) % every == 0
        columns = {"Effusion": y, "Cardiomegaly": 0 * y, NO_FINDING: ~y}
        labels = archive.labels(**{name: column.astype(int).tolist() for name, column in columns.items()})
        found = report(archive, tmp_path / f"limit{every}", scores=scores, labels=labels, split="test")
        assert any("have a finding, more than" in note for note in found.metrics["notes"]) == warned


@pytest.mark.slow
def test_alerts_without_labels_or_rules(tmp_path: Path) -> None:
    archive = Archive(tmp_path, patients=20)
    found = report(archive, tmp_path / "report")
    shares = found.metrics["alerts"]["rules"][0]["shares"]
    known = {"images_flagged", "patients_flagged", "flags_per_image"}
    assert {key for key, share in shares.items() if share["value"] is not None} == known
    assert found.metrics["reading_order"] is None
    assert "flag_ppv" not in found.page
    # Another system's probabilities: neither flags nor thresholds, but an order.
    table = pq.read_table(tmp_path / "SCORES" / "scores").select(["image_id", "patient_id", "p_Effusion"])
    pq.write_table(table.filter(table["p_Effusion"].is_valid()), tmp_path / "foreign.parquet")
    labels = archive.labels()
    found = report(archive, tmp_path / "foreign", scores=str(tmp_path / "foreign.parquet"), labels=labels)
    assert found.metrics["alerts"]["rules"] == []
    assert f"Not measured: {found.metrics['alerts']['reason']}" in found.page
    assert math.isfinite(found.metrics["reading_order"]["position"]["value"])
    nothing = {f: [0] * archive.n for f in FEW} | {NO_FINDING: [1] * archive.n}
    found = report(
        archive, tmp_path / "healthy", scores=str(tmp_path / "foreign.parquet"), labels=archive.labels(**nothing)
    )
    assert found.metrics["reading_order"] == {"reason": "no study is known to have a finding"}
    assert "no study is known to have a finding" in found.page


@pytest.mark.parametrize(
    ("gain", "said", "not_said"),
    [
        ((7.0, 2.0, 14.0), "7 min sooner (95% interval 2 to 14)", "worse"),
        ((-7.0, -14.0, -2.0), "worse than first come, first served", "forward"),
        ((-3.0, -9.0, 4.0), "9 later to 4 sooner", "worse"),
        ((3.0, None, None), "not shown to differ", "forward"),
        ((0.53, -3.5, 4.4), "0.5 min sooner", "forward"),
    ],
)
def test_a_reading_order_that_does_harm_is_called_so(gain: tuple, said: str, not_said: str) -> None:
    share = Share(gain[0], gain[1], gain[2], 40, None)
    order = ReadingOrder(100, 40, share, share, 0.2, share, {}, {}, {})
    text = " ".join(summarize_order(order, "study"))
    assert said in text
    assert not_said not in text
    assert is_order_worse(order) == (gain[0] == -7.0)
