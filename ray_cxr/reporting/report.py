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

from ray_cxr.data import manifest
from ray_cxr.errors import ERROR_CODES, InputError, OutputError
from ray_cxr.evaluation import drift, published, subgroups
from ray_cxr.labels import LABELS, NO_FINDING
from ray_cxr.reporting import html, pictures, plots, tables
from ray_cxr.reporting.against import (
    Population,
    against_boxes,
    against_consensus,
    against_published,
    against_scores,
)
from ray_cxr.reporting.labelled import Evaluated, describe_split, guard, join, leak_words
from ray_cxr.reporting.measures import Measured, columns, measure
from ray_cxr.reporting.prevalence import read_prevalences
from ray_cxr.reporting.scores import Place, Scores, n_patients, number, provenance, read_scores
from ray_cxr.reporting.summary import remarks, summary
from ray_cxr.reporting.worklist import as_csv, worklist
from ray_cxr.storage import atomic, remote

_log = logging.getLogger(__name__)
#: What a report consists of; an older report's pictures must not survive into a newer one.
_PICTURES = (
    "auroc",
    "roc",
    "precision_recall",
    "reliability",
    "distributions",
    "subgroups",
    "subgroup_differences",
    "compared",
    "consensus",
    "localisation",
    "drift",
    "examples",
    "heatmaps",
    "radiographs",
    "learning_curves",
    "prevalence",
    "cooccurrence",
    "priority",
)
#: Of the subgroups' intervals at most, and of those of two attributes crossed: there are hundreds of them.
_SUBGROUP_RESAMPLES, _CROSSING_RESAMPLES = 500, 200


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
    """Write metrics.json, metrics.parquet, pictures (PNG and SVG), worklist.csv, report.md and, last, report.html.

    Args:
        scores: what `ray-cxr score` wrote; or Parquet, a file or a folder, with image_id and p_<Finding>.
        out: the folder for the report; an older report in it is replaced.
        labels: a manifest with labels; None reports what was found without saying how well.
        split: evaluate only the labels' rows of `train`, `val` or `test`; None takes all rows.
        consensus: a table of radiologists' labels, see `data.consensus`; of the evaluated images, or without `labels`
            of all that were scored.
        boxes: a table of boxes, see `data.boxes`, for the heat maps that `score --heatmaps` drew.
        compare: another score table, compared with this one on the labelled images that both have.
        prevalence: a TOML file of shares per finding, see `prevalence`, to give predictive values for.
        n_resamples: patient-bootstrap resamples.
        seed: of the bootstrap and of the choice of examples.

    Returns:
        What was written to metrics.json: float64 unrounded; what is undefined is None, with its reason.

    Raises:
        InputError: the scores are unfinished, are none, or share no image with the labels, the consensus table, the
            boxes or the other scores; `split` or `compare` without labels, `prevalence` without any; no heat maps.
        TableError: a table names an image twice or holds values that it cannot hold.
        LeakError: an image or patient that trained the model is in an evaluation of `test` or of no named
            split.
        OutputError: `out` is a file.
    """
    if split is not None and split not in manifest.SPLITS:
        raise InputError(f"--split {split}: use train, val or test")
    if split is not None and labels is None:
        raise InputError(f"--split {split}: needs --labels, whose rows it chooses")
    if compare is not None and labels is None:
        raise InputError(f"--compare {compare}: needs --labels; without them neither table is better or worse")
    if prevalence is not None and labels is None and consensus is None:
        raise InputError(f"--prevalence {prevalence}: needs --labels or --consensus, which sensitivity is taken from")
    if n_resamples < 1:
        raise InputError(f"n_resamples is {n_resamples}; it must be at least 1")
    out = remote.path(out)
    remote.check_bucket(out)
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out}: is a file; name a folder")
    shares = {} if prevalence is None else read_prevalences(str(prevalence))

    table = read_scores(scores)
    _refuse_inside(out, table)
    _log.debug("%s: %d rows, %d errors", table.source, len(table.ids), int((~table.ok).sum()))
    result = _empty(table, split)
    drawn: dict[str, Figure] = {}
    evaluated = None
    if labels is not None:
        evaluated = _labelled(table, labels, split, result)
        measured = _evaluate(table, evaluated, result, shares, n_resamples, seed)
        drawn |= pictures.of_evaluation(table, evaluated, measured, seed)
        found = _subgroups(table, evaluated, result, n_resamples, seed)
        if found is not None:
            drawn |= pictures.of_subgroups(found, measured.macro)
    if compare is not None and evaluated is not None:
        result["compared"] = against_scores(
            table, evaluated, str(compare), split, result["split_label"], n_resamples=n_resamples, seed=seed
        )
        drawn["compared"] = pictures.of_comparison(result["compared"], "these scores", "the others")
    population = Population.of(table, evaluated, split, result["split_label"])
    if consensus is not None:
        result["consensus"], agreed = against_consensus(
            table, population, str(consensus), prevalences=shares, n_resamples=n_resamples, seed=seed
        )
        chart = pictures.of_consensus(agreed)
        drawn |= {} if chart is None else {"consensus": chart}
    if boxes is not None:
        result["localisation"], located = against_boxes(
            table, population, str(boxes), n_resamples=n_resamples, seed=seed
        )
        drawn["localisation"] = pictures.of_boxes(located)
    result["drift"] = _drift(table, evaluated, result["split_label"])
    result["intervals"] = _method(n_resamples, seed) if labels or consensus or boxes else None
    chart = pictures.of_drift(result["drift"]) if result["drift"] else None
    drawn |= {} if chart is None else {"drift": chart}
    priority = table.priority[np.isfinite(table.priority)]
    if labels is None and len(priority):
        drawn["priority"] = plots.priority_histogram(priority)
    epochs = table.model.get("curves") or []
    if epochs:
        drawn["learning_curves"] = plots.learning_curves(epochs)
    return _write(out, table, result, drawn)


def _refuse_inside(out: Path, table: Scores) -> None:
    """A report's metrics.parquet in the folder that scores are read from would be read as scores the next time."""
    if table.folder is not None and remote.is_inside(out, remote.path(table.folder)):
        raise OutputError(f"--out {out}: lies among the scores in {table.folder}; name another folder")


def _empty(table: Scores, split: str | None) -> dict[str, Any]:
    return {
        "split": split,
        "split_label": None,
        "split_kind": None,
        "split_seed": None,
        "n_images": int(table.ok.sum()),
        "n_patients": n_patients(table.patients[table.ok]),
        "findings": {},
        "macro": None,
        "weighted": None,
        "counts": _counts(table),
        "flag_rates": _flag_rates(table),
        "drift": None,
        "digests": _digests(table),
        "intervals": None,
        "leak_check": None,
        "subgroups": None,
        "published": [],
        "consensus": None,
        "compared": None,
        "localisation": None,
        "notes": _notes(table),
    }


def _method(n_resamples: int, seed: int) -> dict[str, Any]:
    return {
        "method": "percentile bootstrap over patients",
        "level": 0.95,
        "n_resamples": n_resamples,
        "seed": seed,
        "delong": "logit scale, images taken as independent",
    }


def _stacked(table: Scores, of: Mapping[str, np.ndarray], missing: Any) -> np.ndarray:
    """Columns of the table's findings, [n,F]."""
    return np.column_stack([of.get(f, np.full(len(table.ids), missing)) for f in table.findings])


def _drift(table: Scores, evaluated: Evaluated | None, words: str | None) -> dict[str, Any] | None:
    """What was flagged against what validation led to expect; None for another system's scores.

    With labels of the evaluated images, because the others may have trained the model; without of all.
    """
    if not table.own:
        return None
    rows = np.arange(len(table.ids)) if evaluated is None else evaluated.rows
    found = drift.measure(
        drift.Expected.of(table.model),
        table.findings,
        _stacked(table, table.flags, np.int8(-1))[rows],
        _stacked(table, table.p, np.nan)[rows],
        table.quality_flags[rows],
        table.ok[rows],
        table.patients[rows] if evaluated is None else evaluated.patients,
    )
    entry = {"images": "all scored images" if evaluated is None else f"the evaluated images ({words})"}
    entry |= found.as_dict()
    if evaluated is not None:
        del entry["errors"]  # what failed was not evaluated, and is counted elsewhere
    return entry


def _subgroups(
    table: Scores, evaluated: Evaluated, result: dict[str, Any], n_resamples: int, seed: int
) -> subgroups.Subgroups | None:
    """Fills `result`; None where nothing is known of the people."""
    groups = subgroups.groups(evaluated.sex, evaluated.age, evaluated.view, evaluated.follow_up)
    if all(not group.known for group in groups):
        result["subgroups"] = {"reason": "the labels tell neither sex, age, view nor follow-up"}
        return None
    names = [f for f in table.findings if (evaluated.labels[f] >= 0).any()]
    if not names:
        result["subgroups"] = {"reason": "no finding is both scored and labelled"}
        return None
    rows = evaluated.rows
    found = subgroups.measure(
        groups,
        np.column_stack([evaluated.labels[f] for f in names]),
        np.column_stack([table.p[f][rows] for f in names]),
        np.column_stack([table.flags[f][rows] if f in table.flags else np.full(len(rows), -1) for f in names]),
        evaluated.patients,
        names,
        n_resamples=min(n_resamples, _SUBGROUP_RESAMPLES),
        n_resamples_crossings=min(n_resamples, _CROSSING_RESAMPLES),
        seed=seed,
        macro=np.array([f != NO_FINDING for f in names], dtype=bool),
    )
    result["subgroups"] = found.as_dict()
    return found


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
        whose = (
            "These rows name the model that made them, but nothing beside them tells which images trained it"
            if table.model_digests
            else "These are another system's predictions. Nothing tells which images trained it"
        )
        notes.append(f"{whose}, so a leak between its training and this evaluation cannot be ruled out here.")
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


def _labelled(table: Scores, path: str | Path, split: str | None, result: dict[str, Any]) -> Evaluated:
    """Join and guard; fills `result` with what was joined."""
    labelled = manifest.read_manifest(path)
    info = manifest.split_info(labelled)
    evaluated = join(table, labelled, path, split, result["counts"])
    result["split_label"] = describe_split(split, info)
    result["split_kind"] = info.get("kind")
    result["split_seed"] = info.get("seed")
    place = Place.of(str(path))
    result["digests"]["labels"] = hashlib.sha256(place.bytes()).hexdigest() if place.is_file else None
    result["digests"]["tables"] = info.get("tables") or info.get("digests")
    result["leak_check"] = guard(
        table, evaluated.rows, evaluated.patients, split, "the test split" if split else "the labels"
    )
    other = sum(n for part, n in result["leak_check"].get("shared_by_part", {}).items() if part != split)
    if split in ("train", "val") and other:
        result["notes"].insert(
            0,
            f"These labels call {other:,} images {split} that the model knows as its "
            f"{'val' if split == 'train' else 'train'} images: the labels' split is not the model's.",
        )
    if info.get("kind") == "official" and split == "test" and len(evaluated.rows) != published.OFFICIAL_TEST_IMAGES:
        result["notes"].append(
            f"These are {len(evaluated.rows):,} images; NIH's official test split has "
            f"{published.OFFICIAL_TEST_IMAGES:,}."
        )
    if split in ("train", "val"):
        use = "fitted its weights" if split == "train" else "chose its best epoch, calibration and operating points"
        result["notes"].insert(
            0,
            f"This is the {split} split, which, if the model was trained on this manifest, {use}: the "
            "numbers say how well it fits and not how well it will do on new patients.",
        )
    result["n_images"] = len(evaluated.rows)
    result["n_patients"] = n_patients(evaluated.patients)
    return evaluated


def _evaluate(
    table: Scores,
    evaluated: Evaluated,
    result: dict[str, Any],
    prevalences: Mapping[str, float],
    n_resamples: int,
    seed: int,
) -> Measured:
    """Measure; fills `result`."""
    labels = {f: evaluated.labels[f] for f in LABELS}
    measured = measure(
        columns(table, evaluated.rows),
        labels,
        evaluated.patients,
        prevalences=prevalences,
        n_resamples=n_resamples,
        seed=seed,
    )
    result["findings"], result["macro"], result["weighted"] = measured.findings, measured.macro, measured.weighted
    result["published"] = against_published(result)
    return measured


def _write(out: Path, table: Scores, result: dict[str, Any], drawn: Mapping[str, Figure]) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    ours = {"report.html", "report.md", *(f"{picture}.{kind}" for picture in _PICTURES for kind in ("png", "svg"))}
    for old in [path for path in out.glob("*") if path.name in ours]:
        old.unlink(missing_ok=True)
    shown: dict[str, bytes] = {}
    for name in _PICTURES:
        if name in drawn:
            _log.debug("drawing %s", name)
            shown[name], vector = plots.encode(drawn[name])
            (out / f"{name}.png").write_bytes(shown[name])
            (out / f"{name}.svg").write_bytes(vector)
    lines = worklist(table)
    atomic.write_text(out / "worklist.csv", as_csv(lines))
    atomic.write_json(out / "metrics.json", result)
    atomic.write_parquet(tables.metrics_table(result), out / "metrics.parquet")
    view = {
        "m": result,
        "source": table.source,
        "own": table.own,
        "has_priority": bool(np.isfinite(table.priority).any()),
        "model": _model_facts(table),
        "summary": summary(result),
        "pictures": shown,
        "worklist": lines[:25],
        "worklist_total": len(lines),
        "remarks": remarks(result["findings"]),
        "consensus_remarks": remarks(result["consensus"]["findings"]) if result["consensus"] else {},
        "leak_words": leak_words,
        "attributes": pictures.ATTRIBUTES,
        "assumed": {
            f: one
            for f, one in (result["findings"] or (result["consensus"] or {}).get("findings", {})).items()
            if one["assumed_prevalence"] is not None
        },
    }
    atomic.write_text(out / "report.md", html.render(view, "report.md.j2"))
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
