"""The functions that `ray_cxr` offers to Python programs and notebooks, next to `load_bundle`.

They call the code of the commands, so that numbers are those of `ray-cxr report` and `ray-cxr train`. Every function
raises `RayCxrError`, whose one line names what is wrong and what to do.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa

from ray_cxr import config, labels
from ray_cxr.data import manifest
from ray_cxr.errors import InputError
from ray_cxr.evaluation import metrics
from ray_cxr.models.bundle import Bundle
from ray_cxr.reporting import measures
from ray_cxr.reporting.evaluation_set import EvaluationSet, join_labels, join_table
from ray_cxr.reporting.leakage import check_leakage
from ray_cxr.reporting.scores import Scores, read_score_table, read_scores
from ray_cxr.reporting.worklist import build_worklist

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_log = logging.getLogger(__name__)

#: Scores or labels: a path, or a table in memory.
Table = str | Path | pd.DataFrame


def evaluate(
    scores: Table,
    labels: Table,
    *,
    split: str | None = None,
    prevalences: Mapping[str, float] | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Evaluate scores against labels, with the metrics and intervals of `ray-cxr report`.

    Args:
        scores: the folder that `ray-cxr score` wrote, a Parquet file or folder, or a DataFrame such as that of
            `Bundle.predict`. It has `image_id` and `p_<Finding>`, 0 to 1; optionally `patient_id`, `c_<Finding>`
            (calibrated), `flag_<Finding>` (bool) and `status`.
        labels: a manifest, as a Parquet file or a DataFrame: `image_id` and a column per finding with 0, 1 or null (not
            labelled); optionally `patient_id` and `split`.
        split: evaluate only the labels' rows of `train`, `val` or `test`; None takes all rows.
        prevalences: share of positives by finding in another population, 0 to 1, for predictive values there.
        n_resamples: resamples of the bootstrap over patients.
        seed: seed of the bootstrap.

    Returns:
        One row per finding, which is the index, and a last row `macro`, their mean. Columns: `n` and `positives`
        (images, Int64); and, float64, `<metric>` with its 95% interval `<metric>_low` and `<metric>_high` for `auroc`,
        `average_precision`, `sensitivity`, `specificity`, `ppv`, `npv`, `brier` and the other metrics of
        docs/report.md. What is undefined is NaN; `reason` says why an AUROC is.

    Raises:
        InputError: scores and labels share no image, or `split` is unknown.
        TableError: a table names an image twice or holds invalid values.
        LeakError: `split` is `test` or None, and `scores` is a folder of `ray-cxr score` with an evaluated image or
            patient that trained the model. A DataFrame does not say which images trained its model.
    """
    _, found = _evaluate(scores, labels, split, prevalences, measures.BootstrapSettings(n_resamples, seed))
    rows = {name: _list_numbers(result, result.n, result.positives) for name, result in found.findings.items()}
    rows["macro"] = _list_numbers(found.macro, None, None)
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("finding")
    return table.astype({"n": "Int64", "positives": "Int64"})


def plot_calibration(
    scores: Table, labels: Table, *, split: str | None = None, findings: Sequence[str] | None = None
) -> Figure:
    """Plot the observed share of positives against the calibrated probability, with 95% intervals.

    Args:
        scores, labels, split: as for `evaluate`; `scores` needs `c_<Finding>`.
        findings: one panel each; None: all that are calibrated and labelled.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        InputError: none of the findings is calibrated and labelled; or as `evaluate`.
    """
    from ray_cxr.reporting.curve_figures import plot_reliability
    from ray_cxr.reporting.figure_set import build_reliability

    (table, images), found = _evaluate(scores, labels, split, None, measures.BootstrapSettings(200, 0))
    panels = build_reliability(table, images, found)
    chosen = [panel for panel in panels if findings is None or panel.finding in findings]
    if not chosen:
        known = ", ".join(panel.finding for panel in panels) or "none"
        raise InputError(f"findings: no calibrated probabilities with labels; findings that have both: {known}")
    return plot_reliability(chosen)


def worklist(scores: Table) -> pd.DataFrame:
    """List the studies of a score table in the order to read them, as in worklist.csv of a report.

    Args:
        scores: as for `evaluate`. Each image without a `study_id` is a study.

    Returns:
        The columns of worklist.csv (docs/report.md): `priority` and `abnormality`, float32 0 to 1, NaN for a failed
        image; `top_finding`, `flagged` (findings separated by `|`), ids and counts; and the study's highest
        `p_<Finding>` and `c_<Finding>`.

    Raises:
        InputError, TableError: as `evaluate`.
    """
    return pd.DataFrame(build_worklist(_read_scores(scores)).to_columns())


def train(
    prepared: str | Path,
    out: str | Path,
    *,
    config_file: str | Path | None = None,
    gpu: bool = False,
    num_cpus: int | None = None,
    on_event: Callable[[str], None] = _log.info,
    **settings: Any,
) -> Bundle:
    """Train a model as `ray-cxr train` does, or continue an earlier run in the same folder.

    Starts Ray on this machine and stops it at the end; uses the Ray of this process, or the cluster of RAY_ADDRESS, if
    there is one.

    Args:
        prepared: the folder that `ray-cxr prepare` wrote, with images of the splits train and val.
        out: folder of the run; the bundle is in its folder `bundle`.
        config_file: TOML file with a section `[train]`.
        gpu: give each worker a GPU.
        num_cpus: CPUs of Ray on this machine; None: all.
        on_event: called with a line of text per event, such as an epoch; `print` shows them.
        settings: keys of `[train]` in docs/settings.md, such as `backbone="ResNet50"` or `epochs=3`. They have
            precedence over `config_file`.

    Returns:
        The bundle of the epoch with the highest validation macro AUROC.

    Raises:
        ConfigError: a setting is unknown or invalid, or `prepared` is not a prepared folder.
        TableError, LeakError, OutputError: as `ray-cxr train`.
        RayCxrError: training failed.
    """
    from ray_cxr import session
    from ray_cxr.training import trainer

    loaded = config.load(config_file)
    chosen = config.build(config.TrainSettings, {**loaded.train.model_dump(), **settings}, where="train")
    ray = loaded.ray if num_cpus is None else loaded.ray.replace(num_cpus=num_cpus)
    if gpu:
        session.require_gpu(ray)
    start = functools.partial(session.start_ray, ray)
    return trainer.train(prepared, out, chosen, use_gpu=gpu, on_event=on_event, start_ray=start)


def _evaluate(
    scores: Table,
    labelled: Table,
    split: str | None,
    prevalences: Mapping[str, float] | None,
    bootstrap: measures.BootstrapSettings,
) -> tuple[tuple[Scores, EvaluationSet], measures.EvaluationResult]:
    if split is not None and split not in manifest.SPLITS:
        raise InputError(f"split {split!r}: use train, val or test")
    if bootstrap.n_resamples < 1:
        raise InputError(f"n_resamples is {bootstrap.n_resamples}; it must be at least 1")
    for name, share in (prevalences or {}).items():
        if name not in labels.LABELS or not 0 < share < 1:
            raise InputError(f"prevalences: {name}: {share!r}; use a known finding and a share between 0 and 1")
    table = _read_scores(scores)
    if isinstance(labelled, pd.DataFrame):
        checked = manifest.check_manifest(_to_arrow(labelled), "labels")
        images = join_table(table, checked, "labels", split)
    else:
        images = join_labels(table, labelled, split)
    check_leakage(table, images.rows, images.patients, split, f"the {split} split" if split else "the labels")
    outputs = measures.ModelOutputs.select(table, images.rows)
    options: dict[str, Any] = {"prevalences": prevalences or {}, "bootstrap": bootstrap}
    return (table, images), measures.evaluate(outputs, images.labels, images.patients, **options)


def _read_scores(scores: Table) -> Scores:
    return read_score_table(_to_arrow(scores), "scores") if isinstance(scores, pd.DataFrame) else read_scores(scores)


def _to_arrow(frame: pd.DataFrame) -> pa.Table:
    return pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata()


def _list_numbers(
    result: measures.FindingResult | measures.MeanResult, n: int | None, positives: int | None
) -> dict[str, Any]:
    row: dict[str, Any] = {"n": n, "positives": positives}
    for metric in metrics.METRICS:
        found = result.metrics.get(metric.key, measures.Measurement()).shown
        row |= {metric.key: found.value, f"{metric.key}_low": found.low, f"{metric.key}_high": found.high}
    return row | {"reason": result.reason}
