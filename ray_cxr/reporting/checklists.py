"""checklist.md: what a report can fill in of two reporting guidelines, for authors of a paper.

CLAIM 2024 Update (Tejani et al., Radiology: Artificial Intelligence 2024;6(4):e240300) and TRIPOD+AI (Collins et al.,
BMJ 2024;385:e078378). Items have our own short names; the published wording counts. An item is filled in only with
values of the run. If the run lacks them, the item is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_cxr.evaluation.metrics import METRICS
from ray_cxr.imaging.demographics import PatientCount, count_of
from ray_cxr.labels import NO_FINDING
from ray_cxr.reporting import html
from ray_cxr.reporting.scores import Scores

AUTHORS = "to be written by the authors"
UNKNOWN = "unknown: not recorded in this run"

#: Number, topic, and the key of the text that fills the item in; empty if only authors can.
_Item = tuple[str, str, str]
CLAIM: tuple[_Item, ...] = (
    ("1", "Title: AI and its kind", ""),
    ("2", "Abstract", ""),
    ("3", "Background and intended use", ""),
    ("4", "Aims and hypotheses", ""),
    ("5", "Prospective or retrospective", ""),
    ("6", "Goal of the study", ""),
    ("7", "Sources of the data", "data"),
    ("8", "Who was included and excluded", ""),
    ("9", "Preprocessing", "preprocessing"),
    ("10", "Selection of parts of the data", ""),
    ("11", "De-identification", ""),
    ("12", "Missing data", "missing"),
    ("13", "Image acquisition", ""),
    ("14", "Reference standard: definition", "reference"),
    ("15", "Reference standard: reason for the choice", ""),
    ("16", "Reference standard: source and annotators", ""),
    ("17", "Annotation of the test set", ""),
    ("18", "Agreement of annotators", ""),
    ("19", "Partitions of the data", "partitions"),
    ("20", "Level at which partitions are disjoint", "disjoint"),
    ("21", "Intended size of the test set", "size"),
    ("22", "Model", "model"),
    ("23", "Software and versions", "software"),
    ("24", "Initial weights", "start"),
    ("25", "Training", "training"),
    ("26", "Selection of the final model", "selection"),
    ("27", "Ensembles", "ensemble"),
    ("28", "Metrics", "metrics"),
    ("29", "Uncertainty and significance", "uncertainty"),
    ("30", "Robustness", "robustness"),
    ("31", "Explainability", "explanation"),
    ("32", "Testing on internal data", "internal"),
    ("33", "Testing on external data", "external"),
    ("34", "Trial registration", ""),
    ("35", "Numbers included and excluded", "flow"),
    ("36", "Demographics per partition", "demographics"),
    ("37", "Performance, also in subgroups", "performance"),
    ("38", "Accuracy with intervals", "accuracy"),
    ("39", "Analysis of failures", "failures"),
    ("40", "Limitations", ""),
    ("41", "Implications for practice", ""),
    ("42", "Full protocol", ""),
    ("43", "Availability of software, model and data", "identity"),
    ("44", "Funding", ""),
)
TRIPOD_AI: tuple[_Item, ...] = (
    ("1", "Title", ""),
    ("2", "Abstract (has a checklist of its own)", ""),
    ("3a", "Clinical context and existing models", ""),
    ("3b", "Population, purpose and users", ""),
    ("3c", "Known inequalities in health", ""),
    ("4", "Aims", ""),
    ("5a", "Sources of the data, and whom they represent", "data"),
    ("5b", "Dates of the data", ""),
    ("6a", "Setting and centres", ""),
    ("6b", "Who was eligible", ""),
    ("6c", "Treatments", ""),
    ("7", "Preprocessing and quality checks", "preprocessing"),
    ("8a", "Outcome: definition and assessment", "reference"),
    ("8b", "Outcome: assessors", ""),
    ("8c", "Outcome: blinding", ""),
    ("9a", "Predictors: choice", ""),
    ("9b", "Predictors: definition", "predictors"),
    ("9c", "Predictors: assessors", ""),
    ("10", "Sample size and its reason", "size"),
    ("11", "Missing data", "missing"),
    ("12a", "Use and partition of the data", "partitions"),
    ("12b", "Handling of predictors", "preprocessing"),
    ("12c", "Model, training and tuning", "training"),
    ("12d", "Variation between clusters: methods", ""),
    ("12e", "Measures of performance", "metrics"),
    ("12f", "Model updating: methods", "updating"),
    ("12g", "Computation of the predictions", "prediction"),
    ("13", "Class imbalance", "imbalance"),
    ("14", "Fairness: methods", "fairness"),
    ("15", "Output and thresholds", "output"),
    ("16", "Differences between training and evaluation data", "drift"),
    ("17", "Ethics", ""),
    ("18a", "Funding", ""),
    ("18b", "Conflicts of interest", ""),
    ("18c", "Protocol", ""),
    ("18d", "Registration", ""),
    ("18e", "Availability of data", ""),
    ("18f", "Availability of code", "software"),
    ("19", "Involvement of patients and public", ""),
    ("20a", "Flow of participants", "flow"),
    ("20b", "Characteristics of participants", "demographics"),
    ("20c", "Comparison with the training data", "drift"),
    ("21", "Participants and events per analysis", "events"),
    ("22", "Full model, and access to it", "identity"),
    ("23a", "Performance with intervals, also in subgroups", "accuracy"),
    ("23b", "Variation between clusters: results", ""),
    ("24", "Model updating: results", "updating"),
    ("25", "Interpretation and fairness", ""),
    ("26", "Limitations", ""),
    ("27a", "Poor or missing input in use", "failures"),
    ("27b", "Users and their expertise", ""),
    ("27c", "Next steps", ""),
)


#: Parts of metrics.json with measures of their own.
_SECTIONS = {
    "calibration": "calibration slope and intercept",
    "net_benefit": "net benefit",
    "selection": "selective prediction",
    "alerts": "share of images with a flag",
    "reading_order": "reading-order gain",
    "underdiagnosis": "underdiagnosis by group",
}


def render_checklist(m: Mapping[str, Any], table: Scores, leak_check: str, tables: Mapping[str, str]) -> str:
    """Return checklist.md of a report with the content `m` of metrics.json, and SHA-256s of its label tables."""
    known = _describe_data(m, table, leak_check) | _describe_model(m, table) | _describe_results(m)
    known |= _compare_tables(m, table, tables)
    lists = {
        "CLAIM 2024 Update (Tejani et al., Radiology: Artificial Intelligence 2024)": CLAIM,
        "TRIPOD+AI (Collins et al., BMJ 2024)": TRIPOD_AI,
    }
    filled = {
        title: [(number, topic, (known[key] or UNKNOWN) if key else AUTHORS) for number, topic, key in items]
        for title, items in lists.items()
    }
    return html.render({"lists": filled, "source": table.source}, "checklist.md.j2")


def _describe_data(m: Mapping[str, Any], table: Scores, leak_check: str) -> dict[str, str]:
    """Fill in the items on data; a text is empty if the run lacks the values."""
    source, counts, labels = table.provenance, m["counts"], m["digests"]["labels"]
    split, spec = source.get("split") or {}, table.model.get("input_spec") or {}
    tables = ", ".join(f"{name} (SHA-256 {digest})" for name, digest in (split.get("tables") or {}).items())
    size = html.format_patients(m)
    images = source.get("images", {}).items()
    parts = [f"{name} {_people(part)}" for name, part in images]
    rule = ", ".join(f"{key} {split[key]}" for key in ("kind", "seed", "fractions") if split.get(key) is not None)
    labelled = [found["n"] for found in m["findings"].values()]
    flagged, is_labelled = m["flagged"], "labelled" in counts
    listed = count_of(flagged["images"], f"{'labelled' if is_labelled else 'listed'} image")
    failed = f"{flagged['failed']['images']:,} of {listed} could not be scored"
    evaluated = _name("Evaluated", m["split_label"])
    groups = [group for group in (m["subgroups"] or {}).get("groups", []) if not group.get("crossing")]
    people = [
        f"{name}: {_list(part.get('sex'))}; age {_list(part.get('age'))}"
        for name, part in source.get("demographics", {}).items()
    ]
    trained = source.get("demographics", {}).get("train", {}).get("findings", {})
    return {
        "data": _join(
            evaluated,
            _name("SHA-256 of the labels", labels),
            _name("Model", source.get("origin")),
            _name("Tables of the training", tables),
        ),
        "preprocessing": _join(
            _name("Resized", html.format_spec(spec) if spec.get("size") else ""),
            _name(
                f"Images with a quality flag, which are not excluded, of {listed}",
                _list(flagged["quality_flags"]["by_flag"]),
            ),
        ),
        "missing": _join(
            f"Excluded: {failed}",
            f"{count_of(counts['labelled_not_scored'], 'labelled image')} without a score. Null labels are left out "
            f"per finding; images with a label: at least {min(labelled):,}"
            if labelled
            else "",
        ),
        "reference": _join(
            _name("Label table, SHA-256", labels),
            _name("Also compared with the panel of", (m["consensus"] or {}).get("source")),
            "How the labels were made is not recorded" if labelled else "",
        ),
        "partitions": _join(
            _name("Split of the training", rule),
            "; ".join([*parts, f"{'evaluated' if evaluated else 'scored'} {size}"]),
        ),
        "disjoint": _name("Leak check", leak_check),
        "size": f"{size}; no sample size was calculated here",
        "flow": _describe_flow(counts),
        "demographics": _join(
            *people,
            _name("Evaluated", ", ".join(f"{g['attribute']} {g['value']} {count_of(g['n'], 'image')}" for g in groups)),
        ),
        "failures": _join(failed, _list(flagged["failed"]["by_code"])),
        "events": _join(
            size, _name("Positives", _list_positives(m["findings"])), _name("In training", _list_positives(trained))
        ),
    }


def _describe_flow(counts: Mapping[str, Any]) -> str:
    """State the numbers of images of the scores, and those of the labels apart from them."""
    parts = {"Images of the scores": ("rows", {"scored": "scored", "failed": "errors"})}
    if "labelled" in counts:
        rest = {"evaluated": "evaluated", "failed": "labelled_errors", "without a score": "labelled_not_scored"}
        parts["Labelled images to evaluate"] = ("labelled", rest)
    return _join(
        *(
            f"{name}: {counts[total]:,} ({', '.join(f'{word} {counts[key]:,}' for word, key in rest.items())})"
            for name, (total, rest) in parts.items()
        )
    )


def _compare_tables(m: Mapping[str, Any], table: Scores, tables: Mapping[str, str]) -> dict[str, str]:
    """Fill in internal and external testing; the run only knows whether the training read the same tables."""
    trained = set(((table.provenance.get("split") or {}).get("tables") or {}).values())
    evaluated = _name("Evaluated", m["split_label"])
    if not (trained and tables and evaluated):
        return {"internal": "", "external": ""}
    if trained & set(tables.values()):
        same = "of tables that the training also read"
        return {"internal": f"{evaluated}, {same}", "external": f"Not in this run: its images are {same}"}
    sites = "Whether the sites differ too is not recorded"
    return {"internal": "", "external": f"{evaluated}, of other tables than those of the training. {sites}"}


def _describe_model(m: Mapping[str, Any], table: Scores) -> dict[str, str]:
    """Fill in the items on the model and its training."""
    source, model, made = table.provenance, table.model, table.provenance.get("recalibrated")
    layers, settings = model.get("architecture") or {}, source.get("settings") or {}
    versions = {"Training": source.get("versions"), "Scoring": table.run.get("versions")}
    epochs, epoch, chosen_by = len(model.get("curves") or []), source.get("best_epoch"), source.get("chosen_by")
    methods = sorted({str(rule["method"]) for rule in (model.get("calibration") or {}).values() if rule})
    points = {name: point for name, point in table.operating_points.items() if point and name != NO_FINDING}
    rules = sorted({str(point.get("rule")) for point in points.values()})
    updating = "None: not recalibrated" if table.is_own else ""
    if made:
        fitted = f"calibration {made['method']}, operating points {made['rule']}"
        images = _people(made)
        updating = f"Recalibrated {made['created'][:10]} on {images}: {fitted}"
    return {
        "model": _join(
            _name("Backbone", model.get("backbone")),
            _name("Layers above it", _list({k: layers[k] for k in ("pooling", "dense", "dropout") if k in layers})),
            f"One probability per finding ({count_of(len(table.findings), 'finding')})",
        ),
        "predictors": "The pixels of one radiograph; no clinical data" if table.is_own else "",
        "software": _join(*(_name(step, _list(found)) for step, found in versions.items())),
        "start": _join(source.get("initial_weights"), _name("Images that trained them", source.get("lineage"))),
        "training": _join(_name("Settings", _list(settings)), f"{epochs} epochs" if epochs else ""),
        "selection": f"Epoch {epoch}, the best by {chosen_by}" if epoch and chosen_by else "",
        "ensemble": _describe_ensemble(table),
        "identity": _name("Model, SHA-256", ", ".join(m["digests"]["model"])),
        "updating": updating,
        "prediction": _name("ray-cxr score, precision", table.run.get("precision")),
        "imbalance": _join(_name("Loss", settings.get("loss")), _name("Balance", settings.get("balance"))),
        "output": _join(_name("Calibration", ", ".join(methods)), _name("Rule of the thresholds", ", ".join(rules))),
    }


def _describe_ensemble(table: Scores) -> str:
    """State how many models were averaged; empty if unknown."""
    members = (table.provenance.get("ensemble") or {}).get("members")
    if members:
        return f"The mean of the calibrated logits of {len(members)} models"
    return "None: one model" if table.is_own and len(table.model_digests) == 1 else ""


def _describe_results(m: Mapping[str, Any]) -> dict[str, str]:
    """Fill in the items on metrics and results."""
    findings, macro, intervals, drift = m["findings"], m["macro"], m["intervals"] or {}, m["drift"]
    measured = [metric.label for metric in METRICS if any(f.get(metric.key) is not None for f in findings.values())]
    more = [label for key, label in _SECTIONS.items() if findings and m.get(key)]
    hits = (m["localisation"] or {}).get("overall") or {}
    words = (m["subgroups"] or {}).get("comparisons", {}).get("single", {}).get("words")
    groups = [group for group in (m["subgroups"] or {}).get("groups", []) if not group["crossing"]]
    attributes = ", ".join(dict.fromkeys(group["attribute"].replace("_", " ") for group in groups))
    is_judged = bool((m["underdiagnosis"] or {}).get("groups"))
    baselines = " and ".join(dict.fromkeys(drift["baselines"].values())) if drift else ""
    drifted = f"Drift from {baselines}: {drift['words']}" if drift else ""
    mean = ""
    if macro and macro["auroc"] is not None:
        mean = f"Macro AUROC {_interval(macro)}, over {count_of(len(macro['findings']), 'finding')}"
    if macro and macro["headline_reason"]:
        mean = f"No macro AUROC ({macro['headline_reason']})"
    performance = _join(mean, words)
    return {
        "metrics": ", ".join([*measured, *more]),
        "uncertainty": _join(
            f"{intervals['level']:.0%} intervals, {intervals['method']}, {intervals['n_resamples']:,} resamples, "
            f"seed {intervals['seed']}"
            if intervals
            else "",
            _name("AUROC", intervals.get("auroc")),
            _name("Mean AUROC", intervals.get("mean_auroc")),
            _name("Rates", intervals.get("shares")),
            _name("Groups", (m["subgroups"] or {}).get("interval_method")),
        ),
        "drift": drifted,
        "robustness": _join(_name("Groups", words), drifted),
        "fairness": f"AUROC, sensitivity and specificity by {attributes}, each compared with the largest group"
        + ("; underdiagnosis and overdiagnosis in the same groups" if is_judged else "")
        if attributes
        else "",
        "explanation": f"Heat maps: hit rate {hits['hit_rate']:.3f} on {count_of(hits['n'], 'boxed finding')}"
        if hits.get("hit_rate") is not None
        else "",
        "performance": performance,
        "accuracy": _join(
            performance, *(f"{name} {_interval(f)}" for name, f in findings.items() if f["auroc"] is not None)
        ),
    }


def _name(label: str, value: object) -> str:
    return f"{label}: {value}" if value else ""


def _join(*parts: object) -> str:
    return ". ".join(str(part).rstrip(".") for part in parts if part)


def _list(values: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{key} {html.format_setting(value)}" for key, value in (values or {}).items())


def _list_positives(findings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {found['positives']:,} of {found['n']:,}" for name, found in findings.items())


def _people(part: Mapping[str, Any]) -> str:
    # Bundles of older versions have 0 where no patient id is known.
    return PatientCount(part["patients"] or None, part.get("images_without_patient", 0)).describe(part["images"])


def _interval(found: Mapping[str, Any]) -> str:
    low, high = (found[f"auroc_interval_{end}"] for end in ("low", "high"))
    return f"{found['auroc']:.3f}" + (f" ({low:.3f} to {high:.3f})" if low is not None else " (no interval)")
