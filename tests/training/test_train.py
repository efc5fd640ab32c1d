"""`train` from outside: real Ray Train workers, a real bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

import ray_cxr
from ray_cxr.data.prepared import PreparedSet
from ray_cxr.labels import FINDINGS

pytestmark = pytest.mark.ray
SETTINGS = ["backbone=TinyCNN", "weights=none", "size=64", "batch_size=16", "min_positives=2", "learning_rate=0.003"]


RUN = ("epochs=8", "patience=1", "learning_rate=0.05")


def with_settings(*more: str) -> list[str]:
    return [part for setting in (*SETTINGS, *more) for part in ("--set", setting)]


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """As a user runs it, until an epoch is no better than the one before."""
    from ray_cxr.cli import main

    out = tmp_path_factory.mktemp("train") / "run"
    arguments = ["train", str(prepared), "--out", str(out), *with_settings(*RUN)]
    assert main(arguments) == 0
    return out, arguments


def test_leaves_a_bundle_that_says_where_it_comes_from(run: tuple[Path, list[str]], prepared: Path) -> None:
    out, _ = run
    bundle = ray_cxr.load_bundle(out / "bundle")
    source = bundle.info["provenance"]
    assert bundle.findings == FINDINGS
    assert bundle.input_spec.size == 64
    assert source["initial_weights"] == "random"
    assert source["lineage"] == "known"
    assert source["split"]["kind"] == "patient"
    assert source["prepared_digest"] == PreparedSet(prepared, 64).manifest_digest
    assert 1 <= source["best_epoch"] < 8
    assert source["settings"]["epochs"] == 8
    low, high = source["age_range"]
    assert 0 <= low < high <= 120
    card = (out / "bundle" / "MODEL_CARD.md").read_text()
    assert "For research only" in card
    assert "Initial weights: random" in card


def test_validation_auroc_is_that_of_the_bundle_on_the_validation_images(
    run: tuple[Path, list[str]], prepared: Path
) -> None:
    """The number that was reported, computed again from the exported bundle by other code."""
    bundle = ray_cxr.load_bundle(run[0] / "bundle")
    val = PreparedSet(prepared, 64).load("val")
    p = bundle.predict(np.asarray(val.images))[[f"p_{name}" for name in FINDINGS]].to_numpy()
    for j, name in enumerate(FINDINGS):
        row = bundle.info["provenance"]["validation"]["findings"][name]
        y = val.labels[:, j]
        assert (row["n"], row["positives"]) == (len(y), int(y.sum()))
        if 0 < y.sum() < len(y):
            assert row["auroc"] == pytest.approx(roc_auc_score(y, p[:, j]), abs=0.02)
        else:
            assert row["auroc"] is None


def test_split_names_what_trained_and_what_chose_it(run: tuple[Path, list[str]], manifest: Path) -> None:
    split = pq.read_table(run[0] / "bundle" / "split.parquet").to_pandas()
    table = pq.read_table(manifest).to_pandas().set_index("image_id")
    assert set(split["split"]) == {"train", "val"}
    assert (table.loc[split["image_id"], "split"].to_numpy() == split["split"].to_numpy()).all()
    assert (table.loc[split["image_id"], "patient_id"].to_numpy() == split["patient_id"].to_numpy()).all()


def test_stops_for_want_of_patience_and_keeps_the_curve_beyond_the_best_epoch(run: tuple[Path, list[str]]) -> None:
    rows = pd.read_csv(run[0] / "metrics.csv")
    bundle = ray_cxr.load_bundle(run[0] / "bundle")
    best = bundle.info["provenance"]["best_epoch"]
    assert rows["epoch"].tolist() == list(range(1, best + 2))
    assert len(rows) < 8, "the run never got worse: choose another learning rate"
    assert rows["val_auroc"].idxmax() + 1 == best
    assert bundle.info["provenance"]["validation"]["macro_auroc"] == pytest.approx(rows["val_auroc"].max(), abs=1e-12)
    assert [point["epoch"] for point in bundle.model_json()["curves"]] == rows["epoch"].tolist()


def test_same_command_again_does_nothing(run: tuple[Path, list[str]], command) -> None:
    before = (run[0] / "bundle" / "SHA256SUMS").stat().st_mtime_ns
    code, out, _ = command(*run[1])
    assert code == 0
    assert "finished already" in out
    assert (run[0] / "bundle" / "SHA256SUMS").stat().st_mtime_ns == before


def test_another_setting_in_the_same_folder_is_refused(run: tuple[Path, list[str]], prepared: Path, command) -> None:
    code, _, err = command("train", prepared, "--out", run[0], *with_settings(*RUN[:2], "learning_rate=0.1"))
    assert (code, err.count("\n")) == (2, 1)
    assert "name another --out" in err


def test_the_bundles_config_trains_again_unchanged(run: tuple[Path, list[str]], prepared: Path, command) -> None:
    """`--config bundle/config.toml` is the same run: continuing it is doing nothing."""
    code, out, err = command("train", prepared, "--out", run[0], "--config", run[0] / "bundle" / "config.toml")
    assert code == 0, err
    assert "finished already" in out


def test_a_run_cut_short_continues_without_training_again(prepared: Path, tmp_path: Path, command) -> None:
    """The bundle is removed, as if the run had died just before it: no epoch is trained again."""
    import shutil

    out = tmp_path / "run"
    code, said, err = command("train", prepared, "--out", out, *with_settings("epochs=1"))
    assert code == 0, err
    assert "RANDOM weights" in said
    shutil.rmtree(out / "bundle")
    code, said, err = command("train", prepared, "--out", out, *with_settings("epochs=2"))
    assert code == 0, err
    assert "continues after epoch 1" in said
    assert "epoch 1 of 2" not in said
    assert "epoch 2 of 2" in said


def test_weights_that_do_not_fit_are_one_line_and_no_restart(prepared: Path, tmp_path: Path, command) -> None:
    from conftest import make_tiny_bundle

    other = make_tiny_bundle(tmp_path / "other").path
    given = with_settings("epochs=1", "backbone=MobileNetV3Small", f"weights={other}")
    code, _, err = command("train", prepared, "--out", tmp_path / "run", *given)
    assert (code, err.count("\n")) == (2, 1)
    assert "is it for MobileNetV3Small" in err
    code, _, err = command("train", prepared, "--out", tmp_path / "run2", *with_settings(f"weights={tmp_path}/none.h5"))
    assert code == 2
    assert "no such file or bundle" in err


def test_a_run_that_starts_from_a_bundle_carries_on_what_trained_that(
    prepared: Path, tiny_bundle, tmp_path: Path, command
) -> None:
    given = with_settings("epochs=1", f"weights={tiny_bundle.path}", "findings=15")
    code, out, err = command("train", prepared, "--out", tmp_path / "run", *given)
    assert code == 0, err
    assert "started at random: logits of No_Finding" in out
    bundle = ray_cxr.load_bundle(tmp_path / "run" / "bundle")
    split = pq.read_table(bundle.path / "split.parquet").to_pandas().set_index("image_id")
    assert split.loc["00000099_000.png", "patient_id"] == "99"  # from the first bundle
    assert len(split) > 20
    assert bundle.info["provenance"]["initial_weights"] == f"the bundle {tiny_bundle.digest}"
    assert bundle.info["provenance"]["lineage"] == "unknown"  # the first bundle does not say that it knows


def test_no_gpu_is_said_at_once(prepared: Path, tmp_path: Path, command) -> None:
    code, _, err = command("train", prepared, "--out", tmp_path / "run", "--gpu", *with_settings("epochs=1"))
    assert (code, err.count("\n")) == (2, 1)
    assert "Ray has 0" in err
