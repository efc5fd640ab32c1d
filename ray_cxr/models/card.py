"""Write MODEL_CARD.md, for the people who decide whether to use a bundle.

Facts that a bundle lacks, because it was imported or an older version wrote it, are reported as unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: Marks a number based on fewer than ten patients with, or without, the finding.
_SMALL = "†"
_SMALL_NOTE = (
    f"{_SMALL} Fewer than 10 patients with the finding, or without it: the true interval is wider. For a mean: most of "
    "its findings are affected."
)
_ATTRIBUTES = {"sex": "sex", "age_band": "age, years", "view": "view", "follow_up": "follow-up"}
_RATES = ("sensitivity", "specificity")


def model_card(info: Mapping[str, Any], curves: Sequence[Mapping[str, Any]]) -> str:
    """Return the card in Markdown; it uses only the contents of `bundle.json` and the learning curves."""
    source, spec = info["provenance"], info["input_spec"]
    lines = [
        f"# Model card: {info['backbone']} at {spec['size']} pixels",
        "",
        "**For research only. Not a medical device; not for diagnosis.**",
        *_section("Summary"),
        f"- Input: one frontal chest radiograph, 8-bit gray, {spec['size']} pixels square "
        f"(aspect: {spec['aspect']}, interpolation: {spec['interpolation']}).",
        f"- Output: a probability for each of {', '.join(info['findings'])}.",
        f"- Origin: {source['origin']}.",
        f"- Initial weights: {source['initial_weights']}.",
        *_intended_use(source),
        *_data(source),
        *_demographics(source),
    ]
    if curves:
        lines += ["", f"## Training: {len(curves)} epochs, of which epoch {source.get('best_epoch')} was the best"]
    lines += [*_validation(info), *_subgroups(source), *_calibration(info)]
    if source.get("recalibrated"):
        lines += _recalibration(info)
    lines += [*_alternatives(info), *_unfitted(info), *_precisions(info), *_quality(info), *_limits()]
    return "\n".join([*lines, *_versions(source)])


def _section(title: str) -> list[str]:
    return ["", f"## {title}", ""]


def _intended_use(source: Mapping[str, Any]) -> list[str]:
    return [
        *_section("Intended use"),
        "- Research: studies of screening and of worklist order on frontal (PA or AP) chest radiographs of adults, in "
        "which people read every image.",
        "- Not intended for: diagnosis or treatment; leaving images unread or informing patients because of its "
        "results; lateral views and other parts of the body; children; images that are not radiographs, such as "
        "photographs of a screen; findings that are not in its list.",
        f"- Children in training: {_count_children(source)}.",
        "- Before use at another site: evaluate it there on labelled images (`ray-cxr report`), then fit calibration "
        "and operating points there (`ray-cxr recalibrate`).",
    ]


def _count_children(source: Mapping[str, Any]) -> str:
    people = source.get("demographics", {}).get("train")
    if not people:
        return "unknown"
    bands = people["age_band"]
    known = sum(bands.values()) - bands.get("unknown", 0)
    if not known:
        return "unknown, since no age is known"
    return f"{bands.get('0-17', 0):,} of {known:,} images of known age are of patients under 18"


def _data(source: Mapping[str, Any]) -> list[str]:
    split = source.get("split") or {}
    lines = [*_section("Data"), f"- Split: {describe_split(split)}."]
    for name in ("train", "val"):
        counts = source.get("images", {}).get(name)
        if counts:
            lines.append(f"- {name}: {counts['images']:,} images of {counts['patients']:,} patients.")
    if not source.get("images"):
        lines.append("- Images and patients in training: unknown.")
    if source.get("lineage") == "unknown":
        lines.append("- Not all training images are known, so a test set may contain some of them.")
    if source.get("age_range"):
        lines.append(f"- Ages in training: {source['age_range'][0]:.0f} to {source['age_range'][1]:.0f} years.")
    for kind, label in (("tables", "Table"), ("lists", "List of a split")):
        digests = split.get(kind)
        if isinstance(digests, Mapping):
            lines += [f"- {label} {name}: SHA-256 {digest}." for name, digest in digests.items()]
    if source.get("prepared_digest"):
        lines.append(f"- Prepared manifest: digest {source['prepared_digest']}.")
    return lines


def _demographics(source: Mapping[str, Any]) -> list[str]:
    """A row per value of each attribute, and the positives per finding; a column per split."""
    title = _section("Demographics")
    splits = source.get("demographics")
    if not splits:
        return [*title, "Sex, age, view and follow-up of the training images: unknown."]
    names = [name for name in ("train", "val") if name in splits]
    rows: dict[str, list[str]] = {}
    for attribute, label in _ATTRIBUTES.items():
        values = dict.fromkeys(value for name in names for value in splits[name][attribute])
        # Each split has its age bands in order, but may lack some.
        for value in sorted(values) if attribute == "age_band" else values:
            counts = [(splits[name][attribute].get(value, 0), splits[name]["images"]) for name in names]
            rows[f"{label}: {value}"] = [f"{n:,} ({n / of:.1%})" if of else f"{n:,}" for n, of in counts]
        if attribute == "age_band":
            rows["age, years: median (quartiles)"] = [_quartiles(splits[name]["age"]) for name in names]
    lines = [*title, "Counts of images, not patients.", "", *_table(names, rows, first="")]
    rows = {}
    for finding in dict.fromkeys(finding for name in names for finding in splits[name]["findings"]):
        cells = [splits[name]["findings"].get(finding, {"n": 0, "positives": 0}) for name in names]
        if any(cell["n"] for cell in cells):
            rows[finding] = [f"{c['positives']:,} of {c['n']:,}" if c["n"] else "not labelled" for c in cells]
    return [*lines, "", "Positive images, of the images labelled for a finding:", "", *_table(names, rows)]


def _quartiles(age: Mapping[str, float | None]) -> str:
    if age["median"] is None:
        return "unknown"
    return f"{age['median']:.0f} ({age['q1']:.0f} to {age['q3']:.0f})"


def _validation(info: Mapping[str, Any]) -> list[str]:
    source = info["provenance"]
    metrics = source.get("validation", {}).get("findings", {})
    if not metrics:
        return [
            *_section("Validation"),
            "Unknown: the bundle has no validation. `ray-cxr report` with labels measures it.",
        ]
    recalibrated = bool(source.get("recalibrated"))
    evaluation = source.get("evaluation", {})
    rows: dict[str, list[str]] = {}
    for name in info["findings"]:
        row, cell = metrics.get(name, {}), evaluation.get("findings", {}).get(name, {})
        rows[name] = [f"{row.get('n', 0):,}", f"{row.get('positives', 0):,}", _number(row.get("auroc"))]
        if evaluation:
            low, high = cell.get("auroc_low"), cell.get("auroc_high")
            rows[name][2] = _interval(row.get("auroc"), low, high, cell.get("small"))
            rows[name].append(_number(cell.get("average_precision")))
        if not recalibrated:
            if evaluation:
                rows[name] += [_interval(cell.get(r), cell.get(f"{r}_low"), cell.get(f"{r}_high")) for r in _RATES]
            rows[name] += _rules(info, name)
    heads = ["images", "positives", "AUROC", *(["average precision"] if evaluation else [])]
    if recalibrated:
        # The thresholds were fitted on other images; they have a table of their own.
        title = "Validation in training (selected the epoch: not a test)"
    else:
        title = "Validation (selected the epoch, the calibration and the thresholds: not a test)"
        heads += [*(_RATES if evaluation else ()), "calibrated", "flags above", "flag rate"]
    return [*_section(title), *_means(evaluation, recalibrated), *_table(heads, rows), *_validation_notes(evaluation)]


def _means(evaluation: Mapping[str, Any], recalibrated: bool) -> list[str]:
    """Means over findings, a line each."""
    if not evaluation:
        return []
    labels = {"auroc": "Macro AUROC"} | ({} if recalibrated else {rate: f"Mean {rate}" for rate in _RATES})
    lines = []
    for name, label in labels.items():
        mean = evaluation["means"][name]
        count = f" over {len(mean['findings'])} findings" if mean["findings"] else ""
        reason = f": {mean['reason']}" if mean["value"] is None else ""
        lines.append(f"- {label}: {_interval(mean['value'], mean['low'], mean['high'])}{count}{reason}.")
    lines.append(
        f"- In brackets: 95% intervals from {evaluation['n_resamples']:,} resamples of patients. They cover the chance "
        "in sampling patients, but neither wrong labels nor other hospitals."
    )
    return [*lines, ""]


def _validation_notes(evaluation: Mapping[str, Any]) -> list[str]:
    cells = evaluation.get("findings", {})
    reasons: dict[str, list[str]] = {}
    for name, cell in cells.items():
        if cell["reason"]:
            reasons.setdefault(cell["reason"], []).append(name)
    lines = [f"- No AUROC for {', '.join(names)}: {reason}." for reason, names in reasons.items()]
    if any(cell["small"] and cell["auroc"] is not None for cell in cells.values()):
        lines += ["", _SMALL_NOTE] if lines else [_SMALL_NOTE]
    return ["", *lines] if lines else []


def _subgroups(source: Mapping[str, Any]) -> list[str]:
    title = _section("Subgroups (of validation: not a test)")
    evaluation = source.get("evaluation")
    if not evaluation:
        return [*title, "Not measured: differences between groups of patients are unknown."]
    rates = () if source.get("recalibrated") else _RATES
    rows = {}
    for group in evaluation["groups"]:
        means = group["own"]
        small = means["auroc"]["small"] * 2 > len(means["auroc"]["findings"])
        rows[f"{_ATTRIBUTES[group['attribute']]}: {group['value']}"] = [
            f"{group['n']:,}",
            f"{group['n_patients']:,}",
            _mean(means["auroc"], small),
            _mean(group["shared"]["auroc"]),
            *(_mean(means[rate]) for rate in rates),
        ]
    heads = ["images", "patients", "macro AUROC (findings)", "shared findings", *(f"mean {rate}" for rate in rates)]
    lines = [
        *title,
        "The macro AUROC is over the findings that are defined in the group; their number follows it. Groups with "
        'different findings do not compare. The column "shared findings" is over the findings that are defined in all '
        "groups of the attribute, without the group unknown.",
        "",
        *_table(heads, rows, first=""),
        "",
        _SMALL_NOTE,
        "",
    ]
    if not rates:
        return [*lines, "Sensitivity in subgroups at the operating points of the recalibration was not measured."]
    return [*lines, *_differences(evaluation)]


def _differences(evaluation: Mapping[str, Any]) -> list[str]:
    """Differences in sensitivity between groups."""
    count, found = evaluation["comparisons"], evaluation["differences"]
    if not count:
        return ["No group is large enough to compare its sensitivity with others."]
    lines = [
        f"Sensitivity at the operating points, compared with the largest group of each attribute, per finding: "
        f"{len(found):,} of {count:,} differences have an interval that excludes 0; about {0.05 * count:.0f} would by "
        "chance alone."
    ]
    if found:
        largest = sorted(found, key=lambda one: -abs(one["difference"]))[:10]
        lines += ["", f"The largest of them{f' ({len(largest)})' if len(found) > len(largest) else ''}:", ""]
        lines += [
            f"- {one['finding']}, {_ATTRIBUTES[one['attribute']]} {one['value']} against {one['reference']}: "
            f"{one['difference']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})."
            for one in largest
        ]
    return lines


def _mean(mean: Mapping[str, Any], small: bool = False) -> str:
    if mean["value"] is None:
        return "undefined"
    return f"{_interval(mean['value'], mean['low'], mean['high'], small)}, {len(mean['findings'])}"


def _interval(value: float | None, low: float | None, high: float | None, small: bool | None = False) -> str:
    """Format a number with its interval, e.g. `0.812 (0.790 to 0.833)`."""
    if value is None:
        return "undefined"
    mark = _SMALL if small else ""
    return f"{value:.3f}{mark} ({low:.3f} to {high:.3f})" if low is not None else f"{value:.3f}{mark} (no interval)"


def _calibration(info: Mapping[str, Any]) -> list[str]:
    source = info["provenance"]
    fitted = {name: rule for name, rule in info["calibration"].items() if rule}
    title = _section("Calibration")
    if not fitted:
        return [*title, "Not calibrated: probabilities are the model's raw outputs and may differ widely from frequencies."]
    # After a recalibration these errors describe the old rules.
    errors = {} if source.get("recalibrated") else source.get("evaluation", {}).get("findings", {})
    rows = {}
    for name, rule in fitted.items():
        rows[name] = [rule["method"], f"{rule['slope']:.4f}", f"{rule['intercept']:.4f}"]
        if errors:
            rows[name] += [_number(errors[name]["ece_raw"], 4), _number(errors[name]["ece_calibrated"], 4)]
    heads = ["method", "slope", "intercept", *(["error before", "error after"] if errors else [])]
    note = (
        "The error is the expected calibration error, the mean distance between probability and frequency in ten bins. "
        "After calibration it is measured on other patients than those of the fit."
        if errors
        else "The calibration error on other patients was not measured."
    )
    formula = "Calibrated = sigmoid(slope * logit(p) + intercept). Calibration does not change the order of images."
    return [*title, formula, note, "", *_table(heads, rows)]


def _recalibration(info: Mapping[str, Any]) -> list[str]:
    source = info["provenance"]["recalibrated"]
    before = source["before"]["operating_points"]
    rows = {}
    for name in info["findings"]:
        row, old = source["findings"][name], before[name]
        rows[name] = [
            f"{row['n']:,}",
            f"{row['positives']:,}",
            *_rules(info, name),
            _number(old["threshold"], 4) if old else "none",
            "none" if row["flag_rate_before"] is None else _number(row["flag_rate_before"]),
        ]
    heads = ["images", "positives", "calibrated", "flags above", "flag rate", "flags above before", "flag rate before"]
    return [
        *_section("Recalibration (these images selected the calibration and the thresholds: not a test)"),
        f"- Same weights as the bundle {source['from']}, whose rules are kept in bundle.json.",
        f"- Fitted on {source['images']:,} images of {source['patients']:,} patients, {source['created']}: "
        f"calibration by {source['method']}, operating points by {source['rule']}.",
        "",
        *_table(heads, rows),
    ]


def _rules(info: Mapping[str, Any], name: str) -> list[str]:
    """Cells of the columns calibrated, flags above, flag rate."""
    point, fitted = info["operating_points"][name], info["calibration"][name]
    return [
        fitted["method"] if fitted else "no",
        _number(point["threshold"], 4) if point else "none",
        _number(info["expected_flag_rates"][name]) if point else "none",
    ]


def _alternatives(info: Mapping[str, Any]) -> list[str]:
    """A row per finding and a column per rule; `_unfitted` lists findings without any point."""
    rules = info.get("operating_alternatives", {})
    heads = list(dict.fromkeys(rule for points in rules.values() for rule in points))
    rows = {}
    for name in info["findings"]:
        points = [rules.get(name, {}).get(rule) for rule in heads]
        if any(points):
            rows[name] = [
                f"{p['threshold']:.4f} ({p['sensitivity']:.3f}, {p['specificity']:.3f})" if p else "none"
                for p in points
            ]
    if not rows:
        return []
    return [
        *_section("Operating points by other rules, on the same images"),
        "Flags above (sensitivity, specificity); the bundle does not use them.",
        "",
        *_table(heads, rows),
    ]


def _unfitted(info: Mapping[str, Any]) -> list[str]:
    notes = info.get("rule_notes", {})
    names: dict[str, list[str]] = {}
    for name in info["findings"]:
        tables = {"calibration": "calibration", "operating point": "operating_points"}
        absent = [label for label, table in tables.items() if not info[table][name]]
        if absent:
            reason = notes.get(name) or f"no {' and no '.join(absent)}: not fitted"
            names.setdefault(reason, []).append(name)
    if not names:
        return []
    return [
        *_section("Findings without calibration or operating point"),
        "Without a calibration `c_` is null in a score table, without an operating point `flag_` is null.",
        "",
        *(f"- {', '.join(group)}: {reason}." for reason, group in names.items()),
    ]


def _precisions(info: Mapping[str, Any]) -> list[str]:
    """Precisions that run on a CPU, and how far each moves the probabilities."""
    title = _section("Precisions on CPUs")
    refused = info.get("runtimes_refused")
    if refused:
        return [*title, f"- fp32 in Keras only; the bundle has no OpenVINO graph: {refused}."]
    runtimes = info.get("runtimes")
    if not runtimes:
        return []
    lines = [
        *title,
        "OpenVINO runs the model. When the bundle is opened, its answers for eight synthetic images are compared with "
        "those of Keras in float32.",
        "",
    ]
    for name in ("fp32", "bf16"):
        row = runtimes[name]
        if row["accepted"] is None:
            reason = row.get("reason", "the machine that made the bundle does not support it")
            lines.append(f"- {name}: not measured, {reason}; `auto` does not select it.")
            continue
        verdict = "" if row["accepted"] else ": **refused**"
        lines.append(
            f"- {name}: moves probabilities by at most {row['largest_drift']:.2g} ({row['tolerance']:g} allowed)"
            f"{verdict}."
        )
    made = info["provenance"].get("quantized")
    if "int8" in runtimes and made:
        limits = made["settings"]
        lines.append(
            f"- int8, on {made['check_images']:,} validation images against fp32: moves probabilities by "
            f"{made['mean_drift']:.4f} on average, 99 of 100 by less than {made['p99_drift']:.4f} "
            f"({limits['max_p99_drift']:g} allowed), all by at most {made['largest_drift']:.4f}. The macro AUROC "
            f"changes by {-made['macro_auroc_fall']:+.4f} (a fall of {limits['max_auroc_fall']:g} allowed). "
            "Calibration and thresholds are those of fp32."
        )
    return lines


def _quality(info: Mapping[str, Any]) -> list[str]:
    fitted = info.get("quality")
    if not fitted:
        return []
    title = _section("Quality flags")
    if "lacking" in fitted:
        return [*title, f"- None by pixels and features: {fitted['lacking']}."]
    rates = ", ".join(f"{name} {100 * rate:.1f} %" for name, rate in fitted["expected_rates"].items())
    return [
        *title,
        f"- Statistics from {fitted['train_images']:,} training images, limits from {fitted['held_out_images']:,} "
        f"others; expected flag rates on such images: {rates}.",
    ]


def _limits() -> list[str]:
    return [
        *_section("Limits"),
        "- ChestX-ray14's labels were extracted from reports by software; some are wrong.",
        "- Calibration and thresholds hold for patients like those of the fit; `ray-cxr recalibrate` fits them on your "
        "own.",
        "- A probability says nothing about findings that are not in the list.",
        "- No number here comes from a test set: expect less on new patients, and still less at another hospital.",
        "- Groups that are not in the tables, such as ethnic origin or body build, could not be compared.",
        "- No study has measured whether its use benefits patients.",
    ]


def _versions(source: Mapping[str, Any]) -> list[str]:
    created = source.get("created")
    return [
        *_section("Versions"),
        *(f"- {name} {version}" for name, version in source.get("versions", {}).items()),
        *([f"- Made: {created}."] if created else []),
        "- The bundle's digest is the SHA-256 of its file SHA256SUMS, which lists the digest of every other file, "
        "including this card. It is the model_digest of each row that the bundle scores.",
        "",
    ]


def _table(heads: Sequence[str], rows: Mapping[str, Sequence[str]], first: str = "finding") -> list[str]:
    return [
        f"| {' | '.join([first, *heads])} |",
        "|---" * (len(heads) + 1) + "|",
        *(f"| {' | '.join([name, *cells])} |" for name, cells in rows.items()),
    ]


def describe_split(split: Mapping[str, Any]) -> str:
    """Describe a split, e.g. `random by patient, seed 0`."""
    kind = split.get("kind")
    if kind == "official":
        return f"the official train+val list, a tenth of its patients for validation, seed {split.get('seed')}"
    if kind == "patient":
        return f"random by patient, seed {split.get('seed')}, fractions {split.get('fractions')}"
    return "given by the tables" if kind == "given" else "unknown"


def _number(value: float | None, digits: int = 3) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"
