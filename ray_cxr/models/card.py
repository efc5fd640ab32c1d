"""MODEL_CARD.md: what a bundle is, for the people who must decide whether to use it.

What a bundle does not know of itself, because it was imported or an older version made it, is said to be unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: Beside a number that comes of fewer than ten patients with, or without, the finding.
_SMALL = "†"
_SMALL_NOTE = (
    f"{_SMALL} Fewer than 10 patients with the finding, or without it: the interval is narrower than the truth. Of a "
    "mean it marks that most of its findings are such."
)
_ATTRIBUTES = {"sex": "sex", "age_band": "age, years", "view": "view", "follow_up": "follow-up"}


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
        *_use(source),
        *_data(source),
        *_people(source),
    ]
    if curves:
        lines += ["", f"## Training: {len(curves)} epochs, the best of them epoch {source.get('best_epoch')}"]
    lines += _validation(info)
    lines += _subgroups(source)
    lines += _calibration(info)
    if source.get("recalibrated"):
        lines += _recalibration(info)
    lines += _alternatives(info)
    lines += _lacking(info)
    lines += _precisions(info)
    lines += _quality(info)
    lines += _limits()
    lines += _versions(source)
    return "\n".join(lines)


def _use(source: Mapping[str, Any]) -> list[str]:
    return [
        "",
        "## Intended use",
        "",
        "- Research: studies of screening and of worklist order on frontal (PA or AP) chest radiographs of adults, in "
        "which people read every image.",
        "- Not meant for: diagnosis or treatment of anybody; leaving images unread, or telling a patient something, "
        "because of what it says; lateral views and other parts of the body; children; pictures that are no "
        "radiographs, such as photographs of a screen; findings that are not in its list.",
        f"- Children in training: {_children(source)}.",
        "- Before it is used at a place of its own: evaluate it there on labelled images of that place (`ray-cxr "
        "report`), then set calibration and operating points there (`ray-cxr recalibrate`).",
    ]


def _children(source: Mapping[str, Any]) -> str:
    people = source.get("demographics", {}).get("train")
    if not people:
        return "unknown"
    bands = people["age_band"]
    known = sum(bands.values()) - bands.get("unknown", 0)
    if not known:
        return "unknown, because no age is"
    children = bands.get("0-17", 0)
    return f"{children:,} of {known:,} images of known age are of patients under 18"


def _data(source: Mapping[str, Any]) -> list[str]:
    lines = ["", "## Data", ""]
    split = source.get("split") or {}
    lines.append(f"- Split: {split_words(split)}.")
    for name in ("train", "val"):
        counts = source.get("images", {}).get(name)
        if counts:
            lines.append(f"- {name}: {counts['images']:,} images of {counts['patients']:,} patients.")
    if not source.get("images"):
        lines.append("- Images and patients in training: unknown.")
    if source.get("lineage") == "unknown":
        lines.append("- Not all images that trained it are known: what it is tested on may be among them.")
    if source.get("age_range"):
        lines.append(f"- Ages in training: {source['age_range'][0]:.0f} to {source['age_range'][1]:.0f} years.")
    for kind, word in (("tables", "Table"), ("lists", "List of a split")):
        digests = split.get(kind)
        if isinstance(digests, Mapping):
            lines += [f"- {word} {name}: SHA-256 {digest}." for name, digest in digests.items()]
    if source.get("prepared_digest"):
        lines.append(f"- Manifest, as it was prepared: digest {source['prepared_digest']}.")
    return lines


def _people(source: Mapping[str, Any]) -> list[str]:
    """A row per value of each attribute, and the findings' positives; a column per split."""
    title = ["", "## Who is in the images", ""]
    told = source.get("demographics")
    if not told:
        return [*title, "Sex, age, view and follow-up of the training images: unknown."]
    names = [name for name in ("train", "val") if name in told]
    rows: dict[str, list[str]] = {}
    for attribute, words in _ATTRIBUTES.items():
        values = dict.fromkeys(value for name in names for value in told[name][attribute])
        # Age bands come in order in each split, but one may have bands that the other lacks.
        for value in sorted(values) if attribute == "age_band" else values:
            rows[f"{words}: {value}"] = [_share(told[name][attribute].get(value, 0), told[name]) for name in names]
        if attribute == "age_band":
            rows["age, years: median (quartiles)"] = [_quartiles(told[name]["age"]) for name in names]
    lines = [*title, "Images, not patients.", "", *_table(names, rows, first="")]
    rows = {}
    for finding in dict.fromkeys(finding for name in names for finding in told[name]["findings"]):
        counts = [told[name]["findings"].get(finding, {"n": 0, "positives": 0}) for name in names]
        if any(count["n"] for count in counts):
            rows[finding] = [
                f"{count['positives']:,} of {count['n']:,}" if count["n"] else "not labelled" for count in counts
            ]
    return [*lines, "", "Images with the finding, of those labelled for it:", "", *_table(names, rows)]


def _share(count: int, of: Mapping[str, Any]) -> str:
    return f"{count:,} ({count / of['images']:.1%})" if of["images"] else f"{count:,}"


def _quartiles(age: Mapping[str, float | None]) -> str:
    if age["median"] is None:
        return "unknown"
    return f"{age['median']:.0f} ({age['q1']:.0f} to {age['q3']:.0f})"


def _validation(info: Mapping[str, Any]) -> list[str]:
    source = info["provenance"]
    metrics = source.get("validation", {}).get("findings", {})
    if not metrics:
        return [
            "",
            "## Validation",
            "",
            "Not known here: the bundle holds no validation. `ray-cxr report` with labels measures it.",
        ]
    again = bool(source.get("recalibrated"))
    more = source.get("evaluation", {})
    rows: dict[str, list[str]] = {}
    for name in info["findings"]:
        row = metrics.get(name, {})
        cell = more.get("findings", {}).get(name, {})
        rows[name] = [f"{row.get('n', 0):,}", f"{row.get('positives', 0):,}", _number(row.get("auroc"))]
        if more:
            rows[name][2] = _between(row.get("auroc"), cell.get("auroc_low"), cell.get("auroc_high"), cell.get("small"))
            rows[name].append(_number(cell.get("average_precision")))
        if not again:
            if more:
                rows[name] += [
                    _between(cell.get(rate), cell.get(f"{rate}_low"), cell.get(f"{rate}_high"))
                    for rate in ("sensitivity", "specificity")
                ]
            rows[name] += _rules(info, name)
    heads = ["images", "positives", "AUROC", *(["average precision"] if more else [])]
    if again:
        # Its thresholds are of other images than these: they stand in a table of their own.
        title = "## Validation in training (it chose the epoch: not a test)"
    else:
        title = "## Validation (it chose the epoch, the calibration and the thresholds: not a test)"
        heads += [*(["sensitivity", "specificity"] if more else []), "calibrated", "flags above", "flag rate"]
    return ["", title, "", *_overall(more, again), *_table(heads, rows), *_validation_notes(more)]


def _overall(more: Mapping[str, Any], again: bool) -> list[str]:
    """The means over findings, in sentences."""
    if not more:
        return []
    lines = []
    for name, words in (
        ("auroc", "Macro AUROC"),
        ("sensitivity", "Mean sensitivity"),
        ("specificity", "Mean specificity"),
    ):
        mean = more["means"][name]
        if again and name != "auroc":
            continue
        of = f" over {len(mean['findings'])} findings" if mean["findings"] else ""
        why = f": {mean['reason']}" if mean["value"] is None else ""
        lines.append(f"- {words}: {_between(mean['value'], mean['low'], mean['high'])}{of}{why}.")
    lines.append(
        f"- In brackets: 95% intervals from {more['n_resamples']:,} resamples of patients. They know of chance in "
        "drawing patients; not of wrong labels, nor of other hospitals."
    )
    return [*lines, ""]


def _validation_notes(more: Mapping[str, Any]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name, cell in more.get("findings", {}).items():
        if cell["reason"]:
            reasons.setdefault(cell["reason"], []).append(name)
    lines = [f"- No AUROC for {', '.join(names)}: {reason}." for reason, names in reasons.items()]
    if any(cell["small"] and cell["auroc"] is not None for cell in more.get("findings", {}).values()):
        lines += ["", _SMALL_NOTE] if lines else [_SMALL_NOTE]
    return ["", *lines] if lines else []


def _subgroups(source: Mapping[str, Any]) -> list[str]:
    title = ["", "## Subgroups (of validation: not a test)", ""]
    more = source.get("evaluation")
    if not more:
        return [*title, "Not measured: nobody knows here whether it is as good for everybody."]
    again = bool(source.get("recalibrated"))
    rates = [] if again else ["sensitivity", "specificity"]
    rows = {}
    for group in more["groups"]:
        means = group["own"]
        few = means["auroc"]["small"] * 2 > len(means["auroc"]["findings"])
        name = f"{_ATTRIBUTES[group['attribute']]}: {group['value']}"
        rows[name] = [
            f"{group['n']:,}",
            f"{group['n_patients']:,}",
            _mean(means["auroc"], few),
            _mean(group["shared"]["auroc"]),
            *(_mean(means[rate]) for rate in rates),
        ]
    heads = ["images", "patients", "macro AUROC (findings)", "of those that all define", *(f"mean {r}" for r in rates)]
    lines = [
        *title,
        "The macro AUROC is over the findings that the group defines, whose number stands behind it. Groups that "
        "define other findings do not compare; in the next column all groups of an attribute, but for unknown, have "
        "the same.",
        "",
        *_table(heads, rows, first=""),
        "",
        _SMALL_NOTE,
        "",
    ]
    if again:
        return [*lines, "Sensitivity in subgroups at the operating points of the recalibration was not measured."]
    return [*lines, *_underdiagnosis(more)]


def _underdiagnosis(more: Mapping[str, Any]) -> list[str]:
    made, found = more["comparisons"], more["differences"]
    if not made:
        return ["No group is large enough to say whether findings are missed more often in it."]
    lines = [
        f"Sensitivity at the operating points, compared with the largest group of each attribute, finding by finding: "
        f"{len(found):,} of {made:,} differences have an interval that excludes 0; about {0.05 * made:.0f} would by "
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


def _mean(mean: Mapping[str, Any], few: bool = False) -> str:
    if mean["value"] is None:
        return "undefined"
    return f"{_between(mean['value'], mean['low'], mean['high'], few)}, {len(mean['findings'])}"


def _between(value: float | None, low: float | None, high: float | None, small: bool | None = False) -> str:
    """A number with its interval, such as `0.812 (0.790 to 0.833)`."""
    if value is None:
        return "undefined"
    mark = _SMALL if small else ""
    return f"{value:.3f}{mark} ({low:.3f} to {high:.3f})" if low is not None else f"{value:.3f}{mark} (no interval)"


def _calibration(info: Mapping[str, Any]) -> list[str]:
    """What is done to a probability, and how far off it is before and after."""
    source = info["provenance"]
    fitted = {name: rule for name, rule in info["calibration"].items() if rule}
    title = ["", "## Calibration", ""]
    if not fitted:
        return [*title, "There is none: probabilities are as the network gives them, and may be far from frequencies."]
    # After a recalibration these errors are of a rule that is no longer used.
    errors = {} if source.get("recalibrated") else source.get("evaluation", {}).get("findings", {})
    rows = {}
    for name, rule in fitted.items():
        rows[name] = [rule["method"], f"{rule['slope']:.4f}", f"{rule['intercept']:.4f}"]
        if errors:
            rows[name] += [_number(errors[name]["ece_raw"], 4), _number(errors[name]["ece_calibrated"], 4)]
    lines = [*title, "Calibrated = sigmoid(slope * logit(p) + intercept). The order of images stays as it is."]
    heads = ["method", "slope", "intercept"]
    if errors:
        heads += ["error before", "error after"]
        lines.append(
            "The error is the expected calibration error, the mean distance of probability and frequency in ten bins; "
            "after calibrating it was measured on other patients than those that the calibration was fitted on."
        )
    else:
        lines.append("How far off it is on other patients was not measured.")
    return [*lines, "", *_table(heads, rows)]


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
            why = row.get("reason", "the machine that made the bundle has none")
            lines.append(f"- {name}: not measured, {why}; `auto` does not take it.")
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


def _limits() -> list[str]:
    return [
        "",
        "## Limits",
        "",
        "- ChestX-ray14's labels were mined from reports by software; some are wrong.",
        "- Calibration and thresholds hold for patients like those that they were fitted on; "
        "`ray-cxr recalibrate` fits them on your own.",
        "- A probability says nothing about findings that are not in the list.",
        "- No number here is of a test set: expect less on new patients, and less again at another hospital.",
        "- Groups that are not in the tables (such as origin, or body build) could not be looked at.",
        "- Whether anybody is helped by using it was never studied.",
    ]


def _versions(source: Mapping[str, Any]) -> list[str]:
    made = source.get("created")
    return [
        "",
        "## Versions",
        "",
        *(f"- {name} {version}" for name, version in source.get("versions", {}).items()),
        *([f"- Made: {made}."] if made else []),
        "- This bundle's digest is the SHA-256 of its file SHA256SUMS, which has the digest of every other file, this "
        "card's too. It stands as model_digest in each row that the bundle scores.",
        "",
    ]


def _table(heads: Sequence[str], rows: Mapping[str, Sequence[str]], first: str = "finding") -> list[str]:
    return [
        f"| {' | '.join([first, *heads])} |",
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
