"""A model that is scored and reported on the images and labels of another hospital. Without Ray."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

COLUMNS = [
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
]
Command = Callable[..., tuple[int, str, str]]


def make_hospital(root: Path, images: list[Path]) -> Path:
    """Write a folder and a table as CheXpert has them."""
    rows = []
    for i, image in enumerate(images):
        name = f"CheXpert-v1.0-small/train/patient{i // 2:05d}/study{i % 2 + 1}/view1_frontal.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, root / name)
        marks: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        marks |= {"Edema": ["0.0", "1.0", "-1.0"][i % 3], "Pleural Effusion": ["1.0", "0.0"][i % 2]}
        rows.append({"Path": name, "Sex": "Female", "Age": 60, "Frontal/Lateral": "Frontal", "AP/PA": "AP", **marks})
    pd.DataFrame(rows).to_csv(root / "train.csv", index=False)
    return root / "train.csv"


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_external_images_are_reported_as_such(
    tiny_bundle: Any, phantoms: Any, tmp_path: Path, command: Command
) -> None:
    images = [path for path in sorted(Path(phantoms.images).rglob("*.png")) if path.stat().st_size > 3000][:24]
    table = make_hospital(tmp_path / "hospital", images)
    manifest, scores, out = (tmp_path / name for name in ("m.parquet", "scores", "report"))
    assert command("manifest", table, "--images", tmp_path / "hospital", "--out", manifest)[0] == 0
    assert command("score", "--model", tiny_bundle.path, "--manifest", manifest, "--out", scores)[0] == 0
    given = ("report", scores, "--manifest", manifest, "--out", out)
    code, _, err = command(*given, "--split", "external")
    assert code == 0, err
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["split"] == "external"
    assert "external" in metrics["split_label"]
    assert (metrics["n_images"], metrics["n_patients"]) == (24, 12)
    edema, effusion = metrics["findings"]["Edema"], metrics["findings"]["Effusion"]
    assert (edema["n"], edema["positives"]) == (16, 8)
    assert (effusion["n"], effusion["positives"]) == (24, 12)
    # CheXpert has no hernias: they are not negative.
    assert (metrics["findings"]["Hernia"]["n"], metrics["findings"]["Hernia"]["auroc"]) == (0, None)
    assert command(*given, "--split", "test")[0] == 2
    # A patient who trained the model is no patient of another hospital.
    trained = pd.read_parquet(tiny_bundle.path / "split.parquet")
    rows = pd.read_parquet(manifest)
    rows["patient_id"] = trained.loc[trained["split"] == "train", "patient_id"].dropna().iloc[0]
    rows.to_parquet(manifest)
    code, _, err = command(*given, "--split", "external")
    assert code == 2
    assert "trained this model" in err
