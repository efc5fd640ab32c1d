"""checklist.md: what a report can fill in of two reporting guidelines, for authors of a paper.

CLAIM 2024 Update (Tejani et al., Radiology: Artificial Intelligence 2024;6(4):e240300) and TRIPOD+AI (Collins et al.,
BMJ 2024;385:e078378). Items have our own short names; the published wording counts. An item is filled in only with
values of the run. If the run lacks them, the item is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_cxr.evaluation import metrics
from ray_cxr.imaging.demographics import PatientCount
from ray_cxr.reporting import html
from ray_cxr.reporting.scores import Scores

AUTHORS = "to be written by the authors"
UNKNOWN = "unknown: not recorded in this run"

#: Number, topic, and the method of `_Run` that fills the item in; empty if only authors can.
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
    ("30", "Robustness", ""),
    ("31", "Explainability", "explanation"),
    ("32", "Testing on internal data", "tested"),
    ("33", "Testing on external data", "tested"),
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
    ("14", "Fairness: methods", ""),
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


def render_checklist(m: Mapping[str, Any], table: Scores, leak_check: str) -> str:
    """Return checklist.md of a report with the content `m` of metrics.json."""
    run = _Run(m, table, leak_check)
    lists = {
        "CLAIM 2024 Update (Tejani et al., Radiology: Artificial Intelligence 2024)": CLAIM,
        "TRIPOD+AI (Collins et al., BMJ 2024)": TRIPOD_AI,
    }
    filled = {
        title: [(number, topic, (getattr(run, key)() or UNKNOWN) if key else AUTHORS) for number, topic, key in items]
        for title, items in lists.items()
    }
    return html.render({"lists": filled, "source": table.source}, "checklist.md.j2")


@dataclass(frozen=True)
class _Run:
    """One method per item that a run can fill in; it returns None or an empty text if the run lacks the values."""

    m: Mapping[str, Any]
    table: Scores
    leak_check: str

    @property
    def _source(self) -> Mapping[str, Any]:
        return self.table.provenance

    @property
    def _people(self) -> str:
        return html.format_patients(self.m)

    def data(self) -> str:
        tables = (self._source.get("split") or {}).get("tables") or {}
        return _join(
            _name("Evaluated", self.m["split_label"]),
            _name("SHA-256 of the labels", self.m["digests"]["labels"]),
            _name("Model", self._source.get("origin")),
            _name("Tables of the training", ", ".join(f"{name} (SHA-256 {digest})" for name, digest in tables.items())),
        )

    def tested(self) -> str:
        label = self.m["split_label"]
        return f"Evaluated: {label}. Whether its sites are those of the training is not recorded" if label else ""

    def preprocessing(self) -> str:
        spec, flags = self.table.model.get("input_spec") or {}, self.m["counts"]["quality_flags"]
        resized = f"{spec.get('size')} × {spec.get('size')} pixels, {spec.get('aspect')}, {spec.get('interpolation')}"
        flagged = ", ".join(f"{name} {n:,}" for name, n in flags.items())
        return _join(
            f"Resized to {resized}" if spec else "",
            _name("Images with a quality flag, which are evaluated too", flagged),
        )

    def missing(self) -> str:
        counts, labelled = self.m["counts"], [found["n"] for found in self.m["findings"].values()]
        return _join(
            f"Excluded: {counts['errors']:,} of {counts['rows']:,} images that could not be scored",
            f"{counts['labelled_not_scored']:,} labelled images without a score" if labelled else "",
            f"Null labels are left out per finding; at least {min(labelled):,} images have a label" if labelled else "",
        )

    def reference(self) -> str:
        return _join(
            _name("Label table, SHA-256", self.m["digests"]["labels"]),
            _name("Also compared with the panel of", (self.m["consensus"] or {}).get("source")),
            "How the labels were made is not recorded" if self.m["findings"] else "",
        )

    def partitions(self) -> str:
        split = self._source.get("split") or {}
        parts = self._source.get("images") or {}
        used = [f"{name} {part['images']:,} images of {_format_people(part)}" for name, part in parts.items()]
        rule = ", ".join(f"{key} {split[key]}" for key in ("kind", "seed", "fractions") if split.get(key) is not None)
        evaluated = f"evaluated {self.m['n_images']:,} images of {self._people}"
        return _join(_name("Split of the training", rule), "; ".join([*used, evaluated]))

    def disjoint(self) -> str:
        return _name("Leak check", self.leak_check)

    def size(self) -> str:
        return f"{self.m['n_images']:,} images of {self._people}; no sample size was calculated here"

    def model(self) -> str:
        fixed = self.table.model.get("architecture") or {}
        layers = ", ".join(f"{key} {fixed[key]}" for key in ("pooling", "dense", "dropout") if key in fixed)
        return _join(
            _name("Backbone", self.table.model.get("backbone")),
            _name("Layers above it", layers),
            f"One probability for each of {len(self.table.findings)} findings",
        )

    def software(self) -> str:
        versions = {"Training": self._source.get("versions"), "Scoring": self.table.run.get("versions")}
        return _join(*(_name(step, _list(found)) for step, found in versions.items() if found))

    def start(self) -> str:
        return _join(
            self._source.get("initial_weights"), _name("Images that trained them", self._source.get("lineage"))
        )

    def training(self) -> str:
        epochs = len(self.table.model.get("curves") or [])
        return _join(_name("Settings", _list(self._source.get("settings"))), f"{epochs} epochs" if epochs else "")

    def selection(self) -> str:
        epoch, rule = self._source.get("best_epoch"), self._source.get("chosen_by")
        return f"Epoch {epoch}, the best by {rule}" if epoch and rule else ""

    def ensemble(self) -> str:
        return "None: one model" if self.table.is_own and len(self.table.model_digests) == 1 else ""

    def metrics(self) -> str:
        findings = self.m["findings"].values()
        measured = [m.label for m in metrics.METRICS if any(found.get(m.key) is not None for found in findings)]
        return ", ".join([*measured, *(label for key, label in _SECTIONS.items() if findings and self.m.get(key))])

    def uncertainty(self) -> str:
        found = self.m["intervals"]
        if not found:
            return ""
        resamples = f"{found['n_resamples']:,} resamples, seed {found['seed']}"
        others = [_name(label, found.get(key)) for key, label in (("auroc", "AUROC"), ("shares", "Rates"))]
        return _join(f"{found['level']:.0%} intervals, {found['method']}, {resamples}", *others)

    def drift(self) -> str:
        found = self.m["drift"]
        if not found:
            return ""
        return f"Drift from {' and '.join(dict.fromkeys(found['baselines'].values()))}: {found['words']}"

    def explanation(self) -> str:
        found = (self.m["localisation"] or {}).get("overall") or {}
        if found.get("hit_rate") is None:
            return ""
        return f"Heat maps: hit rate {found['hit_rate']:.3f} on {found['n']:,} boxed findings"

    def flow(self) -> str:
        counts = self.m["counts"]
        names = ("rows", "scored", "errors", "labelled", "evaluated", "labelled_errors", "labelled_not_scored")
        return ", ".join(f"{name.replace('_', ' ')} {counts[name]:,}" for name in names if name in counts)

    def demographics(self) -> str:
        parts = []
        for name, people in (self._source.get("demographics") or {}).items():
            parts.append(f"{name}: {_list(people.get('sex'))}; age {_list(people.get('age'))}")
        groups = [group for group in (self.m["subgroups"] or {}).get("groups", []) if not group.get("crossing")]
        shown = ", ".join(f"{group['attribute']} {group['value']} {group['n']:,} images" for group in groups)
        return _join(*parts, _name("Evaluated", shown))

    def performance(self) -> str:
        macro = self.m["macro"]
        if not macro:
            return ""
        compared = (self.m["subgroups"] or {}).get("comparisons", {}).get("single", {}).get("words")
        return _join(f"Macro AUROC {_interval(macro)}, over {len(macro['findings'])} findings", compared)

    def accuracy(self) -> str:
        return _join(
            self.performance(),
            *(f"{name} {_interval(found)}" for name, found in self.m["findings"].items() if found["auroc"] is not None),
        )

    def failures(self) -> str:
        counts = self.m["counts"]
        return _join(f"{counts['errors']:,} images could not be scored", _list(counts["by_code"]))

    def identity(self) -> str:
        return _name("Model, SHA-256", ", ".join(self.m["digests"]["model"]))

    def predictors(self) -> str:
        return "The pixels of one radiograph; no clinical data" if self.table.is_own else ""

    def updating(self) -> str:
        made = self._source.get("recalibrated")
        if not made:
            return "None: not recalibrated" if self.table.is_own else ""
        fitted = f"calibration {made['method']}, operating points {made['rule']}"
        return f"Recalibrated {made['created'][:10]} on {made['images']:,} images of {_format_people(made)}: {fitted}"

    def prediction(self) -> str:
        precision = self.table.run.get("precision")
        return f"ray-cxr score, precision {precision}" if precision else ""

    def imbalance(self) -> str:
        return _name("Loss", (self._source.get("settings") or {}).get("loss"))

    def output(self) -> str:
        points = self.table.operating_points
        rules = sorted({str(point.get("rule")) for point in points.values() if point})
        fitted = self.table.model.get("calibration") or {}
        methods = sorted({str(rule["method"]) for rule in fitted.values() if rule})
        return _join(_name("Calibration", ", ".join(methods)), _name("Rule of the thresholds", ", ".join(rules)))

    def events(self) -> str:
        train = ((self._source.get("demographics") or {}).get("train") or {}).get("findings") or {}
        return _join(
            f"{self.m['n_images']:,} images of {self._people}",
            _name("Positives", _list_positives(self.m["findings"])),
            _name("In training", _list_positives(train)),
        )


def _name(label: str, value: object) -> str:
    return f"{label}: {value}" if value else ""


def _join(*parts: object) -> str:
    return ". ".join(str(part).rstrip(".") for part in parts if part)


def _list(values: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{key} {html.format_setting(value)}" for key, value in (values or {}).items())


def _list_positives(findings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {found['positives']:,} of {found['n']:,}" for name, found in findings.items())


def _format_people(part: Mapping[str, Any]) -> str:
    # Bundles of older versions have 0 where no patient id is known.
    return str(PatientCount(part["patients"] or None, part.get("images_without_patient", 0)))


def _interval(found: Mapping[str, Any]) -> str:
    low, high = (found.get(f"auroc_interval_{end}", found[f"auroc_{end}"]) for end in ("low", "high"))  # means lack it
    return f"{found['auroc']:.3f}" + (f" ({low:.3f} to {high:.3f})" if low is not None else " (no interval)")
