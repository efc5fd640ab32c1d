"""`tune` from outside: real trials, each a run of real Ray Train workers; killed, resumed, looked into."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import optuna
import pandas as pd
import pyarrow.parquet as pq
import pytest

import ray_cxr
from ray_cxr.data.prepared import PreparedSet

pytestmark = pytest.mark.ray

#: What a run leaves but for its times.
NUMBERS = ["epoch", "loss", "val_loss", "val_auroc", "learning_rate"]
#: Trial 0 learns; trial 1 is another backbone; trial 2 starts from weights that are not numbers; trial 3 takes steps
#: that kill the network.
SEARCH = """
[train]
weights = "none"
size = 64
epochs = 3
batch_size = 8
min_positives = 2
pooling = "avgmax"

[tune]
trials = 4
grace_epochs = 2
reduction_factor = 2

[tune.space]
backbone = ["TinyCNN", "MobileNetV3Small"]
learning_rate = {{ low = 1e-3, high = 10.0, log = true }}
weights = ["none", "{nothing}"]
[tune.space.when."backbone=TinyCNN"]
dense = [[], [16]]

[[tune.enqueue]]
backbone = "TinyCNN"
learning_rate = 0.003
weights = "none"
dense = []
[[tune.enqueue]]
backbone = "MobileNetV3Small"
learning_rate = 0.001
weights = "none"
[[tune.enqueue]]
backbone = "TinyCNN"
learning_rate = 0.003
weights = "{nothing}"
dense = []
[[tune.enqueue]]
backbone = "TinyCNN"
learning_rate = 10.0
weights = "none"
dense = [16]
"""


class Study(NamedTuple):
    """A search that was killed and resumed: its folder, its file of settings, and what its two lives said."""

    out: Path
    config: Path
    first: str
    second: str
    kept: float

    def rows(self) -> pd.DataFrame:
        return pq.read_table(self.out / "trials.parquet").to_pandas().set_index("number")


def not_numbers(path: Path) -> Path:
    """Weights of a TinyCNN of which one is not a number."""
    import keras

    from ray_cxr.labels import FINDINGS
    from ray_cxr.models import classifier
    from ray_cxr.models.architecture import Architecture

    keras.utils.set_random_seed(0)
    model = classifier.build(Architecture(backbone="TinyCNN", size=64, findings=FINDINGS, pooling="avgmax"))
    kernel = next(layer for layer in model.layers if hasattr(layer, "kernel")).kernel
    kernel.assign(kernel * float("nan"))
    model.save_weights(str(path))
    return path


@pytest.fixture(scope="module")
def many(ray_here, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred patients at 64 pixels: enough that a network which learns is better than one which does not."""
    from ray_cxr.config import PrepareSettings
    from ray_cxr.data.manifest import build_manifest, write_manifest
    from ray_cxr.data.phantoms import write_phantoms
    from ray_cxr.data.prepared import prepare

    folder = tmp_path_factory.mktemp("many")
    drawn = write_phantoms(folder / "drawn", patients=100, size=128, broken=False)
    table, _ = build_manifest(
        [str(drawn.table)], images=str(drawn.images), split="patient", fractions=(0.5, 0.3, 0.2), seed=1
    )
    write_manifest(table, folder / "m.parquet")
    prepare(folder / "m.parquet", folder / "prepared", PrepareSettings(sizes=(64,)))
    return folder / "prepared"


@pytest.fixture(scope="module")
def study(many: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """SIGKILL of the command and all that it started, in the middle of its second trial; then `--resume`."""
    from contextlib import redirect_stdout
    from io import StringIO

    from ray_cxr.cli import main

    folder = tmp_path_factory.mktemp("tune")
    out, config, log = folder / "study", folder / "search.toml", folder / "log"
    config.write_text(SEARCH.format(nothing=not_numbers(folder / "nothing.weights.h5")))
    program = [sys.executable, "-m", "ray_cxr.cli", "tune", str(many), "--out", str(out), "--config", str(config)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with open(log, "w") as stream:
        first = subprocess.Popen(program, start_new_session=True, stdout=stream, stderr=stream, env=environment)
        deadline = time.monotonic() + 240
        # The one that began second; which of the first two that is, Ray decides.
        while not re.search(r"is (finished|stopped)(.|\n)*epoch 1 of 3", log.read_text()):
            assert first.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        os.killpg(first.pid, signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
    assert not (out / "bundle").exists()
    done = int(re.search(r"trial (\d+) is (?:finished|stopped)", log.read_text())[1])
    kept = (out / "trials" / f"{done:04d}" / "metrics.csv").stat().st_mtime
    with redirect_stdout(StringIO()) as said:
        assert main(["tune", str(many), "--out", str(out), "--resume"]) == 0
    return Study(out, config, log.read_text(), said.getvalue(), kept)


@pytest.mark.timeout(600)  # two starts of Ray, and five of Ray Train
def test_killed_and_resumed_keeps_what_is_done_and_goes_on_where_it_was(study: Study) -> None:
    done = int(re.search(r"trial (\d+) is (?:finished|stopped)", study.first)[1])
    left = int(re.search(r"trial (\d+), epoch 1 of 3(?!(.|\n)*epoch 1 of 3)", study.first)[1])
    assert {done, left} == {0, 1}
    assert "tune: 1 trials are done already and stay as they are" in study.second
    assert (study.out / "trials" / f"{done:04d}" / "metrics.csv").stat().st_mtime == study.kept
    assert f"trial {done} begins" not in study.second
    told = re.search(rf"tune: trial {left} continues from its checkpoint, [12] epochs done", study.second)
    assert told, study.second
    rows = study.rows()
    assert rows.loc[left, "restarts"] == 1
    assert rows.loc[done, "restarts"] == 0
    assert rows.loc[left, "state"] in ("finished", "stopped")
    for curve in rows["curve"]:
        assert [point["epoch"] for point in curve] == list(range(1, len(curve) + 1))


def test_every_trial_ends_as_what_it_was(study: Study) -> None:
    rows = study.rows()
    assert len(rows) == 4
    assert rows.loc[0, "state"] == "finished"
    assert rows.loc[2, "state"] == "failed"
    assert rows.loc[2, "reason"] == "the loss is nan at epoch 1, step 1"
    assert rows.loc[3, "state"] == "stopped"
    assert rows.loc[3, "epochs"] in (2, 3)  # it trains on while the decision is on its way
    assert rows.loc[3, "val_auroc"] < rows.loc[0, "val_auroc"]
    assert "tune: trial 3 is stopped after epoch 2" in study.second
    assert "trial 2 failed: the loss is nan" in study.second
    assert set(rows["backbone"]) == {"TinyCNN", "MobileNetV3Small"}
    storage = f"sqlite:///{study.out / 'study.db'}"
    (name,) = optuna.get_all_study_names(storage)
    kept = optuna.load_study(study_name=name, storage=storage).trials
    assert [trial.state.name for trial in kept][2:4] == ["FAIL", "PRUNED"]
    assert kept[0].value == rows.loc[0, "val_auroc"]
    assert kept[3].intermediate_values == {
        epoch: max(point["val_auroc"] for point in rows.loc[3, "curve"][:epoch]) for epoch in (1, 2)
    }


def test_a_parameter_of_one_backbone_is_asked_there_alone(study: Study) -> None:
    rows = study.rows()
    tiny = rows["backbone"] == "TinyCNN"
    assert rows.loc[tiny, "param_dense"].notna().all()
    assert rows.loc[~tiny, "param_dense"].isna().all()
    assert json.loads(rows.loc[3, "param_dense"]) == [16]


def test_the_bundle_is_the_best_trials(study: Study, many: Path) -> None:
    rows = study.rows()
    best = rows.loc[rows["state"] != "failed", "val_auroc"].idxmax()
    bundle = ray_cxr.load_bundle(study.out / "bundle")
    tuned = bundle.info["provenance"]["tuned"]
    assert (tuned["trial"], tuned["trials"]) == (best, 4)
    assert bundle.info["provenance"]["validation"]["macro_auroc"] == rows.loc[best, "val_auroc"]
    assert bundle.architecture.backbone == rows.loc[best, "backbone"]
    assert any(bundle.info["calibration"].values())
    images = PreparedSet(many, 64).load("val").images
    assert len(bundle.predict(images[:3])) == 3
    page = (study.out / "report.html").read_text()
    assert "MobileNetV3Small" in page
    assert "the loss is nan" in page
    # Nobody will make a bundle of the others.
    assert [path.parent.name for path in sorted(study.out.glob("trials/*/ray"))] == [f"{best:04d}"]


def test_best_toml_is_the_same_run_again(study: Study, many: Path, tmp_path: Path, command) -> None:
    code, _, err = command("train", many, "--out", tmp_path / "run", "--config", study.out / "best.toml")
    assert code == 0, err
    best = ray_cxr.load_bundle(study.out / "bundle").info["provenance"]["tuned"]["trial"]
    there = pd.read_csv(study.out / "trials" / f"{best:04d}" / "metrics.csv")[NUMBERS]
    again = pd.read_csv(tmp_path / "run" / "metrics.csv")[NUMBERS]
    pd.testing.assert_frame_equal(again.iloc[: len(there)], there, check_exact=True)


def test_the_same_command_again_does_nothing_and_another_search_is_refused(
    study: Study, many: Path, tmp_path: Path, command
) -> None:
    before = (study.out / "bundle" / "SHA256SUMS").stat().st_mtime_ns
    code, out, err = command("tune", many, "--out", study.out, "--config", study.config)
    assert code == 0, err
    assert "is finished already" in out
    assert (study.out / "bundle" / "SHA256SUMS").stat().st_mtime_ns == before
    other = tmp_path / "other.toml"
    other.write_text(study.config.read_text().replace("high = 10.0", "high = 20.0"))
    for arguments, named in (
        (["--config", other], "space.learning_rate"),
        (["--config", study.config, "--set", "train.label_smoothing=0.1"], "train.label_smoothing 0.0 (now 0.1)"),
        (["--resume", "--set", "scheduler=median"], "tune.scheduler asha (now median)"),
    ):
        code, _, err = command("tune", many, "--out", study.out, *arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert named in err
    assert len(study.rows()) == 4


@pytest.mark.long
def test_two_objectives_two_workers_a_trial(prepared: Path, tmp_path: Path, command) -> None:
    """AUROC and the exported network's speed; what Optuna calls best is the front."""
    settings = [
        *("train.backbone=TinyCNN", "train.weights=none", "train.size=64", "train.epochs=1", "train.batch_size=16"),
        *("objectives=['images_per_second', 'auroc']", "trials=2", "scheduler=none", "known=false"),
        "space={dense=[[], [512, 512]]}",
        "enqueue=[{dense=[]}, {dense=[512, 512]}]",
    ]
    out = tmp_path / "study"
    given = [part for setting in settings for part in ("--set", setting)]
    code, said, err = command("tune", prepared, "--out", out, "--workers", 2, *given)
    assert code == 0, err
    assert "1 trial at a time, each of 2 workers of 1 CPU" in said
    rows = pq.read_table(out / "trials.parquet").to_pandas()
    assert rows["state"].tolist() == ["finished"] * 2
    assert (rows["images_per_second"] > 0).all()
    assert rows["images_per_second"].nunique() == 2
    assert len(list((out / "speeds").iterdir())) == 2
    storage = f"sqlite:///{out / 'study.db'}"
    study = optuna.load_study(study_name=optuna.get_all_study_names(storage)[0], storage=storage)
    assert study.metric_names == ["auroc", "images_per_second"]
    values = [trial.values for trial in study.trials]  # noqa: PD011
    assert values == rows[["val_auroc", "images_per_second"]].to_numpy().tolist()
    better = {a for a in (0, 1) if not all(x <= y for x, y in zip(values[a], values[1 - a], strict=True))}
    assert {trial.number for trial in study.best_trials} == better
    assert "Pareto" in (out / "report.html").read_text()
