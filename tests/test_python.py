"""The public functions, the examples of docs/python.md, and the notebook, as a user's program calls them."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from pathlib import Path
from typing import Any

import notebooks
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import replace_ray, score_arguments
from sklearn.metrics import roc_auc_score

import ray_cxr
from ray_cxr.cli import main
from ray_cxr.imaging.decode import load_image

ROOT = Path(__file__).parents[1]
GUIDE = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


@pytest.fixture(scope="module")
def labels(manifest: Path) -> pd.DataFrame:
    return pd.read_parquet(manifest)


@pytest.fixture(scope="module")
def frame(scores: Path) -> pd.DataFrame:
    return pd.read_parquet(scores / "scores")


@pytest.fixture(scope="module")
def featured(tiny_bundle: Any, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Score with features, without Ray."""
    out = tmp_path_factory.mktemp("featured") / "out"
    with replace_ray(), contextlib.redirect_stdout(io.StringIO()):
        assert main(score_arguments(tiny_bundle.path, manifest, out, "--features")) == 0
    return out


@pytest.fixture
def workplace(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_bundle: Any,
    scores: Path,
    manifest: Path,
    labels: Any,
    featured: Path,
) -> Path:
    """Return a working directory with the paths of docs/python.md and of the notebook."""
    places = {
        "runs/first/bundle": tiny_bundle.path,
        "runs/scores": scores,
        "runs/featured": featured,
        "runs/nih.parquet": manifest,
        "demo-out/run/bundle": tiny_bundle.path,
        "demo-out/manifest.parquet": manifest,
    }
    for name, target in places.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(target)
    usable = labels[labels["image_id"].str.endswith("000.png")]["path"].dropna()
    shutil.copy(next(path for path in usable if Path(path).stat().st_size > 1000), tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_evaluate_agrees_with_scikit_learn_and_takes_tables_and_folders(
    scores: Path, frame: pd.DataFrame, manifest: Path, labels: pd.DataFrame
) -> None:
    found = ray_cxr.evaluate(scores, manifest, n_resamples=20)
    joined = frame[frame["status"] == "ok"].merge(labels, on="image_id")
    assert found.index[-1] == "macro"
    for finding in ray_cxr.FINDINGS:
        y = joined[finding]
        assert (found.loc[finding, "n"], found.loc[finding, "positives"]) == (y.notna().sum(), y.sum())
        if 0 < y.sum() < len(y):
            expected = roc_auc_score(y.astype(int), joined[f"p_{finding}"])
            assert found.loc[finding, "auroc"] == pytest.approx(expected)
            assert found.loc[finding, "auroc_low"] <= expected <= found.loc[finding, "auroc_high"]
        else:
            assert np.isnan(found.loc[finding, "auroc"])
            assert found.loc[finding, "reason"]
    in_memory = ray_cxr.evaluate(frame, labels, n_resamples=20)
    pd.testing.assert_series_equal(in_memory["auroc"], found["auroc"])
    test = ray_cxr.evaluate(frame, labels, split="test", n_resamples=20)
    assert test["n"].max() < found["n"].max()


def test_wrong_tables_are_named(frame: pd.DataFrame, labels: pd.DataFrame) -> None:
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (frame, labels, {"split": "dev"}, "split 'dev'"),
        (frame, labels, {"n_resamples": 0}, "n_resamples is 0"),
        (frame, labels, {"prevalences": {"Effusion": 2}}, "Effusion: 2"),
        (frame.drop(columns="image_id"), labels, {}, "no column image_id"),
        (frame, labels.drop(columns="image_id"), {}, "no column image_id"),
        (frame, labels.assign(Effusion=7), {}, "labels: column Effusion holds"),
        (frame, labels.assign(image_id=[f"x{i}" for i in range(len(labels))]), {}, "no image in common"),
    ]
    for scores, truth, options, message in cases:
        with pytest.raises(ray_cxr.RayCxrError, match=re.escape(message)):
            ray_cxr.evaluate(scores, truth, **options)
    with pytest.raises(ray_cxr.RayCxrError, match="findings that have both"):
        ray_cxr.plot_calibration(frame, labels, findings=["Measles"])


def test_worklist_has_the_most_urgent_study_first_and_failures_last(frame: pd.DataFrame) -> None:
    found = ray_cxr.worklist(frame)
    priorities = found["priority"].dropna().to_numpy()
    assert len(priorities) > 1
    assert (np.diff(priorities) <= 0).all()
    assert found["priority"].isna().to_numpy()[len(priorities) :].all()
    assert sorted(found["image_id"]) == sorted(found["image_id"].unique())
    assert {"top_finding", "flagged", "p_Effusion"} <= set(found.columns)


@pytest.mark.slow
def test_explain_gives_a_map_per_image_of_its_top_finding_or_the_named_one(tiny_bundle: Any, phantoms: Any) -> None:
    path = next(p for p in sorted(phantoms.images.rglob("*.png")) if p.stat().st_size > 1000)
    image = load_image(str(path))
    top = tiny_bundle.predict([path])["top_finding"][0]
    from_file, from_array = tiny_bundle.explain([path, image])
    assert (from_file.finding, from_file.rank, from_file.image_id) == (top, 1, path.name)
    assert from_array.image_id == "array_1"
    np.testing.assert_allclose(from_file.cells, from_array.cells, atol=1e-5)
    assert from_file.cells.dtype == np.float32
    assert from_file.cells.min() >= 0
    assert from_file.project().shape == image.shape
    assert from_file.draw(path, side=100).shape == (100, 100, 3)
    (named,) = tiny_bundle.explain(path, "Hernia")
    assert named.finding == "Hernia"
    assert named.p == pytest.approx(tiny_bundle.predict([path], precision="fp32")["p_Hernia"][0], abs=1e-4)
    (occluded,) = tiny_bundle.explain([image], "Hernia", method="occlusion")
    assert occluded.cells.shape == (7, 7)
    assert tiny_bundle.explain([]) == []
    with pytest.raises(ray_cxr.RayCxrError, match="predicts Atelectasis"):
        tiny_bundle.explain([image], "Measles")
    with pytest.raises(ray_cxr.RayCxrError, match=r"missing: nothing\.png"):
        tiny_bundle.explain(["nothing.png"])


@pytest.mark.slow
def test_examples_of_the_guide_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {}
    *blocks, training = GUIDE
    for block in blocks:
        exec(block, namespace)
    printed = capsys.readouterr().out
    assert re.search(r"missing.png\s+error\s+missing", printed)
    assert namespace["overlay"].shape == (320, 320, 3)
    assert (workplace / "calibration.png").stat().st_size > 1000
    assert "ray_cxr.train(" in training
    shown = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert [name for name in ray_cxr.__all__ if not re.search(rf"\b{name}\b", shown)] == ["__version__"]


@pytest.mark.slow
def test_notebook_runs_and_has_small_outputs(workplace: Path) -> None:
    path = ROOT / "examples" / "first_look.ipynb"
    cells = notebooks.read_cells(path)
    results = notebooks.run_cells(cells)
    frames = [value for _, value in results if isinstance(value, pd.DataFrame)]
    assert [len(value) > 0 for value in frames] == [True] * 3
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in code), "store them with tests/notebooks.py"
    assert path.stat().st_size < 300_000


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_training_example_of_the_guide_runs(
    shared_ray: None, workplace: Path, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from conftest import replace_ray

    from ray_cxr.config import PrepareSettings
    from ray_cxr.data.prepared import prepare

    with replace_ray():
        prepare(manifest, workplace / "runs" / "prepared", PrepareSettings(sizes=(64,)))
    namespace: dict[str, Any] = {"ray_cxr": ray_cxr}
    exec(GUIDE[-1], namespace)
    assert "epoch 1 of 1" in capsys.readouterr().out
    assert namespace["trained"].findings == ray_cxr.FINDINGS
    assert pq.read_table(workplace / "runs" / "small" / "bundle" / "split.parquet").num_rows
    with pytest.raises(ray_cxr.RayCxrError, match="epoch"):
        ray_cxr.train(workplace / "runs" / "prepared", workplace / "runs" / "other", epoch=1)
