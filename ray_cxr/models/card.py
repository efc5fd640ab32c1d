"""Write MODEL_CARD.md, for people who decide whether to use a bundle. The text is in model_card.md.j2.

The card reports facts as unknown if the bundle lacks them because it was imported or an older version wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ray_cxr.imaging.demographics import PatientCount
from ray_cxr.labels import NO_FINDING

_ATTRIBUTES = {"sex": "sex", "age_band": "age, years", "view": "view", "follow_up": "follow-up"}
_RATES = ("sensitivity", "specificity")
#: What a rule for operating points promises on the images of the fit; those with a target after "the share of".
_RULES = {
    "any_flag_rate": "images with any flag is at most",
    "flag_rate": "flagged images of each finding is at most",
    "npv": "negatives among the unflagged images is at least",
    "sensitivity": "flagged positives is at least",
    "specificity": "unflagged negatives is at least",
    "youden": "sensitivity + specificity is highest",
}
#: Number of differences between subgroups that the card lists.
_MAX_DIFFERENCES = 10


def model_card(info: Mapping[str, Any], curves: Sequence[Mapping[str, Any]]) -> str:
    """Return the card in Markdown from the contents of `bundle.json` and `curves.json`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    source = info["provenance"]
    evaluation = source.get("evaluation") or {}
    rates = () if source.get("recalibrated") else _RATES
    cells = evaluation.get("findings", {})
    return environment.get_template("model_card.md.j2").render(
        info=info,
        source=source,
        curves=curves,
        attributes=_ATTRIBUTES,
        interval=_interval,
        children=_count_children(source),
        patients=_count_patients,
        demographics=_demographics(source),
        mean_labels={"auroc": "Macro AUROC"} | {rate: f"Mean {rate}" for rate in rates},
        validation=_validation(info, rates),
        undefined_reasons=_group({name: cell["reason"] for name, cell in cells.items() if cell["reason"]}),
        has_small=any(cell["small"] and cell["auroc"] is not None for cell in cells.values()),
        subgroups=_subgroups(evaluation, rates),
        largest=sorted(evaluation.get("differences", []), key=lambda row: -abs(row["difference"]))[:_MAX_DIFFERENCES],
        calibration=_calibration(info),
        worse_calibrated=_list_worse_calibrated(info),
        useless=[name for name in cells if "sensitivity" in rates and cells[name].get("sensitivity") == 0.0],
        recalibration=_recalibration(info),
        rule=_describe_rule(info),
        alternatives=_alternatives(info),
        unfitted=_unfitted(info),
    )


def _count_children(source: Mapping[str, Any]) -> str:
    people = source.get("demographics", {}).get("train")
    if not people:
        return "unknown"
    bands = people["age_band"]
    known = sum(bands.values()) - bands.get("unknown", 0)
    if not known:
        return "unknown, since no age is known"
    return f"{bands.get('0-17', 0):,} of {known:,} images of known age are of patients under 18"


def _count_patients(counts: Mapping[str, Any]) -> str:
    # Bundles of older versions have 0 where no patient id is known.
    return PatientCount(counts["patients"] or None, counts.get("images_without_patient", 0)).describe(counts["images"])


def _demographics(source: Mapping[str, Any]) -> dict[str, str] | None:
    """Return two tables with a column per split: images by sex, age, view and follow-up, and positives by finding."""
    splits = source.get("demographics")
    if not splits:
        return None
    names = [name for name in ("train", "val") if name in splits]
    people: dict[str, list[str]] = {}
    for attribute, label in _ATTRIBUTES.items():
        values = dict.fromkeys(value for name in names for value in splits[name][attribute])
        # Each split has its age bands in order, but may lack some.
        for value in sorted(values) if attribute == "age_band" else values:
            counts = [(splits[name][attribute].get(value, 0), splits[name]["images"]) for name in names]
            people[f"{label}: {value}"] = [f"{n:,} ({n / of:.1%})" if of else f"{n:,}" for n, of in counts]
        if attribute == "age_band":
            ages = [splits[name]["age"] for name in names]
            people["age, years: median (quartiles)"] = [
                f"{age['median']:.0f} ({age['q1']:.0f} to {age['q3']:.0f})" if age["median"] is not None else "unknown"
                for age in ages
            ]
    findings: dict[str, list[str]] = {}
    for finding in dict.fromkeys(finding for name in names for finding in splits[name]["findings"]):
        cells = [splits[name]["findings"].get(finding, {"n": 0, "positives": 0}) for name in names]
        if any(cell["n"] for cell in cells):
            findings[finding] = [f"{c['positives']:,} of {c['n']:,}" if c["n"] else "not labelled" for c in cells]
    return {"people": _table(names, people, first=""), "findings": _table(names, findings)}


def _validation(info: Mapping[str, Any], rates: Sequence[str]) -> str | None:
    source = info["provenance"]
    metrics = source.get("validation", {}).get("findings", {})
    if not metrics:
        return None
    evaluation = source.get("evaluation", {})
    heads = ["images", "positives", "AUROC", *(["average precision", *rates] if evaluation else [])]
    rows: dict[str, list[str]] = {}
    for name in info["findings"]:
        row, cell = metrics.get(name, {}), evaluation.get("findings", {}).get(name, {})
        rows[name] = [f"{row.get('n', 0):,}", f"{row.get('positives', 0):,}", _number(row.get("auroc"))]
        if evaluation:
            low, high = cell.get("auroc_low"), cell.get("auroc_high")
            rows[name][2] = _interval(row.get("auroc"), low, high, cell.get("small"))
            rows[name].append(_number(cell.get("average_precision")))
            rows[name] += [_interval(cell.get(r), cell.get(f"{r}_low"), cell.get(f"{r}_high")) for r in rates]
        if rates:  # after a recalibration, `_recalibration` lists the rules
            rows[name] += _rules(info, name)
    return _table([*heads, *(("calibrated", "flags above (raw p)", "flag rate") if rates else ())], rows)


def _subgroups(evaluation: Mapping[str, Any], rates: Sequence[str]) -> str:
    rows = {}
    for group in evaluation.get("groups", []):
        means = group["own"]
        small = means["auroc"]["small"] * 2 > len(means["auroc"]["findings"])
        rows[f"{_ATTRIBUTES[group['attribute']]}: {group['value']}"] = [
            f"{group['n']:,}",
            "unknown" if group["n_patients"] is None else f"{group['n_patients']:,}",
            _mean(means["auroc"], small),
            _mean(group["shared"]["auroc"]),
            *(_mean(means[rate]) for rate in rates),
        ]
    heads = ["images", "patients", "macro AUROC (findings)", "shared findings", *(f"mean {rate}" for rate in rates)]
    return _table(heads, rows, first="")


def _mean(mean: Mapping[str, Any], small: bool = False) -> str:
    if mean["value"] is None:
        return "undefined"
    return f"{_interval(mean['value'], mean['low'], mean['high'], small)}, {len(mean['findings'])}"


def _interval(value: float | None, low: float | None, high: float | None, small: bool | None = False) -> str:
    """Format a number with its interval, e.g. `0.812 (0.790 to 0.833)`."""
    if value is None:
        return "undefined"
    mark = "†" if small else ""  # explained in the template
    return f"{value:.3f}{mark} ({low:.3f} to {high:.3f})" if low is not None else f"{value:.3f}{mark} (no interval)"


def _calibration(info: Mapping[str, Any]) -> str | None:
    fitted = {name: rule for name, rule in info["calibration"].items() if rule}
    if not fitted:
        return None
    errors = _calibration_errors(info)
    rows = {}
    for name, rule in fitted.items():
        rows[name] = [rule["method"], f"{rule['slope']:.4f}", f"{rule['intercept']:.4f}"]
        if errors:
            rows[name] += [_number(errors[name]["ece_raw"], 4), _number(errors[name]["ece_calibrated"], 4)]
    return _table(["method", "slope", "intercept", *(["error before", "error after"] if errors else [])], rows)


def _calibration_errors(info: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the rows that hold the errors of this calibration; after a recalibration those of the old one remain."""
    source = info["provenance"]
    return {} if source.get("recalibrated") else source.get("evaluation", {}).get("findings", {})


def _list_worse_calibrated(info: Mapping[str, Any]) -> list[str]:
    """Return the calibrated findings whose calibration error on other patients is larger than without calibration."""
    errors = {name: row for name, row in _calibration_errors(info).items() if info["calibration"].get(name)}
    return [
        name
        for name, row in errors.items()
        if None not in (row["ece_raw"], row["ece_calibrated"]) and row["ece_calibrated"] > row["ece_raw"]
    ]


def _recalibration(info: Mapping[str, Any]) -> str | None:
    source = info["provenance"].get("recalibrated")
    if not source:
        return None
    rows = {}
    for name in info["findings"]:
        row, old = source["findings"][name], source["before"]["operating_points"][name]
        rows[name] = [
            f"{row['n']:,}",
            f"{row['positives']:,}",
            *_rules(info, name),
            _number(old["threshold"], 4) if old else "none",
            "none" if row["flag_rate_before"] is None else _number(row["flag_rate_before"]),
        ]
    heads = [
        "images",
        "positives",
        "calibrated",
        "flags above (raw p)",
        "flag rate",
        "flags above before",
        "flag rate before",
    ]
    return _table(heads, rows)


def _rules(info: Mapping[str, Any], name: str) -> list[str]:
    """Return a finding's cells of the columns calibrated, flags above, flag rate."""
    point, fitted = info["operating_points"][name], info["calibration"][name]
    return [
        fitted["method"] if fitted else "no",
        _number(point["threshold"], 4) if point else "none",
        _number(info["expected_flag_rates"][name]) if point else "none",
    ]


def _describe_rule(info: Mapping[str, Any]) -> str | None:
    """Return the rule of the operating points, without that of `No_Finding`, and its meaning; None if they differ."""
    points = info["operating_points"]
    rules = {point.get("rule") for finding, point in points.items() if point and finding != NO_FINDING}
    name, _, target = str(rules.pop()).partition("=") if len(rules) == 1 else ("", "", "")
    if name not in _RULES:
        return None
    return f"{name}={target} (the share of {_RULES[name]} {target})" if target else f"{name} ({_RULES[name]})"


def _alternatives(info: Mapping[str, Any]) -> str | None:
    """Return a table with a row per finding and a column per rule; findings without any point are left out."""
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
    return _table(heads, rows) if rows else None


def _unfitted(info: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the findings without calibration or operating point, by reason."""
    notes, reasons = info.get("rule_notes", {}), {}
    for name in info["findings"]:
        tables = {"calibration": "calibration", "operating point": "operating_points"}
        absent = [label for label, table in tables.items() if not info[table][name]]
        if absent:
            reasons[name] = notes.get(name) or f"no {' and no '.join(absent)}: not fitted"
    return _group(reasons)


def _group(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names that share each reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return names


def _table(heads: Sequence[str], rows: Mapping[str, Sequence[str]], first: str = "finding") -> str:
    lines = [[first, *heads], *([name, *cells] for name, cells in rows.items())]
    text = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([text[0], "|---" * (len(heads) + 1) + "|", *text[1:]])


def _number(value: float | None, digits: int = 3) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"
