"""Warnings where a result cannot be used: findings without a threshold, useless thresholds, and too many flags.

A mean AUROC is a headline only if it rests on enough patients (`explain_headline`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ray_cxr.imaging.demographics import count_of
from ray_cxr.imaging.overlays import EMPTY
from ray_cxr.labels import NO_FINDING

#: A threshold, or a score table, that flags more than this share of images is no selection.
MANY = 0.5
#: The share that a threshold flags is far above the prevalence if it is more than this multiple of it.
FAR_ABOVE = 2.0
#: A finding supports a headline AUROC with this many patients with it, and without it.
HEADLINE_PATIENTS = 5
#: Share of the averaged findings that must support a headline AUROC.
HEADLINE_FINDINGS = 0.5
#: With fewer images, the share of flagged images says little.
FEW_IMAGES = 10
#: Findings that a warning names.
_NAMED = 4
#: Share of the flagged images of which a finding accounts for almost all flags.
_ALMOST_ALL = 0.9
_MIN_POSITIVES = 5
#: A rule that gives each finding a threshold.
_REMEDY = "flag_rate=0.1"
#: Starts the reason of findings that validation has in too few images.
_FEWER = "fewer than"


@dataclass(frozen=True)
class Warned:
    """A warning: its kind, the findings it is about, one sentence, what to do about it, and the reasons.

    Kinds are `no_threshold`, `flags_most`, `most_images_flagged`, `chance`, `few_patients`, `training_images`,
    `no_boxes` and `empty_heatmaps`.
    """

    kind: str
    text: str
    advice: str = ""
    findings: tuple[str, ...] = ()
    reasons: str = ""

    def describe(self) -> str:
        """Return the warning and what to do about it, for the terminal."""
        return f"{self.text} {self.advice}".strip()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "findings": list(self.findings)}


@dataclass(frozen=True)
class FittedPoint:
    """The threshold of a finding: the share of images it flags, and why it is missing (one of the two is None)."""

    finding: str
    flag_rate: float | None
    reason: str | None
    n: int | None = None  # images that it was chosen on, and those of them with the finding
    positives: int | None = None


def warn_of_model(
    model: Mapping[str, Any], flagged: Mapping[str, float | None] | None = None, *, helps: bool = True
) -> list[Warned]:
    """List the warnings of `bundle.json` or `model.json`; a model without operating points gets one.

    Args:
        flagged: per rule, the share of these images that it flags for any finding.
        helps: whether more flags of this model would help: without, no other rule is advised.
    """
    points, notes = model.get("operating_points") or {}, model.get("rule_notes") or {}
    provenance = model.get("provenance") or {}
    site = provenance.get("recalibrated") or {}
    counts = (site or provenance.get("validation") or {}).get("findings") or {}
    source = site or provenance.get("settings") or {}
    least = int(source.get("min_positives") or _MIN_POSITIVES)
    images = "the images of the recalibration" if site else "the validation images"
    fitted = []
    for finding in model.get("findings") or points:
        if finding == NO_FINDING:
            continue
        point, row = points.get(finding) or {}, counts.get(finding) or {}
        n, positives = point.get("n", row.get("n")), point.get("positives", row.get("positives"))
        reason = None if point else _explain_missing(notes.get(finding), n, positives, least, images)
        fitted.append(FittedPoint(finding, point.get("flag_rate"), reason, n, positives))
    missing = warn_of_missing(fitted, (flagged or {}).get(_REMEDY), helps=helps)
    return [*missing, *warn_of_thresholds(fitted, images)]


def warn_of_missing(
    points: Sequence[FittedPoint], remedy_rate: float | None = None, *, helps: bool = True
) -> list[Warned]:
    """Warn of findings without a threshold, by reason; the rule `_REMEDY` flags `remedy_rate` of these images.

    `helps` is whether more flags of this model would: without, the rule is not advised.
    """
    missing = [point for point in points if point.reason is not None]
    if not missing:
        return []
    names = tuple(point.finding for point in missing)
    if len(missing) == len(points) and not any(point.reason for point in missing):
        text = "No finding can be flagged: the model has no operating points."
        return [Warned("no_threshold", text, "Score labelled images and run `ray-cxr recalibrate`.", names)]
    reasons: dict[str, list[str]] = {}
    for point in missing:
        reasons.setdefault(point.reason or "no operating point", []).append(point.finding)
    explained = "; ".join(f"{reason} ({_list(found)})" for reason, found in reasons.items())
    flagged = [point.finding for point in points if point.reason is None]
    one = len(missing) == 1
    if not flagged:
        text = f"No finding can be flagged: {_list(names)}."
    elif len(flagged) <= len(missing) and len(flagged) <= _NAMED:
        only = " and ".join(filter(None, (", ".join(map(_name, flagged[:-1])), _name(flagged[-1]))))
        text = f"Only {only} can be flagged; {count_of(len(missing), 'finding')} cannot: {_list(names)}."
    else:
        text = f"{len(missing)} of {len(points)} findings cannot be flagged: {_list(names)}."
    few = [point.finding for point in missing if point.reason and point.reason.startswith(_FEWER)]
    rules = any(point.reason and not point.reason.startswith(_FEWER) for point in missing)
    these = "it" if one else "them" if len(few) == len(missing) else _list(few)
    cost = "" if remedy_rate is None else f" (flags {_percent(remedy_rate)} of these images)"
    remedies = (
        f"another rule, by `ray-cxr recalibrate` with labels and `--set operating_point={_REMEDY}`{cost}"
        if rules and helps
        else "",
        f"more validation images with {these}" if few else "",
    )
    advice = f"An image without a flag may have {'it' if one else 'them'}."
    if any(remedies):
        advice += f" Remedy: {' or '.join(filter(None, remedies))}."
    return [Warned("no_threshold", text, advice, names, f"{explained}.")]


def warn_of_thresholds(points: Iterable[FittedPoint], images: str) -> list[Warned]:
    """Warn of thresholds that flag most of the images that they were chosen on, although few have the finding."""
    found = [
        (point.finding, point.flag_rate, point.positives / point.n)
        for point in points
        if point.flag_rate is not None and point.n and point.positives is not None
    ]
    useless = sorted((one for one in found if one[1] > MANY and one[1] > FAR_ABOVE * one[2]), key=lambda one: -one[1])
    if not useless:
        return []
    parts = [f"{_name(name)} {_percent(rate)} ({_percent(share)} have it)" for name, rate, share in useless[:_NAMED]]
    more = f" and {len(useless) - _NAMED} more" if len(useless) > _NAMED else ""
    what = "A threshold flags" if len(useless) == 1 else f"{len(useless)} thresholds flag"
    text = f"{what} most of {images}, far more than have the finding: {', '.join(parts)}{more}."
    advice = "Most of these flags are false alarms: recalibrate with another rule of operating points."
    return [Warned("flags_most", text, advice, tuple(name for name, _, _ in useless))]


def warn_of_flags(flags: Mapping[str, np.ndarray], rule: str | None = None) -> list[Warned]:
    """Warn if most images have a flag.

    Args:
        flags: per finding, int8 [n], 1, 0, or -1 without a threshold or score.
        rule: the rule of all operating points, if there is one.
    """
    found = {finding: values for finding, values in flags.items() if finding != NO_FINDING}
    if not found:
        return []
    highest = flag_any(found, len(next(iter(found.values()))))
    judged, flagged = int((highest >= 0).sum()), int((highest == 1).sum())
    if judged < FEW_IMAGES or flagged <= MANY * judged:
        return []
    counts = {finding: int((values == 1).sum()) for finding, values in found.items()}
    named = sorted((name for name in counts if counts[name] >= _ALMOST_ALL * flagged), key=lambda name: -counts[name])
    for_most = f", almost all for {_list(named)}" if named else ""
    share = f"{flagged:,} of {judged:,} images ({100 * flagged / judged:.1f}%)"
    text = f"{share} are flagged{for_most}: the worklist is not a selection."
    findings = tuple(finding for finding in counts if counts[finding] > MANY * judged)
    return [Warned("most_images_flagged", text, _advise_on_flags(rule, flagged / judged), findings)]


def warn_of_chance(
    flags: Mapping[str, np.ndarray], aurocs: Mapping[str, tuple[float | None, float | None, float | None]], where: str
) -> list[Warned]:
    """Warn of findings with flags whose AUROC is not shown to be better than chance.

    Args:
        flags: per finding, int8 [n], 1, 0, or -1 without a threshold or score.
        aurocs: per finding, the AUROC and the ends of its 95% interval; None where unknown.
        where: names the images of the AUROC, such as `these images`.
    """
    found = {finding: values for finding, values in flags.items() if finding != NO_FINDING}
    flagged = int((flag_any(found, len(next(iter(found.values()), np.zeros(0)))) == 1).sum())
    counts = {finding: int((values == 1).sum()) for finding, values in found.items()}
    named, parts = [], []
    for finding in sorted(counts, key=lambda name: -counts[name]):
        value, low, high = aurocs.get(finding, (None, None, None))
        if counts[finding] and value is not None and low is not None and high is not None and low <= 0.5:
            named.append(finding)
            share = f"{counts[finding]:,} of {count_of(flagged, 'flagged image')}"
            parts.append(f"{_name(finding)} ({share}): AUROC {value:.3f} ({low:.3f}–{high:.3f})")
    if not named:
        return []
    more = f", and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    text = f"Flags that are not shown to be better than chance, on {where}: {', '.join(parts[:_NAMED])}{more}."
    unknown = [_name(f) for f, n in counts.items() if n and None in aurocs.get(f, (None,))]
    if unknown:
        text += f" Unknown, because too few images there have or lack them: {', '.join(unknown)}."
    return [Warned("chance", text, "Do not rely on them.", tuple(named))]


def warn_of_empty_maps(empty: int, flagged: int, method: str | None) -> list[Warned]:
    """Warn if most heat maps of flagged findings are empty.

    Args:
        flagged: number of heat maps of flagged findings.
        empty: number of these that are zero everywhere.
        method: of `score.heatmap_method`, None if unknown.
    """
    if empty <= MANY * flagged:
        return []
    text = f"{empty:,} of {count_of(flagged, 'heat map')} of flagged findings {'is' if empty == 1 else 'are'} empty"
    advice = ""
    if method != "occlusion":
        advice = "Try `--set heatmap_method=occlusion`: remove the folder heatmaps in SCORES and run `score` again."
    return [Warned("empty_heatmaps", f"{text}: {EMPTY}.", advice)]


def flag_any(flags: Mapping[str, np.ndarray], n: int) -> np.ndarray:
    """Return the flag of n images for any finding: 1, 0, or -1 if no flag is known; `No_Finding` does not count.

    Args:
        flags: per finding, int8 [n], 1, 0 or -1.
    """
    found = [values for finding, values in flags.items() if finding != NO_FINDING]
    return np.max([np.full(n, -1, np.int8), *found], axis=0)


def _advise_on_flags(rule: str | None, share: float) -> str:
    if rule is None:
        return ""
    name, _, limit = rule.partition("=")
    if name != "any_flag_rate":
        return "A rule such as any_flag_rate=0.3 limits this share (see the alert budget)."
    if share > float(limit):
        return (
            f"The limit of the rule {rule} does not hold on these images: recalibrate the model on images like these."
        )
    return f"The rule {rule} allows this; a lower limit flags fewer images."


def explain_headline(counts: Sequence[int], unit: str = "patients") -> str | None:
    """Explain why a mean AUROC is no headline, or return None if it is.

    Args:
        counts: for each averaged finding, the smaller of the numbers of patients with it and without it.
        unit: what is counted.
    """
    few = sum(count < HEADLINE_PATIENTS for count in counts)
    if few <= (1.0 - HEADLINE_FINDINGS) * len(counts):
        return None
    return (
        f"not enough {unit}: {few} of {len(counts)} findings have fewer than {HEADLINE_PATIENTS} positive or "
        f"negative {unit}"
    )


def explain_validation(findings: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Explain why the mean AUROC of a bundle's `provenance.validation.findings` is no headline, or return None."""
    averaged = [row for name, row in findings.items() if row["auroc"] is not None and name != NO_FINDING]
    return explain_headline([min(row["positives"], row["n"] - row["positives"]) for row in averaged], "images")


def warn_of_headline(reason: str) -> Warned:
    return Warned("few_patients", f"No mean AUROC is shown as a main result: {reason}.")


def _explain_missing(note: str | None, n: int | None, positives: int | None, least: int, images: str) -> str:
    """Return why a finding has no threshold; an empty text if it is unknown."""
    if n is not None and positives is not None:
        for count, kind in ((positives, "positives"), (n - positives, "negatives")):
            if count < least:
                return f"{_FEWER} {least} {kind} among {images}"
    for part in (note or "").split("; "):
        kind, _, reason = part.rpartition(": ")
        if kind in ("", "no operating point"):
            reason = reason.partition(", because")[0]
            return f"the rule {reason}" if "=" in reason.partition(" ")[0] else reason
    return ""


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(map(_name, names[:_NAMED]))
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def _name(finding: str) -> str:
    return finding.replace("_", " ")


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"
