"""Two real Ray Train workers, left alone, killed and resumed: every run ends with the same bits."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import ray_cxr
from ray_cxr import cli
from ray_cxr.config import TrainSettings, build
from ray_cxr.models.classifier import stored_arrays
from ray_cxr.training import trainer

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
#: Everything that has a state or is drawn at random. The validation AUROC rises in the second epoch and falls in the
#: third, which is the last then: what a kill loses would show in the weights of the bundle.
MODEL = {"backbone": "TinyCNN", "weights": "none", "size": 64, "batch_size": 6, "sync_batchnorm": "true"}
STEPS = {"optimizer": "sgd", "learning_rate": 0.3, "clip_norm": 1.0, "ema": 0.9, "schedule": "cosine", "rotation": 5.0}
EPOCHS = {"epochs": 8, "patience": 1, "warmup_epochs": 0.5, "checkpoint_steps": 4, "min_positives": 2}
SETTINGS: dict[str, Any] = MODEL | STEPS | EPOCHS
#: The columns of metrics.csv that are not times.
NUMBERS = ["epoch", "loss", "val_loss", "val_auroc", "learning_rate"]


def arguments(prepared: Path, out: Path, workers: int, **changes: object) -> list[str]:
    settings = [part for key, value in (SETTINGS | changes).items() for part in ("--set", f"{key}={value}")]
    return ["train", str(prepared), "--out", str(out), "--workers", str(workers), *settings]


def outcome(out: Path) -> tuple[pd.DataFrame, dict[str, list[np.ndarray]]]:
    """Return the numbers of every epoch and the weights in the bundle."""
    weights = stored_arrays(ray_cxr.load_bundle(out / "bundle").path / "model.weights.h5")
    return pd.read_csv(out / "metrics.csv")[NUMBERS], weights


def assert_same_bits(out: Path, expected: Path) -> None:
    (numbers, weights), (expected_numbers, expected_weights) = outcome(out), outcome(expected)
    pd.testing.assert_frame_equal(numbers, expected_numbers, check_exact=True)
    assert set(weights) == set(expected_weights)
    for name, arrays in expected_weights.items():
        for found, array in zip(weights[name], arrays, strict=True):
            np.testing.assert_array_equal(found, array, err_msg=name)


def act_in_mid_epoch_2(rank: int, marker: Path, act: Callable[[], None]) -> Callable[[], list[Any]]:
    """Return callbacks that act before step 5 on one worker, and only while `marker` does not exist."""

    def make() -> list[Any]:
        import json
        import os

        from keras.callbacks import LambdaCallback

        epochs: list[int] = []

        def before_step(batch: int, logs: object) -> None:
            this_rank = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
            if (epochs[-1], batch, this_rank) == (1, 4, rank) and not marker.exists():
                marker.write_text("reached", encoding="utf-8")
                act()

        return [LambdaCallback(on_epoch_begin=lambda n, logs: epochs.append(n), on_train_batch_begin=before_step)]

    return make


def wait_for_checkpoint(out: Path) -> Callable[[], None]:
    """Return a function that waits until Ray Train has recorded the checkpoint during epoch 2."""
    snapshot = out / "ray" / "checkpoint_manager_snapshot.json"

    def wait() -> None:
        import contextlib
        import json
        import time

        epoch = 0
        while epoch < 2:
            time.sleep(0.05)
            with contextlib.suppress(OSError, ValueError, TypeError):
                latest = json.loads(snapshot.read_text(encoding="utf-8"))["latest_checkpoint_result"]
                epoch = latest["metrics"]["epoch"]

    return wait


def test_a_killed_command_resumes_to_the_same_weights(uninterrupted, prepared: Path, tmp_path: Path, command) -> None:
    """SIGKILL of the command and all that it started, Ray included; `main` below is the command."""
    out, marker = tmp_path / "run", tmp_path / "marker"
    given = arguments(prepared, out, 2)
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with open(tmp_path / "log", "wb") as log:
        program = [sys.executable, __file__, str(marker), *given]
        process = subprocess.Popen(program, start_new_session=True, stdout=log, stderr=log, env=environment)
        try:
            deadline = time.monotonic() + 500
            while not marker.exists():
                assert process.poll() is None, (tmp_path / "log").read_text(encoding="utf-8")
                assert time.monotonic() < deadline
                time.sleep(0.05)
            wait_for_checkpoint(out)()
        finally:
            os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (out / "bundle").exists()
    code, text, error = command(*given)
    assert code == 0, error
    start = json.loads((out / "started.json").read_text(encoding="utf-8"))
    assert (start["epoch"], start["step"]) == (1, 4)
    assert "RANDOM weights" not in text, "only a new run starts from random weights"
    assert_same_bits(out, uninterrupted.out)


@pytest.mark.long
def test_a_killed_worker_is_restarted_to_the_same_weights(uninterrupted, prepared: Path, tmp_path: Path) -> None:
    wait = wait_for_checkpoint(tmp_path / "run")

    def kill() -> None:
        import os
        import signal

        wait()
        os.kill(os.getpid(), signal.SIGKILL)

    lines: list[str] = []
    callbacks = act_in_mid_epoch_2(1, tmp_path / "marker", kill)
    settings = build(TrainSettings, SETTINGS | {"workers": 2})
    trainer.train(prepared, tmp_path / "run", settings, callbacks=callbacks, on_event=lines.append)
    lost = next(i for i, line in enumerate(lines) if "a worker failed or was lost" in line)
    assert "epoch 2 after step 4" in lines[lost + 1]
    assert_same_bits(tmp_path / "run", uninterrupted.out)


@pytest.mark.long
@pytest.mark.parametrize(("rank", "is_stopped"), [(1, True), (0, True), (1, False)])
def test_a_worker_that_hangs_is_replaced(
    rank: int, is_stopped: bool, uninterrupted, prepared: Path, tmp_path: Path
) -> None:
    """SIGSTOP, or a main thread that waits forever: the process lives, so that Ray notices nothing."""
    wait = wait_for_checkpoint(tmp_path / "run")

    def hang() -> None:
        import os
        import signal
        import time

        wait()
        if is_stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            time.sleep(3600)

    lines: list[str] = []
    callbacks = act_in_mid_epoch_2(rank, tmp_path / "marker", hang)
    settings = build(TrainSettings, SETTINGS | {"workers": 2, "step_timeout_s": 40})
    started = time.monotonic()
    trainer.train(prepared, tmp_path / "run", settings, callbacks=callbacks, on_event=lines.append)
    assert time.monotonic() - started < 200
    stalled = next(i for i, line in enumerate(lines) if "Ray Train restarted" in line)
    # Without worker 0 the others lose TensorFlow's coordinator, which ends them.
    expected = {(1, True): "1 stopped answering", (1, False): "no worker finished a step in 4"}
    assert expected.get((rank, is_stopped), "lost") in lines[stalled], lines
    assert "epoch 2 after step 4" in lines[stalled + 1]
    assert_same_bits(tmp_path / "run", uninterrupted.out)


def main() -> None:
    """Run a command of `ray-cxr`, but hold worker 0 before step 5 of epoch 2 until it is killed."""

    def hold() -> None:
        import time

        time.sleep(3600)

    callbacks = act_in_mid_epoch_2(0, Path(sys.argv[1]), hold)
    trainer.train = functools.partial(trainer.train, callbacks=callbacks)
    sys.exit(cli.main(sys.argv[2:]))


if __name__ == "__main__":
    main()
