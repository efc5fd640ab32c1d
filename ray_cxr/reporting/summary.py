"""A report's main results in a few sentences, and remarks on single findings."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ray_cxr.evaluation import metrics, usability
from ray_cxr.evaluation.drift import INCONCLUSIVE, UNKNOWN
from ray_cxr.evaluation.intervals import NO_VARIATION
from ray_cxr.evaluation.localisation import TOLERANCE
from ray_cxr.evaluation.reading_order import ReadingOrder
from ray_cxr.evaluation.subgroups import Subgroups
from ray_cxr.evaluation.underdiagnosis import CLAIM_PATIENTS, Rate, Underdiagnosis
from ray_cxr.imaging.demographics import count_of
from ray_cxr.reporting import html, plots
from ray_cxr.reporting.alerts import is_order_better, summarize_alerts, summarize_order
from ray_cxr.reporting.flagged import summarize_flagged
from ray_cxr.reporting.measures import EvaluationResult, Measurement
from ray_cxr.reporting.night_results import describe_last, summarize_nights
from ray_cxr.reporting.result import ReportResult
from ray_cxr.reporting.worklist import Worklist, is_doubtful

#: Of the main results.
MAX_SENTENCES = 6
#: Findings that a sentence names, and studies that are read first.
_NAMED = 3
#: Fewer boxes say little about heat maps.
_MANY_BOXES = 10


def list_remarks(evaluation: EvaluationResult) -> dict[str, str]:
    """Return, per finding, what a reader must know about its results."""
    remarks = {}
    shown = [metric for metric in metrics.METRICS if metric.table == "main" and metric.key != "auroc"]
    for finding, result in evaluation.findings.items():
        unscored = 0 if result.auroc.value is None else result.unscored
        measured = {metric.label: result.metrics[metric.key].shown for metric in shown}
        constant = [
            label if label.isupper() else label.lower()
            for label, found in measured.items()
            if found.low is None and found.interval_reason == NO_VARIATION
        ]
        parts = [
            f"undefined: {result.reason}" if result.reason else None,
            result.caution,
            f"no interval for {', '.join(constant)}, because {NO_VARIATION}" if constant else None,
            f"{count_of(unscored, 'labelled image')} without a score" if unscored else None,
        ]
        if any(parts):
            remarks[finding] = "; ".join(filter(None, parts))
    return remarks


@dataclass(frozen=True)
class Summary:
    """The main results, at most `MAX_SENTENCES`, and the sentences of each section of the page by its id.

    `first` says what needs a look and how good the model is, before all warnings; `top` has the other results.
    """

    first: list[str]
    top: list[str]
    sections: dict[str, list[str]]


def summarize(result: ReportResult, model: Mapping[str, Any], worklist: Worklist) -> Summary:
    """Summarize a report in a few sentences, and each of its sections in one or two; `model` is model.json."""
    labelled = result.labelled
    sections = {"alerts": summarize_alerts(result.alerts), **_summarize_comparators(result)}
    order, sections["worklist"] = _summarize_worklist(worklist)
    first, top = [summarize_flagged(result.flagged)], list[str]()
    if result.nights is not None:
        first.insert(0, describe_last(result.nights))
        sections["nights"] = summarize_nights(result.nights)
    if labelled is None:
        first += order
        if not result.consensus:
            first.append(_summarize_validation(model))
    else:
        results, sections["findings"] = _summarize_evaluation(labelled.evaluation)
        first += results[:1]
        top += results[1:]
        sections["ranking"] = labelled.ranking.summarize()
        sections |= labelled.decisions.summarize()
        if isinstance(labelled.reading_order, ReadingOrder):
            unit = "image" if result.flagged.studies.number is None else "study"
            sections["reading_order"] = summarize_order(labelled.reading_order, unit)
            if not is_order_better(labelled.reading_order):
                top += sections["reading_order"][:1]
        if isinstance(labelled.subgroups, Subgroups):
            summary = labelled.subgroups.single.summary
            made = labelled.subgroups.single.made
            sections["subgroups"] = [f"Subgroups: {summary}." if made else f"{html.capitalise(summary)}."]
            sections["subgroups"] += _name_differences(labelled.subgroups)
        if isinstance(labelled.underdiagnosis, Underdiagnosis):
            sections["underdiagnosis"] = _summarize_underdiagnosis(labelled.underdiagnosis)
    for name in ("consensus", "compared", "underdiagnosis", "flags"):
        top += sections.get(name, [])[:1]
    return Summary(first, top[: MAX_SENTENCES - len(first)], sections)


def _summarize_worklist(worklist: Worklist) -> tuple[list[str], list[str]]:
    """Return sentences on what to read first and on the order, for the summary and for the section."""
    ranked = [line for line, value in zip(worklist.lines, worklist.priority, strict=True) if value == value]
    if len(ranked) < 2:
        return [], []
    first = f"Read first, in the order of the worklist: {', '.join(line['image_id'] for line in ranked[:_NAMED])}."
    flagged = [line for line in worklist.lines if line["flagged"]]
    doubtful = sum(map(is_doubtful, worklist.lines))
    if not flagged and not doubtful:
        return [first], ["No row has a flag: all rows are in order of priority, highest first."]
    has = "has a flag and comes" if len(flagged) == 1 else "have a flag and come"
    rows = f"{len(flagged):,} of {count_of(len(worklist.lines), 'row')} {has} first"
    if len(flagged) == len(worklist.lines):
        rows = f"All {len(flagged):,} rows have a flag"
    doubt = f"{doubtful:,} with a quality flag or an image without a score"
    if not flagged:
        rows = f"No row has a flag; first {'comes' if doubtful == 1 else 'come'} {doubt}"
    elif doubtful:
        rows += f", then {doubt}"
    order = f"{rows}; each part is in order of priority, highest first."
    unranked = [line["flagged"] for line in flagged if line["flagged"] == line["flagged_unranked"]]
    if unranked:
        names = dict.fromkeys(name for names in unranked for name in names.split("|"))
        only = "the row with only such a flag is" if len(unranked) == 1 else f"the {len(unranked):,} rows with only"
        only += "" if len(unranked) == 1 else " such flags are"
        order += f" The priority leaves out {_list_findings(names)}, because not calibrated: {only} placed by other"
        order += " findings."
    return [first], [order]


def _summarize_validation(model: Mapping[str, Any]) -> str:
    """Return a sentence on how good the model of scores without labels was on its validation images."""
    provenance = model.get("provenance") or {}
    validation = provenance.get("validation") or {}
    macro, rows = validation.get("macro_auroc"), validation.get("findings") or {}
    start = "Without labels neither these scores nor their order can be checked"
    if macro is None or not rows:
        return f"{start}, and no result of the model on validation images is recorded: how good they are is unknown."
    images = f"its {count_of(max(row['n'] for row in rows.values()), 'validation image')}"
    reason = usability.explain_validation(rows)
    if reason is not None:
        return f"{start}, and {images} are too few to judge how good the model is: {reason}."
    found = ((provenance.get("evaluation") or {}).get("means") or {}).get("auroc") or {}
    interval = ""
    if found.get("value") == macro and found.get("low") is not None:
        interval = f"95% interval {found['low']:.3f} to {found['high']:.3f}; "
    is_chance = macro <= 0.5 or (bool(interval) and found["low"] <= 0.5)
    limit = "this is not shown to be better than chance" if is_chance else "expect less on new ones"
    return (
        f"{start}. On {images} the model reached a macro AUROC of {macro:.3f} ({interval}chance is 0.5). These images "
        f"also chose the model, {'and' if is_chance else 'so'} {limit}."
    )


def _summarize_evaluation(evaluation: EvaluationResult) -> tuple[list[str], list[str]]:
    """Return the main results, and what else a reader of the table must know."""
    macro, findings = evaluation.macro, evaluation.findings
    sentences: list[str] = []
    remarks: list[str] = []
    if macro.auroc.value is None:
        sentences.append(f"The macro AUROC is undefined: {macro.reason}.")
    else:
        averaged = f"{len(macro.findings)} findings" if len(macro.findings) > 1 else "one finding"
        low, high = macro.auroc.shown.low, macro.auroc.shown.high
        has_chance = low is not None and high is not None and low <= 0.5 <= high
        chance_level = ", not distinguishable from chance" if has_chance else ""
        if macro.headline_reason is None:
            shown = _format(macro.auroc.shown, chance=True)
            sentences.append(f"The macro AUROC over {averaged} is {shown}{chance_level}.")
        aurocs = {finding: findings[finding].auroc.value or 0.0 for finding in macro.findings}
        ranked = sorted(aurocs, key=lambda finding: aurocs[finding])
        intervals = {f: findings[f].auroc.shown for f in ranked}
        known = {f: (a.low, a.high) for f, a in intervals.items() if a.low is not None and a.high is not None}
        chance = [f for f, (low, high) in known.items() if low <= 0.5 <= high]
        enough = {f: aurocs[f] for f in ranked if findings[f].fewest_patients >= usability.HEADLINE_PATIENTS}
        extremes = _summarize_extremes(enough, len(ranked), chance)
        (sentences if macro.headline_reason is None else remarks).extend(extremes)
        if macro.headline_reason is None and len(chance) > len(ranked) / 2:
            better = [f"{plots.format_finding(f)} {aurocs[f]:.3f}" for f, (low, _) in known.items() if low > 0.5]
            only = (
                f"; only {', '.join(better)} {'is' if len(better) == 1 else 'are'}" if 0 < len(better) <= _NAMED else ""
            )
            sentences.append(
                f"{len(chance)} of {count_of(len(ranked), 'finding')} are not shown to be better than chance{only}."
            )
        if chance:
            remarks.append(f"Not distinguishable from chance: {_list_findings(chance)}.")
        inverted = [f for f in ranked if aurocs[f] == 0.0 or (f in known and known[f][1] < 0.5)]
        if inverted:
            sentences.append(f"Worse than chance: {_list_findings(inverted)}. Check for inverted scores or labels.")
    cautioned = [finding for finding, found in findings.items() if found.caution]
    if cautioned:
        remarks.append(f"Interpret the intervals of {_list_findings(cautioned)} with caution (see the remarks).")
    undefined = [finding for finding, found in findings.items() if found.auroc.value is None]
    if undefined:
        remarks.append(f"AUROC is undefined for {_list_findings(undefined)}; the remarks give the reason.")
    return sentences, remarks


def _summarize_extremes(aurocs: Mapping[str, float], count: int, chance: Collection[str] = ()) -> list[str]:
    """Name the findings with the lowest and the highest AUROC, which come in ascending order.

    Args:
        aurocs: of the findings with enough patients.
        count: number of findings that have an AUROC.
        chance: findings whose interval contains 0.5.
    """
    ranked = list(aurocs)
    if len(ranked) < 2:
        return []
    lowest = ", ".join(f"{plots.format_finding(f)} {aurocs[f]:.3f}" for f in ranked[: min(_NAMED, len(ranked) // 2)])
    best = f"{aurocs[ranked[-1]]:.3f}"
    equal = [finding for finding in ranked if f"{aurocs[finding]:.3f}" == best]
    highest = f"{plots.format_finding(ranked[-1])} {best}" if len(equal) == 1 else f"{best}, of {len(equal)} findings"
    highest += ", which may be chance" if equal == ranked[-1:] and equal[0] in chance else ""
    if len(equal) == len(ranked):
        return [f"All have AUROC {best}."]
    least = usability.HEADLINE_PATIENTS
    among = f"Of the {len(ranked)} findings with at least {least} patients with and without it, lowest AUROC"
    return [f"{'Lowest AUROC' if count == len(ranked) else among}: {lowest}. Highest: {highest}."]


def _summarize_comparators(result: ReportResult) -> dict[str, list[str]]:
    """Return a sentence on each reference standard and comparator, and on drift."""
    sections = {}
    if result.consensus is not None:
        consensus = result.consensus
        macro, reason = consensus.evaluation.macro.auroc.shown, consensus.evaluation.macro.headline_reason
        shown = f"the macro AUROC is {_format(macro)}" if macro.value is not None else "AUROC is undefined"
        shown = shown if reason is None else f"no macro AUROC is stated: {reason}"
        cautioned = [name for name, found in consensus.evaluation.findings.items() if found.caution]
        warning = f" Interpret the intervals of {_list_findings(cautioned)} with caution." if cautioned else ""
        source = consensus.reference.source
        sections["consensus"] = [f"Against {source}, on {count_of(consensus.n_images, 'image')}, {shown}.{warning}"]
    if result.compared is not None:
        other, paired = result.compared.other, result.compared.macro
        if paired.difference is None:
            sections["compared"] = [f"The macro AUROC cannot be compared with {other}: {paired.reason}."]
        else:
            interval = "no interval"
            if paired.low is not None and paired.high is not None:
                zero = "excludes" if paired.low > 0 or paired.high < 0 else "includes"
                ends = " to ".join(html.format_difference(end) for end in (paired.low, paired.high))
                interval = f"95% interval {ends}, which {zero} 0"
            sections["compared"] = [
                f"The macro AUROC minus that of {other} is {html.format_difference(paired.difference)} ({interval}) on "
                f"the same {count_of(result.compared.n_images, 'image')}."
            ]
    overall = result.boxes.localisation.overall if result.boxes else None
    if overall is not None and overall.hit_rate.value is not None:
        few = "" if overall.n >= _MANY_BOXES else f" Fewer than {_MANY_BOXES} cases say little."
        sections["localisation"] = [
            f"Heat maps peak in or within {TOLERANCE:.0f} pixels of the radiologist's box in "
            f"{html.format_percent(overall.hit_rate.value, 0)} of {count_of(overall.n, 'case')}, against "
            f"{html.format_percent(overall.chance, 0)} for a random point and at most "
            f"{html.format_percent(overall.ceiling, 0)} for the best possible maps of the same size.{few}"
        ]
    if result.drift is not None:
        measured = result.drift.measured
        baseline = " and ".join(dict.fromkeys(measured.baselines.values()))  # two of them in older recalibrated bundles
        sections["flags"] = [f"Drift from {baseline}. {measured.summary}"]
        verdicts = {row.verdict for row in (*measured.flags, *measured.scores, *measured.quality)} - {UNKNOWN}
        if verdicts == {INCONCLUSIVE}:
            sections["flags"] = [f"Drift from {baseline}: too few images to decide."]
        if result.leak_check.shared_images:
            shared = f"{result.leak_check.shared_images:,} of {count_of(result.n_images, 'image')}"
            sections["flags"].append(f"{shared} trained or tuned the model, which hides drift of the others.")
    return sections


def _summarize_underdiagnosis(found: Underdiagnosis) -> list[str]:
    """Return a sentence on images with a finding but no flag, and on the group in which they are clearly more."""
    if found.overall["underdiagnosis"].value is None:
        return []
    all_images = _format_rate(found.overall["underdiagnosis"])
    measured = "" if len(found.findings) > _NAMED else f" ({_list_findings(found.findings)})"
    images = count_of(found.overall["underdiagnosis"].n, "image")
    of_images = f"of the {images} with a finding that can be flagged{measured}"
    sentence = f"Underdiagnosis: {all_images} {of_images} have no flag of any finding."
    corrected = (
        f"{count_of(found.tested, 'comparison')} of groups with at least {CLAIM_PATIENTS} patients with a finding"
    )
    if found.highest is not None:
        group, _ = found.highest
        rates = [_format_rate(one.rates["underdiagnosis"]) for one in found.highest]
        names = [html.format_group(one.value) for one in found.highest]
        attribute = group.attribute.replace("_", " ")
        return [
            f"{sentence} Highest rate clearly above another: {attribute} {names[0]}, {rates[0]}, against {rates[1]} of "
            f"{names[1]}.",
            f"This holds after correction for {corrected}.",
        ]
    if found.tested:
        return [sentence, f"No group clearly differs from the largest one after correction for {corrected}."]
    few = f"No difference to the largest group is claimed: that takes {CLAIM_PATIENTS} patients with a finding in both."
    return [sentence, few] if found.groups else [sentence]


def _format_rate(rate: Rate) -> str:
    shown = html.format_percent(rate.value)
    return shown if rate.low is None else f"{shown} ({html.format_percent(rate.low)}–{html.format_percent(rate.high)})"


def _list_findings(findings: Iterable[str]) -> str:
    return ", ".join(map(plots.format_finding, findings))


def _format(found: Measurement, *, chance: bool = False) -> str:
    """Format a value with its interval; `chance` adds the AUROC of chance."""
    has_interval = found.low is not None and found.high is not None
    interval = f"95% interval {found.low:.3f} to {found.high:.3f}" if has_interval else "no interval"
    return f"{found.value:.3f} ({interval}{'; chance is 0.5' if chance else ''})"


def _name_differences(found: Subgroups) -> list[str]:
    """Return a sentence with the largest differences per finding whose interval excludes 0; nothing without any."""
    clear = [one for one in found.differences if one.finding and not one.crossing and one.excludes_zero]
    clear.sort(key=lambda one: -abs(one.difference or 0.0))
    if not clear:
        return []
    parts = [
        f"{plots.format_finding(one.finding or '')}, {'AUROC' if one.quantity == 'auroc' else one.quantity}, "
        f"{html.format_group(one.value)} minus {html.format_group(one.reference)} "
        f"{html.format_difference(one.difference)}"
        for one in clear[:_NAMED]
    ]
    return [f"The largest of a finding whose interval excludes 0: {'; '.join(parts)}."]
