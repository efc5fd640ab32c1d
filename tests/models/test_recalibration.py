"""Recalibration, from outside: a site's scores and labels in, another bundle out, and everything that is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_tiny_bundle
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_curve

import ray_cxr
from ray_cxr.data import manifest
from ray_cxr.errors import LeakError
from ray_cxr.labels import FINDINGS, LABELS
from ray_cxr.models import predictions
from ray_cxr.models.bundle import Bundle
from ray_cxr.reporting import report

Command = Callable[..., tuple[int, str, str]]

N = 240
COMMON, RARE, UNLABELLED = FINDINGS[0], FINDINGS[7], FINDINGS[9]


@dataclass
class Site:
    """A hospital's images, two of each patient, with labels and with what a network made of them.

    Labels are int [N,15] with -1 for null; of RARE there are three positives, of UNLABELLED nothing is known, and of
    COMMON a fifth is null. The network's probabilities are far too low.
    """

    home: Path
    bundle: Bundle
    ids: list[str] = field(default_factory=lambda: [f"site_{i:04d}.png" for i in range(N)])
    patients: list[str | None] = field(default_factory=lambda: [f"NAME^{i // 2}" for i in range(N)])
    splits: list[str | None] = field(default_factory=lambda: [None] * N)
    failures: dict[int, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(7)
        truth = (rng.random((N, len(LABELS))) < np.linspace(0.1, 0.5, len(LABELS))).astype(np.int8)
        truth[:, LABELS.index(RARE)] = np.arange(N) < 3
        x = -3.0 + 1.5 * truth[:, : len(FINDINGS)] + rng.normal(size=(N, len(FINDINGS)))
        self.p = (1 / (1 + np.exp(-x))).astype(np.float32)
        self.labels = truth
        self.labels[:, LABELS.index(UNLABELLED)] = -1
        self.labels[::5, LABELS.index(COMMON)] = -1

    @property
    def scores(self) -> Path:
        return self.home / "scores-of-site"

    @property
    def table(self) -> Path:
        return self.home / "site.parquet"

    @property
    def out(self) -> Path:
        return self.home / "recalibrated"

    def known(self, finding: str) -> tuple[np.ndarray, np.ndarray]:
        y = self.labels[:, LABELS.index(finding)]
        return y[y >= 0], self.p[y >= 0, FINDINGS.index(finding)]

    def write(self) -> Site:
        """The score folder, in two files, and the manifest."""
        nothing = pa.nulls(len(self.ids), pa.string())
        rows = pa.table(
            {
                "image_id": pa.array(self.ids, pa.string()),
                "path": nothing,
                "patient_id": pa.array(self.patients, pa.string()),
                "study_id": nothing,
            }
        )
        table = predictions.assemble(rows, self.p, self.failures, self.bundle.rules)
        (self.scores / "scores").mkdir(parents=True, exist_ok=True)
        half = len(self.ids) // 2
        for i, part in enumerate((table.slice(0, half), table.slice(half))):
            pq.write_table(part, self.scores / "scores" / f"part-{i:05d}.parquet")
        (self.scores / "settings.json").write_text("{}")
        (self.scores / "run.json").write_text("{}")
        (self.scores / "model.json").write_text(json.dumps(self.bundle.model_json()))
        shutil.copyfile(self.bundle.path / "split.parquet", self.scores / "split.parquet")
        (self.scores / "_SUCCESS").touch()
        columns: dict[str, Any] = {name: pa.nulls(len(self.ids), kind) for name, kind in fields()}
        columns |= {"image_id": self.ids, "patient_id": self.patients, "split": self.splits}
        for j, name in enumerate(LABELS):
            columns[name] = pa.array(self.labels[:, j], pa.int8(), mask=self.labels[:, j] < 0)
        # In another order than the scores: images are joined by their name.
        backwards = pa.table(columns, schema=manifest.SCHEMA).take(pa.array(range(len(self.ids))[::-1]))
        manifest.write_manifest(backwards, self.table)
        return self

    def arguments(self, *more: object) -> list[object]:
        return ["recalibrate", self.bundle.path, self.scores, "--labels", self.table, "--out", self.out, *more]

    def rewrite(self, change: Callable[[pa.Table], pa.Table]) -> None:
        part = self.scores / "scores" / "part-00001.parquet"
        pq.write_table(change(pq.read_table(part)), part)


def fields() -> list[tuple[str, pa.DataType]]:
    return [(item.name, item.type) for item in manifest.SCHEMA]


@pytest.fixture
def site(tiny_bundle: Bundle, tmp_path: Path) -> Site:
    return Site(tmp_path, tiny_bundle)


def done(result: tuple[int, str, str], site: Site) -> Bundle:
    code, _, err = result
    assert (code, err) == (0, "")
    return ray_cxr.load_bundle(site.out)


def split_of(bundle: Bundle) -> list[tuple[str, str | None, str]]:
    table = pq.read_table(bundle.path / "split.parquet")
    return list(zip(*(table[name].to_pylist() for name in ("image_id", "patient_id", "split")), strict=True))


def test_thresholds_come_from_the_sites_labels(site: Site, command: Command) -> None:
    bundle = done(command(*site.write().arguments()), site)
    for name in set(FINDINGS) - {RARE, UNLABELLED}:
        y, p = site.known(name)
        fpr, tpr, thresholds = roc_curve(y, p, drop_intermediate=False)
        best = np.flatnonzero(np.isclose(tpr - fpr, (tpr - fpr).max(), atol=1e-12))[-1]
        point = bundle.info["operating_points"][name]
        assert ((p >= point["threshold"]) == (p >= thresholds[best])).all(), name
        assert (point["rule"], point["n"], point["positives"]) == ("youden", len(y), int(y.sum()))
        assert point["sensitivity"] == pytest.approx(tpr[best])
        assert point["specificity"] == pytest.approx(1 - fpr[best])
        assert bundle.info["expected_flag_rates"][name] == pytest.approx((p >= thresholds[best]).mean())
        assert bundle.info["operating_points"][name] != site.bundle.info["operating_points"][name]


def test_calibration_comes_from_the_sites_labels(site: Site, command: Command) -> None:
    bundle = done(command(*site.write().arguments()), site)
    y, p = site.known(COMMON)
    x = np.log(p.astype(float)) - np.log1p(-p.astype(float))
    high, low = (y.sum() + 1) / (y.sum() + 2), 1 / ((1 - y).sum() + 2)
    target = np.where(y == 1, high, low)
    # A target of 0.9 is nine parts of a positive and one of a negative.
    fit = LogisticRegression(C=1e12, tol=1e-10, max_iter=1000).fit(
        np.tile(x, 2)[:, None], np.repeat([1, 0], len(x)), np.concatenate([target, 1 - target])
    )
    got = bundle.info["calibration"][COMMON]
    assert got["method"] == "platt"
    assert got["slope"] == pytest.approx(fit.coef_[0, 0], rel=1e-3)
    assert got["intercept"] == pytest.approx(fit.intercept_[0], rel=1e-3)
    c = 1 / (1 + np.exp(-(got["slope"] * x + got["intercept"])))
    row = bundle.info["provenance"]["recalibrated"]["findings"][COMMON]
    assert row["brier"] == pytest.approx(brier_score_loss(y, c), abs=1e-6)
    assert c.mean() == pytest.approx(y.mean(), abs=0.01)
    assert row["brier_before"] is None  # FINDINGS[0] of the tiny bundle has no calibration
    second = FINDINGS[1]
    y, p = site.known(second)
    before = 1 / (1 + np.exp(-(2.0 * (np.log(p) - np.log1p(-p)) - 1.0)))
    row = bundle.info["provenance"]["recalibrated"]["findings"][second]
    assert row["brier_before"] == pytest.approx(brier_score_loss(y, before), abs=1e-6)
    assert row["flag_rate_before"] == pytest.approx((p >= 0.5).mean())
    assert row["brier"] < row["brier_before"]


def test_all_of_it_may_lie_in_a_bucket(
    bucket, site: Site, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_CXR_CACHE", str(tmp_path / "cache"))
    expected = done(command(*site.write().arguments()), site)
    bucket.upload(site.bundle.path, "site/bundle")
    bucket.upload(site.scores, "site/scores")
    bucket.put("site/m.parquet", site.table.read_bytes())
    there = ["recalibrate", bucket("site/bundle"), bucket("site/scores"), "--labels", bucket("site/m.parquet"), "--out"]
    code, said, err = command(*there, bucket("site/new"))
    assert (code, err) == (0, "")
    assert said.splitlines()[-1] == f"bundle: {bucket('site/new')}"
    info = json.loads(bucket.get("site/new/bundle.json"))
    for name in ("calibration", "operating_points", "expected_flag_rates"):
        assert info[name] == expected.info[name]
    assert command(*there, bucket("site/new"))[0] == 0
    code, _, err = command(*there, bucket("site/scores/new"))
    assert (code, f"lies inside {bucket('site/scores')}" in err) == (2, True)
    assert not [key for key in bucket.keys("site/scores") if "new" in key]


def test_the_network_is_the_same_and_its_reading_is_not(site: Site, command: Command) -> None:
    old = site.bundle
    new = done(command(*site.write().arguments()), site)
    assert new.digest != old.digest
    for name in ("model.weights.h5", "config.toml", "curves.json"):
        assert (new.path / name).read_bytes() == (old.path / name).read_bytes()
    assert (new.architecture, new.input_spec) == (old.architecture, old.input_spec)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    first, second = old.predict(images), new.predict(images)
    for name in FINDINGS:
        assert first[f"p_{name}"].to_numpy().tobytes() == second[f"p_{name}"].to_numpy().tobytes()
    assert set(second["model_digest"]) == {new.digest}
    # The tiny bundle has no calibration for COMMON; for UNLABELLED there is none any more.
    assert first[f"c_{COMMON}"].isna().all()
    assert second[f"c_{COMMON}"].notna().all()
    fitted = new.info["calibration"][FINDINGS[1]]
    p = second[f"p_{FINDINGS[1]}"].to_numpy(dtype=float)
    expected = 1 / (1 + np.exp(-(fitted["slope"] * (np.log(p) - np.log1p(-p)) + fitted["intercept"])))
    np.testing.assert_allclose(second[f"c_{FINDINGS[1]}"].to_numpy(dtype=float), expected, rtol=1e-5)
    assert second[[f"{kind}_{name}" for kind in ("c", "flag") for name in (RARE, UNLABELLED)]].isna().all(axis=None)
    # The site's probabilities are low: what the old threshold of 0.5 left alone, the new one flags.
    point = new.info["operating_points"][FINDINGS[1]]
    assert (second[f"flag_{FINDINGS[1]}"] == (p >= point["threshold"])).all()


def test_what_the_new_bundle_remembers(site: Site, command: Command) -> None:
    site.write()
    new = done(command(*site.arguments()), site)
    source = new.info["provenance"]
    made = source.pop("recalibrated")
    assert source == site.bundle.info["provenance"]
    assert made["before"] == {
        name: site.bundle.info[name] for name in ("calibration", "operating_points", "expected_flag_rates")
    }
    assert made["from"] == site.bundle.digest
    assert made["labels_digest"] == manifest.digest(manifest.read_manifest(site.table))
    assert (made["method"], made["rule"], made["min_positives"]) == ("platt", "youden", 5)
    assert (made["images"], made["patients"]) == (N, N // 2)
    assert made["findings"][COMMON]["n"] == N * 4 // 5
    assert {"created", "versions", "scores_digest", "left_out"} <= set(made)
    # They chose the thresholds, so no report may take them for a test.
    assert sorted(split_of(new)) == [
        *split_of(site.bundle),
        *((name, patient, "val") for name, patient in zip(site.ids, site.patients, strict=True)),
    ]
    assert new.info["rule_notes"][RARE] == "3 positives, needs 5"
    assert new.info["rule_notes"][UNLABELLED] == "no labelled images"
    assert set(new.info["operating_alternatives"][COMMON]) == {"sensitivity=0.9", "specificity=0.9"}
    card = (new.path / "MODEL_CARD.md").read_text()
    point = new.info["operating_points"][FINDINGS[1]]
    row = next(line for line in card.splitlines() if line.startswith(f"| {FINDINGS[1]} | {N} |"))
    assert f"| platt | {point['threshold']:.4f} | {point['flag_rate']:.3f} | 0.5000 |" in row
    assert f"the bundle {site.bundle.digest}" in card
    assert f"- {RARE}: 3 positives, needs 5." in card
    assert "NAME^" not in card


def test_what_the_command_says(site: Site, command: Command) -> None:
    code, out, err = command(*site.write().arguments())
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"recalibrate: {N} images are used: {N} of no split"
    row = next(line for line in lines if FINDINGS[1] in line)
    point = ray_cxr.load_bundle(site.out).info["operating_points"][FINDINGS[1]]
    for part in (f" {N} ", f" {point['threshold']:.4f} ", " 0.5000 ", f" {point['flag_rate']:.3f} "):
        assert part in row
    assert f"{RARE}: 3 positives, needs 5" in lines
    assert lines[-1] == f"bundle: {site.out}"
    assert "NAME^" not in out


def test_the_rule_and_the_method_can_be_chosen_and_stay_with_the_bundle(site: Site, command: Command) -> None:
    toml = site.home / "site.toml"
    toml.write_text('[recalibrate]\ncalibration = "temperature"\nmin_positives = 3\n')
    arguments = site.write().arguments("--config", toml, "--set", "operating_point=sensitivity=0.9")
    new = done(command(*arguments), site)
    made = new.info["provenance"]["recalibrated"]
    assert (made["method"], made["rule"], made["min_positives"]) == ("temperature", "sensitivity=0.9", 3)
    y, p = site.known(COMMON)
    point = new.info["operating_points"][COMMON]
    assert (p[y == 1] >= point["threshold"]).mean() >= 0.9
    higher = p[p > point["threshold"]].min()  # one score higher is one positive too few
    assert (p[y == 1] > higher).mean() < 0.9
    assert new.info["calibration"][COMMON]["method"] == "temperature"
    assert new.info["calibration"][COMMON]["intercept"] == 0.0
    assert new.info["operating_points"][RARE]["positives"] == 3
    # Once more, from the new bundle and without a word about rules: its own are kept, and so is its history.
    third = Site(site.home / "again", new).write()
    code, out, _ = command(*third.arguments())
    assert code == 0
    assert f"{N} of the images, or others of their patients, were validation images" in out
    made = ray_cxr.load_bundle(third.out).info["provenance"]["recalibrated"]
    assert (made["method"], made["rule"], made["min_positives"]) == ("temperature", "sensitivity=0.9", 5)
    assert made["before"]["recalibrated"]["from"] == site.bundle.digest
    assert len(split_of(ray_cxr.load_bundle(third.out))) == N + 1


def test_only_val_and_unsplit_images_are_used_and_no_patient_of_the_test_split(site: Site, command: Command) -> None:
    site.splits = ["val"] * 60 + [None] * 60 + ["test"] * 61 + [None] + ["train"] * 58
    site.failures = {0: ("corrupt", "broken"), 1: ("missing", "gone")}
    site.labels[2] = -1
    site.write()
    table = pq.read_table(site.table)
    pq.write_table(table.slice(10), site.table)  # ten of split train have no label at all
    code, out, err = command(*site.arguments())
    assert (code, err) == (0, "")
    assert f"recalibrate: {57 + 60} images are used: 57 of split val, 60 of no split" in out
    assert (
        "left out: 61 of split test, 1 of patients of split test, 48 of split train, 2 that could not be scored, "
        "1 without a label for any finding of the bundle, 10 scored images that the labels do not name"
    ) in out
    new = ray_cxr.load_bundle(site.out)
    assert {row[0] for row in split_of(new)} == {"00000099_000.png", *site.ids[3:120]}
    y, _ = site.known(FINDINGS[1])
    assert new.info["provenance"]["recalibrated"]["findings"][FINDINGS[1]]["positives"] == int(y[2:119].sum())


def test_images_that_were_labelled_and_not_scored_are_counted(site: Site, command: Command) -> None:
    site.write()
    site.rewrite(lambda table: table.slice(0, 100))
    _, out, _ = command(*site.arguments())
    assert "220 images are used" in out
    assert "left out: 20 not in the scores" in out


def test_the_images_that_chose_the_thresholds_are_no_test(site: Site, command: Command) -> None:
    new = done(command(*site.write().arguments()), site)
    scored = Site(site.home / "scored-again", new).write()
    with pytest.raises(LeakError, match=f"{N} images and {N // 2} patients"):
        report.write_report(scored.scores, site.home / "report", labels=scored.table)


def test_twice_is_once(site: Site, command: Command) -> None:
    first = command(*site.write().arguments())
    new = done(first, site)
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in site.out.iterdir()}
    code, out, err = command(*site.arguments())
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == f"recalibrate: {site.out} is finished already"
    assert out.splitlines()[-1] == f"bundle: {site.out}"
    assert {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in site.out.iterdir()} == before
    assert ray_cxr.load_bundle(site.out).digest == new.digest


def test_another_bundle_in_out_is_refused(site: Site, command: Command) -> None:
    done(command(*site.write().arguments()), site)
    for setting, words in (
        ("operating_point=specificity=0.9", "operating_point"),
        ("calibration=temperature", "calibration"),
        ("min_positives=6", "min_positives"),
    ):
        code, _, err = command(*site.arguments("--set", setting))
        assert (code, err.count("\n")) == (2, 1)
        assert f"was made from another {words}; name another --out" in err
    site.labels[7, LABELS.index(COMMON)] ^= 1
    site.p[7] /= 2
    site.write()
    assert "was made from another scores, another labels; name" in command(*site.arguments())[2]


def leak_image(site: Site) -> None:
    site.ids[0] = "00000099_000.png"
    site.write()


def leak_patient(site: Site) -> None:
    site.patients[4:6] = ["99", "99"]
    site.splits = ["val"] * N
    site.write()


def leak_patient_of_the_scores(site: Site) -> None:
    """The labels do not know the patients; the score table does."""
    site.patients[4:6] = ["99", "99"]
    site.write()
    table = pq.read_table(site.table)
    place = table.column_names.index("patient_id")
    pq.write_table(table.set_column(place, "patient_id", pa.nulls(N, pa.string())), site.table)


def all_test(site: Site) -> None:
    site.splits = ["test"] * N
    site.write()


def all_train_or_test(site: Site) -> None:
    site.splits = ["train", "train", "test", "test"] * (N // 4)
    site.write()


def other_model(site: Site) -> None:
    site.bundle, asked = make_tiny_bundle(site.home / "other", seed=1), site.bundle
    site.write()
    site.bundle = asked


def two_models(site: Site) -> None:
    def change(table: pa.Table) -> pa.Table:
        digests = ["0" * 64, *table["model_digest"].to_pylist()[1:]]
        return table.set_column(table.column_names.index("model_digest"), "model_digest", pa.array(digests))

    site.write().rewrite(change)


def nobodys_rows(site: Site) -> None:
    """Scored rows without a digest are another system's, or were tampered with."""
    site.write().rewrite(
        lambda table: table.set_column(
            table.column_names.index("model_digest"), "model_digest", pa.nulls(len(table), pa.string())
        )
    )


def unfinished(site: Site) -> None:
    site.write()
    (site.scores / "_SUCCESS").unlink()


def no_scores(site: Site) -> None:
    site.write()
    shutil.rmtree(site.scores)


def empty_scores(site: Site) -> None:
    no_scores(site)
    site.scores.mkdir()


def a_file(site: Site) -> None:
    no_scores(site)
    site.scores.write_text("x")


def no_parts(site: Site) -> None:
    site.write()
    shutil.rmtree(site.scores / "scores")


def broken_part(site: Site) -> None:
    site.write()
    (site.scores / "scores" / "part-00001.parquet").write_bytes(b"PAR1")


def not_a_score_table(site: Site) -> None:
    site.write().rewrite(lambda table: table.drop_columns(["model_digest"]))


def column_gone(site: Site) -> None:
    site.write().rewrite(lambda table: table.drop_columns([f"p_{COMMON}"]))


def unknown_finding(site: Site) -> None:
    site.write().rewrite(lambda table: table.append_column("p_Fracture", table[f"p_{COMMON}"]))


def text_for_numbers(site: Site) -> None:
    def change(table: pa.Table) -> pa.Table:
        words = pa.array(["high"] * len(table))
        return table.set_column(table.column_names.index(f"p_{COMMON}"), f"p_{COMMON}", words)

    site.write().rewrite(change)


def not_a_probability(site: Site) -> None:
    def change(table: pa.Table) -> pa.Table:
        values = pa.array(np.r_[np.nan, 1.5, table[f"p_{COMMON}"].to_numpy()[2:]].astype(np.float32))
        return table.set_column(table.column_names.index(f"p_{COMMON}"), f"p_{COMMON}", values)

    site.write().rewrite(change)


def repeated_score(site: Site) -> None:
    site.write().rewrite(lambda table: pa.concat_tables([table, table.slice(0, 3)]))


def repeated_label(site: Site) -> None:
    site.write()
    table = pq.read_table(site.table)
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), site.table)


def no_labels_file(site: Site) -> None:
    site.write()
    site.table.unlink()


def nothing_labelled(site: Site) -> None:
    site.labels[:] = -1
    site.write()


def nothing_in_common(site: Site) -> None:
    site.write()
    table = pq.read_table(site.table)
    names = pa.array([f"other_{i}.png" for i in range(N)])
    pq.write_table(table.set_column(0, "image_id", names), site.table)


def all_failed(site: Site) -> None:
    site.failures = dict.fromkeys(range(N), ("missing", "gone"))
    site.write()


def too_few(site: Site) -> None:
    site.labels[:] = 0
    site.write()


def tampered_bundle(site: Site) -> None:
    site.write()
    copy = site.home / "copy"
    shutil.copytree(site.bundle.path, copy)
    (copy / "config.toml").chmod(0o644)
    (copy / "config.toml").write_text("[train]\nepochs = 99\n")
    site.bundle = Bundle(copy, "", site.bundle.architecture, site.bundle.input_spec, site.bundle.info)


def out_is_a_folder(site: Site) -> None:
    site.write().out.mkdir()


def out_is_a_file(site: Site) -> None:
    site.write().out.write_text("x")


def out_is_another_bundle(site: Site) -> None:
    site.write()
    make_tiny_bundle(site.out, seed=1)


REFUSED: list[tuple[Callable[[Site], None], str]] = [
    (leak_image, "1 images and 0 patients trained this bundle: its scores on them are too good to fit on; give all"),
    (leak_patient, "0 images and 1 patients trained this bundle: its scores on them are too good"),
    (leak_patient, "; if they are other people with the same ids, put a prefix before yours"),
    (leak_patient_of_the_scores, "0 images and 1 patients trained this bundle"),
    (all_test, f"its {N} scored images are all of split test or train, or of patients of split test; test must stay"),
    (all_train_or_test, "give the images to fit on the split val, or none"),
    (other_model, "120 of 120 rows of part-00000.parquet were not scored with"),
    (two_models, "1 of 120 rows of part-00001.parquet were not scored with"),
    (nobodys_rows, "120 of 120 rows of part-00001.parquet were not scored with"),
    (unfinished, "scores-of-site: score did not finish; run it again to continue"),
    (no_scores, "scores-of-site: no such folder; name the folder that `ray-cxr score` wrote"),
    (empty_scores, "scores-of-site: holds no scores; name the folder"),
    (a_file, "scores-of-site: is a file; name the folder"),
    (no_parts, "scores-of-site: holds no scores/part-*.parquet"),
    (broken_part, "part-00001.parquet: not a readable Parquet file"),
    (not_a_score_table, "part-00001.parquet: has no column model_digest"),
    (column_gone, f"part-00001.parquet: lacks the column p_{COMMON}"),
    (unknown_finding, "part-00001.parquet: has the column p_Fracture"),
    (text_for_numbers, "part-00001.parquet: has columns that are not of a score table's kind"),
    (not_a_probability, "2 scored rows have a probability that is not a number in 0..1"),
    (repeated_score, "scores-of-site: 3 rows repeat an image_id"),
    (repeated_label, "site.parquet: 1 rows repeat an image_id"),
    (no_labels_file, "site.parquet: no such file; make it with `ray-cxr manifest`"),
    (nothing_labelled, "site.parquet: has no label for any finding of"),
    (nothing_in_common, "have no image in common; compare their image_id, such as 'site_0000.png' and 'other_0.png'"),
    (all_failed, f"scores-of-site: all {N} images to fit on are error rows"),
    (too_few, f"nothing can be fitted on these {N} images (14 findings: 0 positives, needs 5); label more"),
    (tampered_bundle, "copy: config.toml is not as it was written"),
    (out_is_a_folder, "recalibrated: exists already and is no bundle; name another --out"),
    (out_is_a_file, "recalibrated: exists already and is no bundle; name another --out"),
    (out_is_another_bundle, "recalibrated: exists already and is a bundle that recalibrate did not make"),
]


@pytest.mark.parametrize(("spoil", "words"), REFUSED, ids=[spoil.__name__ for spoil, _ in REFUSED])
def test_refused_in_one_line_and_nothing_written(
    site: Site, command: Command, spoil: Callable[[Site], None], words: str
) -> None:
    spoil(site)
    before = sorted(site.home.rglob("*"))
    code, _, err = command(*site.arguments())
    assert code == 2, err
    assert err.startswith("ray-cxr recalibrate: ")
    assert err.count("\n") == 1
    assert words in err
    assert "NAME^" not in err
    assert sorted(site.home.rglob("*")) == before


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("calibration=isotonic", "recalibrate.calibration: Input should be 'platt' or 'temperature'"),
        ("operating_point=f1", "recalibrate.operating_point: use youden, sensitivity=X or specificity=X"),
        ("min_positives=1", "recalibrate.min_positives: Input should be greater than or equal to 2"),
        ("method=platt", "unknown key 'recalibrate.method'"),
    ],
)
def test_settings_that_are_none(site: Site, command: Command, setting: str, words: str) -> None:
    code, out, err = command(*site.write().arguments("--set", setting))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_a_damaged_result_is_not_taken_for_a_finished_one(site: Site, command: Command) -> None:
    done(command(*site.write().arguments()), site)
    (site.out / "curves.json").chmod(0o644)
    (site.out / "curves.json").write_text("[]")
    code, _, err = command(*site.arguments())
    assert (code, err.count("\n")) == (2, 1)
    assert "curves.json is not as it was written" in err


def test_the_result_lies_beside_its_sources_and_not_inside(site: Site, command: Command) -> None:
    site.write()
    for inside in (site.bundle.path, site.scores):
        code, _, err = command(*site.arguments()[:-1], inside / "new")
        assert (code, err.count("\n")) == (2, 1)
        assert f"{inside}/new: lies inside {inside}; name another --out" in err
    assert ray_cxr.load_bundle(site.bundle.path).digest == site.bundle.digest


def test_a_place_that_cannot_be_written(site: Site, command: Command) -> None:
    site.write()
    code, _, err = command(*site.arguments()[:-1], site.table / "new")
    assert (code, err.count("\n")) == (2, 1)
    assert f"--out {site.table}/new: cannot be written: Not a directory; name another" in err


def test_unknown_training_images_are_said(site: Site, command: Command) -> None:
    site.write()
    assert "WARNING" not in command(*site.arguments())[1]
    imported = site.home / "imported"
    shutil.copytree(site.bundle.path, imported)
    from test_bundle import edit

    for file in imported.iterdir():
        file.chmod(0o644)
    edit(imported, provenance={**site.bundle.info["provenance"], "lineage": "unknown"})
    other = Site(site.home / "again", ray_cxr.load_bundle(imported)).write()
    code, out, _ = command(*other.arguments())
    assert code == 0
    assert "WARNING: not all images that trained this bundle are known" in out


def test_images_without_a_patient_are_said(site: Site, command: Command) -> None:
    site.patients = [None, None, *site.patients[2:]]
    new = done(result := command(*site.write().arguments()), site)
    assert "WARNING: 2 images have no patient id" in result[1]
    # Each counts as a patient of its own.
    assert new.info["provenance"]["recalibrated"]["patients"] == N // 2 + 1


def test_neither_ray_nor_tensorflow_is_needed(site: Site) -> None:
    code = (
        "import sys\nfrom ray_cxr.cli import main\n"
        f"code = main({[str(item) for item in site.write().arguments()]!r})\n"
        "assert not {'ray', 'tensorflow', 'keras'} & set(sys.modules)\n"
        "raise SystemExit(code)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith(f"bundle: {site.out}\n")
