"""`probe`: a linear head on features of scored images, as a bundle."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from ray_cxr.data import features
from ray_cxr.models import importing
from ray_cxr.models.bundle import Bundle, load_bundle

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import make_tiny_bundle

N, PATIENTS = 360, 120
Command = Callable[..., tuple[int, str, str]]


class Site:
    """A finished score folder with made-up features, and labels that depend on them."""

    def __init__(self, home: Path, bundle: Bundle, *, split: bool = True) -> None:
        rng = np.random.default_rng(1)
        width = bundle.open_runtime("fp32", batch_size=1, threads=1).predict(np.zeros((1, 64, 64), np.uint8))
        self.bundle, self.scores, self.labels = bundle, home / "scores", home / "labels.parquet"
        self.x = (rng.normal(size=(N, width.features.shape[1])) * 3 + 1).astype(np.float16)
        ids = [f"site{i}.png" for i in range(N)]
        patients = [f"p{i // 3}" for i in range(N)]
        truth = self.x[:, :2].astype(float) @ [0.5, -0.7]
        self.edema = (truth + rng.normal(size=N) > 0).astype(float)
        self.edema[::10] = np.nan
        parts = np.array(["train"] * 180 + ["val"] * 90 + ["test"] * 90, dtype=object)
        table = pd.DataFrame({"image_id": ids, "patient_id": patients, "Edema": self.edema, "Mass": 0.0})
        table["Hernia"] = (np.arange(N) % 4 == 0).astype(float)
        if split:
            table["split"] = parts
        table.to_parquet(self.labels)
        for folder in ("scores", "features"):
            (self.scores / folder).mkdir(parents=True)
        bad = np.zeros(N, bool)
        bad[5] = True
        for k, part in enumerate(np.array_split(np.arange(N), 3)):
            name = f"part-{k:05d}.parquet"
            chosen = pa.array(np.array(ids)[part].tolist())
            features.write_features(self.scores / "features" / name, chosen, self.x[part], bad[part], {})
            rows = pa.table({"image_id": chosen, "patient_id": pa.array(np.array(patients)[part].tolist())})
            pq.write_table(rows, self.scores / "scores" / name)
        settings = {"kind": "score", "features": True, "model_digest": bundle.digest}
        (self.scores / "settings.json").write_text(json.dumps(settings))
        (self.scores / "run.json").write_text(json.dumps({"model": str(bundle.path)}))
        (self.scores / "_SUCCESS").touch()

    def arguments(self, out: Path, *more: object) -> list[str]:
        return [str(item) for item in ("probe", self.scores, "--labels", self.labels, "--out", out, *more)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    bundle: Bundle = make_tiny_bundle(tmp_path_factory.mktemp("base") / "bundle")
    return bundle


def predict(bundle: Bundle, images: np.ndarray) -> Any:
    return bundle.open_runtime("fp32", batch_size=4, threads=1).predict(images)


@pytest.mark.slow
def test_head_is_that_of_a_logistic_regression(base: Bundle, tmp_path: Path, command: Command) -> None:
    site = Site(tmp_path, base)
    code, said, err = command(*site.arguments(tmp_path / "out", "--set", "strengths=[0.05]"))
    assert (code, err.count("Error")) == (0, 0), err
    assert "Mass" in said  # has no positives
    new = load_bundle(tmp_path / "out")
    assert new.findings == ("Edema", "Hernia")
    # The same fit in float64, on standardised features of the training images.
    x = site.x.astype(float)
    fitted = np.setdiff1d(np.arange(180), [5])
    mean, deviation = x[fitted].mean(axis=0), x[fitted].std(axis=0)
    rows = fitted[~np.isnan(site.edema[fitted])]
    model = LogisticRegression(C=0.05, max_iter=1000, tol=1e-8).fit((x[rows] - mean) / deviation, site.edema[rows])
    judged = np.arange(180, 270)[~np.isnan(site.edema[180:270])]
    reference = model.predict_proba((x[judged] - mean) / deviation)[:, 1]
    validation = new.info["provenance"]["validation"]["findings"]["Edema"]
    assert (validation["n"], validation["positives"]) == (len(judged), int(site.edema[judged].sum()))
    assert validation["auroc"] == pytest.approx(roc_auc_score(site.edema[judged], reference), abs=0.003)
    assert validation["auroc"] > 0.75
    # The bundle applies the head to the features of its images.
    images = np.random.default_rng(2).integers(0, 256, (6, 64, 64), dtype=np.uint8)
    found = predict(new, images)
    np.testing.assert_allclose(found.features, predict(base, images).features, atol=1e-4)
    expected = model.predict_proba((found.features - mean) / deviation)[:, 1]
    np.testing.assert_allclose(found.probabilities[:, 0], expected, atol=0.01)
    assert new.info["calibration"]["Edema"] is not None
    assert new.info["operating_points"]["Edema"] is not None
    assert not new.is_graph
    split = pq.read_table(new.path / "split.parquet").to_pandas().set_index("image_id")["split"]
    assert split.loc[[f"site{i}.png" for i in (0, 179, 180, 269)]].tolist() == ["train", "train", "val", "val"]
    assert "site300.png" not in split.index
    assert "finished already" in command(*site.arguments(tmp_path / "out", "--set", "strengths=[0.05]"))[1]
    assert command(*site.arguments(tmp_path / "out"))[0] == 2


@pytest.mark.slow
def test_folds_judge_each_image_without_its_patient(base: Bundle, tmp_path: Path, command: Command) -> None:
    site = Site(tmp_path, base, split=False)
    code, _, err = command(*site.arguments(tmp_path / "out", "--set", 'findings=["Edema", "Hernia"]'))
    assert code == 0, err
    source = load_bundle(tmp_path / "out").info["provenance"]
    cells = source["validation"]["findings"]
    assert cells["Edema"]["n"] == N - N // 10 - 1
    assert cells["Edema"]["auroc"] > 0.8
    # No feature tells of this finding: judged on its own patients, it would look far better than chance.
    assert 0.35 < cells["Hernia"]["auroc"] < 0.65
    split = pq.read_table(tmp_path / "out/split.parquet").to_pandas()
    assert (split.loc[split["image_id"].str.startswith("site"), "split"] == "train").all()


def test_patients_are_compared_in_any_spelling(base: Bundle, tmp_path: Path, command: Command) -> None:
    """NIH's copies write a patient as 13 or 00000013; a leak is one in either spelling."""
    site = Site(tmp_path, base)
    trained = pq.read_table(base.path / "split.parquet").to_pandas()
    known = trained[trained["image_id"].str.fullmatch(r"\d{8}_\d{3}.png") & (trained["split"] == "train")]
    image = known["image_id"].iloc[0]
    table = pd.read_parquet(site.labels)
    names = {old: f"{image[:9]}9{row:02d}.png" for row, old in enumerate(table["image_id"].iloc[180:190])}
    table["image_id"] = table["image_id"].replace(names)
    table.loc[180:189, "patient_id"] = image[:8]
    table.to_parquet(site.labels)
    for part in (site.scores / "features").iterdir():
        rows = pq.read_table(part)
        ids = pa.array([names.get(name, name) for name in rows["image_id"].to_pylist()])
        pq.write_table(rows.set_column(0, "image_id", ids), part)
    code, _, err = command(*site.arguments(tmp_path / "out"))
    assert code == 2
    assert "trained this bundle" in err


def test_finding_of_one_patient_is_left_out(base: Bundle, tmp_path: Path, command: Command) -> None:
    site = Site(tmp_path, base, split=False)
    table = pd.read_parquet(site.labels)
    table["Mass"] = 0.0
    table.loc[0:8, "Mass"] = 1.0
    table.loc[0:8, "patient_id"] = "p0"
    table.to_parquet(site.labels)
    code, said, err = command(*site.arguments(tmp_path / "out", "--set", "strengths=[0.01]"))
    assert code == 0, err
    assert "Mass" in said.split("\n")[1]
    assert load_bundle(tmp_path / "out").findings == ("Edema", "Hernia")


@pytest.mark.slow
def test_probe_of_a_graph(tmp_path: Path, command: Command) -> None:
    options = importing.ImportOptions(outputs=("Mass", "-", "-"), normalization="none", layout="nchw", logits=True)
    small = Path(__file__).parents[1] / "models/small.onnx"
    graph = importing.import_weights(small, tmp_path / "graph", backbone=None, options=options)
    site = Site(tmp_path, graph)
    assert command(*site.arguments(tmp_path / "out"))[0] == 0
    new = load_bundle(tmp_path / "out")
    assert new.is_graph
    images = np.random.default_rng(2).integers(0, 256, (6, 64, 64), dtype=np.uint8)
    before, after = predict(graph, images), predict(new, images)
    np.testing.assert_allclose(after.features, before.features, atol=1e-5)
    assert after.probabilities.shape == (6, 2)
    # Logits are linear in the features.
    logits = np.log(after.probabilities / (1 - after.probabilities))
    design = np.column_stack([before.features, np.ones(6)])
    fit = design @ np.linalg.lstsq(design, logits, rcond=None)[0]
    np.testing.assert_allclose(expit(fit), after.probabilities, atol=1e-3)


def test_what_cannot_be_judged_is_refused(base: Bundle, tmp_path: Path, command: Command) -> None:
    site = Site(tmp_path, base)
    out = tmp_path / "out"

    def refuse(word: str, *more: object) -> None:
        code, _, err = command(*site.arguments(out, *more))
        assert (code, err.count("\n")) == (2, 1), err
        assert word in err

    refuse("--bundle", "--bundle", make_tiny_bundle(tmp_path / "other", seed=3).path)
    refuse("no such", "--bundle", tmp_path / "none")
    refuse("10000 positives", "--set", "min_positives=10000")
    table = pd.read_parquet(site.labels)
    table.assign(split="test").to_parquet(site.labels)
    refuse("split test")
    trained = pq.read_table(base.path / "split.parquet").to_pandas()
    patient = trained.loc[trained["split"] == "train", "patient_id"].dropna().iloc[0]
    table["patient_id"] = table["patient_id"].where(table["split"] != "val", patient)
    table.to_parquet(site.labels)
    refuse("trained this bundle")
    pd.DataFrame({"image_id": ["other.png"], "Edema": [1]}).to_parquet(site.labels)
    refuse("no image in common")
    (site.scores / "_SUCCESS").unlink()
    refuse("not finished")
    assert not out.exists()
