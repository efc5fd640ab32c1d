"""The report: evaluate a score table against labels and reference standards, and write numbers, figures and a page.

Every row of scores and labels appears in a count of metrics.json, and every image of the report, failed or not, in
worklist.csv.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ray_cxr.config import PacsSettings, read_toml
from ray_cxr.data import manifest
from ray_cxr.errors import InputError, OutputError, first_line
from ray_cxr.evaluation import metrics, published, usability
from ray_cxr.evaluation.alerts import find_abnormal
from ray_cxr.evaluation.group_estimates import LabelledScores
from ray_cxr.evaluation.groups import build_groups
from ray_cxr.evaluation.intervals import Patients
from ray_cxr.evaluation.subgroups import FEW_PATIENTS, Subgroups, measure_groups
from ray_cxr.evaluation.underdiagnosis import Underdiagnosis, measure_underdiagnosis
from ray_cxr.evaluation.usability import Warned
from ray_cxr.imaging.demographics import PatientCount, count_of
from ray_cxr.imaging.overlays import EMPTY
from ray_cxr.labels import FINDINGS, NO_FINDING, canonicalize, suggest
from ray_cxr.progress import Stage
from ray_cxr.reporting import cards, examples, facts, figure_set, html, inline_svg, tables
from ray_cxr.reporting.abnormality import measure_ranking
from ray_cxr.reporting.alerts import list_warnings, measure_alerts, measure_order, note_missed_findings
from ray_cxr.reporting.cases import Band, HeatMapReader
from ray_cxr.reporting.checklists import render_checklist
from ray_cxr.reporting.comparators import (
    BoxResult,
    check_heatmaps,
    compare_with_boxes,
    compare_with_consensus,
    compare_with_scores,
)
from ray_cxr.reporting.decisions import measure_decisions
from ray_cxr.reporting.evaluation_set import EXTERNAL, EvaluationSet, NotEvaluatedError, Population, join_labels
from ray_cxr.reporting.flagged import measure_flagged
from ray_cxr.reporting.leakage import LeakCheck, check_leakage, compare_training, warn_of_training
from ray_cxr.reporting.measures import BootstrapSettings, ModelOutputs, evaluate
from ray_cxr.reporting.night_results import measure_nights
from ray_cxr.reporting.nights import NightTable, hash_run, list_night_notes, read_nights
from ray_cxr.reporting.quality_page import list_quality_images
from ray_cxr.reporting.report_folder import check_folder, check_replaced
from ray_cxr.reporting.result import Counts, LabelResults, ReportResult, measure_drift, measure_flag_rates
from ray_cxr.reporting.scores import Location, Scores
from ray_cxr.reporting.spreadsheets import format_scores
from ray_cxr.reporting.summary import list_remarks, summarize
from ray_cxr.reporting.unread_images import describe_missing_images, explain_unread_images
from ray_cxr.reporting.worklist import build_worklist
from ray_cxr.reporting.worklist_page import CARDS, list_rows
from ray_cxr.storage import atomic, dicomweb, remote, run_folder

_log = logging.getLogger(__name__)
#: Age from which a patient is an adult, years; also an edge of the age bands.
ADULT = 18


def write_report(
    scores: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    labels: str | Path | None = None,
    split: str | None = None,
    consensus: str | Path | None = None,
    boxes: str | Path | None = None,
    compare: str | Path | None = None,
    prevalence: str | Path | None = None,
    csv: bool = False,
    pacs: PacsSettings | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Write metrics.json, metrics.parquet, figures, worklist.csv, checklist.md, report.md and, last, report.html.

    Returns the content of metrics.json: float64 unrounded; undefined numbers are None, with a reason.

    Args:
        scores: the folder that `ray-cxr score` wrote; or a Parquet file or folder with image_id and p_<Finding>; or
            several folders of one model, such as those of several nights, or a pattern that matches them.
        out: the folder for the report; an older report in it is replaced, but no evaluation by a report of other scores
            or without labels.
        labels: a manifest; None reports scores without an evaluation.
        split: evaluate only the labels' rows of `train`, `val` or `test`; None takes all rows, and so does `external`,
            which names them images of another hospital.
        consensus: radiologists' labels, compared on the evaluated images, or without `labels` on all scored images.
        boxes: radiologists' boxes, compared with the heat maps that `score --heatmaps` drew.
        compare: another score table, compared on the labelled images that both tables have.
        prevalence: a TOML file with the findings' prevalences in a population to compute predictive values for.
        csv: also write scores.csv, with the scores, flags and labels of each image of the report.
        pacs: how to reach the PACS of images whose path is in one; None: the defaults.
        seed: seeds the bootstrap and the choice of examples.

    Raises:
        ConfigError: a file that `pacs` names is unusable.
        InputError: the scores are incomplete, or share no image with the labels, the consensus table or the other
            scores; several folders of scores are not of one model; an option lacks the labels it needs; there are no
            heat maps.
        TableError: a table names an image twice or holds invalid values.
        LeakError: `split` is `test` or None, and an evaluated image or patient is in the model's train or val split.
        OutputError: `out` is a file, or is inside the score folder, or another command writes there.
    """
    _check_options(labels, split, consensus, compare, prevalence, n_resamples)
    bootstrap = BootstrapSettings(n_resamples, seed)
    out = remote.to_path(out)
    remote.check_bucket(out)
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out}: is a file; name a folder")
    prevalences = {} if prevalence is None else _read_prevalences(str(prevalence))
    with Stage("reading the scores"):
        table, night_tables = read_nights(scores)
    if boxes is not None:
        check_heatmaps(table, str(boxes))
    _check_out(out, table)
    digests = _read_digests(table, labels)
    check_replaced(out, digests)
    if any(path is not None and dicomweb.is_dicomweb(path) for path in table.paths):
        dicomweb.configure(pacs or PacsSettings())
    _log.debug("%s: %d rows, %d errors", table.source, len(table.ids), int((~table.ok).sum()))
    with run_folder.lock(out, "report"), Stage("reading the labels" if labels else "counting flags") as stage:
        evaluated, checked = (None, None) if labels is None else _join_labels(table, labels, split)
        population = evaluated or Population.select_scored(table)
        consensus_result = None
        if consensus is not None:
            stage.change("comparing with the consensus table")
            consensus_result = compare_with_consensus(table, population, str(consensus), prevalences, bootstrap)
        labelled = None
        if evaluated is not None and checked is not None:
            labelled = _evaluate_labels(table, evaluated, checked, prevalences, bootstrap, stage)
        stage.change("measuring alerts and drift")
        alerts = measure_alerts(table, population, evaluated, bootstrap)
        n, patients = len(population.rows), PatientCount.of(population.patients)
        leak_check = labelled.leak_check if labelled else compare_training(table, population.rows, population.patients)
        seen = [] if labelled else warn_of_training(leak_check, n)
        box_result, unboxed = _compare_boxes(table, population, boxes, bootstrap)
        maps = HeatMapReader(table)
        counted = maps.count_flagged(population.rows)
        emptied = usability.warn_of_empty_maps(counted.empty, counted.flagged, counted.method) if counted else []
        info = evaluated.info if evaluated else {}
        result = ReportResult(
            split=split,
            n_images=n,
            patients=patients,
            labelled=labelled,
            leak_check=leak_check,
            counts=Counts.count(table, evaluated.counts if evaluated else None),
            flagged=measure_flagged(table, population),
            flag_rates=measure_flag_rates(table),
            drift=measure_drift(table, evaluated),
            nights=measure_nights(night_tables) if night_tables else None,
            alerts=alerts,
            digests={**digests, "tables": info.get("tables") or info.get("digests")},
            report=facts.describe_report(table, info),
            bootstrap=bootstrap if labels or consensus or boxes else None,
            consensus=consensus_result,
            compared=None
            if compare is None or evaluated is None
            else compare_with_scores(table, evaluated, str(compare), bootstrap),
            boxes=box_result,
            heatmaps=counted,
            warnings=[
                *seen,
                *list_warnings(table, population, labelled.evaluation if labelled else None, alerts),
                *emptied,
                *unboxed,
            ],
            notes=[*_list_notes(table, split, labelled, night_tables), *note_missed_findings(alerts)],
        )
        (out / "scores.csv").unlink(missing_ok=True)  # of an older report
        if csv:
            out.mkdir(parents=True, exist_ok=True)
            atomic.write_text(out / "scores.csv", format_scores(table, population))
        stage.change("drawing figures")
        cases = examples.select_cases(table, result, seed, maps)
        figures = figure_set.draw_figures(table, result, cases)
        stage.change("writing the pages")
        return _write(out, table, table.select(population.listed), result, figures, cases, maps)


def _check_options(
    labels: str | Path | None,
    split: str | None,
    consensus: str | Path | None,
    compare: str | Path | None,
    prevalence: str | Path | None,
    n_resamples: int,
) -> None:
    if split is not None and split not in (*manifest.SPLITS, EXTERNAL):
        raise InputError(f"--split {split}: use train, val, test or external")
    if split is not None and labels is None:
        raise InputError(f"--split {split}: needs --manifest, whose rows it selects")
    if compare is not None and labels is None:
        raise InputError(f"--compare {compare}: needs --manifest, to compute the AUROC of both tables")
    if prevalence is not None and labels is None and consensus is None:
        raise InputError(f"--prevalence {prevalence}: needs --manifest or --consensus, to measure sensitivity")
    if n_resamples < 1:
        raise InputError(f"n_resamples is {n_resamples}; it must be at least 1")


def _check_out(out: Path, table: Scores) -> None:
    """Refuse to write into a folder of other files, above all of scores.

    There the next report would read this one's metrics.parquet as scores.
    """
    nights = [remote.to_path(folder) / "scores" for folder in table.folders] if table.nights else []
    for folder in [*nights, *([] if table.folder is None else [remote.to_path(table.folder)])]:
        if remote.is_inside(out, folder):
            raise OutputError(f"--out {out}: is inside the score folder {folder}; name a folder outside it")
    check_folder(out)


def _join_labels(table: Scores, labels: str | Path, split: str | None) -> tuple[EvaluationSet, LeakCheck]:
    images = join_labels(table, labels, split)
    population = "the labels" if split in (None, EXTERNAL) else "the test split"
    return images, check_leakage(table, images.rows, images.patients, split, population)


def _evaluate_labels(
    table: Scores,
    images: EvaluationSet,
    leak_check: LeakCheck,
    prevalences: Mapping[str, float],
    bootstrap: BootstrapSettings,
    stage: Stage,
) -> LabelResults:
    split = images.split
    outputs = ModelOutputs.select(table, images.rows)
    stage.change(f"computing metrics, and intervals from {bootstrap.n_resamples:,} resamples")
    evaluation = evaluate(outputs, images.labels, images.patients, prevalences=prevalences, bootstrap=bootstrap)
    stage.change("comparing subgroups")
    subgroups, underdiagnosis = _measure_subgroups(table, images)
    n, findings = len(images.rows), evaluation.macro.findings
    papers = published.list_published(split, images.info.get("kind"), n_images=n, findings=findings)
    if facts.is_synthetic(images.info):
        papers = []
    stage.change("measuring reading order and net benefit")
    order = measure_order(table, images, bootstrap)
    ranking = measure_ranking(table, images)
    decisions = measure_decisions(table, images, bootstrap)
    return LabelResults(images, leak_check, evaluation, subgroups, underdiagnosis, order, papers, ranking, decisions)


def _compare_boxes(
    table: Scores, population: Population, path: str | Path | None, bootstrap: BootstrapSettings
) -> tuple[BoxResult | None, list[Warned]]:
    """Compare heat maps with boxes; without an evaluated box return a warning, as the other results hold."""
    if path is None:
        return None, []
    try:
        return compare_with_boxes(table, population, str(path), bootstrap), []
    except NotEvaluatedError as error:
        return None, [Warned("no_boxes", f"Heat maps were not compared with boxes. {error}")]


def _read_prevalences(path: str) -> dict[str, float]:
    """Read a TOML file of `Finding = share` lines, shares between 0 and 1."""
    try:
        shares = read_toml(remote.to_path(path))
    except OSError as error:
        raise InputError(f"--prevalence {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"--prevalence {path}: not TOML: {first_line(error)}") from None
    prevalences: dict[str, float] = {}
    for name, share in shares.items():
        finding = canonicalize(name)
        if finding is None:
            raise InputError(f"--prevalence {path}: {name!r} is not a known finding{suggest(name, FINDINGS)}")
        if finding in prevalences:
            raise InputError(f"--prevalence {path}: {finding} is named twice")
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
            raise InputError(f"--prevalence {path}: {name} = {share!r}; use a share between 0 and 1, such as 0.02")
        prevalences[finding] = float(share)
    if not prevalences:
        raise InputError(f"--prevalence {path}: names no finding; add lines such as Effusion = 0.12")
    return prevalences


def _measure_subgroups(table: Scores, evaluated: EvaluationSet) -> tuple[Subgroups | str, Underdiagnosis | str]:
    """Measure every subgroup, or return the reason why there is none."""
    names = [f for f in table.findings if (evaluated.labels[f] >= 0).any()]
    if not names:
        return ("no finding is both scored and labelled",) * 2
    no_flags = np.full(len(table.ids), -1)
    labels = np.column_stack([evaluated.labels[f] for f in names])
    p = np.column_stack([table.p[f] for f in names])[evaluated.rows]
    flags = np.column_stack([table.flags.get(f, no_flags) for f in names])[evaluated.rows]
    macro = np.array([f != NO_FINDING for f in names])
    images = LabelledScores.build(labels, p, flags, evaluated.patients, names, macro)
    groups = build_groups(evaluated.sex, evaluated.age, evaluated.view, evaluated.follow_up)
    if all(not group.is_known for group in groups):
        return ("the labels hold neither sex, age, view nor follow-up",) * 2
    return measure_groups(groups, images), measure_underdiagnosis(groups, images, find_abnormal(evaluated.labels))


def _read_digests(table: Scores, labels: str | Path | None) -> dict[str, Any]:
    location = None if labels is None else Location.of(str(labels))
    digest = table.model.get("digest")
    return {
        "model": list(table.model_digests) or ([digest] if digest else []),
        "run": hash_run(table.source) if table.is_own and not table.nights else None,
        "input": table.run.get("input_digest"),
        "labels": hashlib.sha256(location.read_bytes()).hexdigest() if location and location.is_file else None,
    }


def _list_notes(
    table: Scores, split: str | None, labelled: LabelResults | None, nights: Sequence[NightTable]
) -> list[str]:
    """List what a reader must know to interpret the numbers."""
    notes = []
    if split in ("train", "val"):
        use = "fit the weights" if split == "train" else "select the epoch, the calibration and the operating points"
        notes.append(
            f"This is the {split} split. If the model was trained on this manifest, these images served to {use}: the "
            "results show the fit to known images, not the performance on new patients."
        )
        info = labelled.images.info if labelled else {}
        gap = published.describe_gap(info.get("kind"), synthetic=facts.is_synthetic(info))
        if split == "val" and gap is not None:
            notes.append(f"Expect less on test: {gap}.")
        other = {"train": "val", "val": "train"}[split]
        mismatched = labelled.leak_check.shared_by_part.get(other, 0) if labelled else 0
        if mismatched:
            notes.append(
                f"{count_of(mismatched, 'image')} {'is' if mismatched == 1 else 'are'} {split} in the labels, but "
                f"{other} for the model: the two splits differ."
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
    without_id = PatientCount.of(labelled.images.patients).without_id if labelled else 0
    if without_id:
        notes.append(
            f"{count_of(without_id, 'evaluated image')} {'has' if without_id == 1 else 'have'} no patient id. Each "
            "counts as one patient in the intervals, which are too narrow if a patient has several images."
        )
    notes.extend(_note_children(labelled.images) if labelled else ())
    notes.extend(f"{line[:1].upper()}{line[1:]}." for line in (labelled.images.caveats if labelled else ()))
    notes.extend(table.ranking.notes)
    notes.extend(list_night_notes(nights))
    if table.ignored:
        shown = ", ".join(table.ignored[:8]) + (" …" if len(table.ignored) > 8 else "")
        notes.append(f"Columns of unknown findings were ignored: {shown}.")
    if labelled is not None and labelled.images.info.get("kind") == "official" and split == "test":
        n, complete = len(labelled.images.rows), published.OFFICIAL_TEST_IMAGES
        if n != complete:
            notes.append(f"The evaluation covers {n:,} of the {complete:,} images of NIH's official test split.")
    return notes


def _note_children(images: EvaluationSet) -> list[str]:
    """Return a note on the images of children among the evaluated ones, if any is known."""
    is_child = images.age < ADULT
    if not is_child.any():
        return []
    number = f"{is_child.sum():,} of {count_of(len(is_child), 'evaluated image')}"
    few = Patients.of(images.patients[is_child]).units < FEW_PATIENTS
    shown = "are too few to evaluate the model on them" if few else "have a row in the table of subgroups"
    verb = "is of a child" if is_child.sum() == 1 else "are of children"
    return [f"{number} {verb} (under {ADULT} years). They are part of all results, and {shown}."]


def _write(
    out: Path,
    table: Scores,
    listed: Scores,
    result: ReportResult,
    figures: Mapping[str, Figure],
    cases: Mapping[str, list[Band]],
    maps: HeatMapReader,
) -> dict[str, Any]:
    """Write the files; `listed` has the rows of the table that the worklist has."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("report.html", "report.md"):
        (out / name).unlink(missing_ok=True)
    encoded = inline_svg.write_figures(out, figure_set.NAMES, figures)
    worklist = build_worklist(listed)
    studies = list_rows(listed, worklist, maps)
    quality_images = list_quality_images(listed, result.flagged.doubtful)
    plain = replace(result, notes=[*result.notes, *maps.notes]).to_json()
    plain["images_not_read"] = explain_unread_images(studies, listed.paths) or None
    atomic.write_text(out / "worklist.csv", worklist.to_csv())
    atomic.write_json(out / "metrics.json", plain)
    atomic.write_parquet(tables.build_table(plain), out / "metrics.parquet")
    judged = plain["findings"] or (plain["consensus"] or {}).get("findings", {})
    view = {
        "m": plain,
        "facts": facts.list_facts(table, plain),
        "figures": encoded,
        "cases": cases,
        "colour_stops": cards.list_stops(),
        "empty_map": EMPTY,
        "is_weighted": not np.array_equal(worklist.priority, worklist.abnormality, equal_nan=True),
        "model": facts.list_model_facts(table, plain),
        "summary": summarize(result, table.model, worklist),
        "worklist": studies,
        "quality_images": quality_images,
        "cards": CARDS,
        "missing_images": describe_missing_images(studies, listed.paths),
        "worklist_total": len(worklist.lines),
        "columns": {name: [metric for metric in metrics.METRICS if metric.table == name] for name in metrics.TABLES},
        "probability_metrics": metrics.PROBABILITY_METRICS,
        "remarks": list_remarks(result.labelled.evaluation) if result.labelled else {},
        "consensus_remarks": list_remarks(result.consensus.evaluation) if result.consensus else {},
        "leak_check": result.leak_check.describe(result.split),
        "compared_leak_check": result.compared.leak_check.describe(result.split) if result.compared else "",
        "attributes": figure_set.ATTRIBUTES,
        "assumed": {name: found for name, found in judged.items() if found["assumed_prevalence"] is not None},
    }
    info = result.labelled.images.info if result.labelled else {}
    checklist = render_checklist(plain, table, str(view["leak_check"]), info.get("tables") or {})
    atomic.write_text(out / "checklist.md", checklist)
    atomic.write_text(out / "report.md", html.render(view, "report.md.j2"))
    atomic.write_text(out / "report.html", html.render(view))
    _log.debug("report in %s", out)
    return plain
