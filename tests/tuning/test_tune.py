"""`tune` from outside: real trials, each a run of real Ray Train workers; killed, resumed and continued."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
from studies import load_study, read_rows

import ray_cxr
from ray_cxr import config
from ray_cxr.data.prepared import PreparedSet

pytestmark = pytest.mark.ray

#: Two small backbones stand in for ResNet and DenseNet; dense layers are searched with the first only.
SHORT = """
train = { weights = "none", size = 64, epochs = 1, batch_size = 16, min_positives = 2 }
[tune]
trials = 2
scheduler = "none"
enqueue = [
    { backbone = "TinyCNN", learning_rate = 0.003, dense = [16] },
    { backbone = "MobileNetV3Small", learning_rate = 0.001 },
]
[tune.space]
backbone = ["TinyCNN", "MobileNetV3Small"]
learning_rate = { low = 1e-3, high = 1.0, log = true }
[tune.space.when."backbone=TinyCNN"]
dense = [[], [16]]
"""
#: Trial 0 learns, trial 1 has another backbone, trial 2 starts from weights that are not numbers, and the learning rate
#: of trial 3 is too high.
LONG = """
train = { weights = "none", size = 64, epochs = 5, batch_size = 8, min_positives = 2, pooling = "avgmax" }
[tune]
trials = 4
grace_epochs = 2
reduction_factor = 2
enqueue = [
    { backbone = "TinyCNN", learning_rate = 0.003, weights = "none" },
    { backbone = "MobileNetV3Small", learning_rate = 0.001, weights = "none" },
    { backbone = "TinyCNN", learning_rate = 0.003, weights = "NAN" },
    { backbone = "TinyCNN", learning_rate = 10.0, weights = "none" },
]
[tune.space]
backbone = ["TinyCNN", "MobileNetV3Small"]
learning_rate = { low = 1e-3, high = 10.0, log = true }
weights = ["none", "NAN"]
"""


def check_bundle(out: Path, prepared: Path) -> int:
    """Check that the bundle is that of the best trial, whose number is returned, and can predict."""
    rows = read_rows(out)
    best = rows.loc[rows["state"] != "failed", "val_auroc"].idxmax()
    bundle = ray_cxr.load_bundle(out / "bundle")
    tuned = bundle.info["provenance"]["tuned"]
    assert (tuned["trial"], tuned["trials"], tuned["epochs"]) == (best, len(rows), rows.loc[best, "epochs"])
    assert bundle.info["provenance"]["best_epoch"] == rows.loc[best, "best_epoch"]
    assert bundle.info["provenance"]["validation"]["macro_auroc"] == rows.loc[best, "val_auroc"]
    assert bundle.architecture.backbone == rows.loc[best, "backbone"]
    assert len(bundle.predict(PreparedSet(prepared, 64).load("val").images[:3])) == 3
    if "running" not in set(rows["state"]):
        assert [path.parent.name for path in out.glob("trials/*/ray")] == [f"{best:04d}"]  # no other checkpoints
    return int(best)


def test_tune_compares_two_backbones(shared_ray: None, prepared: Path, tmp_path: Path, command) -> None:
    out, settings = tmp_path / "study", tmp_path / "search.toml"
    settings.write_text(SHORT, encoding="utf-8")
    code, _, err = command("tune", prepared, "--out", out, "--config", settings)
    assert code == 0, err
    rows = read_rows(out)
    assert rows["state"].tolist() == ["finished"] * 2
    assert rows["backbone"].tolist() == ["TinyCNN", "MobileNetV3Small"]
    assert rows["param_dense"].fillna("none").tolist() == ["[16]", "none"]
    assert [trial.value for trial in load_study(out).trials] == rows["val_auroc"].tolist()
    best = check_bundle(out, prepared)
    chosen = config.load(out / "best.toml").train
    assert (chosen.backbone, chosen.learning_rate) == tuple(rows.loc[best, ["backbone", "param_learning_rate"]])
    assert "MobileNetV3Small" in (out / "report.html").read_text(encoding="utf-8")
    # The same command does nothing, and another search is refused.
    before = (out / "bundle" / "SHA256SUMS").stat().st_mtime_ns
    code, _, err = command("tune", prepared, "--out", out, "--config", settings)
    assert code == 0, err
    assert (out / "bundle" / "SHA256SUMS").stat().st_mtime_ns == before
    code, _, err = command("tune", prepared, "--out", out, "--resume", "--set", "scheduler=median")
    assert (code, err.count("\n")) == (2, 1)
    assert "tune.scheduler none (now median)" in err


@pytest.mark.long
@pytest.mark.timeout(600)  # Ray Train starts twice
def test_a_search_in_a_bucket_continues(
    shared_ray, bucket, prepared: Path, tmp_path: Path, command, monkeypatch
) -> None:
    """The record is Optuna's SQLite file, which the bucket holds without a database server."""
    monkeypatch.setenv("RAY_CXR_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    settings = tmp_path / "search.toml"
    settings.write_text(SHORT, encoding="utf-8")
    bucket.upload(prepared, "tune/set")
    given = ["tune", bucket("tune/set"), "--out", bucket("tune/study")]

    def run(*more: object) -> str:
        code, printed, err = command(*given, *more)
        assert code == 0, err
        return printed

    run("--config", settings, "--trials", 1)
    names = {key.removeprefix("tune/study/") for key in bucket.keys("tune/study/")}
    expected = {"study.db", "trials.parquet", "summary.json", "report.html", "history.png", "best.toml"}
    expected |= {"bundle/SHA256SUMS", "trials/0000/metrics.csv", "trials/0000/validation.npz", "begun.json"}
    assert expected <= names
    assert any(name.startswith("trials/0000/ray/checkpoint") for name in names)
    first = bucket.get("tune/study/trials/0000/metrics.csv")

    # As after a kill while the bundle was replaced; another trial follows on another machine.
    bucket.client.delete_object(Bucket="chests", Key="tune/study/bundle/SHA256SUMS")
    bucket.client.delete_object(Bucket="chests", Key="tune/study/summary.json")
    assert "1 trials have already ended and are kept" in run("--resume", "--trials", 2)
    assert bucket.get("tune/study/trials/0000/metrics.csv") == first
    rows = pd.read_parquet(io.BytesIO(bucket.get("tune/study/trials.parquet")))
    assert rows["number"].tolist() == [0, 1]
    assert rows["state"].tolist() == ["finished"] * 2
    (tmp_path / "study.db").write_bytes(bucket.get("tune/study/study.db"))
    assert [trial.value for trial in load_study(tmp_path).trials] == rows["val_auroc"].tolist()
    bundle = ray_cxr.load_bundle(bucket("tune/study/bundle"))
    best = int(rows["val_auroc"].argmax())
    assert bundle.info["provenance"]["tuned"]["trial"] == best
    kept = {key.split("/")[3] for key in bucket.keys("tune/study/trials/") if "/ray/checkpoint" in key}
    assert kept == {f"{best:04d}"}, "checkpoints of the best trial alone"
    assert "is finished already" in run("--resume", "--trials", 2)
    assert not list(tmp_path.glob("s3*"))


@pytest.mark.long
@pytest.mark.timeout(900)  # Ray Train starts 14 times
def test_tune_confirms_two_backbones(shared_ray: None, prepared: Path, tmp_path: Path, command) -> None:
    out, settings = tmp_path / "study", tmp_path / "search.toml"
    settings.write_text(SHORT, encoding="utf-8")
    arguments = ("tune", prepared, "--out", out, "--config", settings, "--confirm", "6")
    code, printed, err = command(*arguments)
    assert code == 0, err
    assert "confirm=6 adds 12 trainings of all epochs" in printed
    comparison = json.loads((out / "summary.json").read_text(encoding="utf-8"))["comparison"]
    confirmation = comparison["confirmation"]
    assert (confirmation["a"], confirmation["b"]) == ("MobileNetV3Small", "TinyCNN")
    assert [pair["trial"] for pair in confirmation["pairs"]] == [1, 0] * 3
    assert [pair["seed"] for pair in confirmation["pairs"]] == list(range(1, 7))
    assert len({pair["b"] for pair in confirmation["pairs"]}) == 6, "new seeds and settings"
    assert confirmation["test"]["n"] == 6
    assert printed.splitlines()[-6:-4] == [comparison["verdict"]["headline"], comparison["verdict"]["details"]]
    assert len(read_rows(out)) == 2
    check_bundle(out, prepared)
    runs = out / "confirm" / "MobileNetV3Small-TinyCNN"
    written = {path: path.stat().st_mtime_ns for path in runs.glob("*/metrics.csv")}
    assert len(written) == 12
    assert not list(runs.glob("*/ray"))
    # The same command does nothing.
    code, printed, err = command(*arguments)
    assert (code, "finished already" in printed) == (0, True), err
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*/metrics.csv")} == written


class Study(NamedTuple):
    """A search that was killed and resumed."""

    prepared: Path
    out: Path
    printed: str  # by the last run
    left: int  # the trial that the kill interrupted
    written: dict[int, float]  # when the trials were written that were done before


def write_nan_weights(path: Path) -> Path:
    """Write weights of a TinyCNN of which one kernel is not a number."""
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
def study(shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A search of 100 patients that Ctrl-C stops in its first trial and SIGKILL in its second, and that is resumed."""
    from conftest import replace_ray

    from ray_cxr.cli import main
    from ray_cxr.config import PrepareSettings
    from ray_cxr.data.manifest import write_manifest
    from ray_cxr.data.manifest_builder import build_manifest
    from ray_cxr.data.prepared import prepare
    from ray_cxr.imaging.phantoms import write_phantoms

    folder = tmp_path_factory.mktemp("tune")
    prepared, out, settings, log = (folder / name for name in ("prepared", "study", "search.toml", "log"))
    drawn = write_phantoms(folder / "drawn", patients=100, size=128, broken=False)
    split: dict[str, Any] = {"split": "patient", "fractions": (0.5, 0.3, 0.2), "seed": 1}
    table, _ = build_manifest([str(drawn.table)], images=str(drawn.images), **split)
    write_manifest(table, folder / "m.parquet")
    with replace_ray():
        prepare(folder / "m.parquet", prepared, PrepareSettings(sizes=(64,)))
    settings.write_text(LONG.replace("NAN", str(write_nan_weights(folder / "nan.weights.h5"))), encoding="utf-8")
    program = [sys.executable, "-m", "ray_cxr.cli", "tune", str(prepared), "--out", str(out), "--config", str(settings)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}

    def run_until(pattern: str, number: signal.Signals) -> tuple[int, str]:
        """Run the command until its output matches, send a signal to all its processes, and return code and output."""
        with open(log, "w", encoding="utf-8") as stream:
            process = subprocess.Popen(program, start_new_session=True, stdout=stream, stderr=stream, env=environment)
        while not re.search(pattern, log.read_text(encoding="utf-8")):
            assert process.poll() is None, log.read_text(encoding="utf-8")
            time.sleep(0.05)
        os.killpg(process.pid, number)
        return process.wait(), log.read_text(encoding="utf-8")

    code, interrupted = run_until("epoch 1 of 5", signal.SIGINT)
    assert code == 130, interrupted
    assert "Traceback" not in interrupted
    assert all((out / name).exists() for name in ("best.toml", "report.html"))
    check_bundle(out, prepared)
    code, killed = run_until(r"is (finished|stopped)(.|\n)*, epoch [1-4] of 5", signal.SIGKILL)
    assert code == -signal.SIGKILL
    left = int(re.findall(r"trial (\d+), epoch", killed)[-1])
    done = map(int, re.findall(r"trial (\d+) is (?:finished|stopped)", killed))
    written = {number: (out / f"trials/{number:04d}/metrics.csv").stat().st_mtime for number in done}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["tune", str(prepared), "--out", str(out), "--resume"]) == 0
    return Study(prepared, out, printed.getvalue(), left, written)


@pytest.mark.long
@pytest.mark.timeout(900)  # Ray starts twice, and Ray Train seven times
def test_resume_keeps_finished_trials_and_continues_the_interrupted_one(study: Study) -> None:
    assert study.left not in study.written
    for number, when in study.written.items():
        assert (study.out / f"trials/{number:04d}/metrics.csv").stat().st_mtime == when
        assert f"trial {number} starts" not in study.printed
    assert re.search(rf"tune: trial {study.left} .* checkpoint, [1-5] epochs", study.printed), study.printed
    rows = read_rows(study.out)
    assert rows.loc[study.left, "restarts"] >= 1
    assert rows.loc[study.left, "state"] in ("finished", "stopped")
    for curve in rows["curve"]:
        assert [point["epoch"] for point in curve] == list(range(1, len(curve) + 1))


@pytest.mark.long
def test_failed_and_stopped_trials_are_recorded(study: Study) -> None:
    rows = read_rows(study.out)
    assert rows["state"].tolist()[2:] == ["failed", "stopped"]
    assert len(rows) == 4
    assert rows.loc[0, "state"] == "finished"
    assert rows.loc[2, "reason"].startswith("the loss is nan")
    assert 2 <= rows.loc[3, "epochs"] < 5  # it trains until the decision arrives
    assert rows.loc[3, "val_auroc"] < rows.loc[0, "val_auroc"]
    trials = load_study(study.out).trials
    assert [trial.state.name for trial in trials][2:] == ["FAIL", "PRUNED"]
    assert trials[0].value == rows.loc[0, "val_auroc"]
    aurocs = [point["val_auroc"] for point in rows.loc[3, "curve"]]
    assert trials[3].intermediate_values == {epoch: max(aurocs[:epoch]) for epoch in (1, 2)}


@pytest.mark.long
def test_training_with_best_toml_repeats_the_best_trial(study: Study, tmp_path: Path, command) -> None:
    best = check_bundle(study.out, study.prepared)
    code, _, err = command("train", study.prepared, "--out", tmp_path / "run", "--config", study.out / "best.toml")
    assert code == 0, err
    columns = ["epoch", "loss", "val_loss", "val_auroc", "learning_rate"]
    trial = pd.read_csv(study.out / "trials" / f"{best:04d}" / "metrics.csv")[columns]
    again = pd.read_csv(tmp_path / "run" / "metrics.csv")[columns]
    pd.testing.assert_frame_equal(again.iloc[: len(trial)], trial, check_exact=True)


@pytest.mark.long
def test_two_objectives_and_two_workers_per_trial(shared_ray: None, prepared: Path, tmp_path: Path, command) -> None:
    """The speed of the exported model is an objective, and Optuna's best trials are the front."""
    settings = ["train.backbone=TinyCNN", "train.weights=none", "train.size=64", "train.epochs=1", "known=false"]
    settings += ["train.batch_size=16", "objectives=['images_per_second', 'auroc']", "trials=2", "scheduler=none"]
    settings += ["space={dense=[[], [512, 512]]}", "enqueue=[{dense=[]}, {dense=[512, 512]}]"]
    out = tmp_path / "study"
    options = [part for setting in settings for part in ("--set", setting)]
    code, printed, err = command("tune", prepared, "--out", out, "--workers", 2, *options)
    assert code == 0, err
    assert re.search(r"1 trial .* 2 workers .* 1 CPU", printed)
    rows = read_rows(out)
    assert rows["state"].tolist() == ["finished"] * 2
    assert (rows["images_per_second"] > 0).all()
    assert len(list((out / "speeds").iterdir())) == 2
    study = load_study(out)
    assert study.metric_names == ["auroc", "images_per_second"]
    values = [trial.values for trial in study.trials]  # noqa: PD011
    assert values == rows[["val_auroc", "images_per_second"]].to_numpy().tolist()
    front = {a for a in (0, 1) if not all(x <= y for x, y in zip(values[a], values[1 - a], strict=True))}
    assert {trial.number for trial in study.best_trials} == front
