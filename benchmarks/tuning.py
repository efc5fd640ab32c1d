"""What a search finds for its epochs, beside random search without early stopping; and what a trial costs besides.

    .venv/bin/python benchmarks/tuning.py --work DIR --out searches.json      the searches
    .venv/bin/python benchmarks/tuning.py --work DIR --overhead               seconds per trial beyond its training

Searches: three methods search one space, TinyCNN at 64 pixels on phantoms, once for each of several search seeds:

    random        random settings, every trial trained to its end: the rival
    random-asha   random settings, ASHA ends trials early
    tpe-asha      Optuna's TPE and ASHA, the defaults of `tune`

The searches are the package's own, `ray_cxr.tuning.search`, with Ray Tune, one trial at a time and none ahead, so that
what comes out depends on the seeds alone. Two things are other than in `tune`, because they cost time and change no
result. A trial does not start Ray Train and TensorFlow of its own: a process that keeps TensorFlow trains it, with the
package's loop, and Tune keeps its trials' process, too. And a curve is a function of its settings (training is
deterministic), so that what was trained once is not trained again: it lies in DIR/curves. Every method is charged with
every epoch of its trials all the same.

Charged are whole epochs; of `random` with so many trials, these are its budget. An incumbent is the trial with the best
validation AUROC so far, looked at when a trial has ended. Told is after how many epochs the incumbent is as good as
random's winner. Judged is something else, because a validation AUROC that was searched for flatters: the incumbent at
half of random's epochs and random's winner are trained anew from fresh seeds and scored on the test split, each with
the weights of its epoch of the best validation AUROC. A search counts with the mean over the fresh seeds, a method with
the median over the searches.

Overhead (--overhead): real trials of `tune`, one at a time, without a scheduler. The wall time of a trial, from the end
of the trial before it, is made up of

    training      the seconds of its epochs; the first one's hold the tracing of the graph
    validation    likewise
    TensorFlow    its import in the worker: from the call of the worker's function until it is imported
    network       opening the data and building the network, which belong to training
    start         from the end of the trial before it until the worker's function is called
    between       what passes between network and last epoch and is neither training nor validation: checkpoints,
                  reports, files
    end           from the last epoch's line in metrics.csv until Tune has told Optuna that the trial has ended

and the overhead is start + between + end. The first trial of a search is told apart: before it Ray Tune itself starts.
Ray's own start-up is before all of that and told by itself. A trial whose process was started ahead (`ahead=1`, the
default) imports while another one trains, which slows that one a little: ahead=0 stands beside it.

Exit codes: 0 done, whether or not the bars are met; 1 a search failed; 2 wrong arguments. All that is made stays in DIR
and is used again; remove DIR where code or packages have changed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
from rich.console import Console
from rich.table import Table

from ray_cxr import cli, session
from ray_cxr.config import RaySettings, TrainSettings, TuneSettings, build
from ray_cxr.data.prepared import PreparedSet
from ray_cxr.errors import RayCxrError, own_error
from ray_cxr.imaging.phantoms import write_phantoms
from ray_cxr.storage import atomic
from ray_cxr.training.worker import METRICS, STARTED
from ray_cxr.tuning import study as studies
from ray_cxr.versions import versions

#: CPUs of Ray, and threads of what trains.
CPUS = 2
SIZE, PATIENTS = 64, 200
#: Parts of the patients; the test split, which judges, is not the smallest.
FRACTIONS = "0.4,0.25,0.35"
#: Sampler and scheduler; the first is the rival of the others.
METHODS = {"random": ("random", "none"), "random-asha": ("random", "asha"), "tpe-asha": ("tpe", "asha")}
RIVAL, JUDGED = "random", "tpe-asha"
SPACE: dict[str, Any] = {
    "learning_rate": {"low": 1e-5, "high": 1e-1, "log": True},
    "optimizer": ["adam", "adamw", "sgd"],
    "batch_size": [8, 16, 32, 64],
    "pooling": ["avg", "max", "avgmax"],
    "dense": [[], [64], [128, 64]],
    "dropout": {"low": 0.0, "high": 0.5, "step": 0.1},
    "loss": ["bce", "weighted_bce", "focal"],
    "label_smoothing": {"low": 0.0, "high": 0.2, "step": 0.05},
    "contrast": {"low": 0.0, "high": 0.5},
    "shift": {"low": 0.0, "high": 0.2},
    "when": {
        "optimizer=sgd": {"momentum": {"low": 0.5, "high": 0.99}},
        "optimizer=adamw": {"weight_decay": {"low": 1e-6, "high": 1e-1, "log": True}},
    },
}
#: Training seeds of the searches, and the first of those that winners are trained with anew.
SEED, FRESH_SEED = 0, 101
#: Bars: epochs that may be spent, as a part of the rival's; seconds of overhead per trial.
HALF, OVERHEAD_S = 0.5, 5.0
#: Why a trial of a search that has spent its epochs is not trained.
SPENT = "the search has spent its epochs"
#: TensorFlow's graphs stay in a process; above so many bytes it is ended, and Ray starts another in its place.
MEMORY_BYTES = 3 << 30
#: With --overhead.
OVERHEAD_EPOCHS = 3
OVERHEAD_SPACE: dict[str, Any] = {"learning_rate": {"low": 1e-3, "high": 1e-2, "log": True}}


# What trains, in processes of its own.


class Trainer:
    """Trains epoch by epoch, in a process that keeps TensorFlow, as `ray_cxr.training.worker` does; a Ray actor.

    Args:
        prepared: the prepared folder.
        curves: the folder for what was trained already, a file for each settings.
        threads: TensorFlow's.
    """

    def __init__(self, prepared: str, curves: str, threads: int) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        from ray_cxr.models import runtime
        from ray_cxr.training.distributed import Replicas

        runtime.prepare_device(False, "auto")
        runtime.limit_threads(threads)
        runtime.make_deterministic()
        self._replicas = Replicas()
        self._data = PreparedSet(prepared, SIZE)
        self._splits = {name: self._data.load(name) for name in ("train", "val", "test")}
        self._curves = Path(curves)
        self._trained, self._key = 0, ""
        self._loop: Any = None

    def trained(self) -> int:
        """Epochs that this process has trained, and not merely looked up."""
        return self._trained

    def epoch(self, values: dict[str, Any], number: int) -> dict[str, Any]:
        """The line of metrics of an epoch, from 1; or `failure`, the reason why there is none."""
        path = self._file(values)
        known = _read(path)
        if number <= len(known["curve"]):
            return known["curve"][number - 1]
        if known["failure"] is None:
            if self._key != path.name or self._progress.epochs_done >= number:
                self._begin(values, path.name)
            try:
                while self._progress.epochs_done < number:
                    self._train()
            except RayCxrError as error:
                known["failure"] = str(error)
            atomic.write_json(path, {**known, "settings": values, "curve": self._progress.curves})
            if known["failure"] is None:
                return self._progress.curves[-1]
        return {"failure": known["failure"]}

    def score(self, values: dict[str, Any]) -> dict[str, Any]:
        """Train to the end: `val` and `test`, the macro AUROCs of the epoch that is best on validation, and `epoch`.

        Raises:
            RayCxrError: the training failed.
        """
        from ray_cxr.training.ingest import Feed
        from ray_cxr.training.loop import evaluate

        path = self._file(values)
        known = _read(path)
        if known["result"] is None:
            self._begin(values, path.name)
            test, loop = self._splits["test"], self._loop
            feed = Feed(test, loop.columns, loop.settings.batch_size, 0, 1)
            found = {"val": -math.inf}
            while self._progress.epochs_done < loop.settings.epochs:
                self._train()
                if self._progress.scores[-1] > found["val"]:
                    with loop.optimizer.use_average():
                        probabilities = loop.predict(feed, len(test))
                    result = evaluate(test.labels[:, loop.columns], probabilities, loop.findings)
                    val, epoch = self._progress.scores[-1], self._progress.epochs_done
                    found = {"val": val, "test": result["macro_auroc"], "epoch": epoch}
            known = {"settings": values, "curve": self._progress.curves, "failure": None, "result": found}
            atomic.write_json(path, known)
        return known["result"]

    def _file(self, values: dict[str, Any]) -> Path:
        # How a trial runs changes nothing of what it trains.
        what = {key: value for key, value in values.items() if key not in ("cpus_per_worker", "max_failures")}
        described = json.dumps([what, self._data.manifest_digest, versions()], sort_keys=True)
        return self._curves / f"{hashlib.sha256(described.encode()).hexdigest()[:24]}.json"

    def _begin(self, values: dict[str, Any], key: str) -> None:
        """Drop what was being trained, whose trial is over, and build another network."""
        import keras
        import psutil

        from ray_cxr.models.architecture import Architecture
        from ray_cxr.training.loop import Loop, TrainState

        self._loop = None
        gc.collect()
        keras.backend.clear_session()
        if psutil.Process().memory_info().rss > MEMORY_BYTES:
            os._exit(0)  # Ray starts this actor anew and asks it the same again
        settings = build(TrainSettings, values)
        self._loop = Loop(
            self._replicas,
            settings,
            Architecture.of(settings, SIZE),
            self._splits["train"],
            self._splits["val"],
            weights="none",
        )
        self._progress, self._key = TrainState(), key

    def _train(self) -> None:
        """One epoch and its validation, as a worker goes about them."""
        from ray_cxr.training import worker

        loop, progress = self._loop, self._progress
        loop.start_epoch(progress)
        done = loop.run_epoch(progress)
        with tempfile.TemporaryDirectory(prefix="ray_cxr-") as folder:
            point, selection = worker._validate(loop, progress, done, Path(folder))
        progress.epochs_done, progress.losses = progress.epochs_done + 1, []
        progress.scores.append(selection)
        progress.curves.append(point)
        self._trained += 1


def _read(path: Path) -> dict[str, Any]:
    try:
        known: dict[str, Any] = {"result": None, **json.loads(path.read_text(encoding="utf-8"))}
    except FileNotFoundError:
        return {"curve": [], "failure": None, "result": None}
    return known


def light_trial(trainer: Any, budget: float) -> Callable[[dict[str, Any], Any], dict[str, Any]]:
    """A trial for `search`, which reports as `ray_cxr.tuning.trial.run` does and lets `trainer` train.

    One that begins when the trials before it have spent the budget fails at once: nothing of it will be looked at.
    """

    def trial(config: dict[str, Any], job: Any) -> dict[str, Any]:
        import ray
        from ray import tune

        from ray_cxr.tuning.trial import Points

        folder, nan = Path(config["folder"]), float("nan")
        points, curve, last = Points(None), [], {}
        before = sum(len(path.read_text().splitlines()) - 1 for path in folder.parent.glob(f"*/{METRICS}"))
        for number in range(1, config["settings"]["epochs"] + 1):
            point = {"failure": SPENT}
            if before < budget:
                point = ray.get(trainer.epoch.remote(config["settings"], number))
            if "failure" in point:
                return {"epoch": 0, "val_auroc": nan, "best_val_auroc": nan, "failure": point["failure"]}
            curve.append(point)
            pd.DataFrame(curve).to_csv(folder / METRICS, index=False, lineterminator="\n")
            last = points.next(point)
            tune.report(last)
        return {**last, "ended": 1}

    return trial


# The searches.


def prepare(work: Path, patients: int) -> Path:
    """The phantoms as a prepared set, by the package's own commands; Ray must be there.

    Raises:
        RayCxrError: a command failed.
    """
    folder = work / f"phantoms-{patients}"
    drawn = write_phantoms(folder / "phantoms", patients=patients, size=128, broken=False)
    manifest, prepared = folder / "manifest.parquet", folder / "prepared"
    split = ("--split", "patient", "--fractions", FRACTIONS)
    for command in (
        ["manifest", str(drawn.table), "--images", str(drawn.images), "--out", str(manifest), *split],
        ["prepare", str(manifest), "--out", str(prepared), "--size", str(SIZE)],
    ):
        with contextlib.redirect_stdout(sys.stderr):
            if cli.main(command):
                raise RayCxrError(f"`ray-cxr {command[0]}` failed; its line above says why")
    return prepared


def base_settings(epochs: int) -> TrainSettings:
    """What all trials share."""
    return TrainSettings(backbone="TinyCNN", size=SIZE, weights="none", epochs=epochs, seed=SEED)


def run_search(
    prepared: Path,
    folder: Path,
    method: str,
    seed: int,
    trials: int,
    epochs: int,
    trainer: Any,
    budget: float = math.inf,
) -> dict[str, Any]:
    """One search: its trials in the order in which they ended, each with settings, epochs, AUROC and state.

    Args:
        prepared, folder: the images and the search's folder.
        method, seed: a key of `METHODS`, and the sampler's.
        trials, epochs: how many trials at most, and of how many epochs.
        trainer: an actor of `Trainer`.
        budget: no trial begins when so many epochs are spent.
    """
    from ray_cxr.tuning import search

    sampler, scheduler = METHODS[method]
    settings = TuneSettings(
        trials=trials,
        space=SPACE,
        known=False,
        sampler=sampler,
        scheduler=scheduler,
        concurrent=1,
        ahead=0,
        seed=seed,
    )
    # What an earlier run left would be continued, by a sampler with another seed than that of a search in one piece.
    shutil.rmtree(folder, ignore_errors=True)
    plan = studies.Plan(prepared, folder, base_settings(epochs), settings)
    tuned = functools.partial(search.ray_tune.TuneConfig, reuse_actors=True)
    with mock.patch.object(search.ray_tune, "TuneConfig", tuned):
        outcome = search.search(plan, trial=light_trial(trainer, budget), finish=False, on_event=lambda line: None)
    if outcome.interrupted:
        raise KeyboardInterrupt
    asked = outcome.study.get_trials(deepcopy=False)
    return {
        "grace_epochs": settings.grace_epochs,
        "reduction_factor": settings.reduction_factor,
        "trials": [
            {
                "number": int(row["number"]),
                "state": row["state"],
                "epochs": int(row["epochs"]),
                "auroc": None if pd.isna(row["val_auroc"]) else float(row["val_auroc"]),
                "settings": plan.settings_of(asked[int(row["number"])]).model_dump(mode="json"),
                "params": asked[int(row["number"])].params,
            }
            # One at a time: the order of the numbers is that in which they ended.
            for row in outcome.rows.sort_values("number").to_dict("records")
            if row["reason"] != SPENT
        ],
    }


def history(trials: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """After each trial, in order of their end: `trial`, `spent` epochs of all so far, the incumbent's `best` number
    and its `auroc`; both None before any trial has one."""
    points: list[dict[str, Any]] = []
    spent, best, auroc = 0, None, -math.inf
    for trial in trials:
        spent += trial["epochs"]
        # A failed trial makes no bundle, however good it was before.
        if trial["state"] != "failed" and trial["auroc"] is not None and trial["auroc"] > auroc:
            best, auroc = trial["number"], trial["auroc"]
        points.append(
            {"trial": trial["number"], "spent": spent, "best": best, "auroc": None if best is None else auroc}
        )
    return points


def incumbent(points: Sequence[Mapping[str, Any]], budget: float) -> Mapping[str, Any] | None:
    """The last point that has spent no more than the budget and has an incumbent."""
    within = [point for point in points if point["spent"] <= budget and point["best"] is not None]
    return within[-1] if within else None


def reached(points: Sequence[Mapping[str, Any]], auroc: float) -> int | None:
    """Epochs spent when the incumbent was as good; None: never."""
    return next((point["spent"] for point in points if point["auroc"] is not None and point["auroc"] >= auroc), None)


def compare(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """All searches, and their winners trained anew."""
    began = time.monotonic()
    with session.start_ray(RaySettings(num_cpus=CPUS), dashboard=True):
        import ray

        prepared = prepare(arguments.work, arguments.patients)
        data = PreparedSet(prepared, SIZE)
        images = {name: len(data.usable(name)) for name in ("train", "val", "test")}
        say(f"phantoms: {images}")
        curves = arguments.work / "curves"
        curves.mkdir(exist_ok=True)
        actor = ray.remote(Trainer).options(num_cpus=CPUS, max_restarts=-1, max_task_retries=-1)
        trainer = actor.remote(str(prepared.absolute()), str(curves.absolute()), CPUS)
        searches = []
        for seed in range(arguments.seeds):
            found: dict[str, Any] = {}
            budget = math.inf
            for method in METHODS:  # the rival first: what it spends is what the others may
                start = time.monotonic()
                trials = arguments.trials if method == RIVAL else arguments.asha_trials
                folder = arguments.work / "searches" / f"{method}-{seed}"
                one = run_search(prepared, folder, method, seed, trials, arguments.epochs, trainer, budget)
                found[method] = {**one, "seconds": time.monotonic() - start}
                last = history(one["trials"])[-1]
                if method == RIVAL:
                    budget = last["spent"]
                say(
                    f"seed {seed}, {method}: {len(one['trials'])} trials, {last['spent']} epochs, validation AUROC "
                    f"{last['auroc'] or math.nan:.4f}; {found[method]['seconds']:.0f} s"
                )
            searches.append({"seed": seed, "methods": found, **judged(found)})
        for one in searches:
            for winner in one["winners"].values():
                retrain(winner, one["methods"], arguments.retrain, trainer)
            shown = ", ".join(f"{name} {one['winners'][name]['test']:.4f}" for name in one["winners"])
            say(f"seed {one['seed']}: test AUROC of the winners: {shown}")
    return {
        "space": SPACE,
        "images": images,
        "epochs_per_trial": arguments.epochs,
        "trials": {RIVAL: arguments.trials, "others": arguments.asha_trials},
        "fresh_seeds": arguments.retrain,
        "searches": searches,
        "summary": summary(searches),
        "seconds": time.monotonic() - began,
    }


def judged(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of one search seed: the rival's epochs, when the others were as good, and whose settings are trained anew.

    Raises:
        RayCxrError: a method has no incumbent where one is needed.
    """
    points = {method: history(one["trials"]) for method, one in found.items()}
    budget = points[RIVAL][-1]["spent"]
    target = points[RIVAL][-1]["auroc"]
    winners = {RIVAL: {"method": RIVAL, **points[RIVAL][-1]}}
    for method in points:
        if method == RIVAL:
            continue
        for when, epochs in (("half", HALF * budget), ("whole", budget)):
            point = incumbent(points[method], epochs)
            if point is None:
                raise RayCxrError(f"{method}: no trial ended within {epochs:g} epochs; give --trials more")
            winners[f"{method} at {when}"] = {"method": method, **point}
    if target is None:
        raise RayCxrError(f"{RIVAL}: no trial has an AUROC; give --trials more")
    return {
        "budget": budget,
        "target": target,
        "reached": {method: reached(points[method], target) for method in points if method != RIVAL},
        "spent": {method: points[method][-1]["spent"] for method in points},
        "winners": winners,
    }


def retrain(winner: dict[str, Any], found: Mapping[str, Any], seeds: int, trainer: Any) -> None:
    """Train a winner's settings anew; adds `tests`, macro AUROC of the test split by seed, and `test`, their mean."""
    import ray

    trial = next(one for one in found[winner["method"]]["trials"] if one["number"] == winner["best"])
    fresh = [{**trial["settings"], "seed": FRESH_SEED + place} for place in range(seeds)]
    winner["params"] = trial["params"]
    winner["tests"] = [ray.get(trainer.score.remote(values))["test"] for values in fresh]
    winner["test"] = statistics.mean(winner["tests"])


def summary(searches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the search seeds, and whether the bar is met."""
    methods = [method for method in METHODS if method != RIVAL]
    parts = {
        method: statistics.median(
            math.inf if one["reached"][method] is None else one["reached"][method] / one["budget"] for one in searches
        )
        for method in methods
    }
    tests = {name: statistics.median(one["winners"][name]["test"] for one in searches) for name in _names(searches)}
    differences = {
        name: [one["winners"][name]["test"] - one["winners"][RIVAL]["test"] for one in searches] for name in tests
    }
    return {
        # JSON has no infinity: None where the median search was not as good within its epochs.
        "reached_part": {method: part if math.isfinite(part) else None for method, part in parts.items()},
        "test": tests,
        "difference": {
            name: {
                "median": statistics.median(values),
                "standard_error": statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None,
                "not_below": sum(value >= 0 for value in values),
            }
            for name, values in differences.items()
            if name != RIVAL
        },
        "met": tests[f"{JUDGED} at half"] >= tests[RIVAL],
    }


def _names(searches: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(searches[0]["winners"])


def show_searches(console: Console, result: Mapping[str, Any]) -> None:
    searches, told = result["searches"], result["summary"]
    table = Table(
        title=f"Epochs until the incumbent's validation AUROC is that of random's winner, of {_budgets(searches)}"
    )
    table.add_column("search seed", justify="right")
    table.add_column("random's AUROC", justify="right")
    others = [method for method in METHODS if method != RIVAL]
    for method in others:
        table.add_column(method, justify="right")
        table.add_column("part", justify="right")
    for one in searches:
        cells = []
        for method in others:
            epochs = one["reached"][method]
            never = f"not within {one['spent'][method]}"
            cells += [never if epochs is None else str(epochs), "" if epochs is None else _part(epochs / one["budget"])]
        table.add_row(str(one["seed"]), f"{one['target']:.4f}", *cells)
    medians = [cell for method in others for cell in ("", _part(told["reached_part"][method]))]
    table.add_row("median", "", *medians)
    console.print(table)
    names = _names(searches)
    table = Table(title=f"Test AUROC of the winners, mean of {result['fresh_seeds']} fresh trainings")
    table.add_column("search seed", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for one in searches:
        table.add_row(str(one["seed"]), *(f"{one['winners'][name]['test']:.4f}" for name in names))
    table.add_row("median", *(f"{told['test'][name]:.4f}" for name in names))
    console.print(table)
    console.print(
        "at half, at whole: the incumbent when half, or all, of random's epochs were spent; curves that another\n"
        "search had trained already were looked up, and their epochs counted as spent all the same"
    )
    for name, difference in told["difference"].items():
        error = difference["standard_error"]
        console.print(
            f"{name} less random: {difference['median']:+.4f} (median of {len(searches)} searches"
            + ("" if error is None else f", standard error {error:.4f}")
            + f"); not below random in {difference['not_below']} of {len(searches)}"
        )
    console.print(
        f"{JUDGED} at half of random's epochs: test AUROC {told['test'][f'{JUDGED} at half']:.4f} against random's "
        f"{told['test'][RIVAL]:.4f}: {'met' if told['met'] else 'NOT met'}"
    )


def _budgets(searches: Sequence[Mapping[str, Any]]) -> str:
    """All trials of `random` train to their end, save those that fail."""
    found = sorted({one["budget"] for one in searches})
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _part(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


# The overhead.


def measure_overhead(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Real trials with a process ahead and without, in turn."""
    before, runs = os.getloadavg()[0], []
    start = time.monotonic()
    with session.start_ray(RaySettings(num_cpus=CPUS), dashboard=True):
        ray_s = time.monotonic() - start
        say(f"Ray started in {ray_s:.0f} s")
        prepared = prepare(arguments.work, arguments.patients)
        for number in range(arguments.rounds):
            for ahead in (1, 0) if number % 2 == 0 else (0, 1):
                folder = arguments.work / "overhead" / f"{number}-ahead-{ahead}"
                run = {"round": number, "ahead": ahead, **_real_search(prepared, folder, arguments.trials, ahead)}
                runs.append(run)
                say(f"round {number + 1}, ahead={ahead}: {arguments.trials} trials in {run['seconds']:.0f} s")
    return {
        "ray_start_seconds": ray_s,
        "load_before": before,
        "load_after": os.getloadavg()[0],
        "epochs": OVERHEAD_EPOCHS,
        "runs": runs,
        "summary": {ahead: overhead_summary(runs, ahead) for ahead in (1, 0)},
    }


def _real_search(prepared: Path, folder: Path, trials: int, ahead: int) -> dict[str, Any]:
    from ray_cxr.tuning import search

    settings = TuneSettings(
        trials=trials,
        space=OVERHEAD_SPACE,
        known=False,
        sampler="random",
        scheduler="none",
        concurrent=1,
        ahead=ahead,
    )
    shutil.rmtree(folder, ignore_errors=True)
    plan = studies.Plan(prepared, folder, base_settings(OVERHEAD_EPOCHS), settings)
    began = time.time()
    rows = search.search(plan, finish=False, on_event=lambda line: None).rows
    seconds = time.time() - began
    if (states := set(rows["state"])) != {"finished"}:
        raise RayCxrError(f"{folder}: trials are {', '.join(sorted(states))}; see {folder / 'trials.parquet'}")
    return {"seconds": seconds, "trials": parts(plan, rows, began)}


def parts(plan: studies.Plan, rows: pd.DataFrame, began: float) -> list[dict[str, float]]:
    """What each trial's wall time is made up of, see the top of this file; seconds.

    Args:
        plan: the search's.
        rows: its record, of trials that ended one after the other.
        began: when it began, seconds since 1970.
    """
    found, before = [], began
    for row in rows.sort_values("ended").to_dict("records"):
        folder = plan.folder(int(row["number"]))
        times = json.loads((folder / STARTED).read_text(encoding="utf-8"))["times"]
        training = sum(point["seconds"] for point in row["curve"])
        validation = sum(point["val_seconds"] for point in row["curve"])
        last, ended = (folder / METRICS).stat().st_mtime, row["ended"].timestamp()
        one = {
            "wall": ended - before,
            "training": training,
            "validation": validation,
            "TensorFlow": times["TensorFlow"] - times["Ray"],
            "network": times["network"] - times["TensorFlow"],
            "start": times["Ray"] - before,
            "between": last - times["network"] - training - validation,
            "end": ended - last,
        }
        found.append({**one, "overhead": one["start"] + one["between"] + one["end"]})
        before = ended
    return found


def overhead_summary(runs: Sequence[Mapping[str, Any]], ahead: int) -> dict[str, Any]:
    """Medians of all trials but each search's first; and of whole searches what is not training, per trial."""
    mine = [run for run in runs if run["ahead"] == ahead]
    later = [trial for run in mine for trial in run["trials"][1:]]
    medians = {name: statistics.median(trial[name] for trial in later) for name in later[0]}
    known = ("training", "validation", "TensorFlow", "network")
    whole = [
        (run["seconds"] - sum(trial[name] for trial in run["trials"] for name in known)) / len(run["trials"])
        for run in mine
    ]
    return {
        "medians": medians,
        "first": statistics.median(run["trials"][0]["overhead"] for run in mine),
        "whole": statistics.median(whole),
        "met": medians["overhead"] <= OVERHEAD_S,
    }


def show_overhead(console: Console, result: Mapping[str, Any]) -> None:
    names = list(result["runs"][0]["trials"][0])
    for ahead, told in result["summary"].items():
        table = Table(title=f"Seconds per trial, ahead={ahead}, {result['epochs']} epochs of a TinyCNN")
        for name in ("round", "trial", *names):
            table.add_column(name, justify="right")
        for run in result["runs"]:
            if run["ahead"] == ahead:
                for place, trial in enumerate(run["trials"]):
                    cells = (f"{trial[name]:.1f}" for name in names)
                    table.add_row(str(run["round"] + 1), f"{place}{' (first)' * (not place)}", *cells)
        table.add_row("", "median", *(f"{told['medians'][name]:.1f}" for name in names))
        console.print(table)
    console.print(
        "overhead: start + between + end; the median leaves out each search's first trial, before which Ray Tune starts"
    )
    for ahead, told in result["summary"].items():
        verdict = (", met" if told["met"] else ", NOT met") if ahead == 1 else ""
        console.print(
            f"ahead={ahead}: overhead {told['medians']['overhead']:.1f} s per trial"
            + (f" <= {OVERHEAD_S:g}{verdict}" if ahead == 1 else "")
            + f"; of the first trial {told['first']:.1f} s; of whole searches {told['whole']:.1f} s per trial"
        )
    console.print(
        f"Ray itself started in {result['ray_start_seconds']:.0f} s, once and before all that; the machine's load was "
        f"{result['load_before']:.1f} before and {result['load_after']:.1f} after"
    )


# The script.


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {"system": platform.platform(), "cpu": model, "cpus": os.cpu_count()}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    whole: dict[str, Any] = {"type": _positive, "metavar": "N"}
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="for all that is made; is kept")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--searches", action="store_true", help="compare the searches: what is done without a mode")
    modes.add_argument("--overhead", action="store_true", help="seconds per trial beyond its training")
    parser.add_argument("--quick", action="store_true", help="one small search of each method, to see that all works")
    parser.add_argument("--seeds", help="searches of each method (5)", **whole)
    parser.add_argument("--trials", help="of random search (20); with --overhead: of each search (6)", **whole)
    parser.add_argument("--asha-trials", help="of the others at most; four times as many", **whole)
    parser.add_argument("--epochs", default=9, help="of a whole trial (9)", **whole)
    parser.add_argument("--retrain", help="fresh seeds that each winner is trained with (3)", **whole)
    parser.add_argument("--rounds", default=1, help="--overhead: searches with each setting (1)", **whole)
    parser.add_argument("--patients", default=PATIENTS, help=f"phantoms ({PATIENTS})", **whole)
    parser.add_argument("--out", "--json", type=Path, metavar="FILE.json", help="write the raw numbers there")
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    arguments.seeds = arguments.seeds or (1 if quick else 5)
    arguments.trials = arguments.trials or (6 if arguments.overhead else 4 if quick else 20)
    arguments.asha_trials = arguments.asha_trials or 4 * arguments.trials
    arguments.retrain = arguments.retrain or (1 if quick else 3)
    if arguments.overhead and arguments.trials < 2:
        parser.error(f"--trials {arguments.trials}: with --overhead the first trial is told apart; give 2 or more")
    return arguments


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that Ray ends, too
    say = functools.partial(print, file=sys.stderr, flush=True)
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)
    result: dict[str, Any] = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["benchmarks/tuning.py", *(sys.argv[1:] if argv is None else argv)],
        "machine": machine(),
        "versions": versions(),
    }
    arguments.work.mkdir(parents=True, exist_ok=True)
    try:
        if arguments.overhead:
            result["overhead"] = measure_overhead(arguments, say)
            show_overhead(console, result["overhead"])
        else:
            result["searches"] = compare(arguments, say)
            show_searches(console, result["searches"])
    except RayCxrError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        inner = own_error(error)  # out of Ray's wrappings
        if not isinstance(inner, RayCxrError):
            raise
        print(inner, file=sys.stderr)
        return 1
    if arguments.out:
        atomic.write_json(arguments.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
