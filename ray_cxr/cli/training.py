"""`train` and `tune`."""

from __future__ import annotations

import argparse
import functools
import time
from collections import Counter
from typing import Any

from rich.table import Table

from ray_cxr import config, errors, session
from ray_cxr.cli.arguments import add_command, add_settings, any_path, override_settings
from ray_cxr.cli.dry_run import add_dry_run, print_cost
from ray_cxr.cli.next_step import suggest_score
from ray_cxr.cli.output import format_number, print_line, print_rule_notes, print_table, print_warnings
from ray_cxr.errors import RayCxrError
from ray_cxr.progress import Stage
from ray_cxr.storage import remote


def add_commands(commands: Any) -> None:
    train = add_command(
        commands,
        "train",
        _train,
        "train a model and write it as a bundle, in RUN/bundle",
        ["prepared --out run --config jobs/laptop.toml", "prepared --out run --set backbone=ResNet50 --set epochs=3"],
    )
    train.add_argument("prepared", type=any_path, metavar="PREPARED", help="folder from ray-cxr prepare")
    train.add_argument("--out", required=True, type=any_path, metavar="RUN", help="folder to write; holds RUN/bundle")
    train.add_argument("--workers", metavar="N", help="training processes (1); 2-8: as many as fit")
    add_dry_run(train)
    add_settings(train, "train", "ray", gpu=True)

    tune = add_command(
        commands,
        "tune",
        _tune,
        "search backbones and settings; the best model is STUDY/bundle",
        ["prepared --out study --config jobs/laptop.toml --trials 10", "prepared --out study --resume --trials 20"],
    )
    tune.add_argument("prepared", type=any_path, metavar="PREPARED", help="folder from ray-cxr prepare")
    tune.add_argument("--out", required=True, type=any_path, metavar="STUDY", help="folder to write")
    tune.add_argument("--trials", type=int, metavar="N", help="number of trials, including earlier runs (20)")
    tune.add_argument("--confirm", type=int, metavar="N", help="pairs of extra trainings of the best two backbones (0)")
    tune.add_argument("--workers", metavar="N", help="training processes per trial (1)")
    tune.add_argument("--resume", action="store_true", help="continue the search in STUDY with its settings")
    add_dry_run(tune)
    add_settings(tune, "tune", "train", "ray", gpu=True)


def _train(arguments: argparse.Namespace) -> None:
    started = time.time()
    settings = config.load(arguments.config, arguments.overrides, section="train")
    with Stage("checking the prepared set", in_log=False):
        from ray_cxr.evaluation import published, usability
        from ray_cxr.reporting import facts
        from ray_cxr.training import trainer

    options: dict[str, Any] = {"use_gpu": arguments.gpu, "started": started, "on_event": print_line}
    chosen = override_settings(settings.train, arguments, "workers")
    if arguments.dry_run:
        with Stage("measuring a training step", in_log=False):
            from ray_cxr.training import cost

            found = cost.estimate_train(arguments.prepared, arguments.out, chosen, use_gpu=arguments.gpu)
        print_cost(found, arguments)
        return
    if arguments.gpu:
        session.require_gpu(settings.ray)
    start = functools.partial(session.start_ray, settings.ray)
    bundle = trainer.train(arguments.prepared, arguments.out, chosen, **options, start_ray=start)
    names = ("finding", "val\nimages", "positives", "AUROC", "calibrated", "operating\npoint")
    table = Table(*names, title="Validation")
    metrics = bundle.info["provenance"]["validation"]["findings"]
    for name in bundle.findings:
        row, point = metrics[name], bundle.info["operating_points"][name]
        calibrated, threshold = "yes" if bundle.info["calibration"][name] else "no", point and point["threshold"]
        counts = f"{row['n']:,}", f"{row['positives']:,}"
        table.add_row(name, *counts, format_number(row["auroc"]), calibrated, format_number(threshold))
    print_table(table)
    macro = bundle.info["provenance"]["validation"]["macro_auroc"]
    print_rule_notes(bundle.info.get("rule_notes", {}))
    print_warnings(warning.describe() for warning in usability.warn_of_model(bundle.info))
    too_few = usability.explain_validation(metrics)
    best, epochs = bundle.info["provenance"]["best_epoch"], len(bundle.model_json()["curves"])
    unreliable = "" if too_few is None else f"; it says little: {too_few}"
    print_line(f"validation macro AUROC {format_number(macro)} in epoch {best}, the best of {epochs}{unreliable}")
    split = bundle.info["provenance"]["split"]
    gap = published.describe_gap(split.get("kind"), synthetic=facts.is_synthetic(split))
    more = "" if gap is None or too_few is not None else f"; {gap}"
    print_line(f"the epoch, the calibration and the operating points were chosen on these images{more}")
    out = remote.to_path(arguments.out)
    print_line(f"learning curves: {out / trainer.CURVES}")
    print_line(f"bundle: {out / 'bundle'}")
    suggest_score(out / "bundle", arguments.prepared)


def _tune(arguments: argparse.Namespace) -> None:
    start = time.monotonic()
    loaded = config.load(arguments.config, arguments.overrides, section="tune")
    with Stage("checking the prepared set", in_log=False):
        from ray_cxr.tuning import plan as plans

    out, base, chosen = remote.to_path(arguments.out), loaded.train, loaded.tune
    if arguments.resume and not plans.has_search(out):
        raise errors.OutputError(f"--resume: {out} holds no search; omit --resume to start one there")
    if arguments.resume and arguments.config is None:
        # Overrides must agree with the settings of the search when it started.
        base, chosen = plans.load_start_settings(out, arguments.overrides)
    base = override_settings(base, arguments, "workers")
    chosen = override_settings(chosen, arguments, "trials", "confirm")
    plan = plans.StudyPlan(arguments.prepared, out, base, chosen)
    if plan.is_finished():
        print_line(f"tune: {out} is finished already; use --trials N for more than {chosen.trials} trials")
        print_line(f"report: {out / 'report.html'}")
        suggest_score(out / "bundle", arguments.prepared)
        return
    if arguments.dry_run:
        with Stage("measuring a training step of each backbone", in_log=False):
            from ray_cxr.tuning import cost

            found = cost.estimate_tune(plan, use_gpu=arguments.gpu)
        print_cost(found, arguments)
        return
    if arguments.gpu:
        session.require_gpu(loaded.ray)
    from ray_cxr.cli.trials import print_trials

    # Ray Train asks the dashboard whether a stopped trial's run is still alive.
    with session.start_ray(loaded.ray, dashboard=True):
        from ray_cxr.tuning import search  # imports Ray, so only after its environment is set

        outcome = search.search(plan, use_gpu=arguments.gpu, on_event=print_line)
    print_trials(outcome.rows)
    for row in outcome.rows.to_dict("records"):
        if row["state"] == "failed":
            print_line(f"trial {row['number']} failed: {row['reason']}")
    if outcome.comparison is not None:
        print_line(outcome.comparison["verdict"]["headline"])
        if outcome.comparison["confirmation"]:
            print_line(outcome.comparison["verdict"]["details"])
    # No trial runs any more.
    states = Counter(outcome.rows["state"].replace("running", "waiting"))
    counts = ", ".join(f"{count} {state}" for state, count in states.most_common()) or "none"
    epochs, extra = outcome.facts["epochs_spent"], outcome.facts["confirm_epochs"]
    more = f" and {extra} in confirming trainings" * bool(extra)
    print_line(f"trials: {counts}; {epochs} epochs trained{more}, {time.monotonic() - start:.0f} s")
    print_line(f"report: {out / 'report.html'}")
    if outcome.bundle is not None:
        print_line(f"best trial: {outcome.facts['best_number']}, settings in {out / 'best.toml'}")
        print_line(f"bundle: {out / 'bundle'}")
    if outcome.facts["interrupted"]:
        raise KeyboardInterrupt
    if outcome.gave_up is not None:
        raise RayCxrError(outcome.gave_up)
    if outcome.bundle is None:
        raise RayCxrError(f"{out}: no trial has a stored checkpoint, so there is no bundle; see trials.parquet")
    suggest_score(out / "bundle", arguments.prepared)
