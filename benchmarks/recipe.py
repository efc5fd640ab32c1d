"""Compare training options by the AUROC on held-out images, over several seeds.

    .venv/bin/python benchmarks/recipe.py --work DIR --task options
    .venv/bin/python benchmarks/recipe.py --work DIR --task options-real batchnorm-real --images FOLDER --labels CSV
    .venv/bin/python benchmarks/recipe.py --work DIR --show

    options           TinyCNN at 64 pixels, from random weights, on phantoms with the prevalence of ChestX-ray14
    options-real      the same model, from weights trained on phantoms, on real images
    batchnorm         DenseNet121 at 64 pixels, from weights trained on phantoms, on darker phantoms: each epoch is
                      validated with the moving statistics of BatchNorm, then with those of `batchnorm_images`
    batchnorm-real    the same on real images

A seed is that of the training and of the data: each has its own phantoms, or its own split of the real images by
patients. All options of a seed have the same images. Every run trains for the same number of steps and is judged by its
last epoch, so that nothing is selected. Trainings run one after another on one thread, without Ray.

DIR/results.jsonl gets a line after each training, so that the script can be stopped and started again; trainings that
are there are not repeated, so choose a new DIR after changes. The tables, which `--show` prints without training, have
means ± standard deviations over the first `--seeds` seeds, and differences ± standard errors, paired by seed. Exit
codes: 0 done; 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
from features import PREVALENCE
from harness import POSITIVE, log

from ray_cxr.config import InputSpec, TrainSettings
from ray_cxr.data import splits
from ray_cxr.data.manifest_builder import build_manifest
from ray_cxr.data.prepared import SplitData
from ray_cxr.imaging.decode import load_image
from ray_cxr.imaging.phantom_anatomy import sample_anatomy
from ray_cxr.imaging.phantom_findings import draw_phantom
from ray_cxr.labels import FINDINGS, LABELS

SIZE = 64
#: Phantoms of a seed, one per patient. The rarest finding has 1%, so that it has positives in every set.
TRAIN, TEST, RAREST = 1500, 2000, 0.01
#: Contrast of a finding's signs, as a share of that of other phantoms. With 1, nearly every AUROC is 1.
CONTRAST = 0.3
#: Share of the patients with real images that train; the others are the test.
FRACTION = 0.6
#: The four rarest findings of ChestX-ray14, whose mean AUROC is shown separately.
RARE = ("Edema", "Fibrosis", "Hernia", "Pneumonia")
#: Seed of the phantoms for starting weights, their number, and the epochs on them.
PRETRAINING_SEED, PRETRAINING, PRETRAINING_EPOCHS = 1000, 4000, 4

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "bce": {"loss": "bce"},
    "balance": {"balance": "findings"},
    "accumulate": {"batch_size": 8, "accumulate": 4},
    "layer_decay": {"layer_decay": 0.7},
    "augmentation": {"intensity": 2, "crop": 0.3, "erase": 0.2},
    "mixup": {"mixup": 0.2},
    "ema": {"ema": 0.99},
    "batchnorm_images": {"batchnorm_images": 512},
}
TINY: dict[str, Any] = {"backbone": "TinyCNN", "learning_rate": 1e-3}
#: After 55 steps, 58% of a moving statistic with DenseNet's momentum of 0.99 is still that of the initial weights.
DENSE: dict[str, Any] = {"backbone": "DenseNet121", "batch_size": 16, "steps_per_epoch": 55, "epochs": 3}
STATISTICS: dict[str, dict[str, Any]] = {"batchnorm_images": {"batchnorm_images": 512, "ema": 0.95}}


@dataclass(frozen=True)
class Task:
    """What is compared.

    Attributes:
        title: of the table.
        settings: training settings in addition to the option's.
        options: name and settings of each option; the first is the rival of the others.
        real: on real images instead of phantoms.
        pretrained: from weights trained on phantoms.
        darkness: divisor of the gray values of phantoms, as of another detector.
    """

    title: str
    settings: dict[str, Any]
    options: dict[str, dict[str, Any]]
    real: bool = False
    pretrained: bool = True
    darkness: int = 1

    @property
    def has_statistics(self) -> bool:
        """Whether BatchNorm's statistics are compared, after each epoch."""
        return self.options is STATISTICS


TASKS = {
    "options": Task("Options on phantoms", {**TINY, "epochs": 8}, OPTIONS, pretrained=False),
    "options-real": Task("Options on real images", {**TINY, "epochs": 20}, OPTIONS, real=True),
    "batchnorm": Task("BatchNorm on darker phantoms", DENSE, STATISTICS, darkness=2),
    "batchnorm-real": Task("BatchNorm on real images", DENSE, STATISTICS, real=True),
}


# ---------------------------------------------------------------- images


def make_data(images: np.ndarray, labels: np.ndarray) -> SplitData:
    """Return images uint8 [N,S,S] with labels int8 [N,15], for training."""
    names = np.arange(len(images)).astype(str).astype(object)
    return SplitData(names, names, np.full(len(images), np.nan), labels, images)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=1)
def draw_phantoms(n: int, seed: int, contrast: float) -> SplitData:
    """Draw n patients whose findings are independent, each as frequent as in ChestX-ray14 but at least `RAREST`."""
    labels = np.zeros((n, len(LABELS)), np.int8)
    present = np.random.default_rng(seed).random((n, len(FINDINGS))) < np.maximum(PREVALENCE, RAREST)
    labels[:, : len(FINDINGS)] = present
    labels[:, len(FINDINGS)] = ~present.any(axis=1)
    images = np.empty((n, SIZE, SIZE), np.uint8)
    for i, row in enumerate(present):
        names = [name for name, is_present in zip(FINDINGS, row, strict=True) if is_present]
        chest = sample_anatomy(seed, i + 1, 0, size=SIZE)
        images[i] = draw_phantom(chest)
        if names:
            images[i] = cv2.addWeighted(draw_phantom(chest, names), contrast, images[i], 1 - contrast, 0)
    return make_data(images, labels)


@functools.lru_cache(maxsize=1)
def load_images(images: str, labels: str) -> tuple[SplitData, Any]:
    """Return the images of a folder that are in a table, and their patients."""
    table, _ = build_manifest([labels], images=images, found_only=True)
    rows = table.to_pandas()
    pixels = np.stack([load_image(path, InputSpec(size=SIZE)) for path in rows["path"]])
    return make_data(pixels, rows[list(LABELS)].fillna(-1).to_numpy(np.int8)), rows["patient_id"]


def split_images(task: Task, seed: int, arguments: argparse.Namespace) -> tuple[SplitData, SplitData]:
    """Return the images of a seed for training and for the test."""
    if task.real:
        data, patients = load_images(str(arguments.images), str(arguments.labels))
        chosen = splits.patient_split(patients, (FRACTION, 0.0, 1.0 - FRACTION), seed)
        train = np.asarray(chosen == "train")
    else:
        data = draw_phantoms(arguments.train + arguments.test, seed, arguments.contrast)
        train = np.arange(len(data)) < arguments.train
    images = np.asarray(data.images) // task.darkness
    return make_data(images[train], data.labels[train]), make_data(images[~train], data.labels[~train])


# ---------------------------------------------------------------- training


def train(
    settings: TrainSettings,
    train: SplitData,
    test: SplitData,
    weights: str,
    judge: Callable[[Any], list[dict[str, Any]]],
    *,
    every_epoch: bool = False,
) -> tuple[Any, list[list[dict[str, Any]]]]:
    """Train, and return the loop and its results on the test images: of `every_epoch`, or only of the last."""
    replicas = open_replicas()
    import keras

    from ray_cxr.models.architecture import Architecture
    from ray_cxr.training.loop import Loop, TrainState

    gc.collect()
    keras.backend.clear_session()
    loop = Loop(replicas, settings, Architecture.of(settings, SIZE), train, test, weights=weights)
    state, epochs = TrainState(), []
    while state.epochs_done < settings.epochs:
        loop.start_epoch(state)
        loop.run_epoch(state)
        state.epochs_done, state.losses = state.epochs_done + 1, []
        if every_epoch or state.epochs_done == settings.epochs:
            epochs.append(judge(loop))
    return loop, epochs


def judge_export(loop: Any) -> list[dict[str, Any]]:
    """Return the result of the weights that `train` would export."""
    with loop.use_export_weights():
        return [loop.validate()[1]]


def judge_statistics(loop: Any) -> list[dict[str, Any]]:
    """Return results of the last weights with moving and with estimated statistics, then both of averaged weights.

    Averaging changes no other weights, so one training is enough.
    """
    results = [loop.validate()[1]]
    with mock.patch.object(loop.optimizer, "use_average", contextlib.nullcontext):
        results += judge_export(loop)
    with loop.optimizer.use_average():
        results.append(loop.validate()[1])
    return results + judge_export(loop)


@functools.lru_cache(maxsize=1)
def open_replicas() -> Any:
    """Return the worker of this process, set up as a worker of `train` on a CPU."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from ray_cxr.models import runtime
    from ray_cxr.training.distributed import Replicas

    runtime.prepare_device(False, "float32")
    runtime.limit_threads(1)
    runtime.make_deterministic()
    return Replicas()


def build_settings(task: Task, option: str, seed: int, arguments: argparse.Namespace) -> TrainSettings:
    given = {**task.settings, **task.options[option], **({"epochs": arguments.epochs} if arguments.epochs else {})}
    return TrainSettings(size=SIZE, weights="none", seed=seed, **given)


def make_weights(task: Task, arguments: argparse.Namespace) -> Path:
    """Train the backbone of a task on phantoms, unless an earlier call did, and return its weights."""
    path = Path(arguments.work) / f"{task.settings['backbone']}.weights.h5"
    if not path.exists():
        data = draw_phantoms(arguments.pretraining, PRETRAINING_SEED, arguments.contrast)
        changes = {"learning_rate": 1e-3, "epochs": arguments.epochs or PRETRAINING_EPOCHS, "steps_per_epoch": None}
        settings = TrainSettings(size=SIZE, weights="none", **{**task.settings, **changes})
        some = make_data(np.asarray(data.images)[:1000], data.labels[:1000])
        loop, results = train(settings, data, some, "none", judge_export)
        partial = path.with_name(f"partial-{path.name}")
        loop.model.save_weights(str(partial))
        partial.rename(path)
        log(f"{path.name}: AUROC {results[-1][-1]['macro_auroc']:.3f} on images that trained it")
    return path


def measure(arguments: argparse.Namespace) -> None:
    """Run all trainings that the results do not have yet, seed by seed."""
    path = Path(arguments.work) / "results.jsonl"
    done = {(one["task"], one["option"], one["seed"]) for one in read_results(path)}
    for seed in range(arguments.seeds):
        for name in arguments.task:
            task = TASKS[name]
            for option in arguments.option or task.options:
                if (name, option, seed) in done or option not in task.options:
                    continue
                settings = build_settings(task, option, seed, arguments)
                weights = str(make_weights(task, arguments)) if task.pretrained else "none"
                images, started = split_images(task, seed, arguments), time.monotonic()
                judge = judge_statistics if task.has_statistics else judge_export
                _, epochs = train(settings, *images, weights, judge, every_epoch=task.has_statistics)
                row = {
                    "task": name,
                    "option": option,
                    "seed": seed,
                    "seconds": round(time.monotonic() - started, 1),
                    "images": [len(part) for part in images],
                    "settings": settings.model_dump(exclude_defaults=True),
                    "epochs": epochs,
                }
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                log(f"{name}, {option}, seed {seed}: {epochs[-1][-1]['macro_auroc']:.4f}, {row['seconds']:.0f} s")


# ---------------------------------------------------------------- tables


def read_results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def get_rare(result: dict[str, Any]) -> float:
    """Return the mean AUROC of the `RARE` findings that have one."""
    values = [result["findings"][name]["auroc"] for name in RARE]
    return statistics.mean(value for value in values if value is not None)


def format_difference(pairs: Sequence[tuple[float, float]]) -> str:
    """Return the mean of the pairs' differences and its standard error."""
    differences = [a - b for a, b in pairs]
    mean = statistics.mean(differences)
    if len(pairs) == 1:
        return f"{mean:+.3f}"
    return f"{mean:+.3f} ± {statistics.stdev(differences) / len(pairs) ** 0.5:.3f}"


def format_values(values: Sequence[float]) -> str:
    """Return the mean and the standard deviation."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def print_row(*cells: Any) -> None:
    print(f"| {' | '.join(map(str, cells))} |")


def show(results: list[dict[str, Any]]) -> None:
    """Print a Markdown table for each task."""
    for name, task in TASKS.items():
        rows = {(one["option"], one["seed"]): one for one in results if one["task"] == name}
        if not rows:
            continue
        first = next(iter(rows.values()))
        train, test = first["images"]
        print(f"\n{task.title}: {train:,} images train, {test:,} test\n")
        show_statistics(rows) if task.has_statistics else show_options(task, rows)


def show_options(task: Task, rows: dict[tuple[str, int], dict[str, Any]]) -> None:
    print_row("option", "seeds", "macro AUROC", "difference", "AUROC of rare findings", "difference")
    print_row(*["---"] * 6)
    rival = next(iter(task.options))
    for option, changes in task.options.items():
        found = {seed: one["epochs"][-1][-1] for (name, seed), one in rows.items() if name == option}
        if not found:
            continue
        columns = []
        for measure in (lambda result: result["macro_auroc"], get_rare):
            columns.append(format_values([measure(result) for result in found.values()]))
            others = {seed: rows[rival, seed]["epochs"][-1][-1] for seed in found if (rival, seed) in rows}
            pairs = [(measure(found[seed]), measure(other)) for seed, other in others.items()]
            columns.append(format_difference(pairs) if pairs and option != rival else "")
        title = ", ".join(f"`{key} = {json.dumps(value)}`" for key, value in changes.items()) or "default"
        print_row(title, len(found), *columns)


def show_statistics(rows: dict[tuple[str, int], dict[str, Any]]) -> None:
    print_row("weights", "epoch", "seeds", "moving statistics", "estimated statistics", "difference")
    print_row(*["---"] * 6)
    runs = [one["epochs"] for one in rows.values()]
    for title, first in (("last", 0), ("averaged (`ema`)", 2)):
        for epoch in range(len(runs[0])):
            aurocs = [[result["macro_auroc"] for result in run[epoch][first : first + 2]] for run in runs]
            before, after = zip(*aurocs, strict=True)
            cells = [title, epoch + 1, len(runs), format_values(before), format_values(after)]
            print_row(*cells, format_difference([*zip(after, before, strict=True)]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--work", required=True, type=Path, metavar="DIR", help="results and starting weights; kept")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["options"], help="options")
    parser.add_argument("--option", nargs="+", choices=OPTIONS, help="only these options of the tasks")
    parser.add_argument("--seeds", default=5, help="number of seeds (5)", **POSITIVE)
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="real images")
    parser.add_argument("--labels", type=Path, metavar="CSV", help="NIH's Data_Entry table of the real images")
    parser.add_argument("--train", default=TRAIN, help=f"phantoms to train on ({TRAIN})", **POSITIVE)
    parser.add_argument("--test", default=TEST, help=f"phantoms of the test ({TEST})", **POSITIVE)
    parser.add_argument(
        "--contrast", type=float, default=CONTRAST, help=f"of findings on phantoms, up to 1 ({CONTRAST})"
    )
    parser.add_argument("--pretraining", default=PRETRAINING, help=f"for starting weights ({PRETRAINING})", **POSITIVE)
    parser.add_argument("--epochs", help="of every training (the task's)", **POSITIVE)
    parser.add_argument("--show", action="store_true", help="only print the tables of the results")
    arguments = parser.parse_args()
    is_real = not arguments.show and any(TASKS[name].real for name in arguments.task)
    if is_real and not (arguments.images and arguments.labels):
        parser.error("tasks on real images need --images and --labels")
    return arguments


def main() -> int:
    arguments = parse()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not arguments.show:
        measure(arguments)
    show([one for one in read_results(arguments.work / "results.jsonl") if one["seed"] < arguments.seeds])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
