"""Recalibration: a site's scores and labels give a new bundle, or one line that names the problem."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import brier_score_loss
from test_bundle import edit, writable_copy

import ray_cxr
from ray_cxr.cli import main
from ray_cxr.data import manifest
from ray_cxr.errors import LeakError
from ray_cxr.evaluation import calibration
from ray_cxr.labels import FINDINGS, LABELS, NO_FINDING
from ray_cxr.models import predictions, recalibration
from ray_cxr.models.bundle import Bundle
from ray_cxr.reporting import report
from ray_cxr.review.verdicts import Verdict, VerdictLog
from ray_cxr.storage import run_folder

Command = Callable[..., tuple[int, str, str]]

N = 240
COMMON, CALIBRATED, RARE, UNLABELLED = FINDINGS[0], FINDINGS[1], FINDINGS[7], FINDINGS[9]
IDS, PATIENTS = [f"site_{i:04d}.png" for i in range(N)], [f"NAME^{i // 2}" for i in range(N)]
TRAINED = "00000099_000.png"  # the image, of patient 99, that trained the tiny bundle


class Site:
    """A hospital's 240 images, two per patient, with labels (-1: null) and with scores that are far too low.

    A fifth of COMMON is null, RARE has three positives, UNLABELLED no label. The bundle calibrates only CALIBRATED.
    """

    def __init__(self, home: Path, bundle: Bundle) -> None:
        rng = np.random.default_rng(7)
        self.home, self.bundle = home, bundle
        self.ids: list[str] = [*IDS]
        self.patients: list[str | None] = [*PATIENTS]
        self.splits: list[str | None] = [None] * N
        self.spread: np.ndarray | None = None  # float32 [N,F], of a model that averages
        self.failures: dict[int, tuple[str, str]] = {}
        self.turned: range = range(0)  # rows with the quality flag `reoriented`
        self.labels = (rng.random((N, len(LABELS))) < np.linspace(0.1, 0.5, len(LABELS))).astype(np.int8)
        self.labels[:, LABELS.index(RARE)] = np.arange(N) < 3
        logits = -3.0 + 1.5 * self.labels[:, : len(FINDINGS)] + rng.normal(size=(N, len(FINDINGS)))
        self.p = (1 / (1 + np.exp(-logits))).astype(np.float32)
        self.labels[:, LABELS.index(UNLABELLED)] = -1
        self.labels[::5, LABELS.index(COMMON)] = -1
        self.scores, self.table, self.out = home / "scores-of-site", home / "site.parquet", home / "recalibrated"

    def known(self, finding: str) -> tuple[np.ndarray, np.ndarray]:
        """Labels and probabilities of the images that are labelled for a finding."""
        y = self.labels[:, LABELS.index(finding)]
        return y[y >= 0], self.p[y >= 0, FINDINGS.index(finding)]

    def write(self) -> Site:
        """Write the score folder in two files, and the manifest."""
        null = pa.nulls(N, pa.string())
        patients = pa.array(self.patients, pa.string())
        rows = pa.table({"image_id": self.ids, "path": null, "patient_id": patients, "study_id": null})
        turned = dict.fromkeys(self.turned, ("reoriented",))
        scored = predictions.assemble(
            rows, self.p, self.failures, self.bundle.rules, header_flags=turned, spread=self.spread
        )
        (self.scores / "scores").mkdir(parents=True, exist_ok=True)
        for i in range(2):
            pq.write_table(scored.slice(i * N // 2, N // 2), self.part(i))
        for name in ("settings.json", "run.json"):
            (self.scores / name).write_text("{}", encoding="utf-8")
        (self.scores / "model.json").write_text(json.dumps(self.bundle.model_json()), encoding="utf-8")
        shutil.copyfile(self.bundle.path / "split.parquet", self.scores / "split.parquet")
        (self.scores / "_SUCCESS").touch()
        columns: dict[str, Any] = {item.name: pa.nulls(N, item.type) for item in manifest.SCHEMA}
        columns |= {"image_id": self.ids, "patient_id": self.patients, "split": self.splits}
        for j, name in enumerate(LABELS):
            columns[name] = pa.array(self.labels[:, j], pa.int8(), mask=self.labels[:, j] < 0)
        # In another order than the scores: images are joined by their name.
        manifest.write_manifest(pa.table(columns, schema=manifest.SCHEMA)[::-1], self.table)
        return self

    def part(self, i: int) -> Path:
        return self.scores / "scores" / f"part-{i:05d}.parquet"

    def arguments(self, *more: object, out: Path | None = None) -> list[object]:
        given = [self.bundle.path, self.scores, "--labels", self.table, "--out", out or self.out]
        return ["recalibrate", *given, *more]


def change_table(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def change_column(path: Path, name: str, change: Callable[[list[Any]], Any]) -> None:
    """Replace a column of a Parquet file by `change` of its values."""

    def replaced(table: pa.Table) -> pa.Table:
        return table.set_column(table.column_names.index(name), name, pa.array(change(table[name].to_pylist())))

    change_table(path, replaced)


def split_of(bundle: Bundle) -> list[tuple[str, str | None, str]]:
    return [tuple(row.values()) for row in pq.read_table(bundle.path / "split.parquet").to_pylist()]


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    code, _, err = result
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("ray-cxr recalibrate: ")
    assert [word for word in words if word not in err] == [], err
    assert "NAME^" not in err


@pytest.fixture
def site(tiny_bundle: Bundle, tmp_path: Path) -> Site:
    return Site(tmp_path, tiny_bundle)


class Recalibrated(NamedTuple):
    site: Site
    bundle: Bundle
    output: str


@pytest.fixture(scope="module")
def finished(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Recalibrated:
    """One run with default settings. Tests must not change its files."""
    site = Site(tmp_path_factory.mktemp("site"), tiny_bundle).write()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main([str(item) for item in site.arguments()]) == 0
    return Recalibrated(site, ray_cxr.load_bundle(site.out), output.getvalue())


def test_rules_are_fitted_on_the_sites_labels(finished: Recalibrated) -> None:
    site, new, _ = finished
    y = site.labels[:, [LABELS.index(name) for name in FINDINGS]]
    rules = calibration.fit_rules(y, site.p, FINDINGS, method="platt", rule="youden", min_positives=5)
    assert new.info["operating_points"] == rules.operating_points
    assert new.info["expected_flag_rates"] == rules.expected_flag_rates
    assert new.info["operating_alternatives"] == rules.operating_alternatives
    for name, fitted in rules.calibration.items():
        assert new.info["calibration"][name] == pytest.approx(fitted)
    assert new.info["rule_notes"] == rules.rule_notes
    assert {name for name, reason in new.info["rule_notes"].items() if reason} == {RARE, UNLABELLED}


def test_provenance_compares_the_rules_before_and_after(finished: Recalibrated) -> None:
    site, new, _ = finished
    rows = new.info["provenance"]["recalibrated"]["findings"]
    y, p = site.known(CALIBRATED)
    # The tiny bundle's calibration is sigmoid(2 logit(p) - 1), its threshold 0.5.
    before = 1 / (1 + np.exp(1 - 2 * (np.log(p) - np.log1p(-p))))
    fitted, threshold = new.rules.calibrations[CALIBRATED], new.rules.thresholds[CALIBRATED]
    assert rows[CALIBRATED] == {
        "n": N,
        "positives": int(y.sum()),
        "flag_rate_before": pytest.approx((p >= 0.5).mean()),
        "flag_rate": pytest.approx((p >= threshold).mean()),
        "brier_before": pytest.approx(brier_score_loss(y, before), abs=1e-6),
        "brier": pytest.approx(brier_score_loss(y, calibration.apply_calibration(fitted, p)), abs=1e-6),
    }
    assert rows[CALIBRATED]["brier"] < rows[CALIBRATED]["brier_before"]
    assert (rows[COMMON]["n"], rows[COMMON]["brier_before"]) == (N * 4 // 5, None)


def test_provenance_names_the_sources_and_keeps_the_old_rules(finished: Recalibrated, tmp_path: Path) -> None:
    site, new, _ = finished
    source = dict(new.info["provenance"])
    made = source.pop("recalibrated")
    old = site.bundle.info
    assert source == old["provenance"]
    assert made["before"] == {name: old[name] for name in ("calibration", "operating_points", "expected_flag_rates")}
    assert made["from"] == site.bundle.digest
    assert made["labels_digest"] == manifest.digest(manifest.read_manifest(site.table))
    assert (made["method"], made["rule"], made["min_positives"]) == ("platt", "youden", 5)
    assert (made["images"], made["patients"]) == (N, N // 2)
    # The images selected the thresholds, so no report may use them as a test.
    used = [(name, patient, "val") for name, patient in zip(site.ids, site.patients, strict=True)]
    assert sorted(split_of(new)) == [*split_of(site.bundle), *used]
    scored = Site(tmp_path, new).write()
    with pytest.raises(LeakError, match=f"{N} images and {N // 2} patients"):
        report.write_report(scored.scores, tmp_path / "report", labels=scored.table)


@pytest.mark.slow
def test_site_images_are_the_baseline_of_all_drift(finished: Recalibrated, tmp_path: Path) -> None:
    """The images of the fit do not drift from themselves, although the old bundle scored far higher."""
    old = finished.site.bundle
    high = {name: {"edges": np.linspace(0.8, 0.95, 9).tolist(), "shares": [0.1] * 10, "n": 500} for name in FINDINGS}
    copy = writable_copy(old, tmp_path / "high")
    edit(copy, provenance={**old.info["provenance"], "score_quantiles": high})
    site = Site(tmp_path, ray_cxr.load_bundle(copy))
    site.turned = range(24)
    site.write()
    recalibration.recalibrate(copy, site.scores, site.table, site.out)
    new = ray_cxr.load_bundle(site.out)
    scored = Site(tmp_path / "again", new)
    scored.turned = range(96)
    found = report.write_report(scored.write().scores, tmp_path / "report")["drift"]
    assert {row["verdict"] for row in found["scores"].values()} <= {"ok", "inconclusive"}
    assert max(row["psi"] for row in found["scores"].values()) < 1e-9
    assert found["flags"][CALIBRATED]["ratio"] == 1.0
    row = found["quality"]["reoriented"]
    assert (row["expected"], row["observed"], row["verdict"]) == (0.1, 0.4, "large")
    assert found["mixed_baselines"] is False
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert f"{N} images of the recalibration of" in page


def test_output_and_card_name_no_patient(finished: Recalibrated) -> None:
    site, new, output = finished
    for text in (output, (new.path / "MODEL_CARD.md").read_text(encoding="utf-8")):
        assert f" {new.info['operating_points'][CALIBRATED]['threshold']:.4f} " in text
        assert f"{RARE}: 3 positives, needs 5" in text
        assert "NAME^" not in text
    assert output.splitlines()[-2] == f"bundle: {site.out}"


def test_weights_stay_and_predict_uses_the_new_rules(finished: Recalibrated) -> None:
    old, new = finished.site.bundle, finished.bundle
    for name in ("model.weights.h5", "config.toml", "curves.json"):
        assert (new.path / name).read_bytes() == (old.path / name).read_bytes()
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    first, second = old.predict(images, precision="fp32"), new.predict(images, precision="fp32")
    columns = [f"p_{name}" for name in FINDINGS]
    np.testing.assert_allclose(first[columns], second[columns], rtol=0, atol=1e-6)
    assert set(second["model_digest"]) == {new.digest}
    p = second[f"p_{CALIBRATED}"].to_numpy(dtype=np.float32)
    expected = calibration.apply_calibration(new.rules.calibrations[CALIBRATED], p)
    np.testing.assert_allclose(second[f"c_{CALIBRATED}"].to_numpy(dtype=float), expected, rtol=1e-5)
    assert (second[f"flag_{CALIBRATED}"] == (p >= new.rules.thresholds[CALIBRATED])).all()
    assert second[[f"{kind}_{name}" for kind in ("c", "flag") for name in (RARE, UNLABELLED)]].isna().all(axis=None)


def test_second_run_changes_nothing(finished: Recalibrated, command: Command) -> None:
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in finished.site.out.iterdir()}
    code, out, err = command(*finished.site.arguments())
    assert (code, err, out.splitlines()[-2]) == (0, "", f"bundle: {finished.site.out}")
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in finished.site.out.iterdir()} == before


def test_other_or_damaged_result_or_source_in_out_is_refused(finished: Recalibrated, site: Site, command) -> None:
    for setting in ("operating_point=specificity=0.9", "calibration=temperature", "min_positives=6"):
        result = command(*finished.site.arguments("--set", setting))
        assert_refused(result, f"another {setting.split('=')[0]};", "--out")
    for path in (finished.site.bundle.path, finished.site.scores, finished.site.table):
        assert_refused(command(*finished.site.arguments(out=path / "new")), f"{path}/new: ", "--out")
    site.labels[7, LABELS.index(COMMON)] ^= 1
    site.p[7] /= 2
    assert_refused(command(*site.write().arguments(out=finished.site.out)), "another scores, another labels;")
    damaged = writable_copy(finished.bundle, site.home / "damaged")
    (damaged / "curves.json").write_text("[]", encoding="utf-8")
    assert_refused(command(*finished.site.arguments(out=damaged)), f"{damaged}: curves.json")


def test_method_and_rule_are_settings_and_stay_with_the_bundle(site: Site, command: Command) -> None:
    toml = site.home / "site.toml"
    toml.write_text('[recalibrate]\ncalibration = "temperature"\nmin_positives = 3\n', encoding="utf-8")
    code, _, err = command(*site.write().arguments("--config", toml, "--set", "operating_point=sensitivity=0.9"))
    assert (code, err) == (0, "")
    new = ray_cxr.load_bundle(site.out)
    assert new.info["provenance"]["recalibrated"]["min_positives"] == 3
    y, p = site.known(COMMON)
    threshold = new.rules.thresholds[COMMON]
    assert (p[y == 1] >= threshold).mean() >= 0.9
    assert (p[y == 1] > p[p > threshold].min()).mean() < 0.9
    assert new.info["calibration"][COMMON]["method"] == "temperature"
    assert new.info["operating_points"][RARE]["positives"] == 3
    # Again, from the new bundle and without settings: it keeps its method, its rule and its history.
    third = Site(site.home / "again", new).write()
    code, out, _ = command(*third.arguments())
    assert (code, f"{N} of the images" in out) == (0, True), out
    last = ray_cxr.load_bundle(third.out)
    made = last.info["provenance"]["recalibrated"]
    assert (made["method"], made["rule"], made["min_positives"]) == ("temperature", "sensitivity=0.9", 5)
    assert made["before"]["recalibrated"]["from"] == site.bundle.digest
    assert len(split_of(last)) == N + 1


def test_rule_of_no_finding_does_not_change_the_bundles(tiny_bundle: Bundle) -> None:
    points = {COMMON: {"rule": "any_flag_rate=0.2"}, RARE: None, NO_FINDING: {"rule": "youden"}}
    for left, rule in ((points, "any_flag_rate=0.2"), ({NO_FINDING: points[NO_FINDING]}, "youden"), ({}, None)):
        bundle = dataclasses.replace(tiny_bundle, info={**tiny_bundle.info, "operating_points": left})
        assert recalibration._common_value(bundle, "operating_points", "rule") == rule


def test_images_are_selected_by_split_score_and_label(site: Site, command: Command) -> None:
    """Only images of split val or of no split are used, without patients of split test; the others are counted."""
    site.splits = ["val"] * 60 + [None] * 60 + ["test"] * 61 + [None] + ["train"] * 58
    site.failures = {0: ("corrupt", "broken"), 1: ("missing", "gone")}
    site.labels[2] = -1
    site.write()
    change_table(site.part(0), lambda table: table.slice(0, 119))  # the last of no split is not scored
    change_table(site.table, lambda table: table.slice(10))  # ten of split train are not in the labels
    code, out, err = command(*site.arguments())
    assert (code, err) == (0, "")
    assert "57 of split val, 59 of no split" in out
    new = ray_cxr.load_bundle(site.out)
    assert {row[0] for row in split_of(new)} == {TRAINED, *site.ids[3:119]}
    made = new.info["provenance"]["recalibrated"]
    assert made["findings"][CALIBRATED]["positives"] == int(site.labels[3:119, LABELS.index(CALIBRATED)].sum())
    counts = {"test": 61, "test_patients": 1, "train": 48, "not_scored": 1, "errors": 2, "unlabelled": 1}
    assert made["left_out"] == {**counts, "not_labelled": 10}


def test_unknown_training_images_and_patients_are_reported(site: Site, command: Command) -> None:
    imported = writable_copy(site.bundle, site.home / "imported")
    edit(imported, provenance={**site.bundle.info["provenance"], "lineage": "unknown"})
    other = Site(site.home / "again", ray_cxr.load_bundle(imported)).write()
    code, out, _ = command(*other.arguments())
    assert (code, "WARNING: not all images that trained this bundle" in out) == (0, True), out
    site.patients[:2] = [None, None]
    code, out, _ = command(*site.write().arguments())
    assert (code, "WARNING: 2 images have no patient id" in out) == (0, True), out
    assert f"{N // 2 - 1} patients (2 images without a patient id): report on others" in " ".join(out.split())
    made = ray_cxr.load_bundle(site.out).info["provenance"]["recalibrated"]
    assert (made["patients"], made["images_without_patient"]) == (N // 2 - 1, 2)
    assert f"{N // 2 - 1} patients (2 images without a patient id), " in (site.out / "MODEL_CARD.md").read_text()


def changed(**changes: Any) -> Callable[[Site], object]:
    """Write the site again with other images, patients, splits or labels."""
    return lambda site: (vars(site).update(changes), site.write())


def training_patient_in_the_scores(site: Site) -> None:
    change_column(site.part(1), "patient_id", lambda values: ["99", *values[1:]])
    change_column(site.table, "patient_id", lambda values: pa.nulls(len(values), pa.string()))


def tampered_bundle(site: Site) -> None:
    copy = writable_copy(site.bundle, site.home / "copy")
    (copy / "config.toml").write_text("[train]\nepochs = 99\n", encoding="utf-8")
    site.bundle = Bundle(copy, "", site.bundle.architecture, site.bundle.input_spec, site.bundle.info)


def part(name: str, change: Callable[[list[Any]], Any]) -> Callable[[Site], None]:
    return lambda site: change_column(site.part(1), name, change)


def columns(change: Callable[[pa.Table], pa.Table]) -> Callable[[Site], None]:
    return lambda site: change_table(site.part(1), change)


P = f"p_{COMMON}"
REFUSED: list[tuple[Callable[[Site], Any], str]] = [
    (changed(splits=["train", "train", "test", "test"] * (N // 4)), "are all of split test or train"),
    (changed(ids=[TRAINED, *IDS[1:]]), "1 images and 0 patients trained this bundle"),
    (changed(patients=["99", *PATIENTS[1:]], splits=["val"] * N), "0 images and 1 patients trained this bundle"),
    (changed(failures=dict.fromkeys(range(N), ("missing", "gone"))), f"scores-of-site: all {N} images"),
    (changed(labels=np.full((N, len(LABELS)), -1)), "site.parquet: has no label"),
    (changed(labels=np.zeros((N, len(LABELS)))), f"these {N} images (14 findings: 0 positives, needs 5)"),
    (training_patient_in_the_scores, "0 images and 1 patients trained this bundle"),
    (part("model_digest", lambda values: ["0" * 64, None, *values[2:]]), "2 of 120 rows of part-00001.parquet"),
    (lambda site: (site.scores / "_SUCCESS").unlink(), "scores-of-site: score did not finish"),
    (lambda site: shutil.rmtree(site.scores), "scores-of-site: no such file or folder"),
    (lambda site: [shutil.rmtree(site.scores), site.scores.mkdir()], "scores-of-site: is a folder, not a run of score"),
    (lambda site: [shutil.rmtree(site.scores), site.scores.touch()], "scores-of-site: is an empty file"),
    (lambda site: shutil.rmtree(site.scores / "scores"), "scores-of-site: has no scores/part-"),
    (lambda site: site.part(1).write_bytes(b"PAR1"), "part-00001.parquet: not a readable"),
    (columns(lambda table: table.drop_columns(["model_digest"])), "part-00001.parquet: has no column model_digest"),
    (columns(lambda table: table.drop_columns([P])), f"part-00001.parquet: lacks the column {P}"),
    (columns(lambda table: table.append_column("p_Fracture", table[P])), "part-00001.parquet: has the column p_Frac"),
    (part("image_id", lambda values: [None, *values[1:]]), "scores-of-site: 1 rows have no image_id"),
    (part("image_id", lambda values: [*values[:117], *values[:3]]), "scores-of-site: 3 rows repeat"),
    (part("status", lambda values: ["good", *values[1:]]), "scores-of-site: 1 rows have a status"),
    (part(P, lambda values: ["high"] * len(values)), "part-00001.parquet: has columns"),
    (part(P, lambda values: [np.nan, 1.5, *values[2:]]), "scores-of-site: 2 rows have a probability"),
    (lambda site: change_column(site.table, "image_id", lambda ids: [ids[1], *ids[1:]]), "site.parquet: 1 rows"),
    (lambda site: site.table.unlink(), "site.parquet: no such file"),
    (lambda site: change_column(site.table, "image_id", lambda ids: [f"x{i}" for i in range(N)]), "0000.png' and 'x0'"),
    (tampered_bundle, "copy: config.toml"),
    (lambda site: site.out.mkdir(), "recalibrated: exists already"),
    (lambda site: shutil.copytree(site.bundle.path, site.out), "recalibrated: exists already and is a bundle"),
]


@pytest.mark.parametrize(("spoil", "words"), REFUSED)
def test_unusable_files_are_refused_and_nothing_is_written(site: Site, command: Command, spoil, words: str) -> None:
    spoil(site.write())
    before = sorted(site.home.rglob("*"))
    assert_refused(command(*site.arguments()), words)
    assert sorted(site.home.rglob("*")) == before


def test_a_second_command_for_one_bundle_is_refused_at_its_start(site: Site, command: Command, monkeypatch) -> None:
    monkeypatch.setattr(recalibration, "_select_images", lambda *_: pytest.fail("it starts"))
    site.write()
    with run_folder.lock_bundle(site.out, "quantize"):
        assert_refused(command(*site.arguments()), f"{site.out}: `ray-cxr quantize` (process ", "is writing here")
    assert not site.out.exists()


@pytest.mark.slow
def test_inputs_and_output_may_be_in_a_bucket(bucket, finished, command: Command, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_CXR_CACHE", str(tmp_path / "cache"))
    site = finished.site
    bucket.upload(site.bundle.path, "site/bundle")
    bucket.upload(site.scores, "site/scores")
    bucket.put("site/m.parquet", site.table.read_bytes())
    given = ["recalibrate", bucket("site/bundle"), bucket("site/scores"), "--labels", bucket("site/m.parquet"), "--out"]
    code, out, err = command(*given, bucket("site/new"))
    assert (code, err, out.splitlines()[-2]) == (0, "", f"bundle: {bucket('site/new')}")
    info = json.loads(bucket.get("site/new/bundle.json"))
    assert info["operating_points"] == finished.bundle.info["operating_points"]
    assert command(*given, bucket("site/new"))[0] == 0
    assert_refused(command(*given, bucket("site/scores/new")), f"lies inside {bucket('site/scores')}")
    assert not [key for key in bucket.keys("site/scores") if "new" in key]


def test_verdicts_of_readers_are_labels(finished: Recalibrated, tmp_path: Path, command: Command) -> None:
    """The same labels as verdicts give the same rules, and their limits are stated and recorded."""
    site, expected, _ = finished
    scores = tmp_path / "scores"
    shutil.copytree(site.scores, scores)
    log = VerdictLog(scores, "anna")
    fixed: dict[str, Any] = {"session": log.session, "reader": "anna", "time": "2026-01-01T00:00:00.000+00:00"}
    fixed |= {"model_digest": None, "study_id": None, "flag": None, "verdict": None, "note": ""}
    fixed |= {"blind": False, "sample": None, "heatmap": False, "labels": False}
    rows = [(i, j) for i in range(N) for j in range(len(FINDINGS)) if site.labels[i, j] >= 0]
    log.append(
        Verdict(**fixed, image_id=site.ids[i], finding=FINDINGS[j], present=int(site.labels[i, j])) for i, j in rows
    )
    log.close()
    table = tmp_path / "verdicts.parquet"
    assert command("reviews", scores, "--out", table)[0] == 0
    code, said, err = command("recalibrate", site.bundle.path, scores, "--labels", table, "--out", tmp_path / "new")
    assert code == 0, err
    assert f"{len(rows):,} of {len(rows):,} labels were decided while the model's output was visible" in said + err
    new = ray_cxr.load_bundle(tmp_path / "new").info
    for name, fitted in new["calibration"].items():
        assert fitted == (pytest.approx(expected.info["calibration"][name]) if fitted else None)
    assert new["provenance"]["recalibrated"]["labels_of_readers"]["anchored"] == len(rows)
