"""A report in a few sentences, for a reader who reads no further."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_cxr.reporting import html, plots

#: What a table shows beside AUROC, by its key.
_NAMES = {"sensitivity": "sensitivity", "specificity": "specificity", "ppv": "PPV"}
CONSTANT = "no interval: every resample gives the same"


def remarks(findings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What must be said of a finding's numbers beside the numbers."""
    remarks = {}
    for finding, entry in findings.items():
        parts = []
        if entry["reason"]:
            parts.append(f"undefined: {entry['reason']}")
        if entry["caution"]:
            parts.append(entry["caution"])
        constant = [_NAMES[name] for name in _NAMES if entry["undefined"].get(f"{name}_low") == CONSTANT]
        if constant:
            parts.append(f"no interval for {', '.join(constant)}: every resample gives the same, which is no certainty")
        if entry["unscored"] and entry["auroc"] is not None:
            parts.append(f"{entry['unscored']:,} labelled images have no score for it")
        if parts:
            remarks[finding] = "; ".join(parts)
    return remarks


def summary(result: Mapping[str, Any]) -> list[str]:
    """The report in a few sentences."""
    counts, macro = result["counts"], result["macro"]
    out = []
    if macro is None:
        how = (
            "Without --labels this report says how well for the images of the consensus table alone."
            if result["consensus"] is not None
            else "There are no labels, so this report says what was found, not how well."
        )
        out.append(
            f"{counts['scored']:,} of {counts['rows']:,} images were scored, of {result['n_patients']:,} patients. "
            + how
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
            sure = [f for f in ranked if found[f]["auroc_low"] is not None]
            chance = [f for f in sure if found[f]["auroc_low"] <= 0.5 <= found[f]["auroc_high"]]
            if chance:
                out.append(f"Not told apart from chance: {', '.join(map(plots.spaced, chance))}.")
            inverted = [f for f in ranked if found[f]["auroc"] == 0.0 or (f in sure and found[f]["auroc_high"] < 0.5)]
            if inverted:
                names = ", ".join(map(plots.spaced, inverted))
                out.append(f"Worse than chance: {names}. Are these scores, or these labels, the wrong way round?")
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
    return out + _others(result)


def _others(result: Mapping[str, Any]) -> list[str]:
    """A sentence for each thing that was looked at beside the labels."""
    out = []
    agreed, compared, located = result["consensus"], result["compared"], result["localisation"]
    if agreed is not None:
        macro = agreed["macro"]
        shown = f"macro AUROC {_ends(macro, 'auroc')}" if macro["auroc"] is not None else "no AUROC can be given"
        unsure = [name for name, entry in agreed["findings"].items() if entry["caution"]]
        warned = f" Do not lean on the intervals of {', '.join(map(plots.spaced, unsure))}." if unsure else ""
        out.append(f"Against {agreed['source']}, on {agreed['n_images']:,} images: {shown}.{warned}")
    if compared is not None:
        macro = compared["macro"]
        if macro["difference"] is None:
            out.append(f"No macro AUROC can be compared with {compared['other']}: {macro['reason']}.")
        else:
            sure = macro["low"] is not None and (macro["low"] > 0 or macro["high"] < 0)
            between = f" (95% interval {macro['low']:+.3f} to {macro['high']:+.3f})" if macro["low"] is not None else ""
            out.append(
                f"Macro AUROC less that of {compared['other']}: {macro['difference']:+.3f}{between} on the same "
                f"{compared['n_images']:,} images, {'more' if sure else 'no more'} than chance explains."
            )
    groups = result["subgroups"]
    if groups is not None and "comparisons" in groups and not groups["comparisons"]["single"]["made"]:
        out.append("Groups of people and views have too few patients here to be compared.")
    elif groups is not None and "comparisons" in groups:
        out.append(f"Between groups of people and views: {groups['comparisons']['single']['words']}.")
    if located is not None and located["overall"]["hit_rate"] is not None:
        one = located["overall"]
        out.append(
            f"Heat maps point into the radiologist's box in {html.percent(one['hit_rate'], 0)} of {one['n']:,} cases; "
            f"a random point would in {html.percent(one['chance'], 0)}."
        )
    if result["drift"] is not None:
        out.append(f"Against what validation led to expect, of {result['drift']['images']}: {result['drift']['words']}")
    return out


def _ends(entry: Mapping[str, Any], name: str) -> str:
    low, high = entry[f"{name}_low"], entry[f"{name}_high"]
    return f"{entry[name]:.3f}" + (f" (95% interval {low:.3f} to {high:.3f})" if low is not None else " (no interval)")
