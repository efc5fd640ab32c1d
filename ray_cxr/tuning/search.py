"""`tune`: Ray Tune runs the trials, Optuna proposes them, and a study's folder keeps what came of them.

Of Ray's own, `Tuner.restore` is not used: it forgets what the scheduler has seen, so that ASHA would begin anew, it
pickles the searcher some seconds behind Optuna's storage, and what it reads back is pickled. A search continues from
Optuna's storage and the trials' own folders instead; see docs/decisions/0013-search.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import ray
import tomli_w
from ray import tune as ray_tune
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from ray.tune.trainable import wrap_function
from sqlalchemy.exc import SQLAlchemyError

from ray_cxr import cluster
from ray_cxr.config import TuneSettings
from ray_cxr.errors import BundleError, ConfigError, OutputError, RayCxrError, own_error
from ray_cxr.evaluation import comparison
from ray_cxr.labels import NO_FINDING
from ray_cxr.models.bundle import Bundle, load_bundle
from ray_cxr.progress import TrialTable
from ray_cxr.storage import atomic, remote
from ray_cxr.training.checkpoints import SNAPSHOT
from ray_cxr.training.export import export_bundle
from ray_cxr.training.planning import plan_resources, plan_training
from ray_cxr.training.worker import FAILURE
from ray_cxr.tuning import study as studies
from ray_cxr.tuning import trial as trials
from ray_cxr.tuning.halving import Halving
from ray_cxr.tuning.study import REPORTED, Plan
from ray_cxr.versions import versions

logger = logging.getLogger(__name__)

#: What a scheduler compares: the best AUROC so far, as a bundle would have it.
METRIC = REPORTED["auroc"]
#: Memory that a trial's own process is counted with. It must ask for something, and may not ask for a CPU: its
#: workers need them all.
TRIAL_BYTES = 300 << 20
#: How long a dashboard may take to answer.
DASHBOARD_WAIT_S = 90
#: So many trials that fail one after the other before any epoch are not the settings' fault.
HOPELESS = 5
#: Fewer other trials than this have no median that could stop one.
_MEDIAN_OF = 3


@dataclass(frozen=True)
class Outcome:
    """What a search came to.

    Attributes:
        rows: one row per trial; see `study.record`.
        best: the number of the best trial; None where none has an AUROC.
        bundle: its bundle.
        interrupted: whether Ctrl-C ended it.
        gave_up: why no more trials were begun; None where nothing was amiss.
        epochs: that were trained in all.
        study: Optuna's.
        facts: what a report says of the search as a whole.
        comparison: of its backbones; None with one.
    """

    study: optuna.Study
    rows: pd.DataFrame
    best: int | None
    bundle: Bundle | None
    interrupted: bool
    gave_up: str | None
    epochs: int
    facts: dict[str, Any]
    comparison: dict[str, Any] | None


#: What a trial does: its configuration and what trials share in, the last report out. For benchmarks and tests.
Trial = Callable[[dict[str, Any], trials.Job], dict[str, Any]]


def search(
    plan: Plan,
    *,
    use_gpu: bool = False,
    on_event: Callable[[str], None] = logger.info,
    trial: Trial = trials.run,
    finish: bool = True,
) -> Outcome:
    """Run a search, or continue it, and leave the best trial's bundle, its settings and all trials' record.

    Args:
        plan: what is searched, and where.
        use_gpu: trials train on GPUs.
        on_event: takes one line per event for people.
        trial: what a trial does.
        finish: whether to make the best trial's bundle.

    Raises:
        ConfigError, OutputError, RayCxrError: see the messages.
    """
    began = time.monotonic()
    settings, out = plan.settings, plan.out
    _refuse_without_dashboard()
    each, fits = plan_resources(plan.base, use_gpu=use_gpu, runs=settings.concurrent)
    at_a_time = settings.concurrent or fits
    with _alone(out):
        cluster.require_shared(out, PREPARED=plan.prepared)
        studies.write_begun(out, plan.base, settings)
        study = plan.open()
        (out / studies.SUMMARY).unlink(missing_ok=True)
        interrupted, gave_up = False, None
        ask = _Ask(plan, study, each)
        done = [one for one in study.get_trials(deepcopy=False) if studies.ended(one)]
        _tell_what_goes_on(plan, study, ask, done, at_a_time, each, on_event)
        left = settings.trials - len(done)
        if left > 0:
            job = trials.Job(
                prepared=remote.address(plan.prepared),
                out=str(out.absolute()),
                use_gpu=use_gpu,
                measure_threads=each if "images_per_second" in settings.objectives else None,
                where=cluster.get_selector(),
            )
            with TrialTable(settings.trials, len(done)) as board:
                watch = _Watch(plan, study, ask, board, on_event)
                over = _run(plan, ask, watch, job, trial, left, at_a_time)
            if ask.gave_up:
                gave_up = (
                    f"{out}: {HOPELESS} trials in a row failed before their first epoch, so no more were begun; mend "
                    "what their reasons say, then the same command goes on"
                )
            interrupted = over < left and gave_up is None
            if interrupted:
                on_event("tune: stopped; what there is so far is being written")
        rows = studies.record(plan, study)
        best = studies.best_of(study, rows)
        pq_rows = studies.table(rows)
        atomic.write_parquet(pq_rows, out / "trials.parquet")
        for number in rows.loc[rows["state"] != "running", "number"]:
            studies.keep_validation(plan.folder(int(number)))
        bundle = None
        if best is not None:
            _write_best(plan, study, rows, best, each)
            if finish:
                bundle = _bundle(plan, study, rows, best, on_event)
        if not interrupted and settings.keep == "best":
            _drop_checkpoints(plan, rows, {best, *studies.pareto(study)})
    epochs = int(rows["epochs"].sum()) if len(rows) else 0
    facts = {
        "title": f"Search in {out.name}",
        "prepared": str(plan.prepared),
        "study_name": plan.name,
        "storage": plan.storage_words(),
        "objectives": list(settings.objectives),
        "directions": [studies.DIRECTIONS[name] for name in settings.objectives],
        "trials_wanted": settings.trials,
        "sampler": settings.sampler,
        "scheduler": _scheduler_words(settings),
        "workers": plan.base.workers,
        "concurrent": at_a_time,
        "epochs_spent": epochs,
        "epochs_full": epochs + _spared(rows, plan.base.epochs),
        "seconds": round(float(rows["seconds"].sum()), 1) if len(rows) else 0.0,
        "seconds_of_command": round(time.monotonic() - began, 1),
        "best_number": best,
        "pareto": studies.pareto(study),
        "interrupted": interrupted,
        "trials_over": int((rows["state"] != "running").sum()) if len(rows) else 0,
        "versions": versions(),
    }
    return Outcome(study, rows, best, bundle, interrupted, gave_up, epochs, facts, _compare(plan, rows))


def _spared(rows: pd.DataFrame, epochs: int) -> int:
    """Epochs that stopped trials would have had still."""
    stopped = rows.loc[rows["state"] == "stopped", "epochs"] if len(rows) else pd.Series(dtype=int)
    return int((epochs - stopped).sum())


def _scheduler_words(settings: TuneSettings) -> str:
    rungs = f"grace {settings.grace_epochs}, reduction {settings.reduction_factor}"
    return {
        "asha": f"ASHA ({rungs})",
        "halving": f"successive halving ({rungs})",
        "median": f"median rule (grace {settings.grace_epochs})",
        "none": "none: every trial trains to its end",
    }[settings.scheduler]


def _compare(plan: Plan, rows: pd.DataFrame) -> dict[str, Any] | None:
    """The backbones side by side; None where there is one."""
    if len(plan.space.backbones) < 2:
        return None
    # Trials are compared at the length that all of them have.
    cut = plan.settings.scheduler != "none"
    curves = [
        comparison.TrialCurve(
            number=int(row["number"]),
            backbone=row["backbone"],
            state=row["state"],
            curve=tuple((int(point["epoch"]), point["val_auroc"]) for point in row["curve"]),
        )
        for row in rows.to_dict("records")
    ]
    compared = comparison.compare_backbones(curves, plan.settings.grace_epochs if cut else plan.base.epochs)
    paired = None
    if compared.pair is not None:
        numbers = [result.best_trial for result in compared.pair]
        found = [None if number is None else studies.validation_of(plan, number) for number in numbers]
        first, second = found
        if first is not None and second is not None:
            columns = [j for j, name in enumerate(plan.base.finding_names()) if name != NO_FINDING]
            # An image that failed at one size only is in one of the two.
            _, mine, theirs = np.intersect1d(first.image_ids, second.image_ids, return_indices=True)
            paired = comparison.paired_macro_auroc(
                first.labels[mine][:, columns],
                first.probabilities[mine][:, columns],
                second.probabilities[theirs][:, columns],
                first.patients[mine],
            )
    return comparison.comparison_record(compared, paired)


def _refuse_without_dashboard() -> None:
    """Refuse a Ray that would never give back what a stopped trial's workers hold.

    A trial that is stopped leaves a run whose controller was killed. Ray Train has a process of its own to free such a
    run's resources, and it asks Ray's state API, a part of the dashboard, whether the controller lives.

    Raises:
        ConfigError: nobody answers there.
    """
    # Asked from where Ray Train will ask: a process on the head node, which must find this Ray among several.
    ask = ray.remote(num_cpus=0, resources={"node:__internal_head__": 0.001}, max_retries=0)(_state_api_answers)
    deadline = time.monotonic() + DASHBOARD_WAIT_S
    while (reason := ray.get(ask.remote())) is not None:
        # It answers some seconds after Ray itself, on a loaded machine many.
        if time.monotonic() > deadline:
            raise ConfigError(
                "this Ray's dashboard does not answer, so what stopped or lost trials hold would never be free again; "
                f"start Ray with its dashboard, and one Ray on a machine ({reason})"
            )
        time.sleep(1)


def _state_api_answers() -> str | None:
    """Return why Ray's state API does not answer from here; None when it does."""
    from ray.util.state import list_nodes

    cluster.bypass_proxies([ray.util.get_node_ip_address(), "127.0.0.1", "localhost"])
    try:
        list_nodes(limit=1, timeout=20)
    except Exception as error:  # of its HTTP client, or of Ray's
        return " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return None


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Refuse a second command in the same folder while one is at work; a kill leaves nothing behind."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror}; name another --out") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{out}: another `ray-cxr tune` is at work here; wait for it, or stop it") from None
        yield
    finally:
        os.close(handle)


def _tell_what_goes_on(
    plan: Plan,
    study: optuna.Study,
    ask: _Ask,
    done: Sequence[optuna.trial.FrozenTrial],
    at_a_time: int,
    each: int,
    on_event: Callable[[str], None],
) -> None:
    on_event(f"tune: study {plan.name} in {plan.storage_words()}")
    if done:
        on_event(f"tune: {len(done)} trials are done already and stay as they are")
    for number in ask.left:
        epochs = len(studies.curve_of(plan.folder(number)))
        kept = (plan.folder(number) / "ray" / SNAPSHOT).exists()
        how = f"continues from its checkpoint, {epochs} epochs done" if kept else "had no checkpoint yet: starts again"
        on_event(f"tune: trial {number} {how}")
    if plan.settings.trials > len(done):
        if plan.base.weights == "none" and "weights" not in plan.space.fields:
            on_event("tune: WARNING: weights=none: every trial starts from RANDOM weights, not from pre-trained ones")
        if plan.settings.sampler == "cmaes" and plan.settings.scheduler != "none":
            on_event(
                "tune: WARNING: cmaes learns from finished trials only; with a scheduler that stops them it gets few"
            )
        for place, (_, missing) in enumerate(plan.points):
            missing = [field for field in missing if field in plan.space.fields]
            if missing and not done:
                on_event(f"tune: known settings {place}: the sampler chooses {', '.join(missing)}")
        workers = plan.base.workers
        on_event(
            f"tune: {at_a_time} trial{'s' * (at_a_time > 1)} at a time, each of {workers} "
            f"worker{'s' * (workers > 1)} of {each} CPU{'s' * (each > 1)}"
        )
        if done and plan.settings.scheduler == "halving":
            on_event("tune: halving begins new brackets; those of the earlier run are over")


def _run(plan: Plan, ask: _Ask, watch: _Watch, job: trials.Job, trial: Trial, left: int, at_a_time: int) -> int:
    """Let Ray Tune run so many trials; how many came to an end.

    Raises:
        RayCxrError: Tune itself failed.
    """

    def tuned(config: dict[str, Any]) -> dict[str, Any]:
        return trial(config, job)

    class Named(wrap_function(tuned)):  # type: ignore[misc]
        """Ray's class around the function, with the trial's name in the dashboard's list of actors."""

        def __repr__(self) -> str:
            return str(self.config["name"])

    settings = plan.settings
    # Those ahead have their processes ready and wait for room, holding nothing that workers need.
    most = at_a_time + settings.ahead
    made = scheduler(settings, plan.base.epochs, watch.earlier(), trials=left, most=most)
    if isinstance(made, Halving):
        ask.room, ask.no_more = made.room, made.no_more
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(Named, {"memory": TRIAL_BYTES}),
        tune_config=ray_tune.TuneConfig(
            search_alg=ask,
            scheduler=made,
            num_samples=left,
            max_concurrent_trials=most,
            trial_name_creator=lambda one: one.config["name"],
            trial_dirname_creator=lambda one: one.config["name"],
        ),
        run_config=ray_tune.RunConfig(
            name=f"tune-{int(time.time())}",
            storage_path=str((plan.out / "ray").absolute()),
            failure_config=ray_tune.FailureConfig(max_failures=settings.max_failures),
            callbacks=[watch],
            verbose=0,
        ),
    )
    # Tune takes over Ctrl-C and gives it back only after one.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    try:
        with _quiet():
            tuner.fit()
    except ray_tune.TuneError as error:
        inner = own_error(error)
        lines = [line for line in str(inner or error).splitlines() if line.strip()] or [type(error).__name__]
        raise RayCxrError(
            f"{plan.out}: Ray Tune gave up: {lines[-1].strip()[:300]}; the same command, or --resume, goes on"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return watch.over


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tune's own lines are of its files; ours are of the trials."""
    loud = [logging.getLogger(name) for name in ("ray.tune", "ray.air", "ray.train")]
    before = [one.level for one in loud]
    added = {
        # Loggers of every trial would write each result three times more.
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        # A trial that failed has no value of some objectives, which is no reason to end the search.
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    }
    for one in loud:
        one.setLevel(logging.CRITICAL)
    try:
        with cluster.set_environment(added):
            yield
    finally:
        for one, level in zip(loud, before, strict=True):
            one.setLevel(level)


class _Earlier:
    """A trial of an earlier run, as far as a scheduler looks at one."""

    def __init__(self, number: int) -> None:
        self.trial_id = f"earlier-{number}"


def scheduler(
    settings: TuneSettings,
    epochs: int,
    earlier: Mapping[int, Sequence[Mapping[str, Any]]],
    *,
    trials: int,
    most: int,
) -> TrialScheduler:
    """Ray's scheduler as the settings ask for it, told what trials of earlier runs have shown.

    Args:
        settings: of the search.
        epochs: of a whole trial.
        earlier: the reports of each trial that is over, by its number.
        trials: how many will come.
        most: processes at a time.
    """
    common: dict[str, Any] = {"time_attr": "epoch", "metric": METRIC, "mode": "max"}
    made: TrialScheduler
    if settings.scheduler == "asha":
        made = ASHAScheduler(
            **common,
            max_t=epochs,
            grace_period=settings.grace_epochs,
            reduction_factor=settings.reduction_factor,
            stop_last_trials=False,  # a trial that has come to its last epoch ends by itself
        )
    elif settings.scheduler == "median":
        made = MedianStoppingRule(
            **common,
            grace_period=settings.grace_epochs,
            min_samples_required=_MEDIAN_OF,
            min_time_slice=math.inf,  # else it pauses trials, which would start their workers anew
        )
    elif settings.scheduler == "halving":
        return Halving(
            metric=METRIC,
            time_attr="epoch",
            epochs=epochs,
            grace=settings.grace_epochs,
            reduction=settings.reduction_factor,
            trials=trials,
            most=most,
            known=lambda trial: len(studies.curve_of(Path(trial.config["folder"]))),
        )
    else:
        return FIFOScheduler()
    for number, reports in earlier.items():
        stand_in = _Earlier(number)
        made.on_trial_add(None, stand_in)
        for report in reports:
            if settings.scheduler == "median":
                # Only taken note of: what a median says now of a trial that is over is no matter.
                made.on_trial_complete(None, stand_in, dict(report))
            else:
                made.on_trial_result(None, stand_in, dict(report))
        if settings.scheduler == "asha":
            made.on_trial_remove(None, stand_in)
    return made


class _Ask(OptunaSearch):
    """Ray's OptunaSearch on a study that outlives this process.

    What is over is told to Optuna as what it is: stopped trials as pruned, failed ones as failed with their reason.
    Trials that another process left unfinished are handed out again, first, under their numbers.
    """

    def __init__(self, plan: Plan, study: optuna.Study, cpus: int) -> None:
        objectives = plan.settings.objectives
        several = len(objectives) > 1
        super().__init__(
            space=plan.space.suggest,
            metric=[REPORTED[name] for name in objectives] if several else METRIC,
            mode=[studies.DIRECTIONS[name][:3] for name in objectives] if several else "max",
            sampler=study.sampler,
            study_name=study.study_name,
            storage=study._storage,
        )
        self._plan, self._cpus = plan, cpus
        self._ot_study = study
        self._in_a_row = 0
        #: Whether so many trials failed at once, one after the other, that more would, too.
        self.gave_up = False
        #: Whether another trial may begin; None: Ray's limit on those that were begun says so.
        self.room: Callable[[], bool] | None = None
        #: Told that no more trials will come than have come.
        self.no_more: Callable[[], None] = lambda: None
        #: Numbers of the trials that an earlier run began and left.
        self.left = [one.number for one in study.get_trials(deepcopy=False) if studies.state_of(one) == "running"]

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles a search to restore it, which is done from Optuna's storage here."""
        return {}

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Whether this, and not Ray, holds the number of trials down."""
        return self.room is not None

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next trial's configuration; None: not yet; or that there will be no more."""
        if self._in_a_row >= HOPELESS:
            self.gave_up = True
            self.no_more()
            return Searcher.FINISHED
        if self.room is not None and not self.room():
            return None
        if self.left:
            number = self.left.pop(0)
            frozen = self._ot_study.get_trials(deepcopy=False)[number]
            # What it was given before, Optuna gives it again.
            trial = optuna.trial.Trial(self._ot_study, frozen._trial_id)
        else:
            trial = self._ot_study.ask()
        self._plan.space.suggest(trial)
        self._ot_trials[trial_id] = trial
        self.starts(trial_id)
        folder = self._plan.folder(trial.number)
        folder.mkdir(parents=True, exist_ok=True)
        settings = self._plan.settings_of(trial).replace(cpus_per_worker=self._cpus)
        # Any trial can be trained again, or have a bundle made of it, by itself.
        whole = {name: value for name, value in settings.model_dump(mode="json").items() if value is not None}
        atomic.write_text(folder / "trial.toml", tomli_w.dumps({"train": whole}))
        return {
            "number": trial.number,
            "name": f"trial-{trial.number:04d}-{settings.backbone}",
            "folder": str(folder.absolute()),
            "settings": settings.model_dump(mode="json"),
        }

    def starts(self, trial_id: str) -> None:
        """Count one more start of a trial, its first or after its process was lost."""
        trial = self._ot_trials[trial_id]
        trial.set_user_attr("starts", int(trial.user_attrs.get("starts", 0)) + 1)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Tell Optuna of an epoch; with several objectives it takes none."""
        if len(self._plan.settings.objectives) > 1 or math.isnan(result[METRIC]):
            return
        trial = self._ot_trials[trial_id]
        known = self._ot_study.get_trials(deepcopy=False)[trial.number].intermediate_values
        if result["epoch"] not in known:
            self._kept(lambda: trial.report(result[METRIC], result["epoch"]))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna how a trial ended; what raised is told by `failed`, which knows why."""
        if trial_id in self._completed_trials or error or not result:
            return
        if "failure" in result:
            self.failed(trial_id, str(result["failure"]))
            return
        trial, ended = self._ot_trials[trial_id], _ended(result, self._plan.base.epochs)
        if result.get("images_per_second") is not None:
            self._kept(lambda: trial.set_user_attr("images_per_second", result["images_per_second"]))
        values = studies.objectives_of(result, self._plan.settings.objectives)
        if values is None:
            self.failed(trial_id, f"it gave no {' and '.join(self._plan.settings.objectives)}")
            return
        if ended or len(self._plan.settings.objectives) > 1:
            self._kept(lambda: trial.set_user_attr("state", "finished" if ended else "stopped"))
            self._kept(lambda: self._ot_study.tell(trial, values))
        else:
            self.on_trial_result(trial_id, result)
            self._kept(lambda: self._ot_study.tell(trial, state=optuna.trial.TrialState.PRUNED))
        self._completed_trials.add(trial_id)
        self._in_a_row = 0

    def _kept(self, act: Callable[[], Any]) -> None:
        """Write to Optuna's storage, which other programs may hold for a while, or which starts anew just now."""
        for wait in (1, 2, 4, 8, 16, 32):
            try:
                act()
                return
            except (optuna.exceptions.StorageInternalError, SQLAlchemyError):
                time.sleep(wait)
        act()

    def failed(self, trial_id: str, reason: str) -> None:
        """Tell Optuna that a trial failed, and why."""
        if trial_id in self._completed_trials:
            return
        trial = self._ot_trials[trial_id]
        self._kept(lambda: trial.set_user_attr("reason", " ".join(reason.split())[:500]))
        self._kept(lambda: self._ot_study.tell(trial, state=optuna.trial.TrialState.FAIL))
        self._completed_trials.add(trial_id)
        self._in_a_row = 0 if studies.curve_of(self._plan.folder(trial.number)) else self._in_a_row + 1

    def reason(self, trial_id: str) -> str | None:
        """Why a trial failed, as Optuna was told."""
        reason: str | None = self._ot_trials[trial_id].user_attrs.get("reason")
        return reason

    def save(self, checkpoint_path: str) -> None:
        """Nothing: Optuna's storage has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: Optuna's storage has it."""


class _Watch(ray_tune.Callback):
    """Says what happens, and keeps trials.parquet up to date while the search runs."""

    def __init__(
        self, plan: Plan, study: optuna.Study, ask: _Ask, board: TrialTable, on_event: Callable[[str], None]
    ) -> None:
        self._plan, self._study, self._ask, self._board, self._on_event = plan, study, ask, board, on_event
        #: How many trials came to an end.
        self.over = 0
        rows = studies.record(plan, study)
        #: Epochs of each trial that were told; a trial that starts again reports those that it has anew.
        self._told = {int(row["number"]): int(row["epochs"]) for row in rows.to_dict("records")}
        self._begun: set[int] = set()
        best = studies.best_of(study, rows)
        self._best = -math.inf if best is None else float(rows.loc[rows["number"] == best, "val_auroc"].iloc[0])
        self._earlier = {
            int(row["number"]): list(map(trials.Points(None).next, row["curve"]))
            for row in rows.to_dict("records")
            if row["state"] in ("finished", "stopped")
        }

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, as `_Ask`."""
        return {}

    def earlier(self) -> dict[int, list[dict[str, Any]]]:
        """The reports of trials that an earlier run brought to an end, by number."""
        return self._earlier

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        config = trial.config
        values = self._plan.space.values(self._ask._ot_trials[trial.trial_id].params)
        number, backbone = config["number"], config["settings"]["backbone"]
        self._board.start_trial(number, backbone)
        if number in self._begun:
            self._on_event(f"tune: trial {number} goes on after epoch {self._told.get(number, 0)}")
            return
        self._begun.add(number)
        shown = [f"{name} {_short(value)}" for name, value in values.items() if name != "backbone"]
        self._on_event(f"tune: trial {number} begins: {', '.join([backbone, *shown])}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "failure" in result or "ended" in result:
            return
        number, total = trial.config["number"], trial.config["settings"]["epochs"]
        self._board.end_epoch(number, result["epoch"], total, result["val_auroc"])
        if result["epoch"] <= self._told.get(number, 0):
            return
        self._told[number] = result["epoch"]
        self._best = max(self._best, result[METRIC])
        self._on_event(f"tune: trial {number}, epoch {result['epoch']} of {total}: AUROC {result['val_auroc']:.4f}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number, last = trial.config["number"], trial.last_result or {}
        # Of one that was stopped while it waited for others, Tune does not say how far it had come.
        self._ask.on_trial_complete(trial.trial_id, last)
        self.over += 1
        reason = self._ask.reason(trial.trial_id)
        if reason is not None:
            self._end(number, "failed", f"failed: {reason}", None)
            return
        auroc = last[METRIC]
        record = ", the best so far" if auroc >= self._best else ""
        if _ended(last, trial.config["settings"]["epochs"]):
            self._end(number, "finished", f"is finished: AUROC {auroc:.4f}{record}", auroc)
        else:
            self._end(number, "stopped", f"is stopped after epoch {last['epoch']}: AUROC {auroc:.4f}{record}", auroc)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = trial.config["number"]
        reason = _reason(trial)
        atomic.write_json(self._plan.folder(number) / FAILURE, {"message": reason, "input": False})
        self._ask.failed(trial.trial_id, reason)
        self.over += 1
        self._end(number, "failed", f"failed: {reason}", None)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ask.starts(trial.trial_id)
        self._on_event(f"tune: trial {trial.config['number']}: its process was lost; it starts again where it was")

    def _end(self, number: int, state: str, words: str, auroc: float | None) -> None:
        self._board.end_trial(number, state, auroc)
        self._on_event(f"tune: trial {number} {words}")
        try:
            rows = studies.record(self._plan, self._study)
            atomic.write_parquet(studies.table(rows), self._plan.out / "trials.parquet")
            for one in rows.loc[rows["state"] != "running", "number"]:
                studies.keep_validation(self._plan.folder(int(one)))
            if self._plan.settings.keep == "best":
                best = studies.best_of(self._study, rows)
                # What ended just now may still be at its files.
                _drop_checkpoints(self._plan, rows, {best, number, *studies.pareto(self._study)})
        except (OSError, optuna.exceptions.OptunaError) as error:
            # A look at where the search is, not a part of it; it is written again at the next trial's end.
            self._on_event(f"tune: WARNING: trials.parquet could not be brought up to date: {error}")


def _reason(trial: Any) -> str:
    """Why Tune gave a trial up, on one line."""
    error = trial.get_pickled_error() if trial.pickled_error_file else None
    inner = own_error(error) if error is not None else None
    if inner is not None:
        return str(inner)
    lines = [line for line in str(error or "its process was lost").strip().splitlines() if line.strip()]
    return f"its process was lost, or raised: {lines[-1].strip()[:300]}"


def _ended(result: Mapping[str, Any], epochs: int) -> bool:
    """Whether a trial came to its end; it may be told to stop just there."""
    return "ended" in result or result["epoch"] >= epochs


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(list(value) if isinstance(value, tuple) else value)


def _write_best(plan: Plan, study: optuna.Study, rows: pd.DataFrame, best: int, cpus: int) -> None:
    """best.toml: all that `train` needs to do the same again."""
    frozen = study.get_trials(deepcopy=False)[best]
    settings = plan.settings_of(frozen)
    size = settings.size or studies.prepared_sizes(plan.prepared)[0]
    plain = {
        key: value for key, value in settings.replace(size=size).model_dump(mode="json").items() if value is not None
    }
    row = rows.loc[rows["number"] == best].iloc[0]
    head = (
        f"# Trial {best} of {plan.name}: validation AUROC {row['val_auroc']:.4f} in epoch {row['best_epoch']:.0f}, "
        f"{row['state']} after {row['epochs']} of {settings.epochs}.\n"
        f"# It was chosen among {len(rows)} trials on the same validation images, which flatters it.\n"
        "#   ray-cxr train PREPARED --config best.toml --out RUN\n"
        f"# Its workers had {cpus} CPUs each; with others, say cpus_per_worker={cpus} for the same bits.\n\n"
    )
    atomic.write_text(plan.out / "best.toml", head + tomli_w.dumps({"train": plain}))


def _bundle(
    plan: Plan, study: optuna.Study, rows: pd.DataFrame, best: int, on_event: Callable[[str], None]
) -> Bundle | None:
    """The best trial's bundle in STUDY/bundle; one that is there and is of the same epoch of that trial stays."""
    row = rows.loc[rows["number"] == best].iloc[0]
    origin = {"study": plan.name, "trial": best, "trials": len(rows), "epochs": int(row["epochs"])}
    target = plan.out / "bundle"
    old = plan.out / ".bundle.old"
    with contextlib.suppress(BundleError):  # a kill may have left half of one, or none
        there = load_bundle(target)
        if {**there.info["provenance"].get("tuned", {}), "trials": 0} == {**origin, "trials": 0}:
            return there
    settings = plan.settings_of(study.get_trials(deepcopy=False)[best])
    run = plan_training(plan.prepared, plan.folder(best), settings)
    fresh = plan.out / ".bundle.new"
    shutil.rmtree(fresh, ignore_errors=True)
    on_event(f"tune: making the bundle of trial {best}")
    export_bundle(run, fresh, more={"tuned": origin})
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return load_bundle(target)


def _drop_checkpoints(plan: Plan, rows: pd.DataFrame, kept: set[int | None]) -> None:
    """Remove Ray Train's checkpoints of trials that are over and of which no bundle will come."""
    for number in rows.loc[rows["state"] != "running", "number"]:
        if int(number) not in kept:
            shutil.rmtree(plan.folder(int(number)) / "ray", ignore_errors=True)
