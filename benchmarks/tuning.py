"""Compare what searches find for their epochs with random search, or measure what a trial costs beyond its training.

    .venv/bin/python benchmarks/tuning.py --work DIR --out searches.json      the searches
    .venv/bin/python benchmarks/tuning.py --work DIR --overhead               seconds per trial beyond its training

Searches: three methods search one space, TinyCNN at 64 pixels on phantoms, once for each of several search seeds:

    random        random settings, every trial trained for all epochs: the rival
    random-asha   random settings, ASHA stops trials early
    tpe-asha      Optuna's TPE and ASHA, the defaults of `tune`

They use `ray_cxr.tuning.search` with Ray Tune, one trial at a time and none ahead, so that results depend only on the
seeds. Two differences from `tune` save time and change no result. A trial does not start Ray Train and TensorFlow: one
process keeps TensorFlow and trains all trials with the package's loop, and Tune keeps its trials' process too. And
training is deterministic, so the same settings are trained only once; their curves remain in DIR/curves. Each method is
charged for every epoch of its trials all the same.

The budget is the number of epochs of `random`. An incumbent is the trial with the best validation AUROC when a trial
has ended. The first table shows after how many epochs a method's incumbent is as good as random's winner. Methods are
judged differently, because a validation AUROC that was searched for is optimistic: the incumbent at half of random's
epochs and random's winner are trained again with fresh seeds and scored on the test split, each with the weights of its
best epoch on validation. A search's result is the mean over the fresh seeds, a method's the median over the searches.

Overhead (--overhead): real trials of `tune`, one at a time, without a scheduler. The wall time of a trial, from the end
of the previous trial, consists of

    training      the seconds of its epochs; the first epoch includes the tracing of the graph
    validation    the seconds of its validations
    TensorFlow    its import in the worker: from the start of the worker's function
    model         opening the data and building the model, which belong to training
    start         from the end of the previous trial to the start of the worker's function
    between       between model and last epoch, neither training nor validation: checkpoints, reports, files
    end           from the last line of metrics.csv until Tune has recorded the trial's end in Optuna

and the overhead is start + between + end. The first trial of a search is separate, because Ray Tune starts before it.
The start of Ray comes before all that and is separate too. A trial whose process was started ahead (`ahead=1`, the
default) imports while another one trains, which slows that one a little: the table also shows ahead=0.

Exit codes: 0 done, whether or not the bars are met; 1 a search failed; 2 wrong arguments. All files remain in DIR and
are used again; remove DIR after changes of code or packages.
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
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
from harness import POSITIVE, create_console, create_parser, interleave, log, read_load, run_script
from rich.table import Table

from ray_cxr import cli, session
from ray_cxr.config import RaySettings, TrainSettings, TuneSettings, build
from ray_cxr.data.prepared import PreparedSet
from ray_cxr.errors import RayCxrError
from ray_cxr.imaging.phantoms import write_phantoms
from ray_cxr.storage import atomic
from ray_cxr.training.worker import METRICS, STARTED
from ray_cxr.tuning.plan import StudyPlan
from ray_cxr.versions import versions

#: CPUs of Ray, and threads of the training process.
CPUS = 2
SIZE, PATIENTS = 64, 200
#: Shares of the patients; the test split, which judges, is not the smallest.
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
#: Training seed of the searches, and the first of the seeds with which winners are trained again.
SEED, FRESH_SEED = 0, 101
#: Bars: share of the rival's epochs; seconds of overhead per trial.
HALF, OVERHEAD_S = 0.5, 5.0
#: Reason of trials that start after the budget is spent.
SPENT = "the search has spent its epochs"
#: TensorFlow never frees its graphs; a process with more bytes ends, and Ray starts another one.
MEMORY_BYTES = 3 << 30
#: Trials of --overhead.
OVERHEAD_EPOCHS = 3
OVERHEAD_SPACE: dict[str, Any] = {"learning_rate": {"low": 1e-3, "high": 1e-2, "log": True}}


# ---------------------------------------------------------------- the training process


class Trainer:
    """Train epoch by epoch as `ray_cxr.training.worker` does, in a process that keeps TensorFlow; a Ray actor.

    Args:
        prepared: the prepared folder.
        curves: folder for trained curves, one file per settings.
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
        self._key = ""
        self._loop: Any = None

    def get_epoch(self, values: dict[str, Any], number: int) -> dict[str, Any]:
        """Return the metrics of an epoch, counted from 1; or `failure`, the reason why there is none."""
        path = self._file(values)
        known = _read(path)
        if number <= len(known["curve"]):
            return known["curve"][number - 1]
        if known["failure"] is None:
            if self._key != path.name or self._progress.epochs_done >= number:
                self._start(values, path.name)
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
        """Train all epochs and return the best one on validation: `val` and `test`, macro AUROCs, and `epoch`.

        Raises:
            RayCxrError: the training failed.
        """
        from ray_cxr.training.ingest import Feed
        from ray_cxr.training.loop import evaluate

        path = self._file(values)
        known = _read(path)
        if known["result"] is None:
            self._start(values, path.name)
            test, loop = self._splits["test"], self._loop
            feed = Feed(test, loop.columns, loop.settings.batch_size, 0, 1)
            found = {"val": -math.inf}
            while self._progress.epochs_done < loop.settings.epochs:
                self._train()
                if self._progress.scores[-1] > found["val"]:
                    with loop.use_export_weights():
                        probabilities = loop.predict(feed)
                    result = evaluate(test.labels[:, loop.columns], probabilities, loop.findings)
                    val, epoch = self._progress.scores[-1], self._progress.epochs_done
                    found = {"val": val, "test": result["macro_auroc"], "epoch": epoch}
            known = {"settings": values, "curve": self._progress.curves, "failure": None, "result": found}
            atomic.write_json(path, known)
        return known["result"]

    def _file(self, values: dict[str, Any]) -> Path:
        # These settings do not change what a trial trains.
        what = {key: value for key, value in values.items() if key not in ("cpus_per_worker", "max_failures")}
        described = json.dumps([what, self._data.manifest_digest, versions()], sort_keys=True)
        return self._curves / f"{hashlib.sha256(described.encode()).hexdigest()[:24]}.json"

    def _start(self, values: dict[str, Any], key: str) -> None:
        """Drop the model of the previous trial and build another one."""
        import keras
        import psutil

        from ray_cxr.models.architecture import Architecture
        from ray_cxr.training.loop import Loop, TrainState

        self._loop = None
        gc.collect()
        keras.backend.clear_session()
        if psutil.Process().memory_info().rss > MEMORY_BYTES:
            os._exit(0)  # Ray restarts this actor and repeats the call
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
        """Train and validate one epoch, as a worker does."""
        from ray_cxr.training import worker

        loop, progress = self._loop, self._progress
        loop.start_epoch(progress)
        done = loop.run_epoch(progress)
        with tempfile.TemporaryDirectory(prefix="ray_cxr-") as folder:
            point, selection = worker.validate_epoch(loop, progress, done, Path(folder))
        progress.epochs_done, progress.losses = progress.epochs_done + 1, []
        progress.scores.append(selection)
        progress.curves.append(point)


def _read(path: Path) -> dict[str, Any]:
    try:
        known: dict[str, Any] = {"result": None, **json.loads(path.read_text(encoding="utf-8"))}
    except FileNotFoundError:
        return {"curve": [], "failure": None, "result": None}
    return known


def light_trial(trainer: Any, budget: float) -> Callable[[dict[str, Any], Any], dict[str, Any]]:
    """Return a trial function for `search`, which lets `trainer` train and reports as `run_trial` does.

    A trial that starts after the previous ones have spent the budget fails at once, and its result is ignored.
    """

    def trial(config: dict[str, Any], job: Any) -> dict[str, Any]:
        import ray
        from ray import tune

        from ray_cxr.tuning.trial import build_report

        folder, nan, curve = Path(config["folder"]), float("nan"), []
        before = sum(len(path.read_text().splitlines()) - 1 for path in folder.parent.glob(f"*/{METRICS}"))
        for number in range(1, config["settings"]["epochs"] + 1):
            point = {"failure": SPENT}
            if before < budget:
                point = ray.get(trainer.get_epoch.remote(config["settings"], number))
            if "failure" in point:
                return {"epoch": 0, "val_auroc": nan, "best_val_auroc": nan, "failure": point["failure"]}
            curve.append(point)
            pd.DataFrame(curve).to_csv(folder / METRICS, index=False, lineterminator="\n")
            tune.report(build_report(curve, None))
        return {**build_report(curve, None), "ended": 1}

    return trial


# ---------------------------------------------------------------- the searches


def prepare(work: Path, patients: int) -> Path:
    """Prepare phantoms with the package's commands; Ray must run.

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
                raise RayCxrError(f"`ray-cxr {command[0]}` failed; see its line above")
    return prepared


def base_settings(epochs: int) -> TrainSettings:
    """Return the settings that all trials share."""
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
    """Run one search; return its trials in the order of their ends, each with settings, epochs, AUROC and state.

    Args:
        prepared, folder: the images and the search's folder.
        method, seed: a key of `METHODS`, and the sampler's seed.
        trials, epochs: maximum number of trials, and epochs of each.
        trainer: an actor of `Trainer`.
        budget: no trial trains after this number of epochs.
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
    # A continued search would use another sampler seed than an uninterrupted one.
    shutil.rmtree(folder, ignore_errors=True)
    plan = StudyPlan(prepared, folder, base_settings(epochs), settings)
    tuned = functools.partial(search.ray_tune.TuneConfig, reuse_actors=True)
    with mock.patch.object(search.ray_tune, "TuneConfig", tuned):
        outcome = search.search(plan, trial=light_trial(trainer, budget), finish=False, on_event=lambda line: None)
    if outcome.facts["interrupted"]:
        raise KeyboardInterrupt
    proposed = outcome.study.get_trials(deepcopy=False)
    return {
        "grace_epochs": settings.grace_epochs,
        "reduction_factor": settings.reduction_factor,
        "trials": [
            {
                "number": int(row["number"]),
                "state": row["state"],
                "epochs": int(row["epochs"]),
                "auroc": None if pd.isna(row["val_auroc"]) else float(row["val_auroc"]),
                "settings": plan.build_settings(proposed[int(row["number"])]).model_dump(mode="json"),
                "params": proposed[int(row["number"])].params,
            }
            # One trial at a time: they end in the order of their numbers.
            for row in outcome.rows.sort_values("number").to_dict("records")
            if row["reason"] != SPENT
        ],
    }


def list_incumbents(trials: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one point after each trial, in order of their ends.

    Each has `trial`, `spent` (epochs of all trials so far), and `best` and `auroc`, the incumbent's number and AUROC,
    which are None before any trial has one.
    """
    points: list[dict[str, Any]] = []
    spent, best, auroc = 0, None, -math.inf
    for trial in trials:
        spent += trial["epochs"]
        # A failed trial cannot become a bundle.
        if trial["state"] != "failed" and trial["auroc"] is not None and trial["auroc"] > auroc:
            best, auroc = trial["number"], trial["auroc"]
        points.append(
            {"trial": trial["number"], "spent": spent, "best": best, "auroc": None if best is None else auroc}
        )
    return points


def find_incumbent(points: Sequence[Mapping[str, Any]], budget: float) -> Mapping[str, Any] | None:
    """Return the last point within the budget that has an incumbent."""
    within = [point for point in points if point["spent"] <= budget and point["best"] is not None]
    return within[-1] if within else None


def count_epochs_until(points: Sequence[Mapping[str, Any]], auroc: float) -> int | None:
    """Return the epochs spent when the incumbent reached an AUROC; None if it never did."""
    return next((point["spent"] for point in points if point["auroc"] is not None and point["auroc"] >= auroc), None)


def measure_searches(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all searches and train their winners again."""
    started = time.monotonic()
    with session.start_ray(RaySettings(num_cpus=CPUS), dashboard=True):
        import ray

        prepared = prepare(arguments.work, arguments.patients)
        data = PreparedSet(prepared, SIZE)
        images = {name: len(data.usable(name)) for name in ("train", "val", "test")}
        log(f"phantoms: {images}")
        curves = arguments.work / "curves"
        curves.mkdir(exist_ok=True)
        actor = ray.remote(Trainer).options(num_cpus=CPUS, max_restarts=-1, max_task_retries=-1)
        trainer = actor.remote(str(prepared.absolute()), str(curves.absolute()), CPUS)
        searches = []
        for seed in range(arguments.seeds):
            found: dict[str, Any] = {}
            budget = math.inf
            for method in METHODS:  # the rival first: its epochs are the others' budget
                start = time.monotonic()
                trials = arguments.trials if method == RIVAL else arguments.asha_trials
                folder = arguments.work / "searches" / f"{method}-{seed}"
                one = run_search(prepared, folder, method, seed, trials, arguments.epochs, trainer, budget)
                found[method] = {**one, "seconds": time.monotonic() - start}
                last = list_incumbents(one["trials"])[-1]
                if method == RIVAL:
                    budget = last["spent"]
                log(
                    f"seed {seed}, {method}: {len(one['trials'])} trials, {last['spent']} epochs, validation AUROC "
                    f"{last['auroc'] or math.nan:.4f}; {found[method]['seconds']:.0f} s"
                )
            searches.append({"seed": seed, "methods": found, **select_winners(found)})
        for one in searches:
            for winner in one["winners"].values():
                retrain(winner, one["methods"], arguments.retrain, trainer)
            shown = ", ".join(f"{name} {one['winners'][name]['test']:.4f}" for name in one["winners"])
            log(f"seed {one['seed']}: test AUROC of the winners: {shown}")
    return {
        "space": SPACE,
        "images": images,
        "epochs_per_trial": arguments.epochs,
        "trials": {RIVAL: arguments.trials, "others": arguments.asha_trials},
        "fresh_seeds": arguments.retrain,
        "searches": searches,
        "summary": summarize_searches(searches),
        "seconds": time.monotonic() - started,
    }


def select_winners(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rival's epochs, when the others were as good, and the trials to train again, for one search seed.

    Raises:
        RayCxrError: a method has no incumbent within its budget.
    """
    points = {method: list_incumbents(one["trials"]) for method, one in found.items()}
    budget = points[RIVAL][-1]["spent"]
    target = points[RIVAL][-1]["auroc"]
    winners = {RIVAL: {"method": RIVAL, **points[RIVAL][-1]}}
    for method in points:
        if method == RIVAL:
            continue
        for when, epochs in (("half", HALF * budget), ("whole", budget)):
            point = find_incumbent(points[method], epochs)
            if point is None:
                raise RayCxrError(f"{method}: no trial ended within {epochs:g} epochs; increase --trials")
            winners[f"{method} at {when}"] = {"method": method, **point}
    if target is None:
        raise RayCxrError(f"{RIVAL}: no trial has an AUROC; increase --trials")
    return {
        "budget": budget,
        "target": target,
        "reached": {method: count_epochs_until(points[method], target) for method in points if method != RIVAL},
        "spent": {method: points[method][-1]["spent"] for method in points},
        "winners": winners,
    }


def retrain(winner: dict[str, Any], found: Mapping[str, Any], seeds: int, trainer: Any) -> None:
    """Train a winner's settings again; add `tests`, macro AUROC of the test split by seed, and `test`, their mean."""
    import ray

    trial = next(one for one in found[winner["method"]]["trials"] if one["number"] == winner["best"])
    fresh = [{**trial["settings"], "seed": FRESH_SEED + index} for index in range(seeds)]
    winner["params"] = trial["params"]
    winner["tests"] = [ray.get(trainer.score.remote(values))["test"] for values in fresh]
    winner["test"] = statistics.mean(winner["tests"])


def summarize_searches(searches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return medians over the search seeds, and whether the bar is met."""
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
        # JSON has no infinity: None if the median search was not as good within its epochs.
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


def show_searches(console: Any, result: Mapping[str, Any]) -> None:
    searches, summary = result["searches"], result["summary"]
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
    medians = [cell for method in others for cell in ("", _part(summary["reached_part"][method]))]
    table.add_row("median", "", *medians)
    console.print(table)
    names = _names(searches)
    table = Table(title=f"Test AUROC of the winners, mean of {result['fresh_seeds']} fresh trainings")
    table.add_column("search seed", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for one in searches:
        table.add_row(str(one["seed"]), *(f"{one['winners'][name]['test']:.4f}" for name in names))
    table.add_row("median", *(f"{summary['test'][name]:.4f}" for name in names))
    console.print(table)
    console.print(
        "at half, at whole: the incumbent after half, or all, of random's epochs; curves that another search had\n"
        "trained already were read from DIR, and their epochs count all the same"
    )
    for name, difference in summary["difference"].items():
        error = difference["standard_error"]
        console.print(
            f"{name} minus random: {difference['median']:+.4f} (median of {len(searches)} searches"
            + ("" if error is None else f", standard error {error:.4f}")
            + f"); not below random in {difference['not_below']} of {len(searches)}"
        )
    console.print(
        f"{JUDGED} at half of random's epochs: test AUROC {summary['test'][f'{JUDGED} at half']:.4f} against random's "
        f"{summary['test'][RIVAL]:.4f}: {'met' if summary['met'] else 'NOT met'}"
    )


def _budgets(searches: Sequence[Mapping[str, Any]]) -> str:
    """Return the epochs of `random`, which differ between searches only if trials failed."""
    found = sorted({one["budget"] for one in searches})
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _part(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


# ---------------------------------------------------------------- the overhead


def measure_overhead(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run real trials with a process ahead and without, in alternating rounds."""
    before, runs = read_load(), []
    start = time.monotonic()
    with session.start_ray(RaySettings(num_cpus=CPUS), dashboard=True):
        ray_s = time.monotonic() - start
        log(f"Ray started in {ray_s:.0f} s")
        prepared = prepare(arguments.work, arguments.patients)
        for number, ahead in interleave((1, 0), arguments.rounds):
            folder = arguments.work / "overhead" / f"{number}-ahead-{ahead}"
            run = {"round": number, "ahead": ahead, **_run_real_search(prepared, folder, arguments.trials, ahead)}
            runs.append(run)
            log(f"round {number + 1}, ahead={ahead}: {arguments.trials} trials in {run['seconds']:.0f} s")
    return {
        "ray_start_seconds": ray_s,
        "load_before": before,
        "load_after": read_load(),
        "epochs": OVERHEAD_EPOCHS,
        "runs": runs,
        "summary": {ahead: summarize_overhead(runs, ahead) for ahead in (1, 0)},
    }


def _run_real_search(prepared: Path, folder: Path, trials: int, ahead: int) -> dict[str, Any]:
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
    plan = StudyPlan(prepared, folder, base_settings(OVERHEAD_EPOCHS), settings)
    started = time.time()
    rows = search.search(plan, finish=False, on_event=lambda line: None).rows
    seconds = time.time() - started
    if (states := set(rows["state"])) != {"finished"}:
        raise RayCxrError(f"{folder}: trials are {', '.join(sorted(states))}; see {folder / 'trials.parquet'}")
    return {"seconds": seconds, "trials": split_wall_times(plan, rows, started)}


def split_wall_times(plan: StudyPlan, rows: pd.DataFrame, started: float) -> list[dict[str, float]]:
    """Return the parts of each trial's wall time, see the top of this file; seconds.

    Args:
        plan: the search's.
        rows: its trials, which ended one after the other.
        started: when the search started, seconds since 1970.
    """
    found, before = [], started
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
            "model": times["model"] - times["TensorFlow"],
            "start": times["Ray"] - before,
            "between": last - times["model"] - training - validation,
            "end": ended - last,
        }
        found.append({**one, "overhead": one["start"] + one["between"] + one["end"]})
        before = ended
    return found


def summarize_overhead(runs: Sequence[Mapping[str, Any]], ahead: int) -> dict[str, Any]:
    """Return medians without each search's first trial; and the time of whole searches beyond training, per trial."""
    mine = [run for run in runs if run["ahead"] == ahead]
    later = [trial for run in mine for trial in run["trials"][1:]]
    medians = {name: statistics.median(trial[name] for trial in later) for name in later[0]}
    known = ("training", "validation", "TensorFlow", "model")
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


def show_overhead(console: Any, result: Mapping[str, Any]) -> None:
    names = list(result["runs"][0]["trials"][0])
    for ahead, summary in result["summary"].items():
        table = Table(title=f"Seconds per trial, ahead={ahead}, {result['epochs']} epochs of a TinyCNN")
        for name in ("round", "trial", *names):
            table.add_column(name, justify="right")
        for run in result["runs"]:
            if run["ahead"] == ahead:
                for index, trial in enumerate(run["trials"]):
                    cells = (f"{trial[name]:.1f}" for name in names)
                    table.add_row(str(run["round"] + 1), f"{index}{' (first)' * (not index)}", *cells)
        table.add_row("", "median", *(f"{summary['medians'][name]:.1f}" for name in names))
        console.print(table)
    console.print(
        "overhead: start + between + end; the median leaves out each search's first trial, before which Ray Tune starts"
    )
    for ahead, summary in result["summary"].items():
        verdict = (", met" if summary["met"] else ", NOT met") if ahead == 1 else ""
        console.print(
            f"ahead={ahead}: overhead {summary['medians']['overhead']:.1f} s per trial"
            + (f" <= {OVERHEAD_S:g}{verdict}" if ahead == 1 else "")
            + f"; of the first trial {summary['first']:.1f} s; of whole searches {summary['whole']:.1f} s per trial"
        )
    console.print(
        f"Ray itself started in {result['ray_start_seconds']:.0f} s, once and before all that; the machine's load was "
        f"{result['load_before']:.1f} before and {result['load_after']:.1f} after"
    )


# ---------------------------------------------------------------- the script


def parse() -> argparse.Namespace:
    parser = create_parser(__doc__)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for all files; kept")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--searches", action="store_true", help="compare the searches (the default)")
    modes.add_argument("--overhead", action="store_true", help="seconds per trial beyond its training")
    parser.add_argument("--quick", action="store_true", help="one small search of each method")
    parser.add_argument("--seeds", help="searches of each method (5)", **POSITIVE)
    parser.add_argument("--trials", help="of random search (20); with --overhead: of each search (6)", **POSITIVE)
    parser.add_argument("--asha-trials", help="maximum of the others; four times as many", **POSITIVE)
    parser.add_argument("--epochs", default=9, help="of a complete trial (9)", **POSITIVE)
    parser.add_argument("--retrain", help="number of fresh seeds for each winner (3)", **POSITIVE)
    parser.add_argument("--rounds", default=1, help="--overhead: searches with each setting (1)", **POSITIVE)
    parser.add_argument("--patients", default=PATIENTS, help=f"phantoms ({PATIENTS})", **POSITIVE)
    arguments = parser.parse_args()
    quick = arguments.quick
    arguments.seeds = arguments.seeds or (1 if quick else 5)
    arguments.trials = arguments.trials or (6 if arguments.overhead else 4 if quick else 20)
    arguments.asha_trials = arguments.asha_trials or 4 * arguments.trials
    arguments.retrain = arguments.retrain or (1 if quick else 3)
    if arguments.overhead and arguments.trials < 2:
        parser.error(f"--trials {arguments.trials}: --overhead reports the first trial separately; use 2 or more")
    return arguments


def measure(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    console = create_console(160)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.overhead:
        result["overhead"] = measure_overhead(arguments)
        show_overhead(console, result["overhead"])
    else:
        result["searches"] = measure_searches(arguments)
        show_searches(console, result["searches"])


if __name__ == "__main__":
    sys.exit(run_script(parse, measure))
