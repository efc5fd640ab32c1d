"""MODEL_CARD.md: what a bundle is, for the people who must decide whether to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def model_card(info: Mapping[str, Any], curves: Sequence[Mapping[str, Any]]) -> str:
    """The card in Markdown, from what `bundle.json` and the learning curves hold and nothing else."""
    source = info["provenance"]
    lines = [
        f"# Model card: {info['backbone']} at {info['input_spec']['size']} pixels",
        "",
        "**For research only. Not a medical device; not for diagnosis.**",
        "",
        "## What it is",
        "",
        f"- Input: one frontal chest radiograph, 8-bit gray, {info['input_spec']['size']} pixels square "
        f"(aspect: {info['input_spec']['aspect']}, interpolation: {info['input_spec']['interpolation']}).",
        f"- Output: a probability for each of {', '.join(info['findings'])}.",
        f"- Where it comes from: {source['origin']}.",
        f"- Initial weights: {source['initial_weights']}.",
    ]
    if source.get("split"):
        lines += ["", "## Data", "", f"- Split: {split_words(source['split'])}."]
        for name in ("train", "val"):
            counts = source.get("images", {}).get(name)
            if counts:
                lines.append(f"- {name}: {counts['images']:,} images of {counts['patients']:,} patients.")
        if source.get("age_range"):
            lines.append(f"- Ages in training: {source['age_range'][0]:.0f} to {source['age_range'][1]:.0f} years.")
    if curves:
        lines += ["", f"## Training: {len(curves)} epochs, the best of them epoch {source.get('best_epoch')}"]
    lines += _validation(info)
    if source.get("recalibrated"):
        lines += _recalibration(info)
    lines += _alternatives(info)
    lines += _lacking(info)
    lines += _precisions(info)
    lines += _quality(info)
    lines += [
        "",
        "## Limits",
        "",
        "- ChestX-ray14's labels were mined from reports by software; some are wrong.",
        "- Calibration and thresholds hold for patients like those that they were fitted on; "
        "`ray-cxr recalibrate` fits them on your own.",
        "- A probability says nothing about findings that are not in the list.",
        "",
        "## Versions",
        "",
        *(f"- {name} {version}" for name, version in source.get("versions", {}).items()),
        "",
    ]
    return "\n".join(lines)


def _validation(info: Mapping[str, Any]) -> list[str]:
    source = info["provenance"]
    metrics = source.get("validation", {}).get("findings", {})
    if not metrics:
        return []
    rows: dict[str, list[str]] = {}
    for name in info["findings"]:
        row = metrics.get(name, {})
        rows[name] = [f"{row.get('n', 0):,}", f"{row.get('positives', 0):,}", _number(row.get("auroc"))]
    if source.get("recalibrated"):
        # Its thresholds are of other images than these: they stand in a table of their own.
        title = "## Validation in training (it chose the epoch: not a test)"
        return ["", title, "", *_table(["images", "positives", "AUROC"], rows)]
    for name, cells in rows.items():
        cells += _rules(info, name)
    heads = ["images", "positives", "AUROC", "calibrated", "flags above", "flag rate"]
    title = "## Validation (it chose the epoch, the calibration and the thresholds: not a test)"
    return ["", title, "", *_table(heads, rows)]


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
        "",
        "## Recalibration (these images chose the calibration and the thresholds: not a test)",
        "",
        f"- The same weights as the bundle {source['from']}; its rules are kept in bundle.json.",
        f"- Fitted on {source['images']:,} images of {source['patients']:,} patients, {source['created']}: "
        f"calibration by {source['method']}, operating points by {source['rule']}.",
        "",
        *_table(heads, rows),
    ]


def _rules(info: Mapping[str, Any], name: str) -> list[str]:
    """Calibrated, flags above, flag rate."""
    point, fitted = info["operating_points"][name], info["calibration"][name]
    return [
        fitted["method"] if fitted else "no",
        _number(point["threshold"], 4) if point else "none",
        _number(info["expected_flag_rates"][name]) if point else "none",
    ]


def _alternatives(info: Mapping[str, Any]) -> list[str]:
    """A row per finding and a column per rule; findings without any point are left to `_lacking`."""
    rules = info.get("operating_alternatives", {})
    heads = list(dict.fromkeys(rule for points in rules.values() for rule in points))
    rows = {}
    for name in info["findings"]:
        points = [rules.get(name, {}).get(rule) for rule in heads]
        if any(points):
            rows[name] = [_point(point) for point in points]
    if not rows:
        return []
    return [
        "",
        "## Operating points by other rules, on the same images",
        "",
        "Flags above (sensitivity, specificity); the bundle does not use them.",
        "",
        *_table(heads, rows),
    ]


def _point(point: Mapping[str, Any] | None) -> str:
    if point is None:
        return "none"
    return f"{point['threshold']:.4f} ({point['sensitivity']:.3f}, {point['specificity']:.3f})"


def _lacking(info: Mapping[str, Any]) -> list[str]:
    notes = info.get("rule_notes", {})
    names: dict[str, list[str]] = {}
    for name in info["findings"]:
        lacks = [
            word
            for word, table in (("calibration", "calibration"), ("operating point", "operating_points"))
            if not info[table][name]
        ]
        if lacks:
            reason = notes.get(name) or f"no {' and no '.join(lacks)}: not fitted"
            names.setdefault(reason, []).append(name)
    if not names:
        return []
    return [
        "",
        "## Findings without calibration or operating point",
        "",
        "Without a calibration `c_` is null in a score table, without an operating point `flag_` is.",
        "",
        *(f"- {', '.join(group)}: {reason}." for reason, group in names.items()),
    ]


def _precisions(info: Mapping[str, Any]) -> list[str]:
    """In which precisions it runs on a CPU, and how far each moves the probabilities."""
    title = ["", "## Precisions on CPUs", ""]
    refused = info.get("runtimes_refused")
    if refused:
        return [*title, f"- fp32 in Keras alone; OpenVINO's graph was left out: {refused}."]
    runtimes = info.get("runtimes")
    if not runtimes:
        return []
    lines = [
        *title,
        "Run by OpenVINO. Whoever opens the bundle compares its answers on eight drawn images with Keras' in float32.",
        "",
    ]
    for name in ("fp32", "bf16"):
        row = runtimes[name]
        if row["accepted"] is None:
            lines.append(f"- {name}: not measured, the machine that made the bundle has none; `auto` does not take it.")
            continue
        refusal = "" if row["accepted"] else ": **refused**"
        lines.append(
            f"- {name}: moves no probability by more than {row['largest_drift']:.2g}, of {row['tolerance']:g} allowed"
            f"{refusal}."
        )
    made = info["provenance"].get("quantized")
    if "int8" in runtimes and made:
        limits = made["settings"]
        lines.append(
            f"- int8, on {made['check_images']:,} validation images against fp32: moves probabilities by "
            f"{made['mean_drift']:.4f} on average, 99 of 100 by less than {made['p99_drift']:.4f} "
            f"({limits['max_p99_drift']:g} allowed), none by more than {made['largest_drift']:.4f}; the macro AUROC "
            f"changes by {-made['macro_auroc_fall']:+.4f} (a fall of {limits['max_auroc_fall']:g} allowed). "
            "Calibration and thresholds are those of fp32."
        )
    return lines


def _quality(info: Mapping[str, Any]) -> list[str]:
    """How the quality flags were fitted, or why there are none."""
    fitted = info.get("quality")
    if not fitted:
        return []
    title = ["", "## Quality flags", ""]
    if "lacking" in fitted:
        return [*title, f"- None by pixels and features: {fitted['lacking']}."]
    rates = ", ".join(f"{name} {100 * rate:.1f} %" for name, rate in fitted["expected_rates"].items())
    return [
        *title,
        f"- Learned from {fitted['train_images']:,} training images, limits from {fitted['held_out_images']:,} others; "
        f"of such images it flags: {rates}.",
    ]


def _table(heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(['finding', *heads])} |",
        "|---" * (len(heads) + 1) + "|",
        *(f"| {' | '.join([name, *cells])} |" for name, cells in rows.items()),
    ]


def split_words(split: Mapping[str, Any]) -> str:
    """A split's description in words, such as `random by patient, seed 0`."""
    kind = split.get("kind")
    if kind == "official":
        return f"the official train+val list, a tenth of its patients for validation, seed {split.get('seed')}"
    if kind == "patient":
        return f"random by patient, seed {split.get('seed')}, fractions {split.get('fractions')}"
    return "given by the tables" if kind == "given" else "unknown"


def _number(value: float | None, digits: int = 3) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"
