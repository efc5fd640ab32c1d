"""Run scenarios of the training loop in several real processes, as Ray Train's workers do, and save the results.

    python workers.py OUT RANK PORT...

There is a port for each worker. Each scenario trains with the real loop under the real strategy; its arrays are in
OUT/<count>-<rank>.npz as `scenario/name`. The tests compare ranks with each other, and two workers with one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 32
#: Sizes that neither the batch of 8 nor the number of workers divides.
N_TRAIN, N_VAL = 29, 13
#: SGD: adding up in another order changes the last bits, and an adaptive step multiplies them.
SGD = {"optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.05, "sync_batchnorm": True}


class Images:
    """Pixels uint8 [N,S,S] that remember which rows were read, in order."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels, self.reads = pixels, []

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        self.reads.append(rows)
        return self.pixels[rows]


def split(n: int, seed: int = 0, size: int = SIZE) -> Any:
    """Return images with a bright corner where Effusion is positive; a tenth of the labels is null."""
    from ray_cxr.data.prepared import SplitData
    from ray_cxr.labels import LABELS

    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (n, len(LABELS))).astype(np.int8)
    images = rng.integers(60, 120, (n, size, size)).astype(np.uint8)
    images[labels[:, LABELS.index("Effusion")] == 1, : size // 2, : size // 2] += 100
    labels[rng.random(labels.shape) < 0.1] = -1
    ids = np.array([f"{i:08d}_000.png" for i in range(n)], dtype=object)
    return SplitData(ids, ids, np.full(n, 50.0), labels, Images(images))


def make(n_train: int = 24, n_val: int = 10, *, policy: str = "float32", callbacks: Any = (), **changes: object) -> Any:
    """Return a loop over a TinyCNN on synthetic images; augmentation is off by default."""
    from ray_cxr.config import TrainSettings
    from ray_cxr.models.architecture import Architecture
    from ray_cxr.training.distributed import Replicas
    from ray_cxr.training.loop import Loop

    base: dict[str, object] = {"backbone": "TinyCNN", "weights": "none", "batch_size": 8, "size": SIZE}
    settings = TrainSettings(**{**base, "contrast": 0, "shift": 0, **changes})  # type: ignore[arg-type]
    start = {"weights": settings.weights, "policy": policy, "callbacks": callbacks}
    return Loop(Replicas(), settings, Architecture.of(settings, SIZE), split(n_train), split(n_val, 1), **start)


def train(item: Any, epochs: int, progress: Any = None) -> Any:
    """Train more epochs and return the progress after them."""
    from ray_cxr.training.loop import TrainState

    progress = progress or TrainState()
    for _ in range(epochs):
        item.run_epoch(progress)
        progress.epochs_done, progress.losses = progress.epochs_done + 1, []
        progress.scores.append(0.5)
    return progress


def weights(item: Any) -> dict[str, np.ndarray]:
    """Return every variable of model and optimizer by a readable name."""
    found = {f"model {v.path}": np.asarray(v) for v in item.model.variables if "seed" not in v.path}
    return found | {f"optimizer {i} {v.name}": np.asarray(v) for i, v in enumerate(item.optimizer.keras.variables)}


def plain(out: Path) -> dict[str, np.ndarray]:
    """Synchronised BatchNorm and every augmentation; rank 0 alone saves between two epochs; one validation.

    BatchNorm's statistics are estimated on three batches, which two workers cannot share equally.
    """
    from ray_cxr.training import batchnorm

    batchnorm.BATCH_SIZE = 8
    changes = {"flip": True, "shift": 0.1, "contrast": 0.3, "rotation": 10.0, "zoom": 0.1, "batchnorm_images": 28}
    item = make(N_TRAIN, N_VAL, **SGD, **changes)
    progress = train(item, 1)
    trained = np.concatenate(item.train.images.reads)
    if item.replicas.rank == 0:
        # The run of one worker and the run of two save at the same time.
        folder = out / f"saved-{item.replicas.count}"
        folder.mkdir()
        item.save(folder)
        item.model.save_weights(str(folder / "saved.weights.h5"))
    train(item, 1, progress)
    with item.use_export_weights():
        probabilities, result = item.validate()
        estimates = {f"estimated {v.path}": np.asarray(v) for v in batchnorm.list_statistics(item.model)}
    validated, macro = np.concatenate(item.val.images.reads), np.array(result["macro_auroc"])
    rows = {"trained": trained, "validated": validated}
    return weights(item) | estimates | rows | {"probabilities": probabilities, "macro AUROC": macro}


def padded() -> dict[str, np.ndarray]:
    """Batches of 7 images: two workers cannot share them equally, so one share has an image of weight 0.

    Only the head is trained, because BatchNorm's statistics would include that image.
    """
    item = make(20, 9, batch_size=7, frozen_epochs=1, flip=True, contrast=0.3, **SGD)
    train(item, 1)
    probabilities, result = item.validate()
    rows = {"trained": np.concatenate(item.train.images.reads), "validated": np.concatenate(item.val.images.reads)}
    return rows | weights(item) | {"probabilities": probabilities, "macro AUROC": np.array(result["macro_auroc"])}


def clipped() -> dict[str, np.ndarray]:
    """Clip the norm of the gradient of two batches; images are mixed and changed, the last batch has one image."""
    changes = {"mixup": 0.4, "intensity": 3, "crop": 0.3, "shear": 5.0, "erase": 0.2}
    item = make(21, 4, clip_norm=0.01, batch_size=4, accumulate=2, layer_decay=0.7, **changes, **SGD)
    train(item, 1)
    return weights(item)


def unsynchronised() -> dict[str, np.ndarray]:
    """Each worker has its own BatchNorm and dropout; Adam, EMA and clipping. Also the statistics before averaging."""
    item = make(N_TRAIN, 4, dropout=0.3, dense=(16,), ema=0.9, clip_norm=1.0, learning_rate=0.01)
    moving = item.model.get_layer("tiny_bn0").moving_mean
    average, before = item.replicas.average, []

    def spy(variables: Any) -> None:
        before.append(np.asarray(moving))
        average(variables)

    item.replicas.average = spy
    train(item, 1)
    arrays = weights(item)
    with item.optimizer.use_average():
        arrays |= {f"averaged {v.path}": np.asarray(v) for v in item.model.trainable_variables}
    return arrays | {"own statistics": before[0]}


def overflow() -> dict[str, np.ndarray]:
    """Half precision whose gradients overflow on the first worker alone: both must skip that step."""
    item = make(16, 4, policy="mixed_float16", **SGD)
    start = np.asarray(item.model.get_layer("logits").kernel)
    flatten = item.optimizer.flatten

    def spoil(gradients: Any) -> Any:
        flat = flatten(gradients)
        return [flat[0] * np.float32(np.inf if item.replicas.rank == 0 else 1.0), *flat[1:]]

    item.optimizer.flatten = spoil
    scale = float(np.asarray(item.optimizer.keras.dynamic_scale))
    train(item, 1)
    return weights(item) | {
        "moved": np.abs(np.asarray(item.model.get_layer("logits").kernel) - start).max(),
        "scale": np.array([scale, float(np.asarray(item.optimizer.keras.dynamic_scale))]),
    }


def exchanges() -> dict[str, np.ndarray]:
    """Without a step: exchange again and again, stop on the last worker alone, then change one bit on rank 1."""
    import keras

    from ray_cxr.errors import RayCxrError

    item = make(16, 4, callbacks=[keras.callbacks.Callback()], **SGD)
    for _ in range(5):
        item.replicas.average(item._statistics)
        item.replicas.check_equal(item.list_shared(), "here")
    stops = [item.is_stop_requested()]
    item.model.stop_training = item.replicas.rank == item.replicas.count - 1
    stops.append(item.is_stop_requested())
    message = ""
    if item.replicas.rank == 1:
        kernel = item.model.get_layer("logits").kernel
        kernel.assign(np.nextafter(np.asarray(kernel), np.float32(1)))
    try:
        item.replicas.check_equal(item.list_shared(), "here")
    except RayCxrError as error:
        message = str(error)
    graphs = item.replicas._gather.experimental_get_tracing_count()
    return {"graphs": np.array(graphs), "stops": np.array(stops), "message": np.array(message)}


def main() -> None:
    out, rank, ports = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    cluster, count = {"worker": [f"127.0.0.1:{port}" for port in ports]}, len(ports)
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": rank}})
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    from ray_cxr.models import runtime

    runtime.prepare_device(False, "auto")
    runtime.limit_threads(1)
    runtime.make_deterministic()
    scenarios: dict[str, Any] = {"plain": lambda: plain(out), "clipped": clipped, "padded": padded}
    if count > 1:
        scenarios |= {"unsynchronised": unsynchronised, "overflow": overflow, "exchanges": exchanges}
    arrays = {f"{name}/{key}": value for name, run in scenarios.items() for key, value in run().items()}
    np.savez(out / f"{count}-{rank}.npz", **arrays)


if __name__ == "__main__":
    main()
