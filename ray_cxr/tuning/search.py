"""`tune`: Ray Tune runs the trials, Optuna proposes their settings, and STUDY keeps the results.

A search continues from Optuna's storage and from the trials' folders. Ray's `Tuner.restore` is not used: it forgets the
state of the scheduler, so ASHA would start with empty rungs. Its copy of the searcher is a pickle, which can execute
code, and is some seconds older than Optuna's storage. See docs/decisions/0013-search.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray import tune as ray_tune
from ray.tune import Callback
from ray.tune.trainable import wrap_function

from ray_cxr import cluster, limits
from ray_cxr.errors import ConfigError, RayCxrError, last_line, own_error
from ray_cxr.progress import Stage, TrialTable
from ray_cxr.storage import remote
from ray_cxr.storage.run_folder import lock
from ray_cxr.training.checkpoints import has_checkpoint, read_stored_epochs
from ray_cxr.training.monitor import read_metrics
from ray_cxr.training.planning import plan_resources
from ray_cxr.training.trainer import advise
from ray_cxr.tuning import confirm, results
from ray_cxr.tuning.halving import Halving
from ray_cxr.tuning.plan import SUMMARY, StudyPlan, save_start_settings
from ray_cxr.tuning.records import find_best_trial
from ray_cxr.tuning.schedulers import create_scheduler
from ray_cxr.tuning.search_monitor import ConfirmMonitor, SearchMonitor
from ray_cxr.tuning.searcher import StudySearcher
from ray_cxr.tuning.trial import TrialContext, run_trial

logger = logging.getLogger(__name__)

#: Memory that Ray reserves for a trial's process. Ray refuses a request without resources, and a CPU reserved here
#: would be missing for the workers.
TRIAL_BYTES = 300 << 20
#: Maximum wait for an answer of Ray's dashboard, seconds.
DASHBOARD_WAIT_S = 90
#: Trains a trial with a configuration and a context, and returns the last report.
TrialFunction = Callable[[dict[str, Any], TrialContext], dict[str, Any]]


def search(
    plan: StudyPlan,
    *,
    use_gpu: bool = False,
    on_event: Callable[[str], None] = logger.info,
    trial: TrialFunction = run_trial,
    finish: bool = True,
) -> results.SearchResult:
    """Run or continue a search, and write its results to STUDY.

    Args:
        use_gpu: whether each worker gets a GPU.
        on_event: receives a line of text per event.
        trial: the function that trains a trial; tests and benchmarks replace it.
        finish: whether to write the best trial's bundle, the report and summary.json.

    Raises:
        ConfigError: the workers do not fit Ray's nodes, or Ray's dashboard does not answer.
        OutputError: another command runs in STUDY, or a file cannot be written there.
        RayCxrError: the storage cannot be opened, or Ray Tune failed.
    """
    started = time.monotonic()
    settings, out = plan.settings, plan.out
    with Stage("waiting for Ray's dashboard"):
        _check_dashboard()
    cpus, capacity = plan_resources(plan.base, use_gpu=use_gpu, runs=settings.concurrent)
    concurrent = settings.concurrent or capacity
    with lock(out, "tune"), cluster.log_node_changes("tune", on_event):
        cluster.require_shared(out, {"PREPARED": plan.prepared})
        save_start_settings(out, plan.base, settings)
        study = plan.open_study()
        (out / SUMMARY).unlink(missing_ok=True)
        searcher = StudySearcher(plan, study, cpus)
        done = sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))
        _log_start(searcher, done, concurrent, on_event)
        remaining = max(0, settings.trials - done)
        ended = 0
        context = TrialContext(
            prepared=remote.to_address(plan.prepared),
            out=remote.to_address(out),
            use_gpu=use_gpu,
            measure_threads=cpus if "images_per_second" in settings.objectives else None,
            placement=cluster.placement,
        )
        if remaining:
            with TrialTable(settings.trials, done) as table:
                monitor = SearchMonitor(searcher, table, on_event)

                def run(config: dict[str, Any]) -> dict[str, Any]:
                    return trial(config, context)

                _run_trials(searcher, monitor, run, remaining, concurrent)
            ended = monitor.ended
        interrupted = ended < remaining and not searcher.gave_up
        rows = results.write_trials(plan, study)
        results.copy_validations(plan, rows)
        wanted = 0 if interrupted or searcher.gave_up else settings.confirm
        runs = confirm.plan_runs(plan, study, rows, wanted)
        if wanted:
            # Before the export, which loads TensorFlow into this process.
            untimed = dataclasses.replace(context, measure_threads=None)
            _run_confirmation(plan, runs, lambda config: trial(config, untimed), (concurrent, cpus), on_event)
            interrupted = not all(run.state[0] for run in runs)
        if interrupted:
            on_event("tune: interrupted; writing the results so far")
        best, bundle = find_best_trial(rows), None
        if best is not None:
            chosen = plan.build_settings(study.get_trials(deepcopy=False)[best])
            results.write_best_settings(plan, chosen, rows, best, cpus)
            if finish:
                bundle = results.export_best(plan, chosen, rows, best, on_event)
        if not interrupted:
            results.drop_checkpoints(plan, study, rows)
        confirmation = confirm.read_confirmation(runs)
        facts = results.collect_facts(plan, study, rows, started, concurrent=concurrent, interrupted=interrupted)
        facts["confirm_over"] = wanted if all(run.state[0] for run in runs) else 0
        facts["confirm_epochs"] = sum(len(read_metrics(run.folder)) for run in runs)
        comparison = results.compare_backbones(plan, study, rows, confirmation)
        result = results.SearchResult(study, rows, bundle, searcher.gave_up, facts, comparison)
        if finish:
            results.write_report(result, plan)
        return result


def _check_dashboard() -> None:
    """Wait until Ray's state API, a part of its dashboard, answers; raise ConfigError if it does not.

    When Tune stops a trial, the controller of its run is killed. A process of Ray Train then frees the resources of the
    run, but only if the state API reports that the controller is dead.
    """
    # On the head node, as Ray Train does, so that this check detects when several Rays there break Train's query.
    query = ray.remote(num_cpus=0, resources={"node:__internal_head__": 0.001}, max_retries=0)(_query_state_api)
    deadline = time.monotonic() + DASHBOARD_WAIT_S
    while (reason := ray.get(query.remote())) is not None:
        # The dashboard starts some seconds after Ray, or later on a loaded machine.
        if time.monotonic() > deadline:
            raise ConfigError(
                "Ray's dashboard does not answer, so stopped or lost trials would never release their resources; "
                f"start Ray with its dashboard, and only one Ray per machine ({reason})"
            )
        time.sleep(1)


def _query_state_api() -> str | None:
    """Return why Ray's state API does not answer; None if it does."""
    from ray.util.state import list_nodes

    cluster.bypass_proxies([ray.util.get_node_ip_address(), "127.0.0.1", "localhost"])
    try:
        list_nodes(limit=1, timeout=20)
    except Exception as error:  # of Ray or its HTTP client
        return " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return None


def _log_start(searcher: StudySearcher, done: int, concurrent: int, on_event: Callable[[str], None]) -> None:
    """Log the plan of this command, and warn of settings that lead to poor results."""
    plan, settings, cpus = searcher.plan, searcher.plan.settings, searcher.cpus
    on_event(f"tune: study {plan.name} in {plan.storage}")
    if done:
        on_event(f"tune: {done} trials have already ended and are kept")
    for number in searcher.unfinished:
        epochs = len(read_stored_epochs(plan.folder(number)))
        resumable = has_checkpoint(plan.folder(number))
        how = f"continues from its checkpoint, {epochs} epochs done" if resumable else "has no checkpoint: starts again"
        on_event(f"tune: trial {number} {how}")
    if settings.trials <= done:
        return
    if plan.base.weights == "none" and "weights" not in plan.space.fields:
        on_event("tune: WARNING: weights=none: every trial starts from RANDOM weights, not from pre-trained ones")
    if settings.sampler == "cmaes" and settings.scheduler != "none":
        on_event("tune: WARNING: cmaes learns from finished trials only, and the scheduler stops most of them")
    for number, (_, missing) in enumerate(plan.points, start=1):
        missing = [field for field in missing if field in plan.space.fields]
        if missing and not done:
            on_event(
                f"tune: known configuration {number} (tried first) does not set {', '.join(missing)}; "
                "the sampler chooses what is missing"
            )
    workers = plan.base.workers
    on_event(
        f"tune: {concurrent} trial{'s' * (concurrent > 1)} at a time, each of {workers} "
        f"worker{'s' * (workers > 1)} of {cpus} CPU{'s' * (cpus > 1)}"
    )
    if settings.confirm:
        on_event(
            f"tune: confirm={settings.confirm} adds {2 * settings.confirm} trainings of all epochs after the search"
        )
    if done and settings.scheduler == "halving":
        on_event("tune: halving cannot continue the earlier run's brackets; it starts new ones")


def _run_trials(
    searcher: StudySearcher, monitor: SearchMonitor, run: Callable[[dict[str, Any]], Any], count: int, concurrent: int
) -> None:
    """Let Ray Tune run `count` trials."""
    plan, settings = searcher.plan, searcher.plan.settings
    # Up to `settings.ahead` trials wait for workers; they reserve no CPUs.
    processes = concurrent + settings.ahead
    scheduler = create_scheduler(settings, plan.base.epochs, monitor.earlier, trials=count, processes=processes)
    searcher.halving = scheduler if isinstance(scheduler, Halving) else None
    options = {"search_alg": searcher, "scheduler": scheduler, "num_samples": count}
    _run_tune(plan, run, monitor, max_concurrent_trials=processes, **options)


def _run_confirmation(
    plan: StudyPlan,
    runs: Sequence[confirm.ConfirmRun],
    run: Callable[[dict[str, Any]], Any],
    resources: tuple[int, int],
    on_event: Callable[[str], None],
) -> None:
    """Let Ray Tune run the confirming trainings that have not ended; `resources`: trainings at a time, CPUs of each."""
    pending = [one for one in runs if not one.state[0]]
    if not runs:
        on_event("tune: no confirming trainings: fewer than two backbones have a validation AUROC")
    if pending:
        on_event(f"tune: {len(pending)} confirming trainings in {pending[0].folder.parent}")
        configs = {}
        for one in pending:
            one.folder.mkdir(parents=True, exist_ok=True)
            settings = one.settings.replace(cpus_per_worker=resources[1]).model_dump(mode="json")
            configs[one.number] = {"folder": remote.to_address(one.folder), "settings": settings}
        # Without a searcher, Tune runs each number once, in order.
        space = {"number": ray_tune.grid_search(list(configs))}
        _run_tune(
            plan,
            lambda config: run({**config, **configs[config["number"]]}),
            ConfirmMonitor(runs, on_event),
            param_space=space,
            max_concurrent_trials=resources[0] + plan.settings.ahead,
        )
    confirm.drop_checkpoints(plan, runs)


def _run_tune(
    plan: StudyPlan,
    run: Callable[[dict[str, Any]], Any],
    monitor: Callback,
    param_space: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Call Ray Tune with the options of its TuneConfig; raise RayCxrError if Tune itself failed."""

    class NamedTrial(wrap_function(run)):  # type: ignore[misc]
        """The class that Ray makes of the function; the dashboard's list of actors shows the trial's name."""

        def __repr__(self) -> str:
            return _name_trial(self.config)

    settings = plan.settings
    store, path = remote.to_arrow(plan.out / "ray")
    selector = cluster.avoid_spot("memory", TRIAL_BYTES, options["max_concurrent_trials"])
    resources = ray_tune.PlacementGroupFactory([{"memory": TRIAL_BYTES}], bundle_label_selector=[selector])
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(NamedTrial, resources),
        param_space=param_space,
        tune_config=ray_tune.TuneConfig(
            trial_name_creator=lambda trial: _name_trial(trial.config),
            trial_dirname_creator=lambda trial: _name_trial(trial.config),
            **options,
        ),
        run_config=ray_tune.RunConfig(
            name=f"tune-{int(time.time())}",
            storage_path=path,
            storage_filesystem=store,
            failure_config=ray_tune.FailureConfig(max_failures=settings.max_failures),
            callbacks=[monitor],
            verbose=0,
        ),
    )
    # Tune replaces the handler of Ctrl-C, and restores it only after Ctrl-C.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    try:
        with _silence_tune():
            tuner.fit()
    except ray_tune.TuneError as error:
        # Tune raises an error of its callbacks and searcher as text.
        own = error.__context__
        if isinstance(own, RayCxrError) and (message := remote.describe_in(own, plan.out)):
            raise type(own)(message) from error
        reason = limits.explain_loss(error, advise(plan.base)) or last_line(own_error(error) or error)
        raise RayCxrError(
            f"{plan.out}: Ray Tune failed: {reason}; run the same command again, or with --resume, to continue"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _name_trial(config: dict[str, Any]) -> str:
    return str(config.get("name") or f"confirm-{config['number']:04d}")


@contextlib.contextmanager
def _silence_tune() -> Iterator[None]:
    """Suppress Tune's own lines, which describe its files."""
    levels = {name: logging.getLogger(name).level for name in ("ray.tune", "ray.air", "ray.train")}
    variables = {
        # By default Tune writes each report to three more files.
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        # A failed trial lacks some objectives, which must not end the search.
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    }
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with cluster.set_environment(variables):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
