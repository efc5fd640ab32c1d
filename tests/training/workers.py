"""A program that several real processes run together, as Ray Train's workers do, and write down what came of it.

    python workers.py OUT RANK COUNT PORT

Each scenario trains with the real loop under the real strategy; OUT/<count>-<rank>.npz then holds its arrays by
`scenario/what`. The tests compare ranks with each other and two workers with one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 32
#: Sets whose sizes divide by nothing: not by the batch of 8, not by the workers.
N_TRAIN, N_VAL = 29, 13
#: Adding up in another order moves the last bits, and a step multiplies them.
SGD = {"optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.05, "sync_batchnorm": True}


class Recorder(np.ndarray):
    """Images that remember which rows were asked for, in turn."""

    asked: list[np.ndarray]

    @classmethod
    def of(cls, images: np.ndarray) -> Recorder:
        view = images.view(cls)
        view.asked = []
        return view

    def __getitem__(self, rows: Any) -> Any:
        if isinstance(rows, np.ndarray):
            self.asked.append(rows.copy())
        return np.asarray(super().__getitem__(rows)).view(np.ndarray)


def split(n: int, seed: int = 0, size: int = SIZE) -> Any:
    """Images whose brightness in a corner says whether Effusion is there; some labels are null."""
    from ray_cxr.data.prepared import SplitData
    from ray_cxr.labels import LABELS

    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (n, len(LABELS))).astype(np.int8)
    images = rng.integers(60, 120, (n, size, size)).astype(np.uint8)
    images[labels[:, LABELS.index("Effusion")] == 1, : size // 2, : size // 2] += 100
    labels[rng.random(labels.shape) < 0.1] = -1
    ids = np.array([f"{i:08d}_000.png" for i in range(n)], dtype=object)
    return SplitData(ids, ids, np.full(n, 50.0), labels, Recorder.of(images))


def make(n_train: int = 24, n_val: int = 10, *, policy: str = "float32", callbacks: Any = (), **changes: object) -> Any:
    """A loop over a TinyCNN on made-up images, without augmentation unless asked for."""
    from ray_cxr.config import TrainSettings
    from ray_cxr.models.architecture import Architecture
    from ray_cxr.training.distributed import Replicas
    from ray_cxr.training.loop import Loop

    plain: dict[str, object] = {"backbone": "TinyCNN", "weights": "none", "batch_size": 8, "size": SIZE}
    settings = TrainSettings(**{**plain, "contrast": 0, "shift": 0, **changes})  # type: ignore[arg-type]
    return Loop(
        Replicas(),
        settings,
        Architecture.of(settings, SIZE),
        split(n_train),
        split(n_val, 1),
        weights=settings.weights,
        policy=policy,
        callbacks=callbacks,
    )


def train(item: Any, epochs: int, progress: Any = None) -> Any:
    """So many epochs more; the progress after them."""
    from ray_cxr.training.loop import Progress

    progress = progress or Progress()
    for _ in range(epochs):
        item.run_epoch(progress)
        progress.epochs_done, progress.losses = progress.epochs_done + 1, []
        progress.scores.append(0.5)
    return progress


def weights(item: Any) -> dict[str, np.ndarray]:
    """Every variable of model and optimizer by a readable name."""
    found = {f"model {v.path}": np.asarray(v) for v in item.model.variables if "seed" not in v.path}
    return found | {f"optimizer {i} {v.name}": np.asarray(v) for i, v in enumerate(item.optimizer.variables)}


def same_steps(**changes: object) -> dict[str, np.ndarray]:
    """SGD with synchronised BatchNorm and every augmentation, over two epochs."""
    moving = {"flip": True, "shift": 0.1, "contrast": 0.3, "rotation": 10.0, "zoom": 0.1}
    item = make(N_TRAIN, N_VAL, **{**SGD, **moving, **changes})
    train(item, 2)
    return weights(item)


def unsynchronised() -> dict[str, np.ndarray]:
    """Each worker's own BatchNorm, dropout, Adam, EMA and clipping; the statistics before and after averaging."""
    item = make(N_TRAIN, N_VAL, dropout=0.3, dense=(16,), ema=0.9, clip_norm=1.0, learning_rate=0.01)
    moving = item.model.get_layer("tiny_bn0").moving_mean
    average, before = item.replicas.average, []

    def spy(variables: Any) -> None:
        before.append(np.asarray(moving))
        average(variables)

    item.replicas.average = spy
    train(item, 2)
    arrays = weights(item)
    with item.optimizer.averaged():
        arrays |= {f"averaged {v.path}": np.asarray(v) for v in item.model.trainable_variables}
    return arrays | {"own statistics": before[0], "kernel": np.asarray(item.model.get_layer("tiny_conv0").kernel)}


def every_image_once() -> dict[str, np.ndarray]:
    """Which rows this worker read in an epoch of training and in a validation, and what the validation gave."""
    item = make(N_TRAIN, N_VAL, **SGD)
    train(item, 1)
    trained = np.concatenate(item.train.images.asked)
    item.val.images.asked.clear()
    probabilities, result = item.validate()
    labels = item.val.labels[:, item.columns]
    aurocs = [np.nan if row["auroc"] is None else row["auroc"] for row in result["findings"].values()]
    return {
        "trained": trained,
        "validated": np.concatenate(item.val.images.asked),
        "probabilities": probabilities,
        "labels": labels,
        "aurocs": np.array(aurocs),
        "macro": np.array(result["macro_auroc"]),
    }


def overflow() -> dict[str, np.ndarray]:
    """Half precision whose loss scale overflows on the first worker's images alone: both must skip that step."""
    item = make(16, 4, policy="mixed_float16", **SGD)
    start = np.asarray(item.model.get_layer("logits").kernel)
    flatten = item.optimizer.flatten

    def spoiled(gradients: Any) -> Any:
        flat = flatten(gradients)
        return [flat[0] * np.float32(np.inf if item.replicas.rank == 0 else 1.0), *flat[1:]]

    item.optimizer.flatten = spoiled
    scale = float(np.asarray(item.optimizer.keras.dynamic_scale))
    train(item, 1)
    return weights(item) | {
        "moved": np.abs(np.asarray(item.model.get_layer("logits").kernel) - start).max(),
        "scale": np.array([scale, float(np.asarray(item.optimizer.keras.dynamic_scale))]),
    }


def parted() -> dict[str, np.ndarray]:
    """One worker's weights are nudged by one bit: all must notice."""
    from ray_cxr.errors import RayCxrError

    item = make(16, 4, **SGD)
    if item.replicas.rank == 1:
        kernel = item.model.get_layer("logits").kernel
        kernel.assign(np.nextafter(np.asarray(kernel), np.float32(1)))
    try:
        item.replicas.agree(item.shared(), "here")
    except RayCxrError as error:
        return {"said": np.array(str(error))}
    return {"said": np.array("")}


def stopped() -> dict[str, np.ndarray]:
    """A callback that stops on the last worker alone stops all."""
    import keras

    item = make(16, 4, callbacks=[keras.callbacks.Callback()], **SGD)
    quiet = item.stop_wanted()
    item.model.stop_training = item.replicas.rank == item.replicas.count - 1
    return {"stop": np.array([quiet, item.stop_wanted()])}


def often() -> dict[str, np.ndarray]:
    """Averaging and gathering again and again: how many graphs that has made."""
    item = make(16, 4, **SGD)
    norms = [v for layer in item._norms for v in (layer.moving_mean, layer.moving_variance)]
    for i in range(5):
        item.replicas.average(norms)
        item.replicas.any(i > 3)
        item.replicas.agree(item.shared(), "here")
    return {"graphs": np.array(item.replicas._gather.experimental_get_tracing_count())}


def saved_by_one(out: Path) -> dict[str, np.ndarray]:
    """Rank 0 alone writes a checkpoint between two steps of all; under other set-ups that has hung."""
    item = make(16, 4, **SGD)
    progress = train(item, 1)
    if item.replicas.rank == 0:
        item.save(out)
        item.model.save_weights(str(out / "saved.weights.h5"))
    train(item, 1, progress)
    return weights(item)


def main() -> None:
    out, rank, count, port = Path(sys.argv[1]), *map(int, sys.argv[2:])
    cluster = {"worker": [f"127.0.0.1:{port + i}" for i in range(count)]}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": rank}})
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    from ray_cxr.models import runtime

    runtime.prepare_device(False, "auto")
    runtime.limit_threads(1)
    runtime.make_deterministic()
    scenarios: dict[str, Any] = {
        "every_image_once": every_image_once,
        "same_steps": same_steps,
        "clipped": lambda: same_steps(clip_norm=0.01),
        "xla": lambda: same_steps(xla=True, sync_batchnorm=False, frozen_epochs=2, dense=(8,)),
        "not_xla": lambda: same_steps(xla=False, sync_batchnorm=False, frozen_epochs=2, dense=(8,)),
        "unsynchronised": unsynchronised,
        "overflow": overflow,
        "parted": parted,
        "stopped": stopped,
        "often": often,
        "saved_by_one": lambda: saved_by_one(out),
    }
    arrays = {f"{name}/{key}": value for name, run in scenarios.items() for key, value in run().items()}
    np.savez(out / f"{count}-{rank}.npz", **arrays)


if __name__ == "__main__":
    main()
