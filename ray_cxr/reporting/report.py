"""The report: reads a score table, joins labels, guards against leaks, writes numbers, pictures and a page.

Nothing is lost on the way: every row of either table ends in a count of `metrics.json`, and every image, the
failed ones too, in `worklist.csv`.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ray_cxr.data import atomic, manifest
from ray_cxr.errors import ERROR_CODES, InputError, OutputError
from ray_cxr.reporting import html, plots
from ray_cxr.reporting.examples import examples
from ray_cxr.reporting.labelled import Evaluated, describe_split, guard, join
from ray_cxr.reporting.measures import measure
from ray_cxr.reporting.scores import Place, Scores, n_patients, number, provenance, read_scores
from ray_cxr.reporting.worklist import as_csv, worklist

_log = logging.getLogger(__name__)
#: What a report consists of; an older report's pictures must not survive into a newer one.
_PICTURES = (
    "auroc",
    "roc",
    "precision_recall",
    "examples",
    "learning_curves",
    "prevalence",
    "priority",
)


def write_report(
    scores: str | Path,
    out: str | Path,
    *,
    labels: str | Path | None = None,
    split: str | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Write metrics.json, pictures (PNG and SVG), worklist.csv and, last, report.html into `out`.

    Args:
        scores: what `ray-cxr score` wrote; or Parquet, a file or a folder, with image_id and p_<Finding>.
        out: the folder for the report; an older report in it is replaced.
        labels: a manifest with labels; None reports what was found without saying how well.
        split: evaluate only the labels' rows of `train`, `val` or `test`; None takes all rows.
        n_resamples: patient-bootstrap resamples.
        seed: of the bootstrap and of the choice of examples.

    Returns:
        What was written to metrics.json: float64 unrounded; what is undefined is None, with its reason.

    Raises:
        InputError: the scores are unfinished, are none, or share no image with the labels; `split` without
            labels.
        TableError: a table names an image twice or holds values that it cannot hold.
        LeakError: an image or patient that trained the model is in an evaluation of `test` or of no named
            split.
        OutputError: `out` is a file.
    """
    if split is not None and split not in manifest.SPLITS:
        raise InputError(f"--split {split}: use train, val or test")
    if split is not None and labels is None:
        raise InputError(f"--split {split}: needs --labels, whose rows it chooses")
    if n_resamples < 1:
        raise InputError(f"n_resamples is {n_resamples}; it must be at least 1")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out}: is a file; name a folder")

    table = read_scores(scores)
    _log.debug("%s: %d rows, %d errors", table.source, len(table.ids), int((~table.ok).sum()))
    result: dict[str, Any] = {
        "split": split,
        "split_label": None,
        "split_kind": None,
        "split_seed": None,
        "n_images": int(table.ok.sum()),
        "n_patients": n_patients(table.patients[table.ok]),
        "findings": {},
        "macro": None,
        "counts": _counts(table),
        "flag_rates": _flag_rates(table),
        "digests": _digests(table),
        "intervals": None,
        "leak_check": None,
        "notes": _notes(table),
    }
    figures: dict[str, Figure] = {}
    if labels is not None:
        evaluated = _evaluate(table, labels, split, result, n_resamples, seed)
        figures.update(_evaluation_figures(table, evaluated, result, seed))
    priority = table.priority[np.isfinite(table.priority)]
    if labels is None and len(priority):
        figures["priority"] = plots.priority_histogram(priority)
    epochs = table.model.get("curves") or []
    if epochs:
        figures["learning_curves"] = plots.learning_curves(epochs)
    return _write(out, table, result, figures)


def _counts(table: Scores) -> dict[str, Any]:
    codes = Counter(code or "unknown" for code in table.codes[~table.ok])
    ordered = [*ERROR_CODES, *sorted(set(codes) - set(ERROR_CODES))]
    return {
        "rows": len(table.ids),
        "scored": int(table.ok.sum()),
        "errors": int((~table.ok).sum()),
        "by_code": {code: codes[code] for code in ordered if codes[code]},
        "quality_flags": dict(sorted(Counter(flag for flag in table.quality_flags if flag).items())),
    }


def _flag_rates(table: Scores) -> dict[str, Any]:
    """Share of scored images flagged, and the share that the operating point led to expect."""
    expected = table.model.get("expected_flag_rates") or {}
    rates: dict[str, Any] = {}
    for finding in table.findings:
        flags = table.flags.get(finding)
        known = flags[flags >= 0] if flags is not None else np.zeros(0)
        rates[finding] = {
            "observed": float(known.mean()) if len(known) else None,
            "expected": number(expected.get(finding)),
            "n": len(known),
        }
    return rates


def _digests(table: Scores) -> dict[str, Any]:
    return {
        "model": list(table.model_digests) or [digest for digest in [table.model.get("digest")] if digest],
        "input": table.run.get("input_digest"),
        "labels": None,
        "tables": None,
    }


def _notes(table: Scores) -> list[str]:
    """What a reader must know to read the rest rightly."""
    notes = []
    if not table.own:
        notes.append(
            "These are another system's predictions. Nothing tells which images trained it, so a leak "
            "between its training and this evaluation cannot be ruled out here."
        )
    if len(table.model_digests) > 1:
        notes.append(f"The rows come from {len(table.model_digests)} different models; the numbers mix them.")
    source = provenance(table)
    if source.get("initial_weights") == "random" and not table.model.get("curves"):
        notes.append("The model starts from random weights and has no learning curve: it may never have been trained.")
    if table.own and (table.trained is None or source.get("lineage") == "unknown"):
        notes.append(
            "Not all images that trained this model are known, so a leak between its training and this evaluation "
            "cannot be ruled out here."
        )
    if table.ignored:
        shown = ", ".join(table.ignored[:8]) + (" …" if len(table.ignored) > 8 else "")
        notes.append(f"Columns that name no known finding were not used: {shown}.")
    return notes


def _evaluate(
    table: Scores, path: str | Path, split: str | None, result: dict[str, Any], n_resamples: int, seed: int
) -> Evaluated:
    """Join, guard, measure; fills `result`."""
    labelled = manifest.read_manifest(path)
    info = manifest.split_info(labelled)
    evaluated = join(table, labelled, path, split, result["counts"])
    result["split_label"] = describe_split(split, info)
    result["split_kind"] = info.get("kind")
    result["split_seed"] = info.get("seed")
    place = Place.of(str(path))
    result["digests"]["labels"] = hashlib.sha256(place.bytes()).hexdigest() if place.is_file else None
    result["digests"]["tables"] = info.get("tables") or info.get("digests")
    result["leak_check"] = guard(table, evaluated, split)
    if split in ("train", "val"):
        use = "fitted its weights" if split == "train" else "chose its best epoch, calibration and operating points"
        result["notes"].insert(
            0,
            f"This is the {split} split, which, if the model was trained on this manifest, {use}: the "
            "numbers say how well it fits and not how well it will do on new patients.",
        )
    result["n_images"] = len(evaluated.rows)
    result["n_patients"] = n_patients(evaluated.patients)
    result["intervals"] = {
        "method": "percentile bootstrap over patients",
        "level": 0.95,
        "n_resamples": n_resamples,
        "seed": seed,
        "delong": "logit scale, images taken as independent",
    }
    measure(table, evaluated, result, n_resamples, seed)
    return evaluated


def _evaluation_figures(table: Scores, evaluated: Evaluated, result: dict[str, Any], seed: int) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    panels = []
    for finding, entry in result["findings"].items():
        if entry["auroc"] is None:
            continue
        labels, p = evaluated.labels[finding], table.p[finding][evaluated.rows]
        usable = (labels >= 0) & ~np.isnan(p)
        panels.append(
            plots.Panel(
                finding=finding,
                y=labels[usable],
                s=p[usable],
                auroc=entry["auroc"],
                low=entry["auroc_low"],
                high=entry["auroc_high"],
                average_precision=entry["average_precision"],
                at=(entry["sensitivity"], entry["specificity"], entry["ppv"]),
            )
        )
    if panels:
        figures["auroc"] = plots.auroc_overview(panels, result["macro"])
        figures["roc"] = plots.roc(panels)
        figures["precision_recall"] = plots.precision_recall(panels)
    present = [
        (finding, entry["prevalence"], entry["positives"], entry["flag_rate"])
        for finding, entry in result["findings"].items()
        if entry["prevalence"] is not None
    ]
    if present:
        figures["prevalence"] = plots.prevalence(present)
    groups = examples(table, evaluated, seed)
    if any(tiles for _, tiles in groups):
        figures["examples"] = plots.examples(groups)
    return figures


def _write(out: Path, table: Scores, result: dict[str, Any], figures: Mapping[str, Figure]) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("report.html", *(f"{picture}.{kind}" for picture in _PICTURES for kind in ("png", "svg"))):
        (out / name).unlink(missing_ok=True)
    pictures: dict[str, bytes] = {}
    for name in _PICTURES:
        if name in figures:
            _log.debug("drawing %s", name)
            pictures[name], vector = plots.encode(figures[name])
            (out / f"{name}.png").write_bytes(pictures[name])
            (out / f"{name}.svg").write_bytes(vector)
    lines = worklist(table)
    atomic.write_text(out / "worklist.csv", as_csv(lines))
    atomic.write_json(out / "metrics.json", result)
    view = {
        "m": result,
        "source": table.source,
        "own": table.own,
        "has_priority": bool(np.isfinite(table.priority).any()),
        "model": _model_facts(table),
        "summary": _summary(result),
        "pictures": pictures,
        "worklist": lines[:25],
        "worklist_total": len(lines),
        "remarks": _remarks(result["findings"]),
    }
    atomic.write_text(out / "report.html", html.render(view))
    _log.debug("report in %s", out)
    return result


def _model_facts(table: Scores) -> list[tuple[str, str]]:
    """What is known of the model, as rows of two texts."""
    model = table.model
    spec = model.get("input_spec") or {}
    facts = [
        ("Backbone", model.get("backbone")),
        (
            "Input",
            f"{spec['size']} × {spec['size']} pixels, {spec.get('aspect')}" if spec.get("size") else None,
        ),
        ("Findings", ", ".join(plots.spaced(finding) for finding in table.findings)),
        ("Model digest", ", ".join(table.model_digests) or model.get("digest")),
    ]
    described = model.get("provenance")
    for name, value in sorted(described.items()) if isinstance(described, Mapping) else ():
        if isinstance(value, (str, int, float)):
            facts.append((str(name).replace("_", " ").capitalize(), value))
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _remarks(findings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What must be said of a finding's numbers beside the numbers."""
    remarks = {}
    for finding, entry in findings.items():
        parts = []
        if entry["reason"]:
            parts.append(f"undefined: {entry['reason']}")
        if entry["caution"]:
            parts.append(entry["caution"])
        if entry["unscored"] and entry["auroc"] is not None:
            parts.append(f"{entry['unscored']:,} labelled images have no score for it")
        if parts:
            remarks[finding] = "; ".join(parts)
    return remarks


def _summary(result: Mapping[str, Any]) -> list[str]:
    """The report in a few sentences."""
    counts, macro = result["counts"], result["macro"]
    out = []
    if macro is None:
        out.append(
            f"{counts['scored']:,} of {counts['rows']:,} images were scored, of {result['n_patients']:,} "
            "patients. There are no labels, so this report says what was found, not how well."
        )
    else:
        out.append(
            f"{result['n_images']:,} images of {result['n_patients']:,} patients were evaluated: "
            f"{result['split_label']}."
        )
        if macro["auroc"] is None:
            out.append(f"There is no macro AUROC: {macro['reason']}.")
        else:
            found = result["findings"]
            between = (
                f" (95% interval {macro['auroc_low']:.3f} to {macro['auroc_high']:.3f})"
                if macro["auroc_low"] is not None
                else " (no interval)"
            )
            of = f"{len(macro['findings'])} findings" if len(macro["findings"]) > 1 else "one finding"
            out.append(f"Macro AUROC is {macro['auroc']:.3f}{between} over {of}.")
            ranked = sorted(macro["findings"], key=lambda f: found[f]["auroc"])
            if len(ranked) > 1:
                weak = ranked[: min(3, len(ranked) // 2)]
                out.append(
                    "Weakest: "
                    + ", ".join(f"{plots.spaced(f)} {found[f]['auroc']:.3f}" for f in weak)
                    + f". Strongest: {plots.spaced(ranked[-1])} {found[ranked[-1]]['auroc']:.3f}."
                )
            chance = [f for f in ranked if found[f]["auroc_low"] is not None and found[f]["auroc_low"] <= 0.5]
            if chance:
                out.append(f"Not told apart from chance: {', '.join(map(plots.spaced, chance))}.")
        unsure = [f for f, entry in result["findings"].items() if entry["caution"]]
        if unsure:
            out.append(f"Do not lean on the intervals of {', '.join(map(plots.spaced, unsure))}: see the remarks.")
        undefined = [f for f, entry in result["findings"].items() if entry["auroc"] is None]
        if undefined:
            out.append(f"No AUROC can be given for {', '.join(map(plots.spaced, undefined))}; the table says why.")
    if counts["errors"]:
        parts = ", ".join(f"{code} {n:,}" for code, n in counts["by_code"].items())
        out.append(
            f"{counts['errors']:,} of {counts['rows']:,} images "
            f"({html.percent(counts['errors'] / counts['rows'], 2)}) could not be scored: {parts}. "
            "They are at the end of the worklist and in no number above."
        )
    else:
        out.append("No image failed.")
    if macro is not None and counts["labelled_not_scored"]:
        out.append(f"{counts['labelled_not_scored']:,} labelled images have no row in the scores.")
    return out
