"""Two real Ray Train workers, left alone, killed and continued: all end with the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest

import ray_cxr
from ray_cxr.config import TrainSettings
from ray_cxr.errors import RayCxrError
from ray_cxr.training import trainer

pytestmark = pytest.mark.ray
SETTINGS: dict[str, Any] = {
    "backbone": "TinyCNN",
    "weights": "none",
    "size": 64,
    "batch_size": 6,
    "epochs": 3,
    "min_positives": 2,
    "optimizer": "sgd",
    "learning_rate": 0.02,
    "sync_batchnorm": True,
    "clip_norm": 1.0,
    "ema": 0.9,
    "schedule": "cosine",
    "warmup_epochs": 0.5,
    "rotation": 5.0,
    "checkpoint_steps": 4,
}
#: Better until the fourth epoch, and clearly worse in the fifth, which is the last: what a kill costs would show in the
#: weights that the bundle gets.
UNTIL_WORSE: dict[str, Any] = {"epochs": 8, "patience": 1, "learning_rate": 0.1, "seed": 7}
#: What a run leaves but for its times.
NUMBERS = ["epoch", "loss", "val_loss", "val_auroc", "learning_rate"]


def arguments(prepared: Path, out: Path, workers: int, **changes: object) -> list[str]:
    settings = {**SETTINGS, **changes}
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={str(value).lower()}")]
    return [
        "train", str(prepared), "--out", str(out), "--workers", str(workers),
        *(part.replace("tinycnn", "TinyCNN") for part in given),
    ]  # fmt: skip


def outcome(out: Path) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """The numbers of every epoch, and the bundle's weights."""
    found: dict[str, np.ndarray] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item[()]

    with h5py.File(ray_cxr.load_bundle(out / "bundle").path / "model.weights.h5") as file:
        file.visititems(visit)
    return pd.read_csv(out / "metrics.csv")[NUMBERS], found


def assert_same_bits(out: Path, expected: tuple[pd.DataFrame, dict[str, np.ndarray]]) -> None:
    numbers, weights = outcome(out)
    pd.testing.assert_frame_equal(numbers, expected[0], check_exact=True)
    assert set(weights) == set(expected[1])
    for name, value in expected[1].items():
        np.testing.assert_array_equal(weights[name], value, err_msg=name)


def at(epoch: int, step: int, rank: int, once: Path | None, act: Callable[[Any], None]) -> Callable[[], list[Any]]:
    """Callbacks that act before one step of one worker; with `once` only in the first life of that worker."""

    def make() -> list[Any]:
        import json
        import os

        import keras

        class Act(keras.callbacks.Callback):
            def on_epoch_begin(self, number: int, logs: object = None) -> None:
                self.now = number + 1

            def on_train_batch_begin(self, batch: int, logs: object = None) -> None:
                mine = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
                if (self.now, batch + 1, mine) == (epoch, step, rank) and not (once and once.exists()):
                    if once:
                        once.write_text("done")
                    act(self.model)

        return [Act()]

    return make


@pytest.mark.timeout(600)  # four starts of Ray Train, the untouched run's among them
def test_a_killed_command_and_then_a_killed_worker_end_with_the_same_weights(
    untouched, prepared: Path, tmp_path: Path
) -> None:
    """SIGKILL of the command and all that it started, Ray included; then, in its second life, of one worker."""
    out = tmp_path / "run"
    program = [sys.executable, "-m", "ray_cxr.cli", *arguments(prepared, out, 2, **UNTIL_WORSE)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    # Ray Train takes note of one checkpoint in two seconds and workers wait for it: the third epoch is far.
    noted = out / "ray" / "checkpoint_manager_snapshot.json"
    with open(tmp_path / "log", "w") as log:
        first = subprocess.Popen(program, start_new_session=True, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + 200
        while not ((out / "metrics.csv").exists() and noted.exists()):  # the first epoch is done, the second has begun
            assert first.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(first.pid, signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
    assert not (out / "bundle").exists()

    def kill(model: Any) -> None:
        import os
        import signal
        import time

        time.sleep(6)  # Ray Train takes note of a checkpoint within about two seconds
        os.kill(os.getpid(), signal.SIGKILL)

    said: list[str] = []
    settings = TrainSettings(**{**SETTINGS, **UNTIL_WORSE}, workers=2)
    callbacks = at(3, 6, 1, tmp_path / "once", kill)
    trainer.train(prepared, out, settings, callbacks=callbacks, on_event=said.append)
    assert (tmp_path / "once").exists()
    lost = said.index("train: WARNING: a worker failed or was lost; Ray Train has started all of them again")
    assert [line for line in said[:lost] if line.startswith("train: continues after epoch")]
    assert said[lost + 1] == "train: continues after epoch 2, step 4"
    assert not any("RANDOM weights" in line for line in said), "only a run that begins starts from such"
    assert_same_bits(out, outcome(untouched.out))


def test_a_loss_that_is_not_finite_ends_the_run_and_names_step_and_images(prepared: Path, tmp_path: Path) -> None:
    """Told by both workers at the same step."""

    def spoil(model: Any) -> None:
        kernel = model.get_layer("logits").kernel
        kernel.assign(kernel * float("nan"))

    settings = TrainSettings(**SETTINGS, workers=2, max_failures=0)
    with pytest.raises(RayCxrError, match="the loss is nan at epoch 1, step 3; lower the learning rate") as caught:
        trainer.train(
            prepared, tmp_path / "run", settings, callbacks=at(1, 3, 0, None, spoil), on_event=lambda line: None
        )
    assert str(caught.value).count("_0") == 6
    assert not (tmp_path / "run" / "bundle").exists()
