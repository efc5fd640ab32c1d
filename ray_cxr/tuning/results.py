"""Write the results of a search: trials.parquet, best.toml, the bundle, the report and summary.json."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import pandas as pd
import tomli_w

from ray_cxr.config import TrainSettings
from ray_cxr.errors import BundleError, OutputError
from ray_cxr.evaluation import backbones
from ray_cxr.evaluation.confirmation import Confirmation
from ray_cxr.evaluation.paired import PairedAuroc, paired_macro_auroc
from ray_cxr.labels import NO_FINDING
from ray_cxr.models.bundle import Bundle, load_bundle
from ray_cxr.progress import Stage
from ray_cxr.reporting.search_page import write_search_page
from ray_cxr.storage import atomic, remote
from ray_cxr.training.export import export_bundle
from ray_cxr.training.planning import plan_training
from ray_cxr.tuning import records
from ray_cxr.tuning.plan import DIRECTIONS, SUMMARY, TABLE, StudyPlan, list_prepared_sizes
from ray_cxr.tuning.schedulers import describe_scheduler
from ray_cxr.versions import versions


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        rows: the table of `records.build_trial_table`.
        bundle: the bundle of the best trial; None without a best trial, or with `finish=False`.
        gave_up: why the search started no more trials; None if it did not give up.
        facts: the facts of `collect_facts`.
        comparison: the result of `compare_backbones`.
    """

    study: optuna.Study
    rows: pd.DataFrame
    bundle: Bundle | None
    gave_up: str | None
    facts: dict[str, Any]
    comparison: dict[str, Any] | None


def write_trials(plan: StudyPlan, study: optuna.Study) -> pd.DataFrame:
    """Write trials.parquet, and return the rows."""
    rows = records.build_trial_table(plan, study)
    atomic.write_parquet(records.to_arrow(rows), plan.out / TABLE)
    return rows


def copy_validations(plan: StudyPlan, rows: pd.DataFrame) -> None:
    """Copy the validation probabilities of ended trials; call it when no trial runs."""
    for number in rows.loc[rows["state"] != "running", "number"]:
        records.copy_validation(plan.folder(int(number)))


def drop_checkpoints(plan: StudyPlan, study: optuna.Study, rows: pd.DataFrame, keep: Collection[int] = ()) -> None:
    """If `tune.keep` is `best`, remove the checkpoints of ended trials that cannot become the bundle, except `keep`."""
    if plan.settings.keep != "best":
        return
    # A running trial may still fail, so it does not replace the best one.
    ended = rows[rows["state"] != "running"]
    kept = {records.find_best_trial(ended), *records.list_pareto_front(study), *keep}
    for number in ended["number"]:
        if int(number) not in kept:
            records.drop_checkpoints(plan.folder(int(number)))


def write_best_settings(plan: StudyPlan, settings: TrainSettings, rows: pd.DataFrame, best: int, cpus: int) -> None:
    """Write best.toml, with which `train` repeats the trial `best`; each worker had `cpus` CPUs."""
    settings = settings.replace(size=settings.size or list_prepared_sizes(plan.prepared)[0])
    plain = settings.model_dump(mode="json", exclude_none=True)
    row = rows.loc[rows["number"] == best].iloc[0]
    head = (
        f"# Trial {best} of {plan.name}: validation AUROC {row['val_auroc']:.4f} in epoch {row['best_epoch']:.0f}, "
        f"{row['state']} after {row['epochs']} of {settings.epochs}.\n"
        f"# The AUROC is optimistic: it is the best of {len(rows)} trials on the same validation images.\n"
        "#   ray-cxr train PREPARED --config best.toml --out RUN\n"
        f"# Each worker had {cpus} CPUs; set cpus_per_worker={cpus} to get the same bits on other machines.\n\n"
    )
    atomic.write_text(plan.out / "best.toml", head + tomli_w.dumps({"train": plain}))


def export_best(
    plan: StudyPlan, settings: TrainSettings, rows: pd.DataFrame, best: int, on_event: Callable[[str], None]
) -> Bundle:
    """Export the bundle of the trial `best` to STUDY/bundle, unless STUDY has the bundle of the same epochs."""
    epochs = int(rows.loc[rows["number"] == best, "epochs"].iloc[0])
    origin = {"study": plan.name, "trial": best, "trials": len(rows), "epochs": epochs}
    target, old = plan.out / "bundle", plan.out / ".bundle.old"
    # A bucket renames nothing: there the old bundle is removed first, and an incomplete one counts as none.
    in_bucket = remote.as_store_path(target) is not None
    new = target if in_bucket else plan.out / ".bundle.new"
    with contextlib.suppress(BundleError):  # missing, or incomplete after a kill
        existing = load_bundle(target)
        if {**existing.info["provenance"].get("tuned", {}), "trials": 0} == {**origin, "trials": 0}:
            return existing
    remote.remove_folder(new)
    on_event(f"tune: exporting the bundle of trial {best}")
    with Stage("writing the bundle"):
        run = plan_training(plan.prepared, plan.folder(best), settings)
        export_bundle(run, new, last=epochs, more={"tuned": origin})
    if not in_bucket:
        remote.remove_folder(old)
        if target.exists():
            target.rename(old)
        new.rename(target)
        remote.remove_folder(old)
    return load_bundle(target)


def write_report(result: SearchResult, plan: StudyPlan) -> None:
    """Write the report with its figures and, last, summary.json; raise OutputError if a file cannot be written."""
    try:
        with Stage("drawing figures"):
            write_search_page(plan.out, result.study, result.rows, result.facts, result.comparison)
        atomic.write_json(plan.out / SUMMARY, {**result.facts, "comparison": result.comparison})
    except OSError as error:
        raise OutputError(f"{plan.out}: cannot write the report: {error.strerror or error}") from None


def collect_facts(
    plan: StudyPlan, study: optuna.Study, rows: pd.DataFrame, started: float, *, concurrent: int, interrupted: bool
) -> dict[str, Any]:
    """Return the facts of summary.json and of the report; `started` is the command's start by `time.monotonic`."""
    settings, epochs = plan.settings, int(rows["epochs"].sum())
    stopped = rows.loc[rows["state"] == "stopped", "epochs"]
    return {
        "title": f"Hyper-parameter search: {plan.out.absolute().name}",
        "prepared": str(plan.prepared),
        "study_name": plan.name,
        "storage": str(plan.storage),
        "objectives": list(settings.objectives),
        "directions": [DIRECTIONS[name] for name in settings.objectives],
        "trials_wanted": settings.trials,
        "sampler": settings.sampler,
        "scheduler": describe_scheduler(settings),
        "workers": plan.base.workers,
        "concurrent": concurrent,
        "epochs_spent": epochs,
        "epochs_full": epochs + int((plan.base.epochs - stopped).sum()),
        "seconds": round(float(rows["seconds"].sum()), 1),
        "seconds_of_command": round(time.monotonic() - started, 1),
        "best_number": records.find_best_trial(rows),
        "pareto": records.list_pareto_front(study),
        "interrupted": interrupted,
        "trials_over": int((rows["state"] != "running").sum()),
        "versions": versions(),
    }


def compare_backbones(
    plan: StudyPlan, study: optuna.Study, rows: pd.DataFrame, confirmation: Confirmation | None
) -> dict[str, Any] | None:
    """Compare the backbones at equal length; None if there is only one."""
    if len(plan.space.backbones) < 2:
        return None
    curves, random = [], records.list_random_trials(plan, study)
    for row in rows.to_dict("records"):
        curve = tuple((point["epoch"], point["val_auroc"]) for point in row["curve"])
        number = row["number"]
        curves.append(backbones.TrialCurve(number, row["backbone"], row["state"], curve, number in random))
    # All trials reach the grace period; without a scheduler they reach the last epoch.
    length = plan.base.epochs if plan.settings.scheduler == "none" else plan.settings.grace_epochs
    compared = backbones.compare_backbones(curves, length)
    return backbones.comparison_record(compared, _compare_best(plan, compared), confirmation)


def _compare_best(plan: StudyPlan, compared: backbones.Comparison) -> PairedAuroc | None:
    """Compare the best trials of the two best backbones on the same validation images; None if they were not kept."""
    if compared.pair is None:
        return None
    first, second = (
        None if backbone.best_trial is None else records.load_validation(plan, backbone.best_trial)
        for backbone in compared.pair
    )
    if first is None or second is None:
        return None
    columns = [j for j, name in enumerate(plan.base.finding_names()) if name != NO_FINDING]
    # An image that could not be prepared at one size is missing from the trials of that size.
    _, in_first, in_second = np.intersect1d(first.image_ids, second.image_ids, return_indices=True)
    return paired_macro_auroc(
        first.labels[in_first][:, columns],
        first.probabilities[in_first][:, columns],
        second.probabilities[in_second][:, columns],
        first.patients[in_first],
    )
