"""The report: evaluate a score table against labels and reference standards, and write numbers, figures and a page.

Every row of scores and labels appears in a count of metrics.json, and every image, failed or not, in worklist.csv.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ray_cxr.data import manifest
from ray_cxr.errors import InputError, OutputError
from ray_cxr.evaluation import metrics, published
from ray_cxr.evaluation.group_resamples import LabelledScores
from ray_cxr.evaluation.groups import build_groups
from ray_cxr.evaluation.subgroups import Subgroups, measure_groups
from ray_cxr.labels import NO_FINDING
from ray_cxr.reporting import figure_set, html, plots, tables
from ray_cxr.reporting.comparators import Population, compare_with_boxes, compare_with_consensus, compare_with_scores
from ray_cxr.reporting.curve_figures import plot_learning_curves, plot_priorities
from ray_cxr.reporting.evaluation_set import EvaluationSet, describe_split, join_labels
from ray_cxr.reporting.leakage import check_leakage
from ray_cxr.reporting.measures import BootstrapSettings, ModelOutputs, evaluate
from ray_cxr.reporting.prevalence import read_prevalences
from ray_cxr.reporting.result import Counts, LabelResults, ReportResult, measure_drift, measure_flag_rates
from ray_cxr.reporting.scores import Location, Scores, count_patients, read_scores
from ray_cxr.reporting.summary import list_remarks, summarize
from ray_cxr.reporting.worklist import build_worklist, format_csv
from ray_cxr.storage import atomic, remote

_log = logging.getLogger(__name__)
#: Figures of a report; those of an older report are removed first.
_FIGURES = (
    "auroc", "roc", "precision_recall", "reliability", "distributions", "subgroups", "subgroup_differences",
    "compared", "consensus", "localisation", "drift", "examples", "heatmaps", "radiographs", "learning_curves",
    "prevalence", "cooccurrence", "priority",
)  # fmt: skip
#: Maximum resamples for subgroups, and for two attributes crossed, of which there are hundreds.
_SUBGROUP_RESAMPLES, _CROSSING_RESAMPLES = 500, 200
_WORKLIST_ROWS = 25


def write_report(
    scores: str | Path,
    out: str | Path,
    *,
    labels: str | Path | None = None,
    split: str | None = None,
    consensus: str | Path | None = None,
    boxes: str | Path | None = None,
    compare: str | Path | None = None,
    prevalence: str | Path | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Write metrics.json, metrics.parquet, figures (PNG and SVG), worklist.csv, report.md and, last, report.html.

    Returns the content of metrics.json: float64 unrounded; undefined numbers are None, with a reason.

    Args:
        scores: the folder that `ray-cxr score` wrote; or a Parquet file or folder with image_id and p_<Finding>.
        out: the folder for the report; an older report in it is replaced.
        labels: a manifest; None reports scores without an evaluation.
        split: evaluate only the labels' rows of `train`, `val` or `test`; None takes all rows.
        consensus: radiologists' labels, compared on the evaluated images, or without `labels` on all scored images.
        boxes: radiologists' boxes, for the heat maps that `score --heatmaps` drew.
        compare: another score table, compared on the labelled images that both tables have.
        prevalence: a TOML file of shares per finding, to compute predictive values for.
        seed: of the bootstrap and of the choice of examples.

    Raises:
        InputError: the scores are incomplete, or share no image with the labels, the consensus table, the boxes or
            the other scores; an option lacks the labels it needs; there are no heat maps.
        TableError: a table names an image twice or holds invalid values.
        LeakError: an evaluated image or patient trained the model, in an evaluation of `test` or of no named split.
        OutputError: `out` is a file, or is inside the score folder.
    """
    _check_options(labels, split, consensus, compare, prevalence)
    if n_resamples < 1:
        raise InputError(f"n_resamples is {n_resamples}; it must be at least 1")
    bootstrap = BootstrapSettings(n_resamples, seed)
    out = remote.to_path(out)
    remote.check_bucket(out)
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out}: is a file; name a folder")
    prevalences = {} if prevalence is None else read_prevalences(str(prevalence))
    table = read_scores(scores)
    if table.folder is not None and remote.is_inside(out, remote.to_path(table.folder)):
        # The next report would read this one's metrics.parquet as scores.
        raise OutputError(f"--out {out}: is inside the score folder {table.folder}; name a folder outside it")
    _log.debug("%s: %d rows, %d errors", table.source, len(table.ids), int((~table.ok).sum()))

    labelled = None if labels is None else _evaluate_labels(table, labels, split, prevalences, bootstrap)
    evaluated, split_label = (labelled.images, labelled.split_label) if labelled else (None, None)
    population = Population.select(table, evaluated, split, split_label)
    result = ReportResult(
        split=split,
        n_images=len(population.rows),
        n_patients=count_patients(population.patients),
        labelled=labelled,
        counts=Counts.count(table, evaluated.counts if evaluated else None),
        flag_rates=measure_flag_rates(table),
        drift=measure_drift(table, evaluated, split_label),
        digests=_read_digests(table, labels, labelled),
        bootstrap=bootstrap if labels or consensus or boxes else None,
        consensus=None
        if consensus is None
        else compare_with_consensus(table, population, str(consensus), prevalences, bootstrap),
        compared=None
        if compare is None or labelled is None
        else compare_with_scores(table, labelled.images, str(compare), split, labelled.split_label, bootstrap),
        boxes=None if boxes is None else compare_with_boxes(table, population, str(boxes), bootstrap),
        notes=_list_notes(table, split, labelled, len(population.rows)),
    )
    return _write(out, table, result, _draw_figures(table, result, seed))


def _evaluate_labels(
    table: Scores, labels: str | Path, split: str | None, prevalences: Mapping[str, float], bootstrap: BootstrapSettings
) -> LabelResults:
    rows = manifest.read_manifest(labels)
    info = manifest.split_info(rows)
    images = join_labels(table, rows, labels, split)
    population = "the test split" if split else "the labels"
    leak_check = check_leakage(table, images.rows, images.patients, split, population)
    outputs = ModelOutputs.select(table, images.rows)
    evaluation = evaluate(outputs, images.labels, images.patients, prevalences=prevalences, bootstrap=bootstrap)
    subgroups = _measure_subgroups(table, images, bootstrap)
    n, findings = len(images.rows), evaluation.macro.findings
    papers = published.list_published(split, info.get("kind"), n_images=n, findings=findings)
    return LabelResults(images, info, describe_split(split, info), leak_check, evaluation, subgroups, papers)


def _check_options(
    labels: str | Path | None,
    split: str | None,
    consensus: str | Path | None,
    compare: str | Path | None,
    prevalence: str | Path | None,
) -> None:
    if split is not None and split not in manifest.SPLITS:
        raise InputError(f"--split {split}: use train, val or test")
    if split is not None and labels is None:
        raise InputError(f"--split {split}: needs --labels, whose rows it selects")
    if compare is not None and labels is None:
        raise InputError(f"--compare {compare}: needs --labels, to compute the AUROC of both tables")
    if prevalence is not None and labels is None and consensus is None:
        raise InputError(f"--prevalence {prevalence}: needs --labels or --consensus, to measure sensitivity")


def _measure_subgroups(table: Scores, evaluated: EvaluationSet, bootstrap: BootstrapSettings) -> Subgroups | str:
    """Measure every subgroup, or return the reason why there is none."""
    groups = build_groups(evaluated.sex, evaluated.age, evaluated.view, evaluated.follow_up)
    if all(not group.is_known for group in groups):
        return "the labels hold neither sex, age, view nor follow-up"
    names = [f for f in table.findings if (evaluated.labels[f] >= 0).any()]
    if not names:
        return "no finding is both scored and labelled"
    rows = evaluated.rows
    labels = np.column_stack([evaluated.labels[f] for f in names])
    p = np.column_stack([table.p[f][rows] for f in names])
    flags = np.column_stack([table.flags[f][rows] if f in table.flags else np.full(len(rows), -1) for f in names])
    macro = np.array([f != NO_FINDING for f in names], dtype=bool)
    n, n_crossings = (min(bootstrap.n_resamples, most) for most in (_SUBGROUP_RESAMPLES, _CROSSING_RESAMPLES))
    images = LabelledScores(labels, p, flags, evaluated.patients, names, macro=macro)
    return measure_groups(groups, images, n_resamples=n, n_resamples_crossings=n_crossings, seed=bootstrap.seed)


def _read_digests(table: Scores, labels: str | Path | None, labelled: LabelResults | None) -> dict[str, Any]:
    location = None if labels is None else Location.of(str(labels))
    info = labelled.info if labelled else {}
    digest = table.model.get("digest")
    return {
        "model": list(table.model_digests) or ([digest] if digest else []),
        "input": table.run.get("input_digest"),
        "labels": hashlib.sha256(location.read_bytes()).hexdigest() if location and location.is_file else None,
        "tables": info.get("tables") or info.get("digests"),
    }


def _list_notes(table: Scores, split: str | None, labelled: LabelResults | None, n_images: int) -> list[str]:
    """List what a reader must know to interpret the numbers."""
    notes = []
    if split in ("train", "val"):
        use = "fit the weights" if split == "train" else "select the epoch, the calibration and the operating points"
        notes.append(
            f"This is the {split} split. If the model was trained on this manifest, these images served to {use}: the "
            "results show the fit to known images, not the performance on new patients."
        )
        other = {"train": "val", "val": "train"}[split]
        mismatched = labelled.leak_check.shared_by_part.get(other, 0) if labelled else 0
        if mismatched:
            notes.append(
                f"{mismatched:,} images are {split} in the labels, but the model used them as {other}: "
                "the two splits differ."
            )
    untraced = "so a leak between its training and this evaluation cannot be excluded."
    if not table.is_own:
        named = "The rows name the model that scored them, but its"
        origin = named if table.model_digests else "These predictions come from another system. Its"
        notes.append(f"{origin} training images are not recorded here, {untraced}")
    if len(table.model_digests) > 1:
        notes.append(f"The rows come from {len(table.model_digests)} different models; the results mix them.")
    if table.provenance.get("initial_weights") == "random" and not table.model.get("curves"):
        notes.append("The model has random initial weights and no learning curve: it may never have been trained.")
    if table.is_own and (table.training is None or table.provenance.get("lineage") == "unknown"):
        notes.append(f"Not all images that trained this model are known, {untraced}")
    if table.ignored:
        shown = ", ".join(table.ignored[:8]) + (" …" if len(table.ignored) > 8 else "")
        notes.append(f"Columns of unknown findings were ignored: {shown}.")
    official = labelled is not None and labelled.info.get("kind") == "official" and split == "test"
    if official and n_images != published.OFFICIAL_TEST_IMAGES:
        notes.append(
            f"The evaluation covers {n_images:,} of the {published.OFFICIAL_TEST_IMAGES:,} images of NIH's official "
            "test split."
        )
    return notes


def _draw_figures(table: Scores, result: ReportResult, seed: int) -> dict[str, Figure]:
    figures: dict[str, Figure | None] = {}
    labelled = result.labelled
    if labelled:
        figures |= figure_set.draw_evaluation(table, labelled.images, labelled.evaluation, seed)
        if isinstance(labelled.subgroups, Subgroups):
            figures |= figure_set.draw_subgroups(labelled.subgroups, labelled.evaluation.macro)
    if result.compared:
        figures["compared"] = figure_set.draw_comparison(result.compared, "these scores", "the others")
    if result.consensus:
        figures["consensus"] = figure_set.draw_consensus(result.consensus.evaluation)
    if result.boxes:
        figures["localisation"] = figure_set.draw_localisation(result.boxes.localisation)
    if result.drift:
        figures["drift"] = figure_set.draw_drift(result.drift.measured)
    priority = table.priority[np.isfinite(table.priority)]
    if labelled is None and len(priority):
        figures["priority"] = plot_priorities(priority)
    if table.model.get("curves"):
        figures["learning_curves"] = plot_learning_curves(table.model["curves"])
    return {name: figure for name, figure in figures.items() if figure is not None}


def _write(out: Path, table: Scores, result: ReportResult, figures: Mapping[str, Figure]) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    stale = {"report.html", "report.md", *(f"{name}.{kind}" for name in _FIGURES for kind in ("png", "svg"))}
    for path in [path for path in out.glob("*") if path.name in stale]:
        path.unlink(missing_ok=True)
    encoded: dict[str, bytes] = {}
    for name in _FIGURES:
        if name in figures:
            _log.debug("drawing %s", name)
            encoded[name], vector = plots.encode_figure(figures[name])
            (out / f"{name}.png").write_bytes(encoded[name])
            (out / f"{name}.svg").write_bytes(vector)
    rows = build_worklist(table)
    plain = result.to_json()
    atomic.write_text(out / "worklist.csv", format_csv(rows))
    atomic.write_json(out / "metrics.json", plain)
    atomic.write_parquet(tables.build_table(plain), out / "metrics.parquet")
    judged = plain["findings"] or (plain["consensus"] or {}).get("findings", {})
    view = {
        "m": plain,
        "source": table.source,
        "figures": encoded,
        "model": _describe_model(table),
        "summary": summarize(result),
        "worklist": rows[:_WORKLIST_ROWS],
        "worklist_total": len(rows),
        "columns": {name: [one for one in metrics.METRICS if one.table == name] for name in metrics.TABLES},
        "probability_metrics": metrics.PROBABILITY_METRICS,
        "remarks": list_remarks(result.labelled.evaluation) if result.labelled else {},
        "consensus_remarks": list_remarks(result.consensus.evaluation) if result.consensus else {},
        "leak_check": result.labelled.leak_check.describe(result.split) if result.labelled else "",
        "compared_leak_check": result.compared.leak_check.describe(result.split) if result.compared else "",
        "attributes": figure_set.ATTRIBUTES,
        "assumed": {finding: one for finding, one in judged.items() if one["assumed_prevalence"] is not None},
    }
    atomic.write_text(out / "report.md", html.render(view, "report.md.j2"))
    atomic.write_text(out / "report.html", html.render(view))
    _log.debug("report in %s", out)
    return plain


def _describe_model(table: Scores) -> list[tuple[str, str]]:
    """List what is known of the model, as pairs of name and value."""
    spec = table.model.get("input_spec") or {}
    facts = [
        ("Backbone", table.model.get("backbone")),
        ("Input", f"{spec['size']} × {spec['size']} pixels, {spec.get('aspect')}" if spec.get("size") else None),
        ("Findings", ", ".join(plots.format_finding(finding) for finding in table.findings)),
        ("Model digest", ", ".join(table.model_digests) or table.model.get("digest")),
    ]
    plain = [(name, value) for name, value in sorted(table.provenance.items()) if isinstance(value, (str, int, float))]
    facts += [(str(name).replace("_", " ").capitalize(), value) for name, value in plain]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]
